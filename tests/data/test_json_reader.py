import json

import pytest

from interactions import split_rows


ROWS = [{"user_id": "a", "item_id": f"i{time}", "timestamp": time} for time in range(4)]
EXPECTED = [
    {
        "user_id": "a",
        "item_ids": ["i0", "i1", "i2"],
        "timestamps": [0, 1, 2],
        "target": "i3",
        "target_timestamp": 3,
    }
]


def write_lines(path, rows, separator="\n"):
    path.write_text(separator.join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize(
    "unused",
    [
        (1.5, 2, "free", None),
        ({"a": 1}, [1, "x"], "text", {"a": {"b": []}}),
        (1, 10**40, 2, 3),
        (True, 1, 0.5, False),
        ("2020-01-01", "2020-13-01", 5, None),
        (float("nan"), 1, 2, float("-inf")),
        ("x" * 3_000_000, "", "", ""),  # longer than the blocks that Arrow reads
    ],
    ids=["types", "nested", "huge", "booleans", "dates", "not a number", "long"],
)
def test_fields_that_nobody_asked_for(tmp_path, load, unused):
    rows = [{"price": value, **row} for row, value in zip(ROWS, unused, strict=True)]
    assert split_rows(load(write_lines(tmp_path / "rows.jsonl", rows)), "test") == EXPECTED


def test_fields_that_some_rows_lack(tmp_path, load):
    rows = [ROWS[0], {**ROWS[1], "price": 1}, ROWS[2], {**ROWS[3], "note": "x"}]
    assert split_rows(load(write_lines(tmp_path / "rows.jsonl", rows)), "test") == EXPECTED


def test_bytes_that_are_not_utf_8(tmp_path, load):
    path = write_lines(tmp_path / "rows.jsonl", [{**row, "note": "é"} for row in ROWS])
    text = path.read_text().replace("\\u00e9", "é")
    path.write_text(text, encoding="latin-1")
    assert split_rows(load(path), "test") == EXPECTED
    path.write_text(text.replace('"i2"', '"é"'), encoding="latin-1")
    with pytest.raises(
        ValueError, match="rows.jsonl, line 3: item_id is .*, expected a 64-bit number or text in UTF-8"
    ):
        load(path)


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "ROWS.JSONL"])
def test_names_and_line_ends(tmp_path, load, separator, name):
    assert split_rows(load(write_lines(tmp_path / name, ROWS, separator)), "test") == EXPECTED


@pytest.mark.parametrize(
    ("items", "times", "expected"),
    [
        ([1, 2, 3, 4], [0, 1, 2, 3], ([1, 2, 3], [0, 1, 2])),
        ([1.0, 2.0, 3.0, 4.0], [0.5, 1, 2, 3], ([1, 2, 3], [0.5, 1.0, 2.0])),
        ([1, 2.0, 3, 4.0], [0, 1.5, 2, 3], ([1, 2, 3], [0.0, 1.5, 2.0])),
        (["1", "2", "3", "4"], ["0", "1", "2", "3"], (["1", "2", "3"], [0, 1, 2])),
    ],
)
def test_types_of_ids_and_timestamps(tmp_path, load, items, times, expected):
    rows = [{"user_id": 1, "item_id": item, "timestamp": time} for item, time in zip(items, times, strict=True)]
    (row,) = split_rows(load(write_lines(tmp_path / "rows.jsonl", rows)), "test")
    assert (row["item_ids"], row["timestamps"]) == expected
    assert [type(value) for value in row["timestamps"]] == [type(value) for value in expected[1]]


def test_a_type_that_changes_after_many_lines(tmp_path, load):
    rows = [{"user_id": user, "item_id": item, "timestamp": item} for user in range(2_000) for item in range(3)]
    rows[-1]["timestamp"] = 2.5
    result = load(write_lines(tmp_path / "rows.jsonl", rows))
    assert result.counts["num_rows"] == 6_000
    assert result.histories["test"]["timestamps"][-1] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], {**ROWS[1], "item_id": 5}], "line 2: item_id is 5, expected a string as on line 1"),
        (
            [ROWS[0], "", {**ROWS[1], "timestamp": "soon"}],
            "line 3: timestamp is 'soon', expected a number as on line 1",
        ),
        (
            [ROWS[0], {**ROWS[1], "user_id": {"$oid": "5"}}],
            "line 2: user_id is {.*}, expected a 64-bit number or text",
        ),
        ([ROWS[0], {**ROWS[1], "item_id": True}], "line 2: item_id is True, expected a string as on line 1"),
        ([{**ROWS[0], "item_id": 2**63}], "line 1: item_id is 9223372036854775808, expected a 64-bit number or text"),
        ([ROWS[0], {**ROWS[1], "timestamp": None}], "line 2: timestamp is None, expected a value"),
        ([ROWS[0], {"user_id": "a", "timestamp": 1}], "line 2: item_id is None, expected a value"),
        ([ROWS[0], '{"user_id": "a", "item'], "line 2: expected one JSON object per line: "),
        ([json.dumps(ROWS)], r"line 1: expected one JSON object per line, found '\[{"),
        ([json.dumps(ROWS, indent=1)], "line 1: expected one JSON object per line: "),
        ([json.dumps(ROWS[0]) + json.dumps(ROWS[1])], "line 1: expected one JSON object per line: Extra data"),
        ([*ROWS * 300, "[1]"], "line 1201: expected one JSON object per line"),
    ],
)
def test_errors_name_the_line(tmp_path, load, rows, message):
    with pytest.raises(ValueError, match=f"rows.jsonl, {message}"):
        load(write_lines(tmp_path / "rows.jsonl", rows))
