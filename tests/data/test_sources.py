import bz2
import gzip
import os

import datasets
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from interactions import ROWS, frame, split_rows, write


@pytest.mark.parametrize("source", ["ml-2m", "folder/missing.csv", "a/b/c"])
def test_unknown_source(load, source):
    with pytest.raises(ValueError, match=f"source must be .* found '{source}'"):
        load(source)


# files


def rows_of(user, first_time=0):
    return frame([(user, item, first_time + item) for item in range(3)])


def make_files(folder, names):
    """Write files of one user each, who is named by the position."""
    for user, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain, suffix = os.path.splitext(name)
        pack = {
            ".gz": gzip.compress,
            ".bz2": bz2.compress,
            ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
        }.get(suffix.lower())
        write(folder / "plain.csv", rows_of(user))
        data = (folder / "plain.csv").read_bytes()
        (folder / "plain.csv").unlink()
        path.write_bytes(data if pack is None else pack(data))
    return folder


def users_of(result):
    assert result.counts["num_rows"] == 3 * result.counts["num_users"]
    return result.histories["test"]["user_id"][:]


def test_folder_of_files_in_the_order_of_their_names(tmp_path, load):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "b.csv", frame([("x", 3, 5), (2, 1, 1), (2, 2, 2), (2, 3, 3)]))
    write(folder / "a.csv", frame([("x", 1, 5), ("x", 2, 5)]))
    assert split_rows(load(folder), "test") == [
        {"user_id": "2", "item_ids": [1, 2], "timestamps": [1, 2], "target": 3, "target_timestamp": 3},
        {"user_id": "x", "item_ids": [1, 2], "timestamps": [5, 5], "target": 3, "target_timestamp": 5},
    ]
    write(folder / "c.parquet", frame())
    with pytest.raises(ValueError, match="files of one kind, found .*c.parquet"):
        load(folder)


def test_all_files_of_a_folder_are_read(tmp_path, load):
    names = ["a.csv", "b.CSV", "c.csv.gz", "d.CSV.GZ", "e.csv.bz2", "f.Csv.Zst", "2024/g.csv", "2024/01/h.csv"]
    folder = make_files(tmp_path / "rows", names)
    assert users_of(load(folder)) == list(range(len(names)))
    assert users_of(load(f"{folder}/")) == list(range(len(names)))
    elsewhere = make_files(tmp_path / "elsewhere", ["i.csv"])
    write(elsewhere / "i.csv", rows_of(8))
    (folder / "link").symlink_to(elsewhere)
    assert users_of(load(folder)) == list(range(len(names) + 1))


@pytest.mark.parametrize(
    "name", ["b.csv.zip", "b.xlsx", "b.txt.xz", "b", "b.csv~", "2024/b.dat", "_b.csv", "_old/b.csv"]
)
def test_a_file_of_a_folder_that_is_not_read_is_an_error(tmp_path, load, name):
    folder = make_files(tmp_path / "rows", ["a.csv", name])
    with pytest.raises(ValueError, match=f"rows holds files that are not read, .*{name}"):
        load(folder)


def test_marks_of_other_programs_are_no_rows(tmp_path, load, caplog):
    folder = make_files(tmp_path / "rows", ["a.csv"])
    for name in ("_SUCCESS", "._SUCCESS.crc", ".DS_Store", "_committed_17"):
        (folder / name).write_bytes(b"x")
    assert users_of(load(folder)) == [0]
    assert "hidden" not in caplog.text
    (folder / "._a.csv").write_bytes(b"\0\5")
    assert users_of(load(folder)) == [0]
    assert "rows: leaving out hidden files, ['._a.csv']" in caplog.text


def test_a_cache_in_the_folder_is_no_part_of_it(tmp_path, load):
    folder = make_files(tmp_path / "rows", ["a.csv", "b.csv"])
    for _ in range(2):
        assert users_of(load(folder, cache_dir=folder / "cache")) == [0, 1]


def test_folder_without_files(tmp_path, load):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "_SUCCESS").touch()
    with pytest.raises(ValueError, match="rows must hold files that end in one of .*, found none"):
        load(tmp_path / "rows")


