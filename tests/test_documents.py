import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import render_results


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("document", render_results.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_what_the_results_say(document):
    assert render_results.render(document) == document.read_text(), "run python examples/benchmarks/render_results.py"


@pytest.fixture
def run_snippet(tmp_path):
    """Runs one of the README's snippets in a fresh process, without a network: what it prints."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)

    def run(number, folder):
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-c", snippets[number]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_the_readme_recommends_with_the_committed_model(run_snippet):
    recommended = ast.literal_eval(run_snippet(0, ROOT))
    assert len(recommended) == 3 and all("No. " in one["title"] for one in recommended)


def test_the_readme_trains_and_recommends(run_snippet, tmp_path):
    ndcg, titles = [line for line in run_snippet(1, tmp_path).splitlines() if not line.startswith("{")]
    assert 0 <= float(ndcg) <= 1
    assert len(re.findall(r"No\. \d+", titles)) == 5


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
