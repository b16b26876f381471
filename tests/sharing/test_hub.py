import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import _http
from transformers import TrainingArguments

import elastic_hf
from elastic_hf import (
    ElasticConfig,
    ElasticForSequentialRecommendation,
    ElasticItemTokenizer,
    SequentialRecommendationTrainer,
    publish,
)
from elastic_hf.__main__ import main
from elastic_hf.baselines import PopularityConfig, PopularityForSequentialRecommendation
from elastic_hf.sharing.hub import PublishError


ROOT = Path(elastic_hf.__file__).parents[1]
NUM_ITEMS = 31
REPO = "ada/shop"
CODE = {file.name for file in (ROOT / "elastic_hf" / "models").glob("*.py")} - {"__init__.py"}
ENDPOINT = {"handler.py", "requirements.txt"}
MODEL = {"README.md", "config.json", "items.parquet", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RESULTS = {"expert_horizons.png", "results/shop-elastic-42.json", "training_curve.png"}
CARD = "---\nlicense: mit\n---\n# Shop\n"


def make_tokenizer():
    return ElasticItemTokenizer.from_items([f"sku {i}" for i in range(NUM_ITEMS)], model_max_length=11)


def make_model():
    torch.manual_seed(0)
    config = ElasticConfig(
        vocab_size=NUM_ITEMS + 3,
        hidden_size=16,
        intermediate_size=24,
        num_interest_experts=5,
        num_memory_subkeys=6,
        num_memory_heads=1,
        memory_top_k=4,
        initializer_range=0.5,
    )
    return ElasticForSequentialRecommendation(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    make_tokenizer().save_pretrained(path)
    make_model().save_pretrained(path)
    (path / "README.md").write_text(CARD)
    for name in ("training_curve.png", "expert_horizons.png"):
        (path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode())
    # what must stay here
    for name in ("results/shop-elastic-42.json", "checkpoint-3/model.safetensors", "runs/events", "results/notes.txt"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    for name in ("training_args.bin", "optimizer.pt", "model.pkl", ".env", "secret.json"):
        (path / name).write_bytes(b"\x80\x04N.")
    return path


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "shop"))


@pytest.fixture
def published(hub, trained):
    publish(trained, REPO)
    return hub


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


def name_items(folder):
    """Give the items titles, which are in items.parquet alone."""
    items = [f"sku {i}" for i in range(NUM_ITEMS)]
    titles = [f"Product {i}" for i in range(NUM_ITEMS)]
    pq.write_table(pa.table({"item_id": items, "title": titles}), folder / "items.parquet")


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def uploads(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def commits(hub, revision="main"):
    return [commit.title for commit in HfApi(endpoint=hub.endpoint).list_repo_commits(REPO, revision=revision)]


@pytest.fixture
def run(hub, capsys):
    """Runs the command in this process: its exit code, its standard output and its standard error."""

    def run(*arguments):
        code = main(["publish", *map(str, arguments)])
        output = capsys.readouterr()
        assert not [token for token in hub.tokens.values() if token in output.out + output.err]
        return code, output.out, output.err

    return run


@pytest.fixture
def refused(run):
    """Runs the command, which must fail in one line: that line."""

    def refused(*arguments):
        code, output, error = run(*arguments)
        assert code == 1 and output == ""
        assert error.startswith("elastic-hf publish: error: ") and error.count("\n") == 1 and error.endswith("\n")
        return error

    return refused


def test_the_card_is_rendered_for_the_repository(run, hub, folder):
    """From the results in the folder; the card that lies there names the folder, and stays."""
    (folder / "results" / "shop-elastic-42.json").unlink()
    results = {"model_type": "elastic", "test_hr@10": 0.5, "test_hr@10_seen_kept": 0.25}
    (folder / "all_results.json").write_text(json.dumps(results))
    before = contents(folder)
    code, printed, _ = run(folder, REPO, "--license", "apache-2.0", "--dry_run")
    assert code == 0 and not hub.requests
    assert run(folder, REPO, "--license", "apache-2.0")[0] == 0
    files = hub.files(REPO)
    card = files["README.md"].decode()
    assert card in printed and "license: apache-2.0" in card and f'pipeline(model="{REPO}"' in card
    assert "trust_remote_code=True" in card and files.keys() >= CODE | {"all_results.json"}
    assert contents(folder) == before


def test_a_license_needs_a_card_made_from_results(refused, folder):
    assert "license is written into a card made from all_results.json" in refused(folder, REPO, "--license", "mit")


def test_one_commit_holds_what_is_allowed_and_nothing_else(hub, folder):
    before = contents(folder)
    commit = publish(folder, REPO, private=True, commit_message="A shop")
    assert contents(folder) == before
    files = hub.files(REPO)
    assert files.keys() == {".gitattributes"} | MODEL | ENDPOINT | RESULTS | CODE
    assert commits(hub) == ["A shop", "initial commit"] and hub.repo(REPO).head("main").oid == commit.oid
    assert hub.repo(REPO).private
    for name in MODEL - {"config.json", "tokenizer_config.json"} | RESULTS:
        assert files[name] == (folder / name).read_bytes()
    for name in CODE:
        assert files[name] == (ROOT / "elastic_hf" / "models" / name).read_bytes()
    config, tokenizer_config = json.loads(files["config.json"]), json.loads(files["tokenizer_config.json"])
    assert config.pop("auto_map") == {
        "AutoConfig": "configuration_elastic.ElasticConfig",
        "AutoModel": "modeling_elastic.ElasticForSequentialRecommendation",
    }
    (pipeline,) = config.pop("custom_pipelines").values()
    assert pipeline["impl"] == "pipeline.SequentialRecommendationPipeline" and pipeline["pt"] == ["AutoModel"]
    assert tokenizer_config.pop("auto_map") == {"AutoTokenizer": [None, "item_tokenizer.ElasticItemTokenizer"]}
    assert config == json.loads((folder / "config.json").read_text())
    assert tokenizer_config == json.loads((folder / "tokenizer_config.json").read_text())


LOAD = """
import sys
{first_line}
import torch
from transformers import AutoModel, AutoTokenizer

for name, options in {sources}:
    if options.get("trust_remote_code"):
        try:
            AutoModel.from_pretrained(name, **{{**options, "trust_remote_code": False}})
            raise AssertionError("code of the repository was run in spite of a no")
        except ValueError as error:
            assert "trust_remote_code=True" in str(error)
    model = AutoModel.from_pretrained(name, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    history = tokenizer([["sku 7", "sku 4", "sku 30"], ["sku 1"]], is_split_into_words=True, padding=True,
        return_tensors="pt")
    with torch.no_grad():
        logits = model(**history).logits
    module = type(model).__module__.split(".")[0]
    print(module, type(tokenizer).__name__, history["input_ids"].tolist(), logits.numpy().tobytes().hex(), sep="\\t")
"""


def test_both_ways_in_give_the_same_logits(hub, trained, tmp_path):
    """In fresh processes, from a private repository: with this package, and without it, where code must be trusted."""
    commit = publish(trained, REPO, private=True)
    sources = [(str(trained), {}), (REPO, {"revision": commit.oid})]
    with_package = LOAD.format(first_line="import elastic_hf", sources=sources)
    without = LOAD.format(
        first_line='sys.modules["elastic_hf"] = None  # cannot be imported',
        sources=[(REPO, {"revision": commit.oid, "trust_remote_code": True})],
    )
    processes = []
    for number, code in enumerate((with_package, without)):
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **hub.environment(tmp_path / f"home{number}")}
        command = [sys.executable, "-c", code]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes))
    lines = []
    for process in processes:
        output, error = process.communicate(timeout=1_800)
        assert process.returncode == 0, error
        assert not [token for token in hub.tokens.values() if token in output + error]
        lines += [line.split("\t") for line in output.splitlines()]
    local, with_package, without = lines
    assert local[:2] == with_package[:2] == ["elastic_hf", "ElasticItemTokenizer"]
    assert without[:2] == ["transformers_modules", "ElasticItemTokenizer"]
    assert local[2:] == with_package[2:] == without[2:]
    assert json.loads(local[2]) == [[10, 7, 33], [0, 0, 4]]


