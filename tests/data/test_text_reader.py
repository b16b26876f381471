import gzip

import pytest

from interactions import split_rows


LOG = [(f"u{row // 4}", f"i{row % 7}", row) for row in range(40)]  # row r is on line r + 2


def write_log(path, changed=(), header="user_id,item_id,timestamp,comment"):
    lines = [f"{user},{item},{time},fine" for user, item, time in LOG]
    for row, line in dict(changed).items():
        lines[row] = line
    path.write_text("\n".join([header, *lines, ""]))
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({5: 'u1,i5,5,"fine'}, "line 7: a quote opens a value and is never closed"),
        ({0: '"u0,i0,0,fine'}, "line 2: a quote opens a value and is never closed"),
        ({39: 'u9,i4,39,"fine'}, "line 41: a quote opens a value and is never closed"),
        (
            {5: 'u1,"i5,5,fine', 9: 'u2,"i2,9,fine'},
            "line 7: a quote opens a value, and the next one, on line 11, does not",
        ),
        (
            {5: 'u1,"i5,5,fine', 9: 'u2,i2",9,fine'},
            "line 7: a quote opens .* ends on line 11 only, and line 8 .* is a row",
        ),
        (
            {5: 'u1,i5,5,"fine', 9: 'u2,i2,9,fine"'},
            "line 7: a quote opens .* ends on line 11 only, and line 8 .* is a row",
        ),
        (
            {5: 'u1,i5,5,"fine', 6: 'u1,i6,6,fine"'},
            "line 7: a quote opens .* ends on line 8 only, and line 8 .* is a row",
        ),
        (
            {5: '"u1,i5,5,fine', 6: 'u1",i6,6,fine'},
            "line 7: a quote opens .* ends on line 8 only, and line 8 .* is a row",
        ),
        # what else is wrong is not told before it
        ({5: 'u1,i5,5,"fine', 20: "u5,i6"}, "line 7: a quote opens a value and is never closed"),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_stray_quotes_swallow_no_row(tmp_path, load, changed, message, ending):
    path = write_log(tmp_path / "log.csv", changed)
    path.write_bytes(path.read_bytes().replace(b"\n", ending.encode()))
    with pytest.raises(ValueError, match=f"log.csv, {message}"):
        load(path)
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=f"packed.csv.gz, {message}"):
        load(packed)


def test_stray_quotes_without_timestamps(tmp_path, load):
    lines = [f"{user},{item},fine" for user, item, _ in LOG]
    lines[3], lines[8] = 'u0,i3,"fine', 'u2,i1,fine"'
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["user_id,item_id,comment", *lines]))
    with pytest.raises(ValueError, match="log.csv, line 5: a quote opens a value that ends on line 10 only"):
        load(path, in_time_order=True)


def test_a_stray_quote_before_more_than_arrow_reads_at_once(tmp_path, load):
    path = write_log(tmp_path / "log.csv", {5: 'u1,i5,5,"fine'})
    with path.open("a") as file:
        file.writelines(f"u{row},i{row % 7},{row},fine\n" for row in range(200_000))
    with pytest.raises(ValueError, match="log.csv, line 7: a quote opens a value and is never closed"):
        load(path)


def test_a_stray_quote_in_the_header(tmp_path, load):
    path = write_log(tmp_path / "log.csv", header='user_id,item_id,timestamp,"comment')
    with pytest.raises(ValueError, match="log.csv, line 1: the header cannot be read"):
        load(path)


@pytest.mark.parametrize(
    ("comment", "has_line_breaks"),
    [
        ('"good, really"', False),
        ('"she said ""no"""', False),
        ('12" TV', False),
        ("'fine", False),
        ('"good\n\nvery, very, good, yes\nend"', True),
        ('"1,2\n3,4"', True),
        ('"she said ""no\nand ""yes"""', True),
    ],
)
def test_quotes_that_are_meant(tmp_path, load, comment, has_line_breaks, caplog):
    result = load(write_log(tmp_path / "log.csv", {5: f"u1,i5,5,{comment}"}))
    assert result.counts["num_rows"] == 40
    assert result.histories["test"]["item_ids"][1] == ["i4", "i5", "i6"]
    assert ("log.csv: 1 values hold line breaks, the first on line 7" in caplog.text) == has_line_breaks


def test_line_numbers_after_a_value_of_several_lines(tmp_path, load):
    path = write_log(tmp_path / "log.csv", {5: 'u1,i5,5,"so\nso"', 20: "u5,,20,fine"})
    with pytest.raises(ValueError, match="log.csv, line 23: item_id is None"):
        load(path)
    path = write_log(tmp_path / "log.csv", {5: 'u1,,5,"so\nso"'})
    with pytest.raises(ValueError, match="log.csv, line 7: item_id is None"):
        load(path)


