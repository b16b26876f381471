import sys
import types

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic_hf.data.item_table import add_text_vectors, item_columns, read_item_table


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_files_are_tables_with_item_ids(tmp_path, suffix):
    frame = pl.DataFrame({"sku": [3, 1], "brand": ["a, b", None], "price": [1.5, None]})
    path = tmp_path / f"items{suffix}"
    if suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if suffix == ".tsv" else ",")
    table = read_item_table(path, ["brand"])
    assert table.to_pydict() == {"item_id": [3, 1], "brand": ["a, b", None], "price": [1.5, None]}


def test_ids_of_texts_are_integers_where_they_are_written_as_such(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,code\n007,1\n1,2\n")
    assert read_item_table(tmp_path / "items.csv")["item_id"].to_pylist() == ["007", "1"]


def test_files_are_of_the_kinds_that_their_names_and_headers_say(tmp_path):
    frame = pl.DataFrame({"sku": [3, 1], "brand": ["a", "b"]})
    frame.write_parquet(tmp_path / "a.csv.parquet")
    frame.write_parquet(tmp_path / "b.pq")
    frame.write_csv(tmp_path / "C.CSV")
    frame.write_csv(tmp_path / "d.csv", separator=";")
    for name in ("a.csv.parquet", "b.pq", "C.CSV", "d.csv"):
        assert read_item_table(tmp_path / name).to_pydict() == {"item_id": [3, 1], "brand": ["a", "b"]}
        assert item_columns(tmp_path / name) == ["sku", "brand"]


def test_lists_and_vectors_come_from_parquet(tmp_path):
    table = pa.table(
        {"item_id": [1], "tags": [["a", "b"]], "vector": pa.array([[0.5, 1.0]], pa.list_(pa.float16(), 2))}
    )
    pq.write_table(table, tmp_path / "items.parquet")
    assert read_item_table(tmp_path / "items.parquet").equals(table)


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="items_file must be an existing .parquet, .csv or .tsv file, found none at"):
        read_item_table(tmp_path / "items.csv")
    (tmp_path / "items.json").write_text("{}")
    with pytest.raises(
        ValueError, match="items_file must be an existing .parquet, .csv or .tsv file, found another at"
    ):
        read_item_table(tmp_path / "items.json")
    (tmp_path / "items.csv").write_text("item_id,price\n1,2\n3\n")
    with pytest.raises(ValueError, match="items.csv: .*Expected 2 columns, got 1"):
        read_item_table(tmp_path / "items.csv")
    (tmp_path / "items.csv").write_text("item_id,price\n1,2\n")
    with pytest.raises(ValueError, match="items.csv: column 'brand' is missing, found"):
        read_item_table(tmp_path / "items.csv", ["brand"])
    (tmp_path / "items.csv").write_text("brand,price\n1,2\n")
    with pytest.raises(ValueError, match="items.csv: column 'item_id' is missing"):
        read_item_table(tmp_path / "items.csv")


class SentenceTransformer:
    """What is used of sentence-transformers: texts to vectors of length 1."""

    def __init__(self, name):
        assert name == "a/model"

    def encode(self, texts, normalize_embeddings):
        assert normalize_embeddings
        vectors = np.array([[len(text), text.count("a"), 1] for text in texts], float)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_texts_become_vectors(monkeypatch):
    module = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    table = pa.table({"item_id": [1, 2, 3], "title": ["banana", None, "kiwi"]})
    added = add_text_vectors(table, "title", "a/model")
    assert added["title_vector"].type == pa.list_(pa.float32(), 3)
    first, missing, last = added["title_vector"].to_pylist()
    np.testing.assert_allclose(first, np.array([6, 3, 1]) / np.sqrt(46), rtol=1e-6)
    np.testing.assert_allclose(last, np.array([4, 0, 1]) / np.sqrt(17), rtol=1e-6)
    assert missing is None and added.drop_columns("title_vector").equals(table)
    with pytest.raises(ValueError, match="items must have no column 'title_vector'"):
        add_text_vectors(added, "title", "a/model")
    with pytest.raises(ValueError, match="text_column 'tags' must hold strings, found list"):
        add_text_vectors(table.append_column("tags", pa.array([["a"]] * 3)), "tags", "a/model")
    with pytest.raises(ValueError, match="items: column 'name' is missing"):
        add_text_vectors(table, "name", "a/model")


def test_a_missing_sentence_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="text_model needs sentence-transformers: pip install"):
        add_text_vectors(pa.table({"item_id": [1], "title": ["a"]}), "title", "a/model")