def test_unchanged_content_makes_no_commit(published, trained, run):
    num_uploads = len(uploads(published))
    assert publish(trained, REPO) is None
    assert run(trained, REPO) == (0, "ada/shop holds this model already: nothing to commit\n", "")
    assert len(commits(published)) == 2 and len(uploads(published)) == num_uploads


def test_what_has_changed_is_one_more_commit_and_other_files_stay(published, folder, run):
    HfApi().upload_file(path_or_fileobj=b"notes", path_in_repo="NOTES.md", repo_id=REPO)
    (folder / "README.md").write_text(CARD + "Better.\n")
    code, output, error = run(folder, REPO)
    assert (code, error) == (0, "") and published.repo(REPO).head("main").oid in output
    files = published.files(REPO)
    assert files["README.md"].decode() == CARD + "Better.\n" and files["NOTES.md"] == b"notes"
    assert len(commits(published)) == 4 and len(uploads(published)) == 2


def test_a_tag_is_made_after_the_commit_and_never_moved(hub, folder, run, refused):
    assert run(folder, REPO, "--private", "--tag", "v1")[0] == 0
    tags = {"refs/tags/v1": hub.repo(REPO).head("main").oid}
    assert run(folder, REPO, "--tag", "v1")[0] == 0  # unchanged
    (folder / "README.md").write_text(CARD + "Better.\n")
    num_uploads = len(uploads(hub))
    assert "tag 'v1' exists and marks another version" in refused(folder, REPO, "--tag", "v1")
    assert len(commits(hub)) == 2
    assert run(folder, REPO, "--tag", "v2")[0] == 0
    tags["refs/tags/v2"] = hub.repo(REPO).head("main").oid
    assert "tag 'v1' exists" in refused(folder, REPO, "--tag", "v1")
    assert {ref: oid for ref, oid in hub.repo(REPO).refs.items() if ref.startswith("refs/tags/")} == tags
    assert len(commits(hub)) == 3 and len(uploads(hub)) == num_uploads


