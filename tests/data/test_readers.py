import gzip

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic_hf.data import readers
from elastic_hf.data.columns import ColumnRequest
from interactions import frame, split_rows, write


HEADER = "user_id,item_id,timestamp\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "user_id,item_id\n1,2\n", r"rows\.csv: column 'timestamp' is missing, found \['user_id'"),
        ("rows.csv", "user_id,item_id,timestamp,item_id\n1,2,3,4\n", "column 'item_id' appears more than once"),
        ("rows.csv", "", "rows.csv has no rows"),
        ("rows.csv", HEADER, "rows.csv has no rows"),
        ("rows.csv", HEADER + "1,2,3\n1,2\n", "line 3: .*Expected 3 columns, got 2: 1,2"),
        ("rows.csv", HEADER + "\n1,2,3\n\n1,2,3,4\n", "line 5: .*Expected 3 columns, got 4"),
        ("rows.csv", HEADER + "1,2,3\n1,2,x\n", "line 3: timestamp is 'x'"),
        ("rows.csv", HEADER + "1,2,2020-01-01\n1,2,2020-01-02\n1,2,soon\n", "line 4: timestamp is 'soon'"),
        ("rows.csv", HEADER + "1,2,2020-01-01\n1,2,2020-13-01\n", "line 3: timestamp is '2020-13-01'"),
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
        (
            "rows.jsonl",
            '{"user_id": 1.5, "item_id": 1, "timestamp": 1}\n',
            "line 1: user_id is 1.5, expected an integer",
        ),
        ("rows.parquet", "not a parquet file", "rows.parquet: "),
        ("rows.xlsx", "x", "must end in one of"),
        ("rows.parquet.gz", "x", "must end in one of"),
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
    with pytest.raises(ValueError, match="rows.parquet, row 1: item_id is 9223372036854775808, "):
        load(write(tmp_path / "rows.parquet", table))


def test_parquet_errors_name_the_row(tmp_path, load):
    path = write(tmp_path / "rows.parquet", frame([(1, 2, 3.0), (1, 3, float("nan")), (1, 4, 5.0)]))
    with pytest.raises(ValueError, match="row 2: timestamp is nan"):
        load(path)
    path = write(tmp_path / "rows.parquet", frame([(1, 2, 3), (None, 3, 4)]))
    with pytest.raises(ValueError, match="row 2: user_id is None"):
        load(path)


# compressed files


@pytest.mark.parametrize(("suffix", "codec"), [(".gz", "gzip"), (".zst", "zstd"), (".bz2", "bz2"), (".lz4", "lz4")])
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".txt"])
def test_compressed_files(tmp_path, load, suffix, codec, kind):
    plain = write(tmp_path / f"rows{kind}", frame())
    data = plain.read_bytes()
    packed = tmp_path / f"packed{kind}{suffix}"
    for part in (data[:40], data[40:]):  # such files may be joined
        with pa.output_stream(str(tmp_path / "part"), compression=codec) as file:
            file.write(part)
        with packed.open("ab") as file:
            file.write((tmp_path / "part").read_bytes())
    assert split_rows(load(packed), "test") == split_rows(load(plain), "test")
    packed.rename(tmp_path / packed.name.upper())
    assert split_rows(load(tmp_path / packed.name.upper()), "test") == split_rows(load(plain), "test")


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_torn_and_mislabelled_files(tmp_path, load, kind):
    data = write(tmp_path / f"rows{kind}", frame([(1, item, item) for item in range(5_000)])).read_bytes()
    packed = tmp_path / f"packed{kind}.gz"
    for content in (gzip.compress(data)[:-9], gzip.compress(data)[:3_000], gzip.compress(data) + b"more", data):
        packed.write_bytes(content)
        with pytest.raises(ValueError, match=f"packed{kind}.gz: "):
            load(packed)


# several files


