#!/usr/bin/env python
"""
From interactions to a published model and back, through a Hub of its own on this machine: no account, no network.

    python tests/sharing/hub_roundtrip.py

It trains a tiny model, publishes it in a private repository, loads it in fresh processes with this package and without
it, compares their logits bit for bit, runs the pipeline, changes bytes on the Hub, shows who refuses them, and kills
an upload midway. It takes a minute or two on a CPU and fails where anything is not as it should be.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.append(str(ROOT / "tests"))
from hub_server import HubServer  # noqa: E402


REPO = "ada/shop"
NUM_USERS, NUM_ITEMS = 40, 30
TINY = "hidden_size=16,intermediate_size=24,num_interest_experts=4,num_memory_subkeys=6,num_hidden_layers=1"
TRAINING = ["--k_core", "3", "--max_length", "10", "--num_train_epochs", "2", "--config_overrides", TINY]

# In a fresh process, with this package or (`trust`) with the repository's own code; `{revision}` pins both.
LOAD = """
import hashlib, sys
trust = {trust}
if trust:
    sys.modules["elastic_hf"] = None  # as if it were not installed
else:
    import elastic_hf
from transformers import AutoModel, AutoTokenizer

options = {{"revision": "{revision}", "trust_remote_code": trust}}
tokenizer = AutoTokenizer.from_pretrained("{repo}", **options)
model = AutoModel.from_pretrained("{repo}", **options).eval()
history = tokenizer([["7", "14", "21"]], is_split_into_words=True, return_tensors="pt")
logits = model(**history).logits.detach().numpy()
best = tokenizer.convert_ids_to_tokens(model.recommend(**history, top_k=5).token_ids[0].tolist())
print(type(model).__module__.split(".")[0], "recommends items", *best)
print(hashlib.sha256(logits.tobytes()).hexdigest())
"""

PIPELINE = """
import elastic_hf
from transformers import pipeline

recommend = pipeline("sequential-recommendation", model="{repo}", revision="v1", top_k=5)
print(*(recommended["item"] for recommended in recommend([7, 14, 21])))
"""


def write_interactions(folder: Path) -> None:
    """A small shop, whose customers walk through the catalogue in steps of 7."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 20, size=NUM_USERS)
    users = np.repeat(np.arange(NUM_USERS), lengths)
    steps = np.concatenate([np.arange(length) for length in lengths])
    items = (generator.integers(NUM_ITEMS, size=NUM_USERS)[users] + 7 * steps) % NUM_ITEMS
    interactions = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": 1_700_000_000 + steps})
    interactions.write_csv(folder / "shop.csv")
    titles = [f"Product no. {i}" for i in range(NUM_ITEMS)]
    pl.DataFrame({"item_id": range(NUM_ITEMS), "title": titles}).write_csv(folder / "titles.csv")


class Roundtrip:
    """Runs commands that know one Hub alone, each with an empty cache."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.num_homes = 0

    def environment(self) -> dict[str, str]:
        self.num_homes += 1
        home = self.folder / f"home-{self.num_homes}"
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        return {**os.environ, **variables, **self.hub.environment(home)}

    def run(self, *command: str | Path, fails: bool = False, env: dict[str, str] | None = None) -> str:
        """The output of a Python command, its standard error included where it `fails`, as it then must."""
        command = [sys.executable, *map(str, command)]
        result = subprocess.run(
            command, env=env or self.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        assert not [token for token in self.hub.tokens.values() if token in result.stdout + result.stderr]
        return (result.stdout + (result.stderr if fails else "")).rstrip()

    def load(self, trust: bool) -> tuple[str, str]:
        """What a fresh process recommends, and the hash of its logits."""
        revision = self.hub.repo(REPO).refs["refs/tags/v1"]
        recommended, logits = self.run("-c", LOAD.format(repo=REPO, revision=revision, trust=trust)).splitlines()
        return recommended, logits


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, HubServer() as hub:
        folder = Path(temporary)
        roundtrip = Roundtrip(hub, folder)
        output_dir = folder / "outputs" / "shop"
        publish = [EXAMPLES / "publish.py", output_dir, REPO]

        print("1. Train")
        write_interactions(folder)
        files = ["--train_file", folder / "shop.csv", "--items_file", folder / "titles.csv"]
        options = ["--cache_dir", folder / "cache", "--output_dir", output_dir, *TRAINING]
        print(roundtrip.run(EXAMPLES / "run_seqrec.py", *files, *options).splitlines()[-1])

        print("\n2. Look, publish, publish again")
        print(roundtrip.run(*publish, "--dry_run").split("\n\n---")[0])
        print(roundtrip.run(*publish, "--private", "--tag", "v1"))
        print(roundtrip.run(*publish, "--private", "--tag", "v1"))

        print("\n3. Load both ways in fresh processes")
        (with_package, logits), (without_package, other_logits) = roundtrip.load(False), roundtrip.load(True)
        print(f"with elastic_hf:         {with_package}, logits {logits[:16]}")
        print(f"with trust_remote_code:  {without_package}, logits {other_logits[:16]}")
        assert logits == other_logits and with_package.split()[1:] == without_package.split()[1:]
        print("the logits are the same, bit for bit")

        print("\n4. The pipeline")
        items = roundtrip.run("-c", PIPELINE.format(repo=REPO))
        print(items)
        assert items.split() == with_package.split()[3:]

        print("\n5. Bytes changed on the Hub")
        entry = hub.repo(REPO).head("v1").files["model.safetensors"]
        weights = hub.objects[entry.key]
        code = LOAD.format(repo=REPO, revision="v1", trust=False)
        hub.objects[entry.key] = weights[:-8]
        error = roundtrip.run("-c", code, fails=True).splitlines()
        print("shortened:", next(line for line in reversed(error) if "Consistency check failed" in line))
        hub.objects[entry.key] = weights[:-1] + bytes([weights[-1] ^ 1])
        home = roundtrip.environment()
        changed = roundtrip.run("-c", code, env=home).splitlines()[1]
        assert changed != logits
        print("changed in place: loaded, since a download is checked for its size only; `hf cache verify` says")
        hf = "from huggingface_hub.cli.hf import main; main()"
        print(roundtrip.run("-c", hf, "cache", "verify", REPO, "--revision", "v1", fails=True, env=home))
        hub.objects[entry.key] = weights

        print("\n6. An upload killed midway")
        before, head = hub.files(REPO), hub.repo(REPO).head("main").oid
        shutil.copytree(output_dir, folder / "better", ignore=shutil.ignore_patterns("checkpoint-*"))
        tensors = {name: 2 * tensor for name, tensor in load_file(output_dir / "model.safetensors").items()}
        save_file(tensors, folder / "better" / "model.safetensors", metadata={"format": "pt"})
        held = hub.fail_next("PUT", ".", hold=True)
        command = [sys.executable, EXAMPLES / "publish.py", folder / "better", REPO]
        process = subprocess.Popen(list(map(str, command)), env=roundtrip.environment(), stderr=subprocess.DEVNULL)
        assert held.reached.wait(1_800), "the upload has not begun"
        process.kill()
        process.wait()
        held.release.set()
        assert hub.files(REPO) == before and hub.repo(REPO).head("main").oid == head
        print(f"killed; {REPO} is as it was, at {head}")
        print(roundtrip.run(EXAMPLES / "publish.py", folder / "better", REPO, "--tag", "v2"))


if __name__ == "__main__":
    main()