def test_a_tag_that_is_refused_leaves_the_commit_and_says_so(hub, trained, refused):
    hub.fail_next("POST", "/tag/", status=500)
    error = refused(trained, REPO, "--tag", "v1")
    assert hub.repo(REPO).head("main").oid in error and "without the tag 'v1'" in error


def test_a_pull_request_leaves_main_alone(published, folder, run, monkeypatch):
    (folder / "README.md").write_text(CARD + "Better.\n")
    monkeypatch.setenv("HF_TOKEN", published.tokens["bob"])  # who has no right to write
    code, output, _ = run(folder, REPO, "--create_pr")
    assert code == 0 and output.endswith("/ada/shop/discussions/1\n")
    assert published.files(REPO)["README.md"].decode() == CARD
    assert published.files(REPO, "refs/pr/1")["README.md"].decode() == CARD + "Better.\n"
    # the proposal can be changed
    monkeypatch.setenv("HF_TOKEN", published.tokens["ada"])
    (folder / "README.md").write_text(CARD + "Best.\n")
    assert run(folder, REPO, "--revision", "refs/pr/1")[0] == 0
    assert published.files(REPO, "refs/pr/1")["README.md"].decode() == CARD + "Best.\n"


def test_a_branch_is_committed_to_if_it_exists(published, folder, run, refused):
    (folder / "README.md").write_text(CARD + "Better.\n")
    assert "revision must be a branch of ada/shop (main), found 'next'" in refused(folder, REPO, "--revision", "next")
    HfApi().create_branch(REPO, branch="next")
    assert run(folder, REPO, "--revision", "next")[0] == 0
    assert len(commits(published)) == 2 and len(commits(published, "next")) == 3


def test_a_public_repository_is_not_taken_for_a_private_one(published, trained, refused):
    assert "private is True, but ada/shop exists and is public" in refused(trained, REPO, "--private")


@pytest.mark.parametrize(
    ("method", "pattern", "status", "message"),
    [
        ("POST", "/preupload/", 401, "the Hub does not know the token (401)"),
        ("POST", "/preupload/", 403, "the token has no right to write here (403)"),
        ("POST", "/commit/", 409, "another change came first (409"),
        ("POST", "/commit/", 412, "another change came first (412"),
        ("POST", "/commit/", 429, "too many requests (429)"),
        ("POST", "/commit/", 500, "the Hub has failed (500)"),
        ("PUT", ".", 403, "Error while uploading 'items.parquet' to the Hub. the token has no right"),
        ("GET", "/refs", 503, "the Hub has failed (503)"),
    ],
)
def test_a_refusal_is_one_line_and_changes_nothing(published, folder, refused, method, pattern, status, message):
    name_items(folder)
    before = published.files(REPO)
    failure = published.fail_next(method, pattern, status=status)
    error = refused(folder, REPO, "--tag", "v1")
    is_in_doubt = pattern == "/commit/" and status == 500
    outcome = "is as it was or holds all of it, publish again to know" if is_in_doubt else "is as it was"
    assert failure.reached.is_set() and message in error and error.endswith(f": ada/shop {outcome}\n")
    assert published.files(REPO) == before and len(published.repo(REPO).refs) == 1


