from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from interactions import frame, split_rows, write


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["2020-01-01", "2020-01-02T00:00:01", "2020-01-03 00:00:00"], [1577836800, 1577923201]),
        (["2020-01-01T00:00:00Z", "2020-01-01T02:00:00+01:00", "2021-01-01T00:00:00Z"], [1577836800, 1577840400]),
        (["1970-01-01T00:00:01.25", "1970-01-02", "1970-01-03"], [1.25, 86400.0]),
        (
            ["2020-01-01 00:00:00 UTC", "2020-01-01 00:00:01.5 UTC", "2020-01-02 00:00:00 UTC"],
            [1577836800.0, 1577836801.5],
        ),
        (
            ["2020-01-01 02:00:00+02", "2020-01-01 00:00 GMT", "2020-01-02 00:00:00 +0000 UTC"],
            [1577836800, 1577836800],
        ),
        (["2020-01-01T00:00:00Z", "2020-01-01T00:00:01", "2020-01-02"], [1577836800, 1577836801]),
        (
            ["2020-01-01T00:00:00.250000000Z", "2020-01-01T00:00:01Z", "2020-01-02T00:00Z"],
            [1577836800.25, 1577836801.0],
        ),
        (["1", "2", "10"], [1, 2]),
        (["1e3", "2E3", "3e+3"], [1000.0, 2000.0]),
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


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (["2020-01-01", "2020-02-30", "2020-01-03"], "timestamp is .*2020.*30.*, expected a valid ISO 8601 date"),
        (
            ["2020-01-01 10:00:00 UTC", "2020-13-01 10:00:00 UTC", "2020-01-03"],
            "'2020-13-01 10:00:00 UTC', expected a valid",
        ),
        (
            ["2020-01-01 10:00", "2020-01-01 10:00 CET", "2020-01-03"],
            "'2020-01-01 10:00 CET', expected a valid ISO 8601 date",
        ),
        (["2020-01-01", "17", "2020-01-03"], "'17', expected an ISO 8601 date as in the first row"),
        (["17", "2020-01-01", "18"], "'2020-01-01', expected Unix seconds as in the first row"),
        (["17", "soon", "18"], "'soon', expected Unix seconds as in the first row"),
    ],
)
@pytest.mark.parametrize(("suffix", "place"), [(".csv", "line 3"), (".jsonl", "line 2"), (".parquet", "row 2")])
def test_wrong_timestamps_are_named_with_their_place(tmp_path, load, times, message, suffix, place):
    path = write(tmp_path / f"rows{suffix}", frame([(1, item, time) for item, time in enumerate(times)]))
    with pytest.raises(
        ValueError, match=f"{path.name}, {place}: timestamp is {message.removeprefix('timestamp is ')}"
    ):
        load(path)


@pytest.mark.parametrize("time", ["05/01/2020", "31.01.2020", "May 1, 2020", "2020-1-5"])
def test_other_dates_are_refused_in_the_first_row(tmp_path, load, time):
    path = write(tmp_path / "rows.csv", frame([(1, item, time) for item in range(3)]))
    with pytest.raises(
        ValueError, match=f"line 2: timestamp is '{time}', expected Unix seconds or an ISO 8601 date such as"
    ):
        load(path)


def test_the_wrong_row_is_found_among_many(tmp_path, load):
    times = ["2020-01-01 10:00:00 UTC"] * 10_000
    times[7_654] = "2020-01-32 10:00:00 UTC"
    path = write(tmp_path / "rows.csv", frame([(1, item, time) for item, time in enumerate(times)]))
    with pytest.raises(ValueError, match="rows.csv, line 7656: timestamp is '2020-01-32 10:00:00 UTC'"):
        load(path)


# ids


def load_ids(load, values, dtype=None):
    """The ids of a table in memory with one user, who has these items in this order."""
    table = pa.table(
        {"user_id": [1] * len(values), "item_id": pa.array(values, dtype), "timestamp": range(len(values))}
    )
    row = split_rows(load(table), "test")[0]
    return [*row["item_ids"], row["target"]]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([30.0, 10.0, 20.0], pa.float64(), [30, 10, 20]),
        ([30.0, 10.0, 2.0**53], pa.float64(), [30, 10, 2**53]),
        ([np.float16(3), np.float16(1), np.float16(2)], pa.float16(), [3, 1, 2]),
        ([Decimal(30), Decimal(10), Decimal(2) ** 60], pa.decimal128(38, 0), [30, 10, 2**60]),
        ([Decimal("30.00"), Decimal("10.00"), Decimal("20.00")], pa.decimal128(10, 2), [30, 10, 20]),
        ([b"x", b"\xc3\xa9", b"z"], pa.binary(), ["x", "é", "z"]),
        (["x", "é", "z"], pa.string_view(), ["x", "é", "z"]),
    ],
    ids=str,
)
def test_ids_of_other_types(load, values, dtype, expected):
    assert load_ids(load, values, dtype) == expected


