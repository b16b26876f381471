import sqlite3
import threading

import pytest

from elastic_hf.serving.stores import RedisStore, SQLiteStore, StoreUnavailable, open_store


USERS = ["ada", "bob:1", "b/o'b\x00", "ü 林", "elastic_hf:user:ada"]


def test_values_are_kept_by_user(store, store_name):
    assert store.read(USERS) == {} and store.read([]) == {}
    values = {user: f"\x00\xff{user}".encode() for user in USERS}
    found = []

    def change(stored):
        found.append(stored)
        return {user: values[user] for user in USERS[:3]}

    store.update(USERS, change)
    store.update(USERS[:3], lambda stored: found.append(stored) or {})
    store.update(USERS[1:], lambda stored: values)
    other = open_store(store_name)
    assert found == [{}, {user: values[user] for user in USERS[:3]}]
    assert other.read([*USERS, "nobody"]) == values
    assert other.read(USERS[1:2]) == {USERS[1]: values[USERS[1]]}
    other.close()


def test_an_error_leaves_the_store_as_it_was(store):
    store.update(["ada"], lambda stored: {"ada": b"1"})

    def fail(stored):
        raise KeyError("no")

    with pytest.raises(KeyError):
        store.update(["ada", "bob"], fail)
    store.update(["bob"], lambda stored: {"bob": b"2"})
    assert store.read(["ada", "bob"]) == {"ada": b"1", "bob": b"2"}


def test_concurrent_updates_lose_nothing(store_name):
    """Each of four writers adds one to a shared counter and to one of two others, at the same time."""

    def count(own):
        store = open_store(store_name)
        for _ in range(50):
            store.update(
                ["shared", own],
                lambda stored: {user: b"%d" % (int(stored.get(user, 0)) + 1) for user in ("shared", own)},
            )
        store.close()

    writers = [threading.Thread(target=count, args=(own,)) for own in ("a", "b", "a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert open_store(store_name).read(["shared", "a", "b"]) == {"shared": b"200", "a": b"100", "b": b"100"}


def test_a_new_file_that_another_process_writes_to_is_waited_for(tmp_path):
    other = sqlite3.connect(tmp_path / "users.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    other.execute("CREATE TABLE others (name TEXT)")
    commit = threading.Timer(0.3, other.execute, ["COMMIT"])
    commit.start()
    store = open_store(str(tmp_path / "users.sqlite"))
    store.update(["ada"], lambda stored: {"ada": b"1"})
    assert store.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    commit.join()
    store.close()
    other.close()


def test_another_writer_is_waited_for_or_seen(store, store_name):
    """Somebody writes between the reading and the writing of another: SQLite keeps them off, Redis starts anew."""
    other, calls = open_store(store_name), []

    def intrude():
        other.update(["ada"], lambda stored: {"ada": stored.get("ada", b"") + b"o"})

    def change(stored):
        calls.append(stored)
        if len(calls) == 1:
            intruder.start()
            if isinstance(store, RedisStore):
                intruder.join()
        return {"ada": stored.get("ada", b"") + b"s"}

    intruder = threading.Thread(target=intrude)
    store.update(["ada"], change)
    intruder.join()
    is_sqlite = isinstance(store, SQLiteStore)
    assert calls == ([{}] if is_sqlite else [{}, {"ada": b"o"}])
    assert store.read(["ada"]) == {"ada": b"so" if is_sqlite else b"os"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/no folder/users.sqlite", "the SQLite file of the states cannot be used: unable to open"),
        ("{folder}/text.sqlite", "the SQLite file of the states cannot be used: file is not a database"),
        ("unix://{folder}/nothing.sock", "the Redis server of the states cannot be used: .*No such file"),
    ],
)
def test_a_store_that_cannot_be_used_is_named(tmp_path, name, message):
    if name.startswith("unix"):
        pytest.importorskip("redis")
    (tmp_path / "text.sqlite").write_text("This is a text, and no database of any kind. " * 20)
    with pytest.raises(StoreUnavailable, match=message):
        open_store(name.format(folder=tmp_path))


def test_states_survive_a_power_cut(tmp_path):
    """A write-ahead log that is flushed with each transaction."""
    store = SQLiteStore(tmp_path / "users.sqlite")
    assert store.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store.connection.execute("PRAGMA synchronous").fetchone() == (2,)
