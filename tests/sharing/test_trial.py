"""Folders that must not be published: torn, broken and foreign files are refused by their names."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from elastic_hf import ElasticItemTokenizer
from elastic_hf.baselines import PopularityConfig, PopularityForSequentialRecommendation
from elastic_hf.registry import MODELS
from elastic_hf.sharing.repository import files_to_publish
from elastic_hf.sharing.trial import load_pipeline, recommend_example
from factories import NUM_TOKENS, elastic_model


NUM_ITEMS = NUM_TOKENS - 3
ITEMS = [f"sku {i}" for i in range(NUM_ITEMS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    items = pa.table({"item_id": ITEMS, "title": [f"Product {i}" for i in range(NUM_ITEMS)]})
    ElasticItemTokenizer.from_items(items, model_max_length=11).save_pretrained(folder)
    elastic_model().save_pretrained(folder)
    (folder / "README.md").write_text("# Shop\n")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "shop")


def change_weights(change, name=None):
    def break_folder(folder):
        file = folder / "model.safetensors"
        weights = load_file(file)
        chosen = name or next(key for key in weights if weights[key].ndim == 2)
        changed = change(weights.get(chosen))
        weights = {key: value for key, value in weights.items() if key != chosen}
        save_file(weights if changed is None else weights | {chosen: changed}, file, metadata={"format": "pt"})

    return break_folder


def with_number(number):
    def change(tensor):
        return tensor.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(number))

    return change_weights(change)


def write(name, contents):
    return lambda folder: (folder / name).write_bytes(contents)


def tear(name):
    def break_folder(folder):
        contents = (folder / name).read_bytes()
        (folder / name).write_bytes(contents[: len(contents) // 2])

    return break_folder


def other_tokenizer(num_items):
    def break_folder(folder):
        items = [f"other {i}" for i in range(num_items)]
        ElasticItemTokenizer.from_items(items, model_max_length=11).save_pretrained(folder)

    return break_folder


def write_items(columns):
    return lambda folder: pq.write_table(pa.table(columns), folder / "items.parquet")


def change_config(**changes):
    def break_folder(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return break_folder


BROKEN = {
    "not a number": (with_number(float("nan")), "model.safetensors must hold finite numbers, found NaN or infinity"),
    "infinite": (with_number(float("-inf")), "model.safetensors must hold finite numbers"),
    "of another model": (write("model.safetensors", b""), "model.safetensors must be the weights of the model"),
    "torn weights": (tear("model.safetensors"), "model.safetensors must be the weights of the model"),
    "a pickle": (write("model.safetensors", b"\x80\x04N."), "model.safetensors must be the weights of the model"),
    "a tensor is missing": (change_weights(lambda tensor: None), "model.safetensors must .* found a file without "),
    "a tensor of another size": (change_weights(lambda tensor: tensor[1:]), "model.safetensors must be the weights"),
    "one tensor more": (
        change_weights(lambda tensor: torch.ones(3), "model.decoder.weight"),
        "found a file with model.decoder.weight",
    ),
    "torn configuration": (tear("config.json"), "config.json must hold JSON"),
    "no configuration": (write("config.json", b"[]"), "config.json must hold a JSON object, found list"),
    "no type of model": (
        write("config.json", b"{}"),
        "config.json must have a model_type among elastic, .*found None",
    ),
    "another architecture": (change_config(model_type="bert"), "config.json must have a model_type .* found 'bert'"),
    "another model of ours": (
        change_config(model_type="sasrec"),
        "model.safetensors must be the weights of the model",
    ),
    "sizes that do not fit": (change_config(num_attention_heads=5), "config.json must be a model's configuration"),
    "torn vocabulary": (tear("tokenizer.json"), "tokenizer.json must be an item tokenizer"),
    "torn tokenizer": (tear("tokenizer_config.json"), "tokenizer_config.json must hold JSON"),
    "a tokenizer of fewer": (other_tokenizer(7), "tokenizer.json must have the model's 31 tokens, found 10"),
    "torn items": (tear("items.parquet"), "items.parquet must be a table of items"),
    "other items": (write_items({"item_id": [f"other {item}" for item in ITEMS]}), "items.parquet must be the items"),
    "items in another order": (write_items({"item_id": ITEMS[::-1]}), "items.parquet must be the items of tokenizer"),
    "fewer items": (write_items({"item_id": ITEMS[1:]}), "items.parquet must be the items of tokenizer.json"),
    "items with their buyers": (
        write_items({"item_id": ITEMS, "user_id": ITEMS}),
        "items.parquet must have item_id, title and count as its columns, found item_id, user_id",
    ),
    "a figure that is none": (write("training_curve.png", b"<html>"), "training_curve.png must be a PNG image"),
    "results that are none": (write("all_results.json", b"{'a': 1}"), "all_results.json must hold JSON"),
    "results that are no numbers": (write("all_results.json", b'{"a": NaN}'), "all_results.json .* the number NaN"),
    "a card in another encoding": (write("README.md", "Café".encode("utf-16")), "README.md must be text in UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused_by_the_name_of_the_file(folder, name):
    break_folder, message = BROKEN[name]
    break_folder(folder)
    with pytest.raises(ValueError, match=message) as error:
        files_to_publish(folder, "ada/shop")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "items.parquet"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"found no {name}"):
        files_to_publish(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_in_the_middle_of_a_training_changes_nothing_in_it(folder, dtype, monkeypatch):
    """Neither the random state nor, for a moment and in all threads, the default type."""
    elastic_model().to(dtype).save_pretrained(folder)
    defaults, set_default_dtype = [], torch.set_default_dtype
    monkeypatch.setattr(
        torch, "set_default_dtype", lambda default: (defaults.append(default), set_default_dtype(default))
    )
    state = torch.get_rng_state()
    pipeline = load_pipeline(folder)
    assert torch.equal(torch.get_rng_state(), state) and {*defaults} == {torch.float32}
    assert pipeline.model.device.type == "cpu" and not pipeline.model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_can_be_tried(folder, dtype):
    elastic_model().to(dtype).save_pretrained(folder)
    pipeline = load_pipeline(folder)
    assert pipeline.model.dtype == dtype and len(recommend_example(pipeline)["recommended"]) == 3


@pytest.mark.parametrize("model_type", MODELS)
def test_every_model_can_be_tried(model_type, tmp_path):
    """Also one that reads fewer items than there are in the catalogue."""
    model_class = MODELS[model_type]
    sizes = {"hidden_size": 8} if model_type != "popularity" else {}
    config = model_class.config_class(vocab_size=NUM_TOKENS, **sizes)
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = 6
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path)
    ElasticItemTokenizer.from_items(ITEMS, model_max_length=5).save_pretrained(tmp_path)
    assert len(recommend_example(load_pipeline(tmp_path))["recommended"]) == 3


def test_a_model_that_reads_less_than_its_tokenizer_keeps_is_refused(tmp_path):
    model_class = MODELS["sasrec"]
    config = model_class.config_class(vocab_size=NUM_TOKENS, hidden_size=8, max_position_embeddings=6)
    model_class(config).save_pretrained(tmp_path)
    ElasticItemTokenizer.from_items(ITEMS, model_max_length=7).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a model that recommends, .* max_position_embeddings .6., found 7"):
        load_pipeline(tmp_path)


def write_popularity(folder, items):
    tokenizer = ElasticItemTokenizer.from_items(items, model_max_length=9)
    model = PopularityForSequentialRecommendation(PopularityConfig(vocab_size=len(tokenizer)))
    model.count_items([np.repeat(np.arange(3, len(tokenizer)), range(len(tokenizer) - 3, 0, -1)).tolist()])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_pipeline(folder)


def test_the_example_reads_the_most_popular_items_and_no_history(tmp_path):
    """By their titles where these are clear: the title "b" is an item id, too, and two items are called "Twice"."""
    items = {
        "item_id": ["a", "b", "c", "d", "e", "f"],
        "title": ["b", None, "Twice", "Twice", "Kes", "M"],
        "count": [9, 4, 7, 5, 0, 8],
    }
    pipeline = write_popularity(tmp_path, pa.table(items))
    example = recommend_example(pipeline)
    assert example["history"] == ["a", "M", "c"]
    assert example["recommended"] == pipeline(["a", "f", "c"], top_k=3)
    assert [row["item"] for row in example["recommended"]] == ["b", "d", "e"]


def test_small_catalogues_have_small_examples(tmp_path):
    assert recommend_example(write_popularity(tmp_path / "one", [7])) is None
    example = recommend_example(write_popularity(tmp_path / "three", [7, 8, 9]))
    assert example["history"] == [7, 8] and [row["item"] for row in example["recommended"]] == [9]


def test_the_example_of_a_model_that_reads_times_has_them(folder):
    elastic_model(use_timestamps=True).save_pretrained(folder)
    pipeline = load_pipeline(folder)
    example = recommend_example(pipeline)
    assert example["history"].keys() == {"history", "timestamps", "now"}
    assert example["history"]["history"] == ["Product 0", "Product 1", "Product 2"]
    assert example["history"]["timestamps"] == [0, 3600, 7200] and example["history"]["now"] == 10_800
    assert example["recommended"] == pipeline(example["history"], top_k=3)


def test_the_example_of_a_model_that_reads_features_of_events_has_them(folder):
    events = Dataset.from_dict({"action": [["buy", "view"]], "price": [[1.5, 2.5]]})
    items = ElasticItemTokenizer.from_pretrained(folder).items
    tokenizer = ElasticItemTokenizer.from_items(items, 11, events)
    tokenizer.save_pretrained(folder)
    elastic_model(event_features=tokenizer.event_features).save_pretrained(folder)
    pipeline = load_pipeline(folder)
    example = recommend_example(pipeline)
    assert {**example["history"], "history": None} == {"history": None, "action": ["view"] * 3, "price": [2.0] * 3}
    assert example["recommended"] == pipeline(example["history"], top_k=3)
    ElasticItemTokenizer.from_items(items, 11).save_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer must have the model's event_features, {.*}, found {}"):
        load_pipeline(folder)
