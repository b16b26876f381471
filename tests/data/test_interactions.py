import hashlib
import http.server
import io
import json
import logging
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import polars as pl
import pytest

from elastic_hf.data import interactions
from elastic_hf.data.interactions import load_histories


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "run_benchmark.py"

# Three users, interleaved and not in time order; user 2 has two interactions at time 5.
ROWS = [
    (2, 30, 5),
    (1, 10, 1),
    (2, 10, 5),
    (1, 20, 9),
    (2, 20, 2),
    (1, 30, 4),
    (3, 20, 7),
    (3, 30, 8),
    (3, 10, 6),
    (1, 10, 8),
]


def frame(rows=ROWS, columns=("user_id", "item_id", "timestamp")):
    return pl.DataFrame(rows, schema=list(columns), orient="row")


def write(path, table):
    if path.suffix == ".parquet":
        table.write_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        table.write_ndjson(path)
    else:
        table.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.fixture
def load(tmp_path):
    """load_histories with a cache of its own and, unless said otherwise, no k-core filter."""

    def load(source, **kwargs):
        return load_histories(source, **{"k_core": 0, "cache_dir": tmp_path / "cache", **kwargs})

    return load


def split_rows(result, split):
    return result.histories[split].to_list()


def reference(rows, k_core):
    """The rules of load_histories, in loops: user -> [(item, time), ...], and the numbers of rows dropped."""
    distinct = list(dict.fromkeys(rows))
    kept = distinct
    while True:
        users, items = Counter(row[0] for row in kept), Counter(row[1] for row in kept)
        strong = [row for row in kept if users[row[0]] >= k_core and items[row[1]] >= k_core]
        if strong == kept:
            break
        kept = strong
    histories = defaultdict(list)
    for user, item, time in kept:
        histories[user].append((item, time))
    for history in histories.values():
        history.sort(key=lambda pair: pair[1])  # stable
    return dict(sorted(histories.items())), len(rows) - len(distinct), len(distinct) - len(kept)


def random_rows(seed, make_user=int, make_item=int, make_time=int):
    rng = random.Random(seed)
    return [
        (make_user(rng.randrange(25)), make_item(int(rng.paretovariate(0.7)) % 40), make_time(rng.randrange(60)))
        for _ in range(600)
    ]


# histories and splits


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json", ".jsonl"])
def test_leave_one_out_by_hand(tmp_path, load, suffix):
    result = load(write(tmp_path / f"rows{suffix}", frame()))
    assert split_rows(result, "train") == [
        {"user_id": 1, "item_ids": [10, 30], "timestamps": [1, 4]},
        {"user_id": 2, "item_ids": [20], "timestamps": [2]},
        {"user_id": 3, "item_ids": [10], "timestamps": [6]},
    ]
    assert split_rows(result, "validation") == [
        {"user_id": 1, "item_ids": [10, 30], "timestamps": [1, 4], "target": 10},
        {"user_id": 2, "item_ids": [20], "timestamps": [2], "target": 30},
        {"user_id": 3, "item_ids": [10], "timestamps": [6], "target": 20},
    ]
    assert split_rows(result, "test") == [
        {"user_id": 1, "item_ids": [10, 30, 10], "timestamps": [1, 4, 8], "target": 20},
        {"user_id": 2, "item_ids": [20, 30], "timestamps": [2, 5], "target": 10},
        {"user_id": 3, "item_ids": [10, 20], "timestamps": [6, 7], "target": 30},
    ]
    # of 10 rows four are in train: items 10 (twice), 20 and 30
    assert result.items.to_list() == [
        {"item_id": 10, "title": None, "count": 2},
        {"item_id": 20, "title": None, "count": 1},
        {"item_id": 30, "title": None, "count": 1},
    ]
    assert result.counts == {
        "num_users": 3,
        "num_items": 3,
        "num_interactions": 10,
        "num_duplicates": 0,
        "num_filtered": 0,
    }