def test_files_without_rows_are_left_out(tmp_path, load):
    (tmp_path / "text").mkdir()
    for name, content in {
        "a.csv": b"",
        "b.csv": HEADER.encode(),
        "c.csv.gz": gzip.compress(b""),
        "d.csv": b"\n\n",
    }.items():
        (tmp_path / "text" / name).write_bytes(content)
    with pytest.raises(ValueError, match="a.csv has no rows, nor has any of the other 3 files"):
        load(tmp_path / "text")
    write(tmp_path / "text" / "e.csv", frame())
    assert load(tmp_path / "text").counts["num_rows"] == 10

    (tmp_path / "parquet").mkdir()
    write(tmp_path / "parquet" / "a.parquet", frame().clear().with_columns(pl.lit(None).alias("item_id")))
    write(tmp_path / "parquet" / "b.parquet", frame())
    assert load(tmp_path / "parquet").counts["num_rows"] == 10
    (tmp_path / "parquet" / "c.parquet").touch()  # this is no Parquet file
    with pytest.raises(ValueError, match="c.parquet: "):
        load(tmp_path / "parquet")


def test_files_may_order_their_columns_as_they_like(tmp_path, load):
    write(tmp_path / "a.csv", frame([(1, item, item) for item in range(3)]))
    write(
        tmp_path / "b.csv",
        frame([(item, "new", 2, item) for item in range(3)], ("timestamp", "x", "user_id", "item_id")),
    )
    assert load(tmp_path).histories["test"]["item_ids"][:] == [[0, 1], [0, 1]]
    write(tmp_path / "c.csv", frame(columns=("user_id", "item", "timestamp")))
    with pytest.raises(
        ValueError, match=r"c.csv: column 'item_id' is missing, found \['user_id', 'item', 'timestamp'\]"
    ):
        load(tmp_path)


def test_files_whose_ids_differ_in_type(tmp_path, load):
    write(tmp_path / "a.parquet", frame([(1, 2, 3)]))
    write(tmp_path / "b.parquet", frame([("1", 2, 3.5)]))
    with pytest.raises(
        ValueError, match="b.parquet: column 'user' must have the type it has in .*a.parquet, int64, found"
    ):
        load(tmp_path)
    write(tmp_path / "b.parquet", frame([(1, 3, 4.5), (1, 4, 5.5)]))
    assert split_rows(load(tmp_path), "test")[0]["timestamps"] == [3.0, 4.5]


# folders that are columns


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_hive_folders(tmp_path, load, suffix, caplog):
    for user in ("10", "9", "a%20b"):
        for day in (1, 2, 3):
            folder = tmp_path / f"user_id={user}" / f"day=2024-01-0{day}"
            folder.mkdir(parents=True)
            write(folder / f"part-0{suffix}", frame([(day,)], ("item_id",)))
    result = load(tmp_path, timestamp_column="day")
    assert result.histories["test"]["user_id"][:] == ["10", "9", "a b"]
    assert result.histories["test"]["timestamps"][:] == [[1704067200, 1704153600]] * 3
    assert load(f"{tmp_path}/user_id=?0", timestamp_column="day").histories["test"]["user_id"][:] == [10]
    with pytest.raises(ValueError, match=r"'timestamp' is missing, found \['item_id', 'user_id', 'day'\]"):
        load(tmp_path)


def test_what_a_file_holds_comes_before_its_folders(tmp_path, load):
    folder = tmp_path / "user_id=7" / "date=2024-01-01"
    folder.mkdir(parents=True)
    write(folder / "part-0.csv", frame([(1, item, item) for item in range(3)], ("user_id", "item_id", "ts")))
    assert split_rows(load(tmp_path), "test") == [
        {"user_id": 1, "item_ids": [0, 1], "timestamps": [0, 1], "target": 2, "target_timestamp": 2}
    ]


def test_a_hive_folder_without_a_value(tmp_path, load):
    folder = tmp_path / "user_id=__HIVE_DEFAULT_PARTITION__"
    folder.mkdir()
    write(folder / "part-0.csv", frame([(1, 2)], ("item_id", "timestamp")))
    with pytest.raises(ValueError, match="part-0.csv, line 2: user_id is None, expected a value"):
        load(tmp_path)


def test_parquet_is_read_in_batches_of_which_no_more_than_a_few_are_in_memory(tmp_path):
    generator = np.random.default_rng(0)
    columns = {name: generator.integers(2**62, size=400_000) for name in ("user_id", "item_id", "timestamp")}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=10_000)
    before, num_rows, most = pa.total_allocated_bytes(), 0, 0
    for table in readers.iterate_files([path], ColumnRequest(), rows_per_batch=7_000):
        assert table.num_rows <= 7_000
        num_rows += table.num_rows
        most = max(most, pa.total_allocated_bytes() - before)
    assert num_rows == 400_000 and 0 < most < path.stat().st_size / 5
