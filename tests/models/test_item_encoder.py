import datetime
import logging

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from elastic_hf import ElasticItemTokenizer
from elastic_hf.models import item_encoder
from elastic_hf.models.item_encoder import ItemEncoder, check_features
from factories import ITEM_FEATURES, item_table


NAN, INF = float("nan"), float("inf")


def learn(table, columns):
    checked = check_features(table, columns)
    encoder = ItemEncoder.learn(checked, columns)
    return encoder, encoder.encode(encoder.check(table))


def of(values, dtype=None, name="x"):
    return pa.table({"item_id": [f"sku {i}" for i in range(len(values))], name: pa.array(values, dtype)})


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (["b", None, "a", "b"], pa.string(), [[2], [0], [1], [2]]),
        (["b", None, "a", "b"], pa.dictionary(pa.int8(), pa.string()), [[2], [0], [1], [2]]),
        ([True, None, False], pa.bool_(), [[2], [0], [1]]),
        ([["b", "a"], None, [], ["b"]], pa.list_(pa.string()), [[2, 1], [0, 0], [0, 0], [2, 0]]),
        ([[7, 30], [], [30]], pa.large_list(pa.int64()), [[2, 1], [0, 0], [1, 0]]),
        ([["b", "a"], None], pa.list_(pa.string(), 2), [[2, 1], [0, 0]]),
    ],
)
def test_categories_are_indices_of_their_sorted_vocabulary(values, dtype, expected):
    encoder, encoded = learn(of(values, dtype), ["x"])
    assert encoded["x"].dtype == torch.int32 and encoded["x"].tolist() == expected
    assert encoder.features == {"x": {"kind": "categories", "size": 2, "length": len(expected[0])}}


def test_integers_are_numbers_or_categories():
    table = of([30, 7, 30, None])
    assert learn(table, ["x"])[0].features["x"] == {"kind": "number", "size": 1}
    _, encoded = learn(table, ["x:categories"])
    assert encoded["x"].tolist() == [[1], [2], [1], [0]]


@pytest.mark.parametrize("dtype", [pa.float64(), pa.float32(), pa.int16(), pa.decimal128(5, 2)])
def test_numbers_are_standard_deviations_from_the_mean(dtype):
    _, encoded = learn(of([1, None, 3, 8]), ["x"])
    deviation = np.std([1, 3, 8])
    torch.testing.assert_close(
        encoded["x"][:, 0], torch.tensor([-3 / deviation, 0, -1 / deviation, 4 / deviation]).float()
    )


@pytest.mark.parametrize("max_components", [128, 3])
@pytest.mark.parametrize("dtype", [pa.list_(pa.float64()), pa.list_(pa.float16(), 5), pa.large_list(pa.float32())])
def test_vectors_are_white_and_of_unit_length_on_average(dtype, max_components, monkeypatch):
    monkeypatch.setattr(item_encoder, "MAX_COMPONENTS", max_components)
    generator = np.random.default_rng(0)
    vectors = 3 + generator.normal(size=(400, 5)) @ generator.normal(size=(5, 5))
    table = of([*vectors.tolist(), None], pa.list_(pa.float64()))
    table = table.cast(pa.schema({"item_id": pa.string(), "x": dtype}))
    encoder, encoded = learn(table, ["x"])
    size = min(5, max_components)
    assert encoder.features["x"] == {"kind": "vector", "size": size}
    known, unknown = encoded["x"][:-1].double(), encoded["x"][-1]
    torch.testing.assert_close(known.T @ known / 400, torch.eye(size).double() / size, atol=1e-4, rtol=0)
    torch.testing.assert_close(known.mean(dim=0), torch.zeros(size).double(), atol=1e-4, rtol=0)
    assert not unknown.any()


def test_the_rank_is_not_exceeded():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 4)) @ generator.normal(size=(4, 5))
    assert learn(of(vectors.tolist()), ["x"])[0].features["x"] == {"kind": "vector", "size": 4}