@pytest.mark.parametrize(
    "makers",
    [
        {},
        {"make_item": lambda item: f"item {item} ü", "make_time": lambda time: time / 4},
        {"make_user": lambda user: f"u{user}"},
    ],
    ids=["integers", "string items and fractions of a second", "string users"],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("users_per_batch", [7, 1000])
def test_equal_to_loops(tmp_path, load, monkeypatch, makers, suffix, users_per_batch):
    monkeypatch.setattr(interactions, "USERS_PER_BATCH", users_per_batch)
    rows = random_rows(0, **makers)
    result = load(write(tmp_path / f"rows{suffix}", frame(rows)), k_core=6)
    histories, num_duplicates, num_filtered = reference(rows, 6)
    assert num_duplicates and num_filtered
    assert split_rows(result, "test") == [
        {
            "user_id": user,
            "item_ids": [item for item, _ in history[:-1]],
            "timestamps": [time for _, time in history[:-1]],
            "target": history[-1][0],
        }
        for user, history in histories.items()
    ]
    train = [item for history in histories.values() for item, _ in history[:-2]]
    assert [item for ids in result.histories["train"]["item_ids"] for item in ids] == train
    everything = {item for history in histories.values() for item, _ in history}
    assert result.items["item_id"][:] == sorted(everything)
    assert dict(zip(result.items["item_id"], result.items["count"], strict=True)) == {
        item: Counter(train)[item] for item in everything
    }
    assert result.counts == {
        "num_users": len(histories),
        "num_items": len(everything),
        "num_interactions": sum(map(len, histories.values())),
        "num_duplicates": num_duplicates,
        "num_filtered": num_filtered,
    }


def test_temporal_split_by_hand(tmp_path, load, caplog):
    times = {"a": [0, 1, 2, 6, 8], "b": [3, 4, 5], "c": [7, 9, 9.5]}
    rows = [(user, f"{user}{time}", time) for user, user_times in times.items() for time in map(float, user_times)]
    path = write(tmp_path / "rows.parquet", frame(rows))
    result = load(path, split="temporal", validation_fraction=2 / 11, test_fraction=3 / 11)
    # the sorted times are 0 1 2 3 4 5 6 7 8 9 9.5: the quantiles 6/11 and 8/11 of 0..10, rounded up, are 6 and 8
    assert split_rows(result, "train") == [
        {"user_id": "a", "item_ids": ["a0.0", "a1.0", "a2.0"], "timestamps": [0, 1, 2]},
        {"user_id": "b", "item_ids": ["b3.0", "b4.0", "b5.0"], "timestamps": [3, 4, 5]},
    ]
    assert split_rows(result, "validation") == [
        {"user_id": "a", "item_ids": ["a0.0", "a1.0", "a2.0"], "timestamps": [0, 1, 2], "target": "a6.0"}
    ]
    assert split_rows(result, "test") == [
        {"user_id": "a", "item_ids": ["a0.0", "a1.0", "a2.0", "a6.0"], "timestamps": [0, 1, 2, 6], "target": "a8.0"},
        {"user_id": "c", "item_ids": ["c7.0"], "timestamps": [7], "target": "c9.0"},
    ]
    assert "validation leaves out 1 users" in caplog.text


def test_temporal_split_tells_the_windows_apart(tmp_path, load):
    # the quantiles 0.4 and 0.7 of the times 0..10 are 4 and 7: b has nothing between them and a nothing after
    rows = [("a", time, time) for time in (0, 1, 4, 5, 6)] + [("b", time, time) for time in (2, 3, 7, 8, 9, 10)]
    path = write(tmp_path / "rows.parquet", frame(rows))
    result = load(path, split="temporal", validation_fraction=0.3, test_fraction=0.3)
    assert result.histories["train"]["user_id"][:] == ["a", "b"]
    assert [(row["user_id"], row["target"]) for row in split_rows(result, "validation")] == [("a", 4)]
    assert [(row["user_id"], row["target"]) for row in split_rows(result, "test")] == [("b", 7)]


def test_temporal_split_never_trains_on_the_future(tmp_path, load):
    path = write(tmp_path / "rows.parquet", frame(random_rows(1)))
    result = load(path, split="temporal", validation_fraction=0.2, test_fraction=0.2)
    train_end = max(time for times in result.histories["train"]["timestamps"] for time in times)
    full = {user: dict(enumerate(history)) for user, history in reference(random_rows(1), 0)[0].items()}
    for name in ("validation", "test"):
        for row in split_rows(result, name):
            item, time = full[row["user_id"]][len(row["item_ids"])]
            assert row["target"] == item and time > train_end


def test_source_without_time_keeps_order_and_repeats(tmp_path, load):
    path = tmp_path / "rows.txt"
    path.write_text("7 1\n3 2\n7 1\n7 5\n3 2\n7 4\n3 9\n")
    result = load(path)
    assert split_rows(result, "test") == [
        {"user_id": 3, "item_ids": [2, 2], "target": 9},
        {"user_id": 7, "item_ids": [1, 1, 5], "target": 4},
    ]
    assert result.counts["num_duplicates"] == 0
    with pytest.raises(ValueError, match="needs timestamps"):
        load(path, split="temporal")


def test_duplicates_are_counted_and_reported(tmp_path, load, caplog):
    # a repeat with another item in between at the same time, and the same item at another time
    rows = [(1, 10, 5), (1, 20, 5), (1, 10, 5), (1, 10, 6), (1, 20, 7)]
    with caplog.at_level(logging.WARNING):
        result = load(write(tmp_path / "rows.csv", frame(rows)))
    assert split_rows(result, "test")[0]["item_ids"] == [10, 20, 10]
    assert result.counts["num_duplicates"] == 1
    assert "dropped 1 rows" in caplog.text


# ids and timestamps


def test_ids_stay_what_they_are(tmp_path, load):
    leading_zeros = [("a b", item, time) for time, item in enumerate(["007", "7", "12"])]
    items = load(write(tmp_path / "zeros.csv", frame(leading_zeros))).items
    assert items["item_id"][:] == ["007", "12", "7"]

    # the first of many rows do not decide the type
    late = [(1, str(item), item) for item in range(5_000)] + [(1, "NA", 5_000)]
    assert "NA" in load(write(tmp_path / "late.csv", frame(late))).items["item_id"][:]

    digits = [("1", "5", 0), ("1", "6", 1), ("1", "7", 2)]
    assert load(write(tmp_path / "digits.parquet", frame(digits))).items["item_id"][:] == ["5", "6", "7"]
    assert load(write(tmp_path / "digits.csv", frame(digits))).items["item_id"][:] == [5, 6, 7]

    categories = frame(digits).with_columns(pl.col("item_id").cast(pl.Categorical), pl.col("user_id").cast(pl.UInt16))
    result = load(write(tmp_path / "categories.parquet", categories))
    assert result.items["item_id"][:] == ["5", "6", "7"]
    assert result.histories["train"].features["user_id"] == datasets.Value("int64")


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["2020-01-01", "2020-01-02T00:00:01", "2020-01-03 00:00:00"], [1577836800, 1577923201]),
        (["2020-01-01T00:00:00Z", "2020-01-01T02:00:00+01:00", "2021-01-01T00:00:00Z"], [1577836800, 1577840400]),
        (["1970-01-01T00:00:01.25", "1970-01-02", "1970-01-03"], [1.25, 86400.0]),
        (["1", "2", "10"], [1, 2]),
        (["1.5", "2", "10"], [1.5, 2.0]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_timestamps_as_strings(tmp_path, load, times, expected, suffix):
    path = write(tmp_path / f"rows{suffix}", frame([(1, item, time) for item, time in enumerate(times)]))
    found = split_rows(load(path), "test")[0]["timestamps"]
    assert found == expected and [type(time) for time in found] == [type(time) for time in expected]


@pytest.mark.parametrize("type_", [pl.Datetime("ms"), pl.Datetime("ns", "Europe/Berlin"), pl.Date])
def test_timestamps_as_dates(tmp_path, load, type_):
    seconds = pl.Series([86_400, 2 * 86_400, 3 * 86_400])
    times = pl.from_epoch(seconds, "s")
    times = times.dt.replace_time_zone("UTC") if getattr(type_, "time_zone", None) else times
    table = pl.DataFrame({"user_id": [1] * 3, "item_id": [1, 2, 3], "timestamp": times.cast(type_)})
    assert split_rows(load(write(tmp_path / "rows.parquet", table)), "test")[0]["timestamps"] == [86_400, 172_800]


# errors

HEADER = "user_id,item_id,timestamp\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "user_id,item_id\n1,2\n", r"rows\.csv: column 'timestamp' is missing, found \['user_id'"),
        ("rows.csv", "user_id,item_id,timestamp,item_id\n1,2,3,4\n", "column 'item_id' appears more than once"),
        ("rows.csv", "", "rows.csv is empty"),
        ("rows.csv", HEADER, "rows.csv has no rows"),
        ("rows.csv", HEADER + "1,2,3\n1,2\n", "line 3: .*Expected 3 columns, got 2: 1,2"),
        ("rows.csv", HEADER + "\n1,2,3\n\n1,2,3,4\n", "line 5: .*Expected 3 columns, got 4"),
        ("rows.csv", HEADER + "1,2,3\n1,2,x\n", "line 3: timestamp is 'x'"),
        ("rows.csv", HEADER + "1,2,2020-01-01\n1,2,2020-01-02\n1,2,soon\n", "line 4: timestamp is 'soon'"),
        ("rows.csv", HEADER + "1,2,2020-01-01\n1,2,2020-13-01\n", "rows.csv: column 'timestamp': .*2020-13-01"),
        ("rows.csv", HEADER + '1,"2\n2",3\n,2,3\n', "line 4: user_id is None, expected a value"),
        ("rows.csv", HEADER + "1,,3\n", "line 2: item_id is None"),
        ("rows.csv", HEADER + "1,2,\n1,2,3\n", "line 2: timestamp is None"),
        ("rows.csv", HEADER + "1,2,3\n1,2,-3\n", "line 3: timestamp is -3, expected a finite"),
        ("rows.csv", HEADER + "1,2,3\n1,2,NaN\n", "line 3: timestamp is nan"),
        ("rows.csv", HEADER + "1,2,inf\n", "line 2: timestamp is inf"),
        ("rows.txt", "1 2\n1 2 3\n", "line 2: .*Expected 2 columns, got 3"),
        ("rows.txt", "1 2\n1\n", "line 2: .*Expected 2 columns, got 1"),
        ("rows.jsonl", '{"user_id": 1}\n{"user_id":\n', "line 2: "),
        ("rows.jsonl", "[1]\n", "line 1: expected one JSON object"),
        ("rows.jsonl", '{"user_id": 1, "item_id": 1}\n', "column 'timestamp' is missing"),
        ("rows.jsonl", '\n{"user_id": null, "item_id": 1, "timestamp": 1}\n', "line 2: user_id is None"),
        ("rows.jsonl", '{"user_id": "", "item_id": 1, "timestamp": 1}\n', "line 1: user_id is '', expected a value"),
        ("rows.jsonl", '{"user_id": 1.5, "item_id": 1, "timestamp": 1}\n', "'user_id' must hold integers or strings"),
        ("rows.parquet", "not a parquet file", "rows.parquet: "),
        ("rows.xlsx", "x", "must end in one of"),
    ],
)
def test_errors_name_file_line_and_column(tmp_path, load, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert not list(tmp_path.glob("cache/*"))


def test_text_that_is_not_utf_8(tmp_path, load):
    path = tmp_path / "rows.csv"
    path.write_bytes((HEADER + "1,2,3\n1,é,4\n").encode("latin-1"))
    with pytest.raises(ValueError, match="rows.csv, line 3: .*UTF8"):
        load(path)


def test_ids_beyond_64_bits(tmp_path, load):
    table = frame().with_columns(pl.lit(2**63).cast(pl.UInt64).alias("item_id"))
    with pytest.raises(ValueError, match="rows.parquet: column 'item_id': "):
        load(write(tmp_path / "rows.parquet", table))


def test_parquet_errors_name_the_row(tmp_path, load):
    path = write(tmp_path / "rows.parquet", frame([(1, 2, 3.0), (1, 3, float("nan")), (1, 4, 5.0)]))
    with pytest.raises(ValueError, match="row 2: timestamp is nan"):
        load(path)
    path = write(tmp_path / "rows.parquet", frame([(1, 2, 3), (None, 3, 4)]))
    with pytest.raises(ValueError, match="row 2: user_id is None"):
        load(path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "random"}, "split must be .* found 'random'"),
        ({"k_core": -1}, "k_core must be .* found -1"),
        ({"split": "temporal", "test_fraction": 0}, "validation_fraction and test_fraction"),
        ({"split": "temporal", "test_fraction": 0.95}, "validation_fraction and test_fraction"),
        ({"title_column": "title", "items_file": "items.csv"}, "only one of them"),
        ({"timestamp_column": "when"}, "column 'when' is missing"),
        ({"data_dir": "."}, "data_dir is for MovieLens"),
        ({"items_file": "missing.csv"}, "missing.csv is not a file"),
    ],
)
def test_bad_arguments(tmp_path, load, kwargs, message):
    path = write(tmp_path / "rows.csv", frame())
    with pytest.raises(ValueError, match=message):
        load(path, **kwargs)


