import hashlib
import http.server
import io
import threading
import zipfile

import datasets
import polars as pl
import pytest

from elastic_hf.data import sources
from interactions import MOVIELENS_FILES, ROWS, frame, split_rows, write, write_movielens


@pytest.mark.parametrize("source", ["ml-2m", "folder/missing.csv", "a/b/c"])
def test_unknown_source(load, source):
    with pytest.raises(ValueError, match=f"source must be .* found '{source}'"):
        load(source)


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
        monkeypatch.setattr(sources, "MOVIELENS_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setitem(sources.MOVIELENS_SHA256, "ml-1m", hashlib.sha256(archive.getvalue()).hexdigest())
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
    expected = sources.MOVIELENS_SHA256["ml-1m"]
    (movielens_server / "ml-1m.zip").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{expected}, found {hashlib.sha256(b'damaged').hexdigest()}"):
        load("ml-1m")
    with pytest.raises(OSError, match="could not download .*ml-20m.zip.*404.*data_dir"):
        load("ml-20m")
    assert not list((tmp_path / "cache").iterdir())