def test_patterns_and_lists(tmp_path, load):
    folder = make_files(tmp_path, ["a-1.csv", "a-2.csv.gz", "b-1.CSV", "s/a-3.csv"])
    for source, users in [
        (f"{folder}/a-*", [0, 1]),
        (f"{folder}/?-1.*", [0, 2]),
        (f"{folder}/**/a-*", [0, 1, 3]),
        ([f"{folder}/s", folder / "a-1.csv"], [0, 3]),
        ((folder / "b-1.CSV", f"{folder}/a-*"), [0, 1, 2]),
    ]:
        assert users_of(load(source)) == users
    (folder / "a-1.csv").rename(folder / "a[1].csv")
    assert users_of(load(f"{folder}/a[1].csv")) == [0]


def test_a_list_is_read_in_its_order(tmp_path, load):
    first, second = (write(tmp_path / f"{name}.csv", frame([(1, name, 5), (1, "y", 6)])) for name in "ba")
    assert split_rows(load([first, second]), "test")[0]["item_ids"] == ["b", "a"]
    assert split_rows(load([second, first]), "test")[0]["item_ids"] == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["z*.csv"], "source must be an existing file or folder, or match one, found .*z.*"),
        (["a.csv", "missing.csv"], "source must be an existing file or folder, or match one, found .*missing.csv"),
        (["a.csv", "*.csv"], "source names .*a.csv more than once"),
        (["a.csv", "c.jsonl"], "files of one kind, found .*c.jsonl, .*a.csv"),
        ([], "source must hold a file"),
    ],
)
def test_wrong_lists(tmp_path, load, names, message):
    make_files(tmp_path, ["a.csv", "b.csv", "c.jsonl"])
    with pytest.raises(ValueError, match=message):
        load([f"{tmp_path}/{name}" for name in names])


# tables


def tables():
    rows = frame()
    pandas = pd.DataFrame(rows.to_dict(as_series=False))
    arrow = pa.table(rows.to_dict(as_series=False))
    dataset = Dataset.from_dict(rows.to_dict(as_series=False))
    order = list(range(10))[::-1]
    return {
        "pandas": pandas,
        "pandas, filtered": pd.concat([pandas.assign(user_id=0), pandas]).query("user_id > 0"),
        "pandas, index": pandas.set_index("user_id"),
        "pandas, nullable": pandas.convert_dtypes(),
        "pandas, mixed column": pandas.assign(note=[1, "x"] * 5),
        "polars": rows,
        "polars, object column": rows.with_columns(pl.Series("note", [object()] * 10, dtype=pl.Object)),
        "arrow": arrow,
        "arrow stream": arrow.to_reader(max_chunksize=3),
        "dataset": dataset,
        "dataset with indices": dataset.select(order).select(order),
        "dataset dict": DatasetDict(train=dataset),
    }


@pytest.mark.parametrize("name", list(tables()))
def test_tables(tmp_path, load, name):
    expected = load(write(tmp_path / "rows.csv", frame()))
    result = load(tables()[name])
    assert result.counts == expected.counts
    assert split_rows(result, "test") == split_rows(expected, "test")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "source must be a path, .*, found builtins.NoneType"),
        ({"user_id": [1]}, "found builtins.dict"),
        ([{"user_id": 1}], "found builtins.list"),
        (frame().lazy(), "found polars.*LazyFrame"),
        (frame().clear(), "DataFrame has no rows"),
        (
            frame().drop("item_id"),
            r"DataFrame: column 'item_id' is missing, found \['user_id', 'timestamp'\]: name it with item_column$",
        ),
        (pd.DataFrame({"user_id": [1.0, None], "item_id": 1, "timestamp": 1}), "DataFrame, row 2: user_id is None"),
        (pd.DataFrame({"user_id": [1, "x"], "item_id": 1, "timestamp": 1}), "DataFrame: .*'x'.* column user_id"),
        (
            DatasetDict(a=Dataset.from_dict({"x": [1]})),
            r"DatasetDict: dataset_split must be one of \['a'\], found 'train'",
        ),
    ],
)
def test_wrong_tables(load, source, message):
    with pytest.raises(ValueError, match=message):
        load(source)