@pytest.mark.parametrize("source", ["ml-2m", "folder/missing.csv", "a/b/c"])
def test_unknown_source(load, source):
    with pytest.raises(ValueError, match=f"source must be .* found '{source}'"):
        load(source)


def test_too_few_interactions_are_left(tmp_path, load):
    path = write(tmp_path / "rows.csv", frame([*ROWS, (4, 10, 1), (4, 20, 2), (5, 10, 1)]))
    with pytest.raises(ValueError, match="2 of 5 users have fewer than 3 .* set k_core to 3"):
        load(path)
    assert load(path, k_core=3).counts["num_users"] == 3
    with pytest.raises(ValueError, match="none of 13 interactions is left with k_core=20"):
        load(path, k_core=20)


# sources


def test_folder_of_files_in_the_order_of_their_names(tmp_path, load):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "b.csv", frame([("x", 3, 5), (2, 1, 1), (2, 2, 2), (2, 3, 3)]))
    write(folder / "a.csv", frame([("x", 1, 5), ("x", 2, 5)]))
    assert split_rows(load(folder), "test") == [
        {"user_id": "2", "item_ids": [1, 2], "timestamps": [1, 2], "target": 3},
        {"user_id": "x", "item_ids": [1, 2], "timestamps": [5, 5], "target": 3},
    ]
    write(folder / "c.parquet", frame())
    with pytest.raises(ValueError, match="files of one kind .*c.parquet"):
        load(folder)
    for path in folder.iterdir():
        path.unlink()
    write(folder / "a.parquet", frame([(1, 2, 3)]))
    write(folder / "b.parquet", frame([("1", 2, 3)]))
    with pytest.raises(ValueError, match="differ in type"):
        load(folder)


