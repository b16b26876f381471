"""The item tokenizer: vocabulary, both encoding paths, saving and loading with and without the package."""

import json
import pickle
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, List, Value
from transformers import AutoTokenizer

from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation
from elastic_hf.models.item_tokenizer import ElasticItemTokenizer


STRING_IDS = ["id one", "é2", " padded ", "日本 語", "a.b , c", "[pad]", "007", "7", "line\nbreak"]
INTEGER_IDS = [50, 7, -3, 2**40, 0, 700]


@pytest.fixture(scope="module")
def string_tokenizer() -> ElasticItemTokenizer:
    titles = [None, "Second", None, "四", "Fifth", "", None, None, None]
    return ElasticItemTokenizer.from_items(pa.table({"item_id": STRING_IDS, "title": titles}), model_max_length=4)


@pytest.fixture(scope="module")
def integer_tokenizer() -> ElasticItemTokenizer:
    items = Dataset.from_dict({"item_id": INTEGER_IDS, "title": list("ABCDEF"), "count": [4, 0, 2, 9, 1, 2]})
    return ElasticItemTokenizer.from_items(items, model_max_length=4)


def slow(tokenizer, histories):
    return tokenizer(histories, is_split_into_words=True)["input_ids"]


def test_token_ids_follow_the_order_of_the_items(string_tokenizer):
    assert [string_tokenizer.pad_token_id, string_tokenizer.unk_token_id, string_tokenizer.mask_token_id] == [0, 1, 2]
    assert len(string_tokenizer) == string_tokenizer.vocab_size == 3 + len(STRING_IDS)
    assert string_tokenizer.convert_tokens_to_ids(STRING_IDS) == list(range(3, 3 + len(STRING_IDS)))
    assert string_tokenizer.convert_ids_to_tokens([3, 6]) == ["id one", "日本 語"]


def test_pads_and_truncates_on_the_left(string_tokenizer):
    history = STRING_IDS[:6]
    batch = string_tokenizer(
        [history, ["é2", "id one"], []], is_split_into_words=True, padding=True, truncation=True, return_tensors="pt"
    )
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 4, 3], [0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "items",
    [
        STRING_IDS,
        pa.table({"item_id": pa.array(STRING_IDS, pa.large_string())}),
        pa.table({"item_id": pa.array(STRING_IDS).dictionary_encode()}),
        pl.DataFrame({"item_id": STRING_IDS, "title": STRING_IDS}),
        pl.DataFrame({"item_id": pl.Series(STRING_IDS, dtype=pl.Enum(STRING_IDS))}),
        Dataset.from_dict({"item_id": STRING_IDS[::-1]}).select(range(len(STRING_IDS) - 1, -1, -1)),
    ],
    ids=["list", "large_string", "dictionary", "polars", "polars enumeration", "dataset with indices"],
)
def test_every_source_of_items_gives_the_same_vocabulary(items, string_tokenizer):
    assert ElasticItemTokenizer.from_items(items, 4).get_vocab() == string_tokenizer.get_vocab()


def test_integer_ids_are_taken_as_integers_and_as_strings(integer_tokenizer):
    histories = [[7, 700], [2**40, -3, 99]]
    expected = [[4, 8], [6, 5, 1]]
    assert slow(integer_tokenizer, histories) == expected
    assert slow(integer_tokenizer, [[str(item) for item in history] for history in histories]) == expected
    assert slow(integer_tokenizer, [np.array(history) for history in histories]) == expected
    assert integer_tokenizer.convert_tokens_to_ids(np.int64(7)) == integer_tokenizer.convert_tokens_to_ids("7") == 4
    assert integer_tokenizer.convert_tokens_to_ids(INTEGER_IDS) == [3, 4, 5, 6, 7, 8]


def test_items_hold_the_counts_that_were_given(string_tokenizer, integer_tokenizer):
    assert string_tokenizer.items.column_names == ["item_id", "title"]
    assert integer_tokenizer.items["count"].to_pylist() == [4, 0, 2, 9, 1, 2]


