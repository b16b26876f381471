"""A published repository where this package is, and where it is not: it then needs public packages alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from transformers import pipeline

import elastic_hf
from elastic_hf import ElasticItemTokenizer, publish
from factories import NUM_TOKENS, elastic_model


ROOT = Path(elastic_hf.__file__).parents[1]
REPO = "ada/shop"
TITLES = [f"Product {i} of the shop" for i in range(NUM_TOKENS - 3)]

# What a stranger does: the card's own code, and what an endpoint does with the same repository.
WITHOUT_PACKAGE = """
import sys
sys.modules["elastic_hf"] = None  # cannot be imported

{card_code}
print("---")
import importlib.util, json
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo}")
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
answer = handler.EndpointHandler(folder)({{"inputs": [history, history[:1]], "parameters": {{"top_k": 3}}}})
print(json.dumps(answer, allow_nan=False))
print({{type(part).__module__.split(".")[0] for part in (recommend, recommend.model, recommend.tokenizer)}})
"""


@pytest.fixture
def published(hub, tmp_path):
    """A repository whose card is rendered from results, and the items that were most popular first."""
    folder = tmp_path / "shop"
    counts = [(7 * i) % 29 for i in range(len(TITLES))]
    items = pa.table({"item_id": [100 + i for i in range(len(TITLES))], "title": TITLES, "count": counts})
    ElasticItemTokenizer.from_items(items, model_max_length=11).save_pretrained(folder)
    elastic_model().save_pretrained(folder)
    (folder / "README.md").write_text("# Shop\n")
    (folder / "all_results.json").write_text(json.dumps({"model_type": "elastic"}))
    publish(folder, REPO, tag="v1")
    return hub


def test_the_code_of_the_card_runs_without_the_package_and_prints_what_it_says(published, tmp_path):
    card = published.files(REPO)["README.md"].decode()
    code, printed = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", card, flags=re.DOTALL).groups()
    assert f'pipeline(model="{REPO}", trust_remote_code=True, revision="v1")' in code
    popular = sorted(range(len(TITLES)), key=lambda i: -((7 * i) % 29))[:3]
    assert re.findall(r'"(Product.*)"', code) == [TITLES[i] for i in popular]

    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", WITHOUT_PACKAGE.format(card_code=code, repo=REPO)]
    environment = {"OMP_NUM_THREADS": "1", **published.environment(tmp_path / "home of a stranger")}
    run = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines, rest = run.stdout.split("---\n")
    assert lines == printed and len(lines.splitlines()) == 3
    answer, modules = rest.splitlines()
    of_three, of_one = json.loads(answer)
    assert [row["title"] for row in of_three] == lines.splitlines() and len(of_one) == 3
    assert modules == "{'transformers_modules'}"


def test_with_the_package_nothing_has_to_be_trusted(published):
    """The task's name is that of the card, and the code that of the package."""
    assert published.files(REPO)["config.json"].count(b"custom_pipelines") == 1
    for task in (None, "sequential-recommendation"):
        recommend = pipeline(task, model=REPO, device="cpu")
        assert {type(part).__module__.split(".")[0] for part in (recommend, recommend.model, recommend.tokenizer)} == {
            "elastic_hf"
        }
        assert len(recommend([100, TITLES[1]], top_k=4)) == 4


def test_published_files_ask_for_no_package_of_this_name(published):
    files = published.files(REPO)
    assert all("elastic_hf" not in line for line in files["requirements.txt"].decode().splitlines())
    for name, content in files.items():
        if name.endswith(".py"):
            assert not re.search(rb"^\s*(import|from) elastic_hf", content, flags=re.MULTILINE)
        elif name == "README.md":
            assert not re.search(rb"pip install (-U )?.?elastic_hf", content)


def test_requirements_are_those_of_the_package():
    """The same packages at the same versions, as far as the code in a repository imports them."""
    requirements = (ROOT / "elastic_hf" / "sharing" / "templates" / "requirements.txt").read_text().splitlines()
    setup = (ROOT / "setup.py").read_text()
    assert [line for line in requirements if f'"{line}"' not in setup] == []
    code = "".join(file.read_text() for file in (ROOT / "elastic_hf" / "models").glob("*.py"))
    imported = {*re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)} - sys.stdlib_module_names
    come_with_transformers = {"huggingface_hub", "numpy", "safetensors", "tokenizers"}
    assert imported - come_with_transformers == {re.split(r"\W", line)[0] for line in requirements}