MOVIELENS_FILES = {
    "ml-100k": {
        "u.data": "".join(f"{user}\t{item}\t3\t{time}\n" for user, item, time in ROWS),
        "u.item": "10|Café (1995)|01-Jan-1995||http://x|0\n20|A, B: C (1996)||\n30|Three (1997)|\n40|Not seen|\n",
    },
    "ml-1m": {
        "ratings.dat": "".join(f"{user}::{item}::3::{time}\n" for user, item, time in ROWS),
        "movies.dat": "10::Café (1995)::Drama\n20::A, B: C (1996)::Drama|War\n30::Three (1997)::War\n",
    },
    "ml-latest-small": {
        "ratings.csv": "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},3.5,{t}\n" for u, i, t in ROWS),
        "movies.csv": 'movieId,title,genres\n10,Café (1995),Drama\n20,"A, B: C (1996)",War\n30,Three (1997),War\n',
    },
}


def write_movielens(folder, name, encoding="utf-8"):
    folder.mkdir(parents=True)
    for filename, text in MOVIELENS_FILES[name].items():
        (folder / filename).write_bytes(text.encode(encoding))
    return folder


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("ml-100k", "latin-1"), ("ml-1m", "latin-1"), ("ml-1m", "utf-8"), ("ml-latest-small", "utf-8")],
)
def test_movielens_layouts(tmp_path, load, name, encoding):
    expected = load(write(tmp_path / "rows.csv", frame()))
    folder = write_movielens(tmp_path / "raw", name, encoding)
    for result in (load(folder), load(name, data_dir=folder)):
        for split in ("train", "validation", "test"):
            assert split_rows(result, split) == split_rows(expected, split)
        assert result.items["title"][:] == ["Café (1995)", "A, B: C (1996)", "Three (1997)"]