@pytest.mark.parametrize("item", [None, 1.5, True])
def test_slow_path_refuses_what_is_no_item_id(integer_tokenizer, item):
    with pytest.raises(ValueError, match="item ids must be integers or strings"):
        integer_tokenizer([[7, item]], is_split_into_words=True)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["a", "b", "a"], "unique, found 'a'"),
        ([3, 1, 3], "unique, found 3"),
        (["a", None], "not be null"),
        ([1, None], "not be null"),
        (["a", "[PAD]"], r"special token \[PAD\]"),
        (["a", "x[MASK]y"], r"special token \[MASK\]"),
        (["a", ""], "not be empty strings"),
        ([], "at least one item"),
        ([1, "a"], "all integers or all strings"),
        ([1.5, 2.5], "integers or strings, found double"),
        (pa.table({"item": [1]}), "column 'item_id', found"),
        (pa.table({"item_id": [1, 2], "count": [1.5, 2.0]}), "counts must be integers, found double"),
        (pa.table({"item_id": [1, 2], "count": [3, None]}), "counts must be at least 0, found a null"),
        (pa.table({"item_id": [1, 2], "count": [3, -1]}), "counts must be at least 0, found -1"),
    ],
)
def test_bad_items_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        ElasticItemTokenizer.from_items(items, model_max_length=4)


@pytest.mark.parametrize("model_max_length", [0, 2.5, True, None])
def test_bad_model_max_length_is_refused(model_max_length):
    with pytest.raises(ValueError, match="model_max_length"):
        ElasticItemTokenizer.from_items(["a"], model_max_length)


# ---- the Arrow path


def random_histories(ids: list, seed: int) -> list[list]:
    rng = np.random.default_rng(seed)
    lengths = [0, 5, 0, 1, 30, 0, 7, 0]
    return [[ids[i] for i in rng.integers(len(ids), size=length)] for length in lengths]


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list])
@pytest.mark.parametrize(
    ("ids", "value_type"),
    [
        ([*STRING_IDS, "unknown", "8"], pa.string()),
        ([*STRING_IDS, "unknown", "8"], pa.large_string()),
        ([*STRING_IDS, "unknown", "8"], pa.dictionary(pa.int32(), pa.string())),
        ([*STRING_IDS, "unknown", "8"], pa.string_view()),
        ([7, 8, -1], pa.int32()),
    ],
    ids=str,
)
def test_arrow_path_equals_slow_path_for_string_items(string_tokenizer, ids, value_type, list_type):
    histories = random_histories(ids, seed=0)
    encoded = string_tokenizer.encode_histories(pa.array(histories, list_type(value_type)))
    assert encoded.type == pa.list_(pa.int32())
    assert encoded.to_pylist() == slow(string_tokenizer, histories)
    assert 1 in encoded.flatten().to_pylist()


@pytest.mark.parametrize(
    ("ids", "value_type"),
    [
        ([*INTEGER_IDS, 1, -(2**50)], pa.int64()),
        ([50, 7, 0, 700, 1], pa.uint16()),
        ([str(item) for item in INTEGER_IDS] + ["07", "x"], pa.string()),
    ],
    ids=str,
)
def test_arrow_path_equals_slow_path_for_integer_items(integer_tokenizer, ids, value_type):
    histories = random_histories(ids, seed=1)
    encoded = integer_tokenizer.encode_histories(pa.array(histories, pa.list_(value_type)))
    assert encoded.to_pylist() == slow(integer_tokenizer, histories)
    assert 1 in encoded.flatten().to_pylist()


def test_arrow_path_takes_slices_and_chunks(integer_tokenizer):
    histories = random_histories(INTEGER_IDS, seed=2)
    lists = pa.array(histories)
    expected = slow(integer_tokenizer, histories)
    sliced = integer_tokenizer.encode_histories(lists.slice(3, 4))
    sliced.validate(full=True)
    assert sliced.to_pylist() == expected[3:7]
    chunked = pa.chunked_array([lists.slice(1, 2), lists.slice(3, 0), lists.slice(3)])
    assert integer_tokenizer.encode_histories(chunked).to_pylist() == expected[1:]
    assert integer_tokenizer.encode_histories(pa.array([], pa.list_(pa.int64()))).to_pylist() == []
    assert integer_tokenizer.encode_histories(pa.chunked_array([], pa.list_(pa.int64()))).to_pylist() == []
    assert integer_tokenizer.encode_histories(pa.array([[], []])).to_pylist() == [[], []]


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        (pa.array([[7], [7, None]]), "null item ids, found 1"),
        (pa.array([[7], None]), "histories must not be null"),
        (pa.array([[7.0]]), "integers or strings, found double"),
        (pa.array([7]), "array of lists, found int64"),
        ([[7]], "array of lists"),
    ],
)
def test_arrow_path_refuses_bad_histories(integer_tokenizer, histories, message):
    with pytest.raises(ValueError, match=message):
        integer_tokenizer.encode_histories(histories)


