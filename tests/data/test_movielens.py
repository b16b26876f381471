import hashlib
import http.server
import io
import threading
import zipfile

import pytest

from elastic_hf.data import movielens
from interactions import MOVIELENS_FILES, frame, split_rows, write, write_movielens


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


def test_movielens_folder_with_other_files_is_refused(tmp_path, load):
    folder = write_movielens(tmp_path / "raw", "ml-latest-small")
    for name in ("links.csv", "tags.csv", "README.txt"):
        (folder / name).write_text("x")
    assert load(folder).counts["num_rows"] == 10
    write(folder / "ratings-2024.csv", frame())
    with pytest.raises(ValueError, match=r"and no others, found \['ratings-2024.csv'\]"):
        load(folder)
    assert load("ml-latest-small", data_dir=folder).counts["num_rows"] == 10  # named, it is no matter


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
        monkeypatch.setattr(movielens, "MOVIELENS_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setitem(movielens.MOVIELENS_SHA256, "ml-1m", hashlib.sha256(archive.getvalue()).hexdigest())
        yield tmp_path / "www"
        server.shutdown()


def test_download(tmp_path, load, movielens_server):
    result = load("ml-1m")
    assert result.items["title"][:] == ["Café (1995)", "A, B: C (1996)", "Three (1997)"]
    cached = tmp_path / "cache" / "ml-1m"
    assert sorted(path.name for path in cached.iterdir()) == ["SHA256SUMS", "movies.dat", "ratings.dat"]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # and the histories
    assert not list(tmp_path.rglob("outside.txt"))

    (cached / "ratings.dat").write_text("1::2::3::4\n")  # damaged: downloaded again
    assert load("ml-1m").counts == result.counts
    (cached / "movies.dat").unlink()
    assert load("ml-1m").items["title"][:] == result.items["title"][:]

    (movielens_server / "ml-1m.zip").unlink()
    assert load("ml-1m").counts == result.counts


def test_download_that_fails_leaves_nothing(tmp_path, load, movielens_server):
    expected = movielens.MOVIELENS_SHA256["ml-1m"]
    (movielens_server / "ml-1m.zip").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{expected}, found {hashlib.sha256(b'damaged').hexdigest()}"):
        load("ml-1m")
    with pytest.raises(OSError, match="could not download .*ml-20m.zip.*404.*data_dir"):
        load("ml-20m")
    assert not list((tmp_path / "cache").iterdir())