def test_movielens_errors_name_the_line(tmp_path, load):
    folder = write_movielens(tmp_path / "dat", "ml-1m")
    (folder / "ratings.dat").write_text("1::2::3::4\n1::2::3\n")
    with pytest.raises(ValueError, match=r"ratings\.dat, line 2"):
        load(folder)
    folder = write_movielens(tmp_path / "data", "ml-100k")
    (folder / "u.item").write_text("10|One|\n20\n")
    with pytest.raises(ValueError, match=r"u\.item, line 2"):
        load(folder)
    (folder / "u.item").unlink()
    with pytest.raises(ValueError, match="must hold the raw files of a MovieLens release"):
        load("ml-100k", data_dir=folder)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_titles_from_an_items_file(tmp_path, load, suffix, caplog):
    titles = write(tmp_path / f"items{suffix}", frame([(30, "Thirty"), (10, "Ten"), (99, "?")], ("item_id", "title")))
    result = load(write(tmp_path / "rows.parquet", frame()), items_file=titles)
    assert result.items["title"][:] == ["Ten", None, "Thirty"]
    assert "1 of 3 items have no title" in caplog.text
    strings = write(tmp_path / "strings.parquet", frame().with_columns(pl.col("item_id").cast(pl.String)))
    assert load(strings, items_file=titles).items["title"][:] == result.items["title"][:]


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
        return datasets.Dataset.from_dict(frame(ROWS, ("user", "item", "timestamp")).to_dict(as_series=False))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"dataset_config_name": "small", "dataset_split": "full", "user_column": "user"}
    result = load("org/name", item_column="item", **hub)
    assert calls == [(("org/name", "small"), {"split": "full"})]
    assert [row["target"] for row in split_rows(result, "test")] == [20, 10, 30]
    with pytest.raises(ValueError, match="org/name: column 'item_id' is missing"):
        load("org/name", **hub)