def test_somebody_else_was_faster(published, folder, monkeypatch):
    """Another commit comes in between the look at the repository and the commit."""
    (folder / "README.md").write_text(CARD + "Better.\n")
    create_commit = HfApi.create_commit

    def late(self, *args, **kwargs):
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        self.upload_file(path_or_fileobj=b"notes", path_in_repo="NOTES.md", repo_id=REPO)
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(PublishError, match="another change came first .412"):
        publish(folder, REPO)
    assert published.files(REPO)["README.md"].decode() == CARD and "NOTES.md" in published.files(REPO)


def test_a_connection_that_breaks_changes_nothing(published, folder, refused, no_waiting):
    name_items(folder)
    before = published.files(REPO)
    published.fail_next("PUT", ".", drop=True, times=6)
    assert "Error while uploading 'items.parquet' to the Hub." in refused(folder, REPO)
    assert published.files(REPO) == before and len(uploads(published)) == 2 + 6


def test_an_answer_that_is_lost_is_not_taken_for_a_refusal(published, folder, refused, run, monkeypatch):
    (folder / "README.md").write_text(CARD + "Better.\n")
    answer = published.answer

    def lose_the_answer(request):
        if "/commit/" in request.path:
            answer(request)
            raise ConnectionError
        return answer(request)

    with monkeypatch.context() as patch:
        patch.setattr(published, "answer", lose_the_answer)
        assert "ada/shop is as it was or holds all of it" in refused(folder, REPO)
    published.faults.clear()
    assert run(folder, REPO) == (0, "ada/shop holds this model already: nothing to commit\n", "")


def test_a_killed_upload_changes_nothing(published, folder, tmp_path, run):
    name_items(folder)
    before, num_commits = published.files(REPO), len(published.repo(REPO).commits)
    failure = published.fail_next("PUT", ".", hold=True)
    environment = {"PYTHONPATH": str(ROOT), **published.environment(tmp_path / "home")}
    process = subprocess.Popen([sys.executable, "-m", "elastic_hf", "publish", str(folder), REPO], env=environment)
    assert failure.reached.wait(1_800)
    process.kill()
    process.wait()
    failure.release.set()
    assert published.files(REPO) == before and len(published.repo(REPO).commits) == num_commits
    assert run(folder, REPO)[0] == 0
    assert published.files(REPO)["items.parquet"] == (folder / "items.parquet").read_bytes()