def split_dataset(ids: list) -> DatasetDict:
    histories = [history for history in random_histories(ids, seed=3) if history] * 5
    users = [f"user {i}" for i in range(len(histories))]
    train = Dataset.from_dict(
        {"user_id": users, "item_ids": histories, "timestamps": [[float(i) for i in range(len(h))] for h in histories]}
    )
    test = train.add_column("target", [ids[i % len(ids)] for i in range(len(train))])
    return DatasetDict(train=train, test=test.add_column("target_timestamp", [i / 4 for i in range(len(train))]))


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("ids", [INTEGER_IDS, STRING_IDS], ids=["int", "string"])
def test_tokenize_histories(ids, num_proc, tmp_path):
    ElasticItemTokenizer.from_items(ids, 4).save_pretrained(tmp_path)
    tokenizer = pickle.loads(pickle.dumps(ElasticItemTokenizer.from_pretrained(tmp_path)))
    histories = split_dataset(ids)
    tokenized = tokenizer.tokenize_histories(histories, num_proc=num_proc)
    features = {
        "user_id": Value("string"),
        "input_ids": List(Value("int32")),
        "timestamps": List(Value("float64")),
    }
    assert tokenized["train"].features == features
    of_targets = {"target": Value("int32"), "target_timestamp": Value("float64")}
    assert tokenized["test"].features == {**features, **of_targets}
    assert tokenized["test"]["target_timestamp"][:] == histories["test"]["target_timestamp"][:]
    without = tokenizer.tokenize_histories(histories.remove_columns("timestamps"), num_proc=num_proc)
    assert without["train"].column_names == ["user_id", "input_ids"]
    for name in ("train", "test"):
        assert tokenized[name]["timestamps"][:] == histories[name]["timestamps"][:]
        assert tokenized[name]["user_id"][:] == histories[name]["user_id"][:]
        assert tokenized[name]["input_ids"][:] == slow(tokenizer, histories[name]["item_ids"][:])
    assert tokenized["test"]["target"][:] == tokenizer.convert_tokens_to_ids(histories["test"]["target"][:])


def test_streams_are_tokenized_as_they_are_read(integer_tokenizer):
    histories = split_dataset(INTEGER_IDS)
    streams = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in histories.items()})
    tokenized = integer_tokenizer.tokenize_histories(streams)
    for name, rows in integer_tokenizer.tokenize_histories(histories).items():
        assert isinstance(tokenized[name], IterableDataset) and tokenized[name].features == rows.features
        assert list(tokenized[name]) == list(rows)
    with pytest.raises(ValueError, match="num_proc must be None for the stream 'train', found 2"):
        integer_tokenizer.tokenize_histories(streams, num_proc=2)
    nameless = IterableDataset.from_generator(lambda: iter([{"item_ids": INTEGER_IDS}]))
    with pytest.raises(ValueError, match="split 'train' must have the column 'item_ids', found None"):
        integer_tokenizer.tokenize_histories(IterableDatasetDict(train=nameless))


def test_tokenize_histories_names_the_bad_split(integer_tokenizer):
    train = split_dataset(INTEGER_IDS)["train"]
    with pytest.raises(ValueError, match="split 'test' must have the column 'item_ids'"):
        integer_tokenizer.tokenize_histories(DatasetDict(test=train.remove_columns("item_ids")))
    with pytest.raises(ValueError, match="split 'validation' must have at least one history"):
        integer_tokenizer.tokenize_histories(DatasetDict(validation=train.select([])))


def test_tokenize_histories_does_not_trust_an_earlier_result(integer_tokenizer, tmp_path):
    histories = split_dataset(INTEGER_IDS)
    histories.save_to_disk(tmp_path)
    histories = DatasetDict({name: Dataset.load_from_disk(tmp_path / name) for name in histories})
    first = integer_tokenizer.tokenize_histories(histories)
    expected = first["train"]["input_ids"][:]
    written = [file["filename"] for file in first["train"].cache_files]
    for file in written:
        with open(file, "r+b") as stream:
            stream.truncate(100)
    assert written and integer_tokenizer.tokenize_histories(histories)["train"]["input_ids"][:] == expected