def test_synthetic(load):
    result = load("synthetic", k_core=5)
    assert result.counts["num_users"] == len(result.histories["train"]) > 0
    assert None not in result.items["title"][:]


# download


@pytest.fixture
def movielens_server(tmp_path, monkeypatch):
    """Serves ml-1m.zip on the loopback interface, with a file that must not be unpacked."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zip_file:
        for filename, text in MOVIELENS_FILES["ml-1m"].items():
            zip_file.writestr(f"ml-1m/{filename}", text)
        zip_file.writestr("../outside.txt", "x")
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "ml-1m.zip").write_bytes(archive.getvalue())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "www")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(interactions, "MOVIELENS_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setitem(interactions.MOVIELENS_SHA256, "ml-1m", hashlib.sha256(archive.getvalue()).hexdigest())
        yield tmp_path / "www"
        server.shutdown()


def test_download(tmp_path, load, movielens_server):
    result = load("ml-1m")
    assert result.items["title"][:] == ["Café (1995)", "A, B: C (1996)", "Three (1997)"]
    cached = tmp_path / "cache" / "ml-1m"
    assert sorted(path.name for path in cached.iterdir()) == ["movies.dat", "ratings.dat"]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # and the histories
    assert not list(tmp_path.rglob("outside.txt"))

    (movielens_server / "ml-1m.zip").unlink()
    assert load("ml-1m").counts == result.counts


def test_download_that_fails_leaves_nothing(tmp_path, load, movielens_server):
    expected = interactions.MOVIELENS_SHA256["ml-1m"]
    (movielens_server / "ml-1m.zip").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{expected}, found {hashlib.sha256(b'damaged').hexdigest()}"):
        load("ml-1m")
    with pytest.raises(OSError, match="could not download .*ml-20m.zip.*404.*data_dir"):
        load("ml-20m")
    assert not list((tmp_path / "cache").iterdir())


# the result on disk


def add_length(row):
    return {"length": len(row["item_ids"])}


def test_memory_mapped_and_mapped_by_two_processes(tmp_path, load):
    result = load(write(tmp_path / "rows.parquet", frame(random_rows(2))), k_core=3)
    assert all(dataset.cache_files for dataset in [*result.histories.values(), result.items])
    mapped = result.histories.map(add_length, num_proc=2)
    for name, dataset in mapped.items():
        assert dataset["length"][:] == [len(items) for items in result.histories[name]["item_ids"]]


def test_loading_twice_is_the_same_and_takes_no_more_disk(tmp_path, load):
    path = write(tmp_path / "rows.csv", frame())
    first, second = load(path), load(path)
    assert first.counts == second.counts and first.items.to_list() == second.items.to_list()
    for name, dataset in first.histories.items():
        assert split_rows(first, name) == split_rows(second, name)
        assert dataset._fingerprint == second.histories[name]._fingerprint  # what `map` looks its caches up by
    assert len(list((tmp_path / "cache").iterdir())) == 1
    load(path, split="temporal", validation_fraction=0.3, test_fraction=0.3)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert [row["target"] for row in split_rows(first, "test")] == [20, 10, 30]


def test_failure_while_writing_leaves_nothing(tmp_path, load, monkeypatch):
    path = write(tmp_path / "rows.csv", frame())
    first = load(path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(interactions, "_write_arrow", fail)
    with pytest.raises(OSError, match="disk full"):
        load(path, split="temporal", validation_fraction=0.3, test_fraction=0.3)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert [row["target"] for row in split_rows(first, "test")] == [20, 10, 30]


def test_benchmark(tmp_path):
    output = tmp_path / "benchmark-data.json"
    settings = ["--num_rows", "3000", "--num_users", "50", "--num_items", "100", "--formats", "parquet"]
    command = [sys.executable, str(SCRIPT), "data", *settings, "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])})
    measured = json.loads(output.read_text())["parquet"]
    assert measured["num_interactions"] + measured["num_filtered"] + measured["num_duplicates"] == 3000
    assert measured["peak_memory_gb"] > 0


# the real files


DATA = os.environ.get("ELASTIC_HF_DATA")


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="the environment variable ELASTIC_HF_DATA names no folder with the data")
def test_counts_of_the_real_files(load):
    ml_1m = load(
        f"{DATA}/ml-1m/interactions.parquet",
        timestamp_column="order",
        items_file=f"{DATA}/ml-1m/movies.dat",
        k_core=5,
    )
    assert list(ml_1m.counts.values()) == [6_040, 3_416, 999_611, 0, 0]
    assert None not in ml_1m.items["title"][:]
    ml_100k = load("ml-100k", data_dir=f"{DATA}/ml-100k")
    assert list(ml_100k.counts.values()) == [943, 1_682, 100_000, 0, 0]
    beauty = load(f"{DATA}/amazon/beauty.txt")
    assert list(beauty.counts.values()) == [40_226, 54_542, 353_962, 0, 0]
