import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import render_outputs
import render_results
from render_outputs import LANGUAGES, ROOT, blocks


PAGES = sorted({*render_results.DOCUMENTS, *render_outputs.DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"})
RUN = [
    document
    for document in render_outputs.DOCUMENTS
    if any(block.language in LANGUAGES and not block.reason for block in blocks(document.read_text()))
]
NUMBER = re.compile(r"\d+\.\d+")


def name(document):
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", render_results.DOCUMENTS, ids=name)
def test_tables_are_what_the_results_say(document):
    assert render_results.render(document) == document.read_text(), "run python examples/benchmarks/render_results.py"


@pytest.fixture
def run_document(tmp_path):
    """Runs the blocks of a document in a fresh process, outside the repository and offline: what each prints."""

    def run(document):
        folder = tmp_path / "reader"
        folder.mkdir()
        render_outputs.fill(folder)
        code = (
            "import json, sys; from render_outputs import run; json.dump(run(sys.stdin.read()), open('../out', 'w'))"
        )
        environment = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(render_outputs.__file__).parent)]),
        }
        process = subprocess.run(
            [sys.executable, "-c", code],
            input=document.read_text(),
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            timeout=1_800,
        )
        assert process.returncode == 0, process.stderr
        return json.loads((tmp_path / "out").read_text())

    return run


@pytest.mark.parametrize("document", RUN, ids=name)
def test_code_runs_and_prints_what_the_document_says(document, run_document):
    """Numbers with a fraction may differ by a quarter: processors round differently, and training makes it more."""
    outputs, found = run_document(document), blocks(document.read_text())
    for block, before, output in zip(found[1:], found, outputs, strict=False):
        if block.language == "text" and before.language in LANGUAGES and not before.reason:
            assert NUMBER.sub("#", output) == NUMBER.sub("#", block.code), "run examples/benchmarks/render_outputs.py"
            numbers, stated = ([float(x) for x in NUMBER.findall(text)] for text in (output, block.code))
            assert numbers == pytest.approx(stated, rel=0.25)


def test_the_readme_trains_a_model_that_beats_popularity():
    (printed,) = re.findall(
        r"NDCG@10 of ELASTIC: (\S+)\nNDCG@10 of popularity: (\S+)\n", (ROOT / "README.md").read_text()
    )
    assert float(printed[0]) > 3 * float(printed[1]) > 0


def test_the_notebook_runs(tmp_path, monkeypatch):
    """One of its cells asserts that the model beats popularity."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    executed = json.loads(render_outputs.execute(render_outputs.NOTEBOOK.read_text(), tmp_path))
    code = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in code[-1]["outputs"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    for target in ("".join(groups) for groups in targets):
        if not re.match(r"https?:|#", target):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (page.parent / path).read_text(), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, target


def test_a_fresh_process_loads_a_checkpoint_and_recommends_titles(tmp_path):
    """Only elastic_hf and transformers are imported; the checkpoint is made in another process."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    make = """
import pyarrow as pa
from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticItemTokenizer

items = pa.table({"item_id": ["a b", "ü", "c", "d", "e"], "title": ["First", "Second", "Third", "Fourth", None]})
ElasticItemTokenizer.from_items(items, model_max_length=7).save_pretrained("model")
ElasticForSequentialRecommendation(ElasticConfig(vocab_size=8)).save_pretrained("model")
"""
    recommend = """
import elastic_hf
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
history = tokenizer([["ü", "a b"]], is_split_into_words=True, return_tensors="pt")
print(type(model).__name__, type(tokenizer).__name__, history["input_ids"].tolist())
print(sorted(tokenizer.convert_ids_to_titles(model.recommend(**history, top_k=3).token_ids[0])))
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout
        for code in (make, recommend)
    ]
    assert outputs[1].splitlines() == [
        "ElasticForSequentialRecommendation ElasticItemTokenizer [[4, 3]]",
        "['Fourth', 'Third', 'e']",
    ]