# ---- the catalogue grows


@pytest.mark.parametrize(
    "add",
    [
        lambda tokenizer: tokenizer.add_tokens(["x9"]),
        lambda tokenizer: tokenizer.add_tokens("7"),  # an item, which the backend would then cut out of "700"
        lambda tokenizer: tokenizer.add_special_tokens({"cls_token": "[CLS]"}),
    ],
    ids=["new item", "known item", "special token"],
)
@pytest.mark.parametrize("is_loaded", [False, True])
def test_tokens_are_not_added(integer_tokenizer, tmp_path, add, is_loaded):
    if is_loaded:
        integer_tokenizer.save_pretrained(tmp_path)
        integer_tokenizer = ElasticItemTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokens cannot be added .*from_items.*resize_token_embeddings"):
        add(integer_tokenizer)
    assert len(integer_tokenizer) == 3 + len(INTEGER_IDS)
    assert integer_tokenizer.cls_token is None
    assert slow(integer_tokenizer, [[700, 7]]) == [[8, 4]]


def test_a_tokenizer_saved_with_an_added_token_is_refused(integer_tokenizer, tmp_path):
    integer_tokenizer.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["added_tokens"].append({**state["added_tokens"][0], "id": 9, "content": "x9", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="x9|found other items"):
        ElasticItemTokenizer.from_pretrained(tmp_path)


def test_a_catalogue_grows_from_its_items(integer_tokenizer):
    new = pa.table({"item_id": [81, 82], "title": ["G", None], "count": [0, 0]})
    grown = ElasticItemTokenizer.from_items(pa.concat_tables([integer_tokenizer.items, new]), model_max_length=4)
    histories = [[*INTEGER_IDS, 82], [81, 99]]
    assert slow(grown, histories) == [[3, 4, 5, 6, 7, 8, 10], [9, 1]]
    assert grown.encode_histories(pa.array(histories)).to_pylist() == slow(grown, histories)
    assert grown.convert_ids_to_titles([8, 9, 10]) == ["F", "G", "82"]

    config = ElasticConfig(vocab_size=len(integer_tokenizer), hidden_size=16, num_memory_subkeys=4)
    model = ElasticForSequentialRecommendation(config).eval()
    old_scores = model(torch.tensor([[3, 4]])).logits
    model.resize_token_embeddings(len(grown))
    torch.testing.assert_close(model(torch.tensor([[3, 4]])).logits[..., : len(integer_tokenizer)], old_scores)
    recommended = model.recommend(torch.tensor([[3, 10]]), top_k=6).token_ids
    assert set(recommended[0].tolist()) == {4, 5, 6, 7, 8, 9}


# ---- titles


def test_titles_fall_back_to_item_ids(string_tokenizer, integer_tokenizer):
    assert string_tokenizer.convert_ids_to_titles([[3, 4], [0, 6]]) == [["id one", "Second"], ["[PAD]", "四"]]
    assert string_tokenizer.convert_ids_to_titles(torch.tensor([2, 8, 1])) == ["[MASK]", "", "[UNK]"]
    assert integer_tokenizer.convert_ids_to_titles(np.int64(8)) == "F"
    assert ElasticItemTokenizer.from_items(INTEGER_IDS, 4).convert_ids_to_titles([5, 6]) == ["-3", str(2**40)]
    assert string_tokenizer.convert_ids_to_titles([]) == []


@pytest.mark.parametrize("ids", [-1, [3, 9], [3.0], ["a"]])
def test_titles_of_no_token_are_refused(integer_tokenizer, ids):
    with pytest.raises(ValueError, match="token ids from 0 to 8"):
        integer_tokenizer.convert_ids_to_titles(ids)


def test_decode_gives_item_ids(string_tokenizer, integer_tokenizer):
    assert string_tokenizer.decode([0, 3, 6], skip_special_tokens=True) == "id one 日本 語"
    assert integer_tokenizer.decode([[4, 8], [2, 5]]) == ["7 700", "[MASK] -3"]


# ---- saving and loading


@pytest.mark.parametrize("fixture", ["string_tokenizer", "integer_tokenizer"])
def test_save_and_load(fixture, request, tmp_path):
    tokenizer = request.getfixturevalue(fixture)
    tokenizer.save_pretrained(tmp_path / "first")
    loaded = ElasticItemTokenizer.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    # What has been loaded stays whole when its folder goes, as checkpoints do.
    for file in (tmp_path / "first").iterdir():
        file.unlink()
    reloaded = ElasticItemTokenizer.from_pretrained(tmp_path / "second")
    for other in (loaded, reloaded, pickle.loads(pickle.dumps(loaded))):
        assert other.items.equals(tokenizer.items)
        assert other.get_vocab() == tokenizer.get_vocab()
        assert (other.padding_side, other.truncation_side, other.model_max_length) == ("left", "left", 4)
    names = {file.name for file in (tmp_path / "second").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "items.parquet"}
    assert "items_file" not in json.loads((tmp_path / "second" / "tokenizer_config.json").read_text())


def test_load_without_items_file_is_refused(integer_tokenizer, tmp_path):
    """Without it ids would come back as strings, and without titles."""
    integer_tokenizer.save_pretrained(tmp_path)
    items = (tmp_path / "items.parquet").read_bytes()
    for damaged in (b"", items[:-20]):
        (tmp_path / "items.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match="items.parquet cannot be read"):
            ElasticItemTokenizer.from_pretrained(tmp_path)
    (tmp_path / "items.parquet").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} must hold items.parquet .* found none"):
        ElasticItemTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold items.parquet"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_items_file_of_another_tokenizer_is_refused(integer_tokenizer, tmp_path):
    integer_tokenizer.save_pretrained(tmp_path)
    other = ElasticItemTokenizer.from_items(INTEGER_IDS[::-1], 4)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "items.parquet").replace(tmp_path / "items.parquet")
    with pytest.raises(ValueError, match="items.parquet must list the items of tokenizer.json"):
        ElasticItemTokenizer.from_pretrained(tmp_path)


