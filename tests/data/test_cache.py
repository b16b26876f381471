import pytest

from elastic_hf.data.cache import is_whole, move_folder, write_checksums


def make(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_replaces_what_differs_under_its_name(tmp_path):
    new = {"a": "1", "b": "2", "c": "3"}
    move_folder(make(tmp_path / "first", **new), tmp_path / "name")
    assert contents(tmp_path / "name") == new
    (tmp_path / "name" / "a").unlink()
    (tmp_path / "name" / "b").write_text("?")
    (tmp_path / "name" / "other").write_text("4")  # such as a cache of `Dataset.map`
    unchanged = (tmp_path / "name" / "c").stat().st_ino
    move_folder(make(tmp_path / "second", **new), tmp_path / "name")
    assert contents(tmp_path / "name") == new | {"other": "4"}
    assert (tmp_path / "name" / "c").stat().st_ino == unchanged


def test_a_name_that_is_a_file(tmp_path):
    (tmp_path / "name").write_text("")
    with pytest.raises(OSError):
        move_folder(make(tmp_path / "new", a="1"), tmp_path / "name")


def test_checksums(tmp_path):
    folder = make(tmp_path / "folder", a="1", b="2")
    assert not is_whole(folder) and not is_whole(tmp_path / "missing")
    write_checksums(folder)
    assert is_whole(folder)
    (folder / "a").write_text("?")
    assert not is_whole(folder)
    (folder / "a").write_text("1")
    assert is_whole(folder)
    (folder / "b").unlink()
    assert not is_whole(folder)