def test_saved_datasets(tmp_path, load):
    dataset = Dataset.from_dict(frame().to_dict(as_series=False))
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict(full=dataset, small=dataset.select([0])).save_to_disk(tmp_path / "two")
    expected = split_rows(load(dataset), "test")
    assert split_rows(load(tmp_path / "one"), "test") == expected
    assert split_rows(load(tmp_path / "two", dataset_split="full"), "test") == expected
    with pytest.raises(ValueError, match=r"two: dataset_split must be one of \['full', 'small'\], found 'train'"):
        load(tmp_path / "two")
    shard = sorted((tmp_path / "one").glob("*.arrow"))[1]
    shard.write_bytes(shard.read_bytes()[:-400])
    with pytest.raises(ValueError, match="one cannot be loaded as a saved dataset"):
        load(tmp_path / "one")
    shard.unlink()
    with pytest.raises(ValueError, match="one cannot be loaded as a saved dataset"):
        load(tmp_path / "one")


# titles, the Hub and the generator


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_titles_from_an_items_file(tmp_path, load, suffix, caplog):
    titles = write(tmp_path / f"items{suffix}", frame([(30, "Thirty"), (10, "Ten"), (99, "?")], ("item_id", "title")))
    result = load(write(tmp_path / "rows.parquet", frame()), items_file=titles)
    assert result.items["title"][:] == ["Ten", None, "Thirty"]
    assert "1 of 3 items have no title" in caplog.text
    strings = write(tmp_path / "strings.parquet", frame().with_columns(pl.col("item_id").cast(pl.String)))
    assert load(strings, items_file=titles).items["title"][:] == result.items["title"][:]


def test_titles_from_what_people_have(tmp_path, load):
    path = tmp_path / "Products.CSV.GZ"
    path.write_bytes(gzip.compress(b"productId;Name;price\n10.0;Ten, or X;5\n20.0;;6\n30.0;Thirty;7\n10.0;ten;5\n"))
    result = load(write(tmp_path / "rows.parquet", frame()), items_file=path)
    assert result.items["title"][:] == ["Ten, or X", None, "Thirty"]
    with pytest.raises(ValueError, match=r"column 'title' is missing, found \['user_id', 'item_id', 'timestamp'\]$"):
        load(tmp_path / "rows.parquet", items_file=tmp_path / "rows.parquet")


def test_titles_of_ids_that_cannot_match(tmp_path, load):
    titles = write(tmp_path / "items.csv", frame([("tt10", "Ten")], ("item_id", "title")))
    with pytest.raises(ValueError, match="titles' item ids are not of the interactions' type int64"):
        load(write(tmp_path / "rows.parquet", frame()), items_file=titles)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_titles_from_a_column_and_named_columns(tmp_path, load, suffix):
    titles = [None, "Ten", "ten", "Twenty", "20", "Thirty", None, "30", None, None]
    table = frame(ROWS, ("who", "what", "when")).with_columns(name=pl.Series(titles))
    columns = {"user_column": "who", "item_column": "what", "timestamp_column": "when", "title_column": "name"}
    result = load(write(tmp_path / f"rows{suffix}", table), **columns)
    assert result.items["title"][:] == ["Ten", "Twenty", "Thirty"]
    assert [row["target"] for row in split_rows(result, "test")] == [20, 10, 30]


def test_hub_dataset(load, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_dict(frame(ROWS, ("user", "thing", "timestamp")).to_dict(as_series=False))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"dataset_config_name": "small", "dataset_split": "full", "user_column": "user"}
    result = load("org/name", item_column="thing", **hub)
    assert calls == [(("org/name", "small"), {"split": "full"})]
    assert [row["target"] for row in split_rows(result, "test")] == [20, 10, 30]
    with pytest.raises(ValueError, match="org/name: column 'item_id' is missing"):
        load("org/name", **hub)


def test_synthetic(load):
    result = load("synthetic", k_core=5)
    assert result.counts["num_users"] == len(result.histories["train"]) > 0
    assert None not in result.items["title"][:]