def test_an_id_of_several_lines_is_refused(tmp_path, load):
    path = write_log(tmp_path / "log.csv", {5: 'u1,"i\n5",5,fine'})
    with pytest.raises(ValueError, match=r"log.csv, line 7: item_id is 'i\\n5', expected an id on one line"):
        load(path)


@pytest.mark.parametrize("place", ["item", "comment"])
def test_long_values(tmp_path, load, place):
    """Longer than the blocks that Arrow reads by default."""
    long = "x" * 3_000_000
    line = f"u1,{long},5,fine" if place == "item" else f"u1,i5,5,{long}"
    result = load(write_log(tmp_path / "log.csv", {5: line}))
    assert result.histories["test"]["item_ids"][1] == ["i4", long if place == "item" else "i5", "i6"]


# delimiters and headers


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.txt", "LOG.CSV"])
def test_delimiters(tmp_path, load, delimiter, name):
    path = write_log(tmp_path / name)
    expected = split_rows(load(path), "test")
    path.write_text(path.read_text().replace(",", delimiter).replace("fine", '"a,b;c"'))
    assert split_rows(load(path), "test") == expected


def test_a_delimiter_is_found_by_the_named_columns(tmp_path, load):
    path = write_log(tmp_path / "log.csv")
    path.write_text(path.read_text().replace(",", ";").replace("user_id", "Kunde, Nr.").replace("item_id", "Artikel"))
    result = load(path, user_column="Kunde, Nr.", item_column="Artikel")
    assert result.counts["num_rows"] == 40
    with pytest.raises(
        ValueError, match=r"column 'user_id' is missing, found \['Kunde, Nr\.', 'Artikel', 'timestamp'"
    ):
        load(path)


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_files_without_a_header(tmp_path, load, delimiter, caplog):
    path = tmp_path / "log.csv"
    path.write_text("".join(f"{user},{item},5.0,{time}\n" for user, item, time in LOG).replace(",", delimiter))
    result = load(path, column_names=["user_id", "item_id", "rating", "timestamp"])
    assert result.counts["num_rows"] == 40
    assert split_rows(result, "test")[0] == {
        "user_id": "u0",
        "item_ids": ["i0", "i1", "i2"],
        "timestamps": [0, 1, 2],
        "target": "i3",
        "target_timestamp": 3,
    }
    assert "not using 'rating'" in caplog.text
    own = {"user_column": "a", "item_column": "b", "timestamp_column": "d"}
    assert split_rows(load(path, column_names=list("abcd"), **own), "test") == split_rows(result, "test")
    message = r"column 'user_id' is missing, found \['u0', .*: name it with user_column \(or all .* with column_names"
    with pytest.raises(ValueError, match=message):
        load(path)
    with pytest.raises(ValueError, match="line 1: .*Expected 3 columns, got 4"):
        load(path, column_names=["user_id", "item_id", "timestamp"])


def test_column_names_beside_a_header_are_refused(tmp_path, load):
    path = write_log(tmp_path / "log.csv")
    with pytest.raises(ValueError, match="log.csv, line 1: expected no header, since column_names are given, found"):
        load(path, column_names=["user_id", "item_id", "timestamp", "comment"])


def test_a_txt_file_may_have_a_header(tmp_path, load):
    path = tmp_path / "log.txt"
    path.write_text("user_id item_id timestamp\n" + "".join(f"{user} {item} {time}\n" for user, item, time in LOG))
    assert load(path).counts["num_rows"] == 40


def test_a_source_without_time_says_so(tmp_path, load, caplog):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\n1,b\n1,a\n1,b\n1,c\n")
    with pytest.raises(ValueError, match="column 'timestamp' is missing, .*timestamp_column .*in_time_order"):
        load(path)
    assert split_rows(load(path, in_time_order=True), "test") == [
        {"user_id": 1, "item_ids": ["b", "a", "b"], "target": "c"}
    ]
    load(write_log(tmp_path / "timed.csv"), in_time_order=True)
    assert "timed.csv: not using 'timestamp'" in caplog.text


def test_columns_that_nobody_asked_for(tmp_path, load):
    """Names that are repeated, missing or many, and values of any kind."""
    path = tmp_path / "log.csv"
    names = ["user_id", "item_id", "timestamp", "x", "x", "", "", *(f"c{number}" for number in range(20_000))]
    rows = [f"{user},{item},{time},1,a,2020-01-01,\xff" + "," * 20_000 for user, item, time in LOG[:4]]
    path.write_bytes("\n".join([",".join(names), *rows]).encode("latin-1"))
    assert load(path).counts["num_rows"] == 4


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_encodings(tmp_path, load, encoding):
    path = tmp_path / "log.csv"
    path.write_text(write_log(tmp_path / "utf-8.csv").read_text(), encoding=encoding)
    if encoding == "utf-8-sig":
        assert load(path).counts["num_rows"] == 40
    else:
        with pytest.raises(ValueError, match="log.csv must be text in UTF-8"):
            load(path)
