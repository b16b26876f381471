"""A Redis server of its own for a test, on a socket in a folder."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def redis_server() -> Iterator[str]:
    """Start a server and yield its URL; skip the test where there is none."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs the program redis-server, as in Debian's package of that name")
    redis = pytest.importorskip("redis")
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket must be short
        socket = f"{folder}/redis.sock"
        command = [program, "--port", "0", "--unixsocket", socket, "--dir", folder, "--save", ""]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            for _ in range(100):
                try:
                    redis.Redis(unix_socket_path=socket).ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.1)
            yield f"unix://{socket}"
        finally:
            server.kill()
            server.wait()
