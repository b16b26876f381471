import polars as pl
import pytest

from interactions import frame, split_rows, write


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