def test_rights(published, trained, refused, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token: log in" in refused(trained, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    error = refused(trained, "ada/new")
    assert "the Hub does not know the token (401)" in error and "hf_unknown" not in error
    monkeypatch.setenv("HF_TOKEN", published.tokens["bob"])
    assert "the token has no right to write here (403)" in refused(trained, "ada/new")
    assert list(published.repos) == [("models", REPO)]


def test_a_reader_may_not_write(published, folder, refused, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", published.tokens["bob"])
    (folder / "README.md").write_text(CARD + "Worse.\n")
    assert "the token has no right to write here (403): ada/shop is as it was" in refused(folder, REPO)
    assert published.files(REPO)["README.md"].decode() == CARD


def test_a_card_that_the_hub_refuses(published, folder, refused):
    (folder / "README.md").write_text("---\nlicense: unheard-of\n---\n")
    assert 'Invalid metadata in README.md. - "license" must be one of' in refused(folder, REPO)
    assert published.files(REPO)["README.md"].decode() == CARD


def test_what_the_folder_must_hold(hub, folder, refused):
    for name in ("README.md", "tokenizer.json"):
        (folder / name).unlink()
    assert "found no tokenizer.json, README.md" in refused(folder, REPO)
    assert "found no config.json, model.safetensors" in refused(folder / "nowhere", REPO)
    assert "repo_id must be namespace/name, found 'shop'" in refused(folder, "shop")
    assert "it goes with neither revision nor tag" in refused(folder, REPO, "--create_pr", "--tag", "v1")
    assert not hub.requests


def test_a_broken_model_is_not_sent(hub, folder, refused):
    shutil.copy(folder / "model.pkl", folder / "model.safetensors")
    error = refused(folder, REPO)
    assert f"{folder / 'model.safetensors'} must be the weights of the model in config.json" in error
    assert refused(folder, REPO, "--dry_run") == error and not hub.requests


def test_a_token_in_a_file_is_not_published(hub, folder, refused):
    (folder / "results" / "shop-elastic-42.json").unlink()
    results = {"model_type": "elastic", "command": f"run_seqrec.py --hub_token {hub.tokens['ada']}"}
    (folder / "all_results.json").write_text(json.dumps(results))
    assert "README.md must not hold the token" in refused(folder, REPO)
    assert not hub.requests


def test_a_dry_run_needs_no_network(hub, folder, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, output, error = run(folder, REPO, "--dry_run")
    listing, card = output.split("\n\n", 1)
    assert (code, error, card) == (0, "", CARD) and not hub.requests
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listing.splitlines()}
    assert sizes.keys() == MODEL | ENDPOINT | RESULTS | CODE
    assert sizes["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_offline(hub, trained, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(trained, REPO)


def test_a_baseline_is_published_without_code(hub, trained, tmp_path):
    folder = tmp_path / "baseline"
    PopularityForSequentialRecommendation(PopularityConfig(vocab_size=NUM_ITEMS + 3)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    publish(folder, REPO)
    files = hub.files(REPO)
    assert files.keys() == {".gitattributes"} | MODEL and "auto_map" not in json.loads(files["config.json"])


def test_what_a_client_notices_of_changed_bytes(published, tmp_path):
    """
    A download is refused if its size is not the listed one. Bytes changed in place come through: only a comparison
    with the listed hashes, `hf cache verify`, tells them.
    """
    entry = published.repo(REPO).head("main").files["model.safetensors"]
    weights = published.objects[entry.key]
    published.objects[entry.key] = weights[:-1]
    with pytest.raises(OSError, match=f"should be of size {entry.size} but has size {entry.size - 1}"):
        hf_hub_download(REPO, "model.safetensors")
    published.objects[entry.key] = weights[:-1] + bytes([weights[-1] ^ 1])
    hf_hub_download(REPO, "model.safetensors")
    (mismatch,) = HfApi().verify_repo_checksums(REPO).mismatches
    assert mismatch["path"] == "model.safetensors" and mismatch["expected"] == entry.sha256


def make_trainer(output_dir, **arguments):
    rows = Dataset.from_dict({"input_ids": [[3 + (i + 7 * t) % NUM_ITEMS for t in range(9)] for i in range(16)]})
    defaults = {"num_train_epochs": 2, "save_strategy": "epoch", "use_cpu": True, "report_to": "none"}
    args = TrainingArguments(str(output_dir), push_to_hub=True, hub_model_id=REPO, **{**defaults, **arguments})
    return SequentialRecommendationTrainer(make_model(), args, train_dataset=rows, processing_class=make_tokenizer())


def test_the_trainer_pushes_what_publish_does(hub, tmp_path):
    trainer = make_trainer(tmp_path / "shop", hub_always_push=True, hub_private_repo=True)
    trainer.train()
    files = hub.files(REPO)
    assert files.keys() == {".gitattributes"} | MODEL | ENDPOINT | CODE
    assert b"# shop" in files["README.md"] and b"trust_remote_code=True" in files["README.md"]
    in_training = ["Training in progress, step 4", "Training in progress, step 2", "initial commit"]
    assert commits(hub) == in_training and hub.repo(REPO).private
    trainer.push_to_hub(dataset="a shop")
    files = hub.files(REPO)
    assert files.keys() == {".gitattributes"} | MODEL | ENDPOINT | CODE and b"a shop" in files["README.md"]
    assert files["model.safetensors"] == (tmp_path / "shop" / "model.safetensors").read_bytes()
    assert commits(hub) == ["End of training", *in_training]
    trainer.push_to_hub(dataset="another shop", blocking=False).result()
    assert b"another shop" in hub.files(REPO)["README.md"]


def test_a_push_that_fails_does_not_end_the_training(hub, tmp_path, caplog):
    trainer = make_trainer(tmp_path / "shop")
    hub.fail_next("POST", "/commit/", status=500, times=2)
    trainer.train()
    assert trainer.state.global_step == 4 and "push_to_hub: the Hub has failed (500)" in caplog.text
    assert commits(hub) == ["initial commit"]
    hub.fail_next("POST", "/commit/", status=500)
    with pytest.raises(PublishError, match="the Hub has failed"):
        trainer.push_to_hub()


def test_the_trainer_does_not_push_optimizer_states(hub, tmp_path):
    with pytest.raises(ValueError, match="hub_strategy must be 'end' or 'every_save'.*found 'checkpoint'"):
        make_trainer(tmp_path, hub_strategy="checkpoint")
    assert not hub.repos
    trainer = make_trainer(tmp_path, hub_strategy="end")
    trainer.train()
    assert commits(hub) == ["initial commit"]
