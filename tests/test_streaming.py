import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticItemTokenizer


ROOT = Path(__file__).parent.parent
NUM_ITEMS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights."""
    path = tmp_path_factory.mktemp("model")
    items = pa.table(
        {"item_id": [f"sku {i}" for i in range(NUM_ITEMS)], "title": [f"No. {i}" for i in range(NUM_ITEMS)]}
    )
    ElasticItemTokenizer.from_items(items, model_max_length=50).save_pretrained(path)
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(vocab_size=NUM_ITEMS + 3, num_memory_subkeys=5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def serve(folder, store, events):
    command = [sys.executable, str(ROOT / "examples" / "streaming.py")]
    command += ["--model_name_or_path", str(folder), "--store", str(store), "--top_k", "4"]
    text = "".join(f"{user}\t{item}\n" for user, item in events)
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, input=text, env=environment, capture_output=True, text=True)


def test_the_service_recommends_what_the_whole_history_says(folder, tmp_path):
    """Two processes, one after the other, on one store; users come back, one of them to an item."""
    store = tmp_path / "users.sqlite"
    first = [("ada", "sku 3"), ("bob", "sku 7"), ("ada", "sku 5")]
    second = [("ada", "sku 3"), ("bob", "sku 0"), ("eve", "sku 19")]
    lines = []
    for events in (first, second):
        result = serve(folder, store, events)
        assert result.returncode == 0, result.stderr
        lines += result.stdout.splitlines()

    model = ElasticForSequentialRecommendation.from_pretrained(folder).eval()
    tokenizer = ElasticItemTokenizer.from_pretrained(folder)
    histories = {}
    for (user, item), line in zip(first + second, lines, strict=True):
        histories.setdefault(user, []).append(item)
        inputs = tokenizer([histories[user]], is_split_into_words=True, return_tensors="pt")
        expected = tokenizer.convert_ids_to_titles(model.recommend(**inputs, top_k=4).token_ids[0])
        assert line.split("\t") == [user, *expected]
    sizes = sqlite3.connect(store).execute("SELECT user, length(state) FROM users ORDER BY user").fetchall()
    assert [user for user, _ in sizes] == ["ada", "bob", "eve"]
    assert max(size for _, size in sizes) - min(size for _, size in sizes) <= 2 * 8  # the ids of two items seen more


@pytest.mark.parametrize(
    ("user", "item", "message"),
    [("ada", "sku 99", "line 1: the model does not know the item 'sku 99'"), ("ada\tx", "sku 1", "line 1 must be")],
)
def test_an_event_that_cannot_be_read_is_refused(folder, tmp_path, user, item, message):
    result = serve(folder, tmp_path / "users.sqlite", [(user, item)])
    assert result.returncode != 0
    assert message in result.stderr