def test_ids_of_categories(load):
    table = pl.DataFrame({"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "timestamp": [1, 2, 3]})
    categories = table.with_columns(
        pl.col("user_id").cast(pl.Categorical), pl.col("item_id").cast(pl.Enum(["x", "y", "z"]))
    )
    assert split_rows(load(categories), "test") == split_rows(load(table), "test")
    numbers = pd.DataFrame({"user_id": pd.Categorical([7, 7, 7]), "item_id": [1, 2, 3], "timestamp": [1, 2, 3]})
    assert load(numbers).histories["test"]["user_id"][:] == [7]


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ([1.0, 2.5, 3.0], pa.float64(), "row 2: item_id is 2.5, expected an integer"),
        ([1.0, 2.0, float("nan")], pa.float64(), "row 3: item_id is nan, expected an integer"),
        ([1.0, float("inf"), 3.0], pa.float64(), "row 2: item_id is inf, expected an integer"),
        (
            [1.0, 2.0**53 + 2, 3.0],
            pa.float64(),
            "row 2: item_id is .*, expected an integer that a float holds exactly",
        ),
        ([1.0, None, 3.0], pa.float64(), "row 2: item_id is None, expected a value"),
        ([Decimal(1), Decimal(2) ** 64, Decimal(3)], pa.decimal128(38, 0), "row 2: item_id is .* at most 64 bits"),
        (
            [Decimal("1.0"), Decimal("2.5"), Decimal(3)],
            pa.decimal128(5, 1),
            "row 2: item_id is Decimal.*, expected an integer",
        ),
        ([1, 2, 2**63], pa.uint64(), "row 3: item_id is 9223372036854775808, expected an integer of at most 64 bits"),
        ([b"a", b"\xff", b"c"], pa.binary(), r"row 2: item_id is b'\\xff', expected text in UTF-8"),
        (["a", "", "c"], pa.string(), "row 2: item_id is '', expected a value"),
        ([True, False, True], pa.bool_(), "column 'item_id' must hold integers or strings, found type bool"),
        ([[1], [2], [3]], pa.list_(pa.int64()), "column 'item_id' must hold integers or strings, found type list"),
    ],
)
def test_wrong_ids_are_named_with_their_row(load, values, dtype, message):
    with pytest.raises(ValueError, match=f"Table.*{message}"):
        load_ids(load, values, dtype)


def test_strings_that_are_not_utf_8(load):
    strings = pa.array(["a", "x", "c"])
    broken = pa.StringArray.from_buffers(3, strings.buffers()[1], pa.py_buffer(b"a\xffc"))
    table = pa.table({"user_id": [1] * 3, "item_id": broken, "timestamp": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"Table, row 2: item_id is b'\\xff', expected text in UTF-8"):
        load(table)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["30.0", "10.0", "20.0"], [30, 10, 20]),
        (["10", "10.0", "20"], [10, 10, 20]),  # as pandas writes a column in parts
        (["-3.0", "0.0", "9007199254740992.0"], [-3, 0, 2**53]),
        (["1.5", "2.0", "3.0"], ["1.5", "2.0", "3.0"]),
        (["10.0", "x", "20.0"], ["10.0", "x", "20.0"]),
        (["12E5", "3E+1x", "7"], ["12E5", "3E+1x", "7"]),
        (["9223372036854775808", "1", "2"], ["9223372036854775808", "1", "2"]),
    ],
)
def test_integer_ids_written_as_floats_in_text(tmp_path, load, ids, expected):
    path = tmp_path / "rows.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"1.0,{item},{time}\n" for time, item in enumerate(ids)))
    (row,) = split_rows(load(path), "test")
    assert [*row["item_ids"], row["target"]] == expected
    assert row["user_id"] == 1


@pytest.mark.parametrize("item", ["1.23457E+12", "1e+16", "12345678901234568.0"])
def test_ids_that_lost_digits_are_refused(tmp_path, load, item):
    """As spreadsheets and pandas write large integers: several ids may have become one."""
    path = write(tmp_path / "rows.csv", frame([(1, "11", 1), (1, item, 2), (1, "12", 3)]))
    with pytest.raises(ValueError, match="rows.csv, line 3: item_id is .*, expected an integer with all its digits"):
        load(path)


def test_decimal_timestamps(load):
    table = pa.table({"user_id": [1] * 3, "item_id": [1, 2, 3]})
    whole = table.append_column("timestamp", pa.array([Decimal(5), Decimal(6), Decimal(7)], pa.decimal128(38, 0)))
    assert split_rows(load(whole), "test")[0]["timestamps"] == [5, 6]
    parts = table.append_column("timestamp", pa.array([Decimal("5.5"), Decimal(6), Decimal(7)], pa.decimal128(10, 1)))
    assert split_rows(load(parts), "test")[0]["timestamps"] == [5.5, 6.0]
