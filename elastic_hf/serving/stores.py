"""Where the states of users are kept: a value of bytes for each user, in SQLite or in Redis.

Both stores have the same three methods, and so may any other: `read`, `update` and `close`. What `update` reads and
writes is one transaction, whatever other threads, processes or machines do to the same users meanwhile.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike


# From the values of users, without those that have none, to the values that are to be written.
Change = Callable[[dict[str, bytes]], dict[str, bytes]]
KEY = "elastic_hf:user:"
SECONDS_TO_WAIT = 60  # for other processes that write
SECONDS_TO_REACH = 5  # a server


class StoreUnavailable(OSError):
    """The store cannot be reached, or cannot write: nothing was acknowledged."""


class SQLiteStore:
    """
    States in a file of SQLite, which several processes of one machine may share.

    What [`update`] has written is on the disk when it returns (a write-ahead log, flushed with each transaction).

    Args:
        file (`str` or `os.PathLike`): is made if there is none.
    """

    def __init__(self, file: str | PathLike) -> None:
        with _reaching("the SQLite file", sqlite3.Error):
            # One thread at a time uses it, not always the same one.
            self.connection = sqlite3.connect(
                file, timeout=SECONDS_TO_WAIT, isolation_level=None, check_same_thread=False
            )
            self._write_ahead()
            self.connection.execute("PRAGMA synchronous = FULL")
            self.connection.execute("CREATE TABLE IF NOT EXISTS users (user TEXT PRIMARY KEY, state BLOB NOT NULL)")

    def _write_ahead(self) -> None:
        """Have the file keep a write-ahead log. SQLite does not wait for others here, as it does elsewhere."""
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while True:
            try:
                self.connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def read(self, users: list[str]) -> dict[str, bytes]:
        """Return the values of those users that have one.

        Raises:
            StoreUnavailable: if the file cannot be read.
        """
        with _reaching("the SQLite file", sqlite3.Error):
            query = f"SELECT user, state FROM users WHERE user IN ({', '.join('?' * len(users))})"
            return dict(self.connection.execute(query, users).fetchall())

    def update(self, users: list[str], change: Change) -> None:
        """Read the values of users and write what `change` makes of them, in one transaction: an error leaves all as
        it was.

        Args:
            users (`list[str]`): whose values are read.
            change (`Callable`): from the values by user to those that are to be written. It may be called again, when
                another process was faster, and must change nothing else.

        Raises:
            StoreUnavailable: if the file cannot be read or written, or others keep it locked.
        """
        with _reaching("the SQLite file", sqlite3.Error), self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            rows = change(self.read(users)).items()
            self.connection.executemany("INSERT OR REPLACE INTO users (user, state) VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self.connection.close()


class RedisStore:
    """
    States in Redis, which processes of many machines may share.

    What [`update`] has written is as durable as the server makes it: with `appendonly yes` and `appendfsync always` it
    is on the server's disk. Where another process changes one of the users meanwhile, all are read anew.

    Args:
        url (`str`): such as `redis://localhost:6379/0`, or `unix:///run/redis.sock`.
    """

    def __init__(self, url: str) -> None:
        import redis

        self.error = redis.RedisError
        self.client = redis.Redis.from_url(
            url, socket_connect_timeout=SECONDS_TO_REACH, socket_timeout=SECONDS_TO_WAIT
        )
        with _reaching("the Redis server", self.error):
            self.client.ping()

    def read(self, users: list[str]) -> dict[str, bytes]:
        """Return the values of those users that have one, see [`SQLiteStore.read`]."""
        with _reaching("the Redis server", self.error):
            return _values(users, self.client.mget([KEY + user for user in users]))

    def update(self, users: list[str], change: Change) -> None:
        """Read the values of users and write what `change` makes of them, see [`SQLiteStore.update`]."""
        keys = [KEY + user for user in users]

        def change_keys(transaction) -> None:
            changed = change(_values(users, transaction.mget(keys)))
            transaction.multi()
            if changed:
                transaction.mset({KEY + user: value for user, value in changed.items()})

        with _reaching("the Redis server", self.error):
            self.client.transaction(change_keys, *keys)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def is_redis(name: str) -> bool:
    """Return whether the name of a store is a URL of Redis, and no file of SQLite."""
    return name.startswith(("redis://", "rediss://", "unix://"))


def open_store(name: str) -> SQLiteStore | RedisStore:
    """Return the store of a name: a URL of Redis, or else a file of SQLite.

    Raises:
        StoreUnavailable: if there is none to be reached.
    """
    return RedisStore(name) if is_redis(name) else SQLiteStore(name)


def _values(users: list[str], values: list[bytes | None]) -> dict[str, bytes]:
    return {user: value for user, value in zip(users, values, strict=True) if value is not None}


@contextmanager
def _reaching(name: str, error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error as reason:
        raise StoreUnavailable(f"{name} of the states cannot be used: {reason}") from reason