def test_load_from_the_hub_cache(integer_tokenizer, tmp_path):
    revision = "0" * 40
    repository = tmp_path / "models--someone--tokenizer"
    integer_tokenizer.save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    loaded = ElasticItemTokenizer.from_pretrained("someone/tokenizer", cache_dir=tmp_path, local_files_only=True)
    assert loaded.items.equals(integer_tokenizer.items)


def test_auto_tokenizer_gives_this_class(string_tokenizer, tmp_path):
    import elastic_hf  # noqa: F401

    string_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ElasticItemTokenizer
    assert loaded.items.equals(string_tokenizer.items)


@pytest.mark.parametrize("config", [None, {"model_type": "elastic"}], ids=["no config.json", "unknown model_type"])
def test_auto_tokenizer_without_the_package(string_tokenizer, tmp_path, config):
    folder = tmp_path / "saved"
    string_tokenizer.save_pretrained(folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    histories = [[*STRING_IDS, "unknown"], ["é2"]]
    arguments = {"is_split_into_words": True, "padding": True, "truncation": True}
    (tmp_path / "input.json").write_text(json.dumps([str(folder), histories, arguments]))
    script = """
import json, sys
sys.modules["elastic_hf"] = None  # an import raises ImportError
from transformers import AutoTokenizer
folder, histories, arguments = json.load(open("input.json"))
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer(histories, **arguments)
print(json.dumps([type(tokenizer).__name__, batch["input_ids"], batch["attention_mask"], tokenizer.decode([0, 6])]))
"""
    command = [sys.executable, "-I", "-c", script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1_800)
    assert run.returncode == 0, run.stderr
    expected = string_tokenizer(histories, **arguments)
    assert json.loads(run.stdout.splitlines()[-1]) == [
        "TokenizersBackend",
        expected["input_ids"],
        expected["attention_mask"],
        "[PAD] 日本 語",
    ]


# Event columns


@pytest.fixture(scope="module")
def events():
    """Training and test histories with event columns."""
    train = Dataset.from_dict(
        {
            "user_id": [1, 2],
            "item_ids": [[50, 7, -3], [7, 0]],
            "rating": [[5, 3, None], [1, 5]],
            "price": [[1.0, 2.0, 3.0], [6.0, None]],
            "action": [["view", "add to cart", "view"], ["buy", "view"]],
        }
    )
    test = Dataset.from_dict(
        {
            "user_id": [2],
            "item_ids": [[7, 0, 0]],
            "rating": [[1, 5, 4]],
            "price": [[6.0, None, 9.0]],
            "action": [["buy", "view", "return"]],
            "target": [50],
        }
    )
    return DatasetDict(train=train, test=test)


def test_event_columns_are_learned_from_training_events_alone(events, tmp_path):
    tokenizer = ElasticItemTokenizer.from_items(INTEGER_IDS, 4, events["train"])
    deviation = np.std([1, 2, 3, 6])
    expected = {
        "action": {"categories": ["add to cart", "buy", "view"]},
        "price": {"mean": 3.0, "deviation": pytest.approx(deviation)},
        "rating": {"categories": [1, 3, 5]},
    }
    assert tokenizer.event_columns == expected and [*tokenizer.event_columns] == [*expected]
    assert tokenizer.event_features == {"action": 3, "price": 0, "rating": 3}
    tokenizer.save_pretrained(tmp_path)
    loaded = pickle.loads(pickle.dumps(ElasticItemTokenizer.from_pretrained(tmp_path)))
    assert loaded.event_columns == tokenizer.event_columns
    tokenized = loaded.tokenize_histories(events)
    for split in tokenized.values():
        for name in expected:
            assert split.features[name] == List(Value("float32"))
    (row,) = tokenized["test"].to_list()
    assert row["action"] == [2, 3, 0] and row["rating"] == [1, 3, 0]
    np.testing.assert_allclose(row["price"], [3 / deviation, 0, 6 / deviation], rtol=1e-6)
    assert tokenized["train"]["rating"][:] == [[3, 2, 0], [1, 3]]
    found = loaded.encode_events({name: events["test"][0][name] for name in ("rating", "action", "price")})
    np.testing.assert_allclose(found, np.stack([row[name] for name in expected], axis=1))
    streamed = IterableDatasetDict(train=events["train"].to_iterable_dataset())
    assert [*loaded.tokenize_histories(streamed)["train"]] == tokenized["train"].to_list()


def test_a_tokenizer_without_event_columns_leaves_them_alone(events, integer_tokenizer):
    assert integer_tokenizer.event_columns == integer_tokenizer.event_features == {}
    tokenized = integer_tokenizer.tokenize_histories(events)
    assert tokenized["train"].column_names == ["user_id", "input_ids"]
    plain = ElasticItemTokenizer.from_items(INTEGER_IDS, 4, events["train"].select_columns(["user_id", "item_ids"]))
    assert "event_columns" not in plain.init_kwargs


def test_bad_event_columns_are_named(events):
    tokenizer = ElasticItemTokenizer.from_items(INTEGER_IDS, 4, events["train"])
    with pytest.raises(
        ValueError, match="split 'test' must have the event columns action, price, rating, found no pri"
    ):
        tokenizer.tokenize_histories(DatasetDict(test=events["test"].remove_columns("price")))
    rows = [*events["train"].to_list(), {**events["train"][1], "rating": [1]}]
    with pytest.raises(ValueError, match="'rating' must have as many values as items, 2 in row 2, found 1"):
        tokenizer.tokenize_histories(DatasetDict(train=Dataset.from_list(rows)))
    rows[2]["rating"] = [1.0, 2.5]
    with pytest.raises(ValueError, match="'rating' must hold integers, found other values: .*2.5.* in row 2"):
        tokenizer.tokenize_histories(DatasetDict(train=Dataset.from_list(rows)))
    with pytest.raises(ValueError, match="event column 'age' must hold lists, found type int64"):
        ElasticItemTokenizer.from_items(INTEGER_IDS, 4, events["train"].add_column("age", [30, 40]))
    columns = {"action": ["buy"], "price": [1], "rating": [5]}
    for changes, message in (
        ({"rating": None}, "event column 'rating' must hold values of one kind, found None"),
        ({"rating": [5, "a"]}, r"event column 'rating' must hold values of one kind, found \[5, 'a'\]"),
        ({"rating": [2**70]}, "event column 'rating' must hold values of one kind, found"),
        ({"price": [True]}, "event column 'price' must hold numbers, found type bool"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode_events({**columns, **changes})
    with pytest.raises(ValueError, match="event column 'price' must be given, found 'action', 'rating'"):
        tokenizer.encode_events({"action": ["buy"], "rating": [5]})
