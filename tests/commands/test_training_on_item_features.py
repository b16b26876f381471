import json
import sys
import types

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from elastic_hf.commands import train
from elastic_hf.sharing.repository import files_to_publish
from factories import item_table


NUM_USERS, NUM_ITEMS = 30, 24


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with interactions in `shop.csv`, and items in `items.parquet` and `plain.csv`."""
    folder = tmp_path_factory.mktemp("shop")
    users = np.repeat(np.arange(NUM_USERS), 9)
    steps = np.tile(np.arange(9), NUM_USERS)
    items = (5 * users + 7 * steps) % NUM_ITEMS
    pl.DataFrame({"user_id": users, "item_id": items, "timestamp": steps}).write_csv(folder / "shop.csv")
    table = pl.from_arrow(item_table(range(NUM_ITEMS + 3)))
    table.write_parquet(folder / "items.parquet")
    table.select("item_id", "brand", "price").write_csv(folder / "plain.csv")
    return folder


def run(shop, output_dir, *arguments):
    sizes = "hidden_size=16,intermediate_size=16,num_interest_experts=4,num_memory_subkeys=6,num_hidden_layers=1"
    settings = ["--train_file", shop / "shop.csv", "--cache_dir", shop / "cache", "--k_core", 3, "--max_length", 8]
    settings += ["--config_overrides", f"{sizes},item_id_dropout=0.3", "--num_train_epochs", 1, "--use_cpu", True]
    train.main([str(part) for part in [*settings, "--output_dir", output_dir, *arguments]])


def test_a_trained_model_reads_features_wherever_it_is(shop, tmp_path):
    features = ["brand", "tags", "price", "vector"]
    arguments = ("--items_file", shop / "items.parquet", "--item_features", *features)
    run(shop, tmp_path / "run", *arguments, "--results_dir", tmp_path)
    results = json.loads((tmp_path / "shop-elastic-42-features.json").read_text())
    assert {*results["config"]["item_features"]} == {*features} and results["config"]["item_id_dropout"] == 0.3
    names = {file.path_in_repo for file in files_to_publish(tmp_path / "run", "ada/shop")}
    assert {"item_features.safetensors", "item_features.py", "item_encoder.py"} <= names
    model = AutoModel.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    known = item_table(range(NUM_ITEMS + 3))
    encoded = tokenizer.encode_item_features(known)
    tables = dict(zip(sorted(features), model.model.item_features.features, strict=True))
    for name, values in encoded.items():
        assert torch.equal(tables[name].encoded[3:], values)
    history = tokenizer([[3, 1]], is_split_into_words=True, return_tensors="pt")
    model.add_items(tokenizer, known.slice(NUM_ITEMS))
    assert model.recommend(**history, top_k=NUM_ITEMS + 1).token_ids.max() == NUM_ITEMS + 5
    tokenizer.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="tokenizer.json must have the model's 27 tokens, found 30"):
        files_to_publish(tmp_path / "run", "ada/shop")
    (tmp_path / "run" / "item_features.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="item_features.safetensors must be what was learned of item features"):
        files_to_publish(tmp_path / "run", "ada/shop")


def test_prefixes_are_trained_on_with_features_of_items(shop, tmp_path):
    """One row for each interaction but the first and the two held out of each user."""
    features = ("--items_file", shop / "items.parquet", "--item_features", "brand", "price")
    run(shop, tmp_path, *features, "--split_into_prefixes", True)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["config"]["training_objective"] == "prefix" and results["config"]["item_id_dropout"] == 0.3
    assert results["steps"] == -(-NUM_USERS * 6 // 8)
    model = AutoModel.from_pretrained(tmp_path)
    assert {*model.config.item_features} == {"brand", "price"}
    model.add_items(AutoTokenizer.from_pretrained(tmp_path), item_table(range(NUM_ITEMS + 3)).slice(NUM_ITEMS))


def test_texts_and_csv(shop, tmp_path, monkeypatch):
    class SentenceTransformer:
        def __init__(self, name):
            assert name == "a/model"

        def encode(self, texts, normalize_embeddings):
            return np.array([[text.count(digit) for digit in "0123"] for text in texts], np.float32)

    module = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    text = ("--text_column", "title", "--text_model", "a/model")
    run(shop, tmp_path / "texts", "--items_file", shop / "items.parquet", *text)
    config = AutoModel.from_pretrained(tmp_path / "texts").config
    assert config.item_features == {"title_vector": {"kind": "vector", "size": 4}}
    monkeypatch.undo()  # what serves needs no such package
    run(shop, tmp_path / "csv", "--items_file", shop / "plain.csv", "--item_features", "brand", "price")
    assert {*AutoModel.from_pretrained(tmp_path / "csv").config.item_features} == {"brand", "price"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--item_features", "brand"), "need items_file, the table that has them, found none"),
        (("--text_column", "title"), "text_column and text_model must be given together"),
        (("--items_file", "items.parquet", "--item_features", "colour"), "found 'colour'"),
        (
            (
                "--items_file",
                "items.parquet",
                "--item_features",
                "brand",
                "--model_type",
                "sasrec",
                "--config_overrides",
                "hidden_size=8",
            ),
            "None for sasrec",
        ),
    ],
)
def test_features_that_cannot_be_read_are_refused(shop, tmp_path, arguments, message):
    arguments = [shop / part if part == "items.parquet" else part for part in arguments]
    with pytest.raises(ValueError, match=message):
        run(shop, tmp_path / "run", *arguments)