def test_items_that_come_later_are_encoded_alike(tmp_path, caplog):
    table = item_table(range(28))
    encoder, encoded = learn(table, ITEM_FEATURES)
    encoder.save(tmp_path / "features.safetensors")
    loaded = ItemEncoder.load(tmp_path / "features.safetensors")
    assert loaded.features == encoder.features
    some = loaded.encode(loaded.check(table.take([9, 2, 27])))
    for name, values in encoded.items():
        assert torch.equal(some[name], values[[9, 2, 27]])
    with caplog.at_level(logging.WARNING):
        new = pa.table({**{name: table[name][:2] for name in table.column_names}, "brand": ["brand 1", "new"]})
        assert loaded.encode(loaded.check(new))["brand"].tolist() == [[2], [0]]
    assert "'brand': 1 categories are not in the vocabulary and left out, such as 'new'" in caplog.text
    save_file({}, tmp_path / "other.safetensors", metadata={"some": "thing"})
    with pytest.raises(ValueError, match="other.safetensors must hold item_features and vocabularies, found some"):
        ItemEncoder.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("values", "columns", "message"),
    [
        ([1.0, NAN], ["x"], r"'x' must be finite .*, found nan in row 2 \(item 'sku 1'\)"),
        ([INF, 1.0], ["x"], r"'x' must be finite .*, found inf in row 1 \(item 'sku 0'\)"),
        ([["a"], ["b", None]], ["x"], r"'x' must hold no null in a list, found one in row 2 \(item 'sku 1'\)"),
        (
            [None, [1.0, 2.0], [1.0]],
            ["x"],
            r"'x' must hold vectors of 2 numbers, found one of 1 in row 3 .item 'sku 2'",
        ),
        ([None, [1.0, NAN]], ["x"], r"'x' must hold finite numbers .* in row 2 \(item 'sku 1'\)"),
        ([[1.0, None], [1.0, 2.0]], ["x"], r"'x' must hold finite numbers .* in row 1 \(item 'sku 0'\)"),
        ([[1.0], [1.0]], ["x"], "'x' must have different vectors, found the same in all items"),
        ([2, 2, None], ["x"], "'x' must have different numbers, found 1"),
        (["a", None], ["x:number"], "'x' must hold values like double, found string"),
        (["a", None], ["x:vector"], "'x' must hold lists of numbers, found the type string"),
        ([None, None], ["x:vector"], "'x' must hold lists of numbers, found the type null"),
        ([[], []], ["x:categories"], "'x' must have a category, found none in 2 items"),
        ([datetime.date(2020, 1, 1)], ["x"], "'x' must be categories, numbers or vectors, found the type date32"),
        (["a"], ["y"], "item features must be columns of the items, x, found 'y'"),
        (["a"], ["item_id"], "item features must be columns of the items, x, found 'item_id'"),
        (["a"], ["x", "x:categories"], "item features must be named once, found 'x' twice"),
    ],
)
def test_broken_features_are_refused_by_column_and_row(values, columns, message):
    with pytest.raises(ValueError, match=message):
        learn(of(values), columns)


def test_vectors_of_new_items_have_the_size_of_the_others():
    encoder, _ = learn(of([[1.0, 2.0], [3.0, 5.0]]), ["x"])
    with pytest.raises(ValueError, match="'x' must hold vectors of 2 numbers, found one of 3 in row 1"):
        encoder.check(of([[1.0, 2.0, 3.0]]))


@pytest.mark.parametrize("as_table", [pl.from_arrow, lambda table: Dataset(table), lambda table: table])
def test_a_catalogue_takes_its_rows_in_its_order(as_table):
    table = item_table(range(28))
    tokenizer = ElasticItemTokenizer.from_items([9, 2, 27], model_max_length=5)
    features = tokenizer.learn_item_features(as_table(table), ITEM_FEATURES)
    encoded = tokenizer.encode_item_features(as_table(table))
    of_rows, expected = learn(table.take([9, 2, 27]), ITEM_FEATURES)
    assert features == of_rows.features
    for name in ITEM_FEATURES:
        torch.testing.assert_close(encoded[name], expected[name])
    assert features["price"] == {"kind": "number", "size": 1}


def test_catalogues_and_tables_that_do_not_belong_together_are_refused():
    tokenizer = ElasticItemTokenizer.from_items([9, 2, 40, 41], model_max_length=5)
    with pytest.raises(ValueError, match="item features must be learned first"):
        tokenizer.encode_item_features(item_table(range(28)))
    with pytest.raises(ValueError, match="for each of the 4 items .* found none for 2 of them, such as 40"):
        tokenizer.learn_item_features(item_table(range(28)), ITEM_FEATURES)
    with pytest.raises(ValueError, match="item ids must be unique, found 2 more than once"):
        tokenizer.learn_item_features(item_table([9, 2, 2, 40, 41]), ITEM_FEATURES)
    with pytest.raises(ValueError, match="items must have the column 'item_id'"):
        tokenizer.learn_item_features(item_table([9]).drop_columns("item_id"), ITEM_FEATURES)
    assert tokenizer.item_features is None
