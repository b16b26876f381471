"""Servers in processes of their own, for measurements and tests: `serve.py`, and Redis."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


EXAMPLES = Path(__file__).parents[1]
JSON = {"Content-Type": "application/json"}


class Service:
    """
    `serve.py` on a free port.

    Args:
        folder (`str` or `Path`): of the model.
        store (`str` or `Path`): file or URL of the users' states.
        environment (`str`): further variables of its environment.

    Attributes:
        log (`list[str]`): What it has written, all of it once it has stopped.

    Raises:
        RuntimeError: if it ends before it listens.
    """

    def __init__(self, folder: str | Path, store: str | Path, **environment: str) -> None:
        command = [sys.executable, EXAMPLES / "serve.py", "--port", "0"]
        command += ["--model_name_or_path", folder, "--store", store]
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), **environment}
        self.process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True)
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"http://([\d.]+):(\d+)", line):
                self.host, self.port = found[1], int(found[2])
                # A pipe that nobody reads would stop the service once it is full.
                self.reader = threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True)
                self.reader.start()
                return
        raise RuntimeError(f"the service must start, found the end of it: {''.join(self.log)}")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def resident_bytes(self) -> int:
        """Return the memory that the service holds, by its own account."""
        status, body = ask(self.connect(), "GET", "/metrics")
        return int(float(re.search(r"^process_resident_memory_bytes (\S+)$", body.decode(), flags=re.MULTILINE)[1]))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        self.reader.join()
        return self.process.wait()


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: dict | None = None, token: str | None = None
) -> tuple[int, bytes]:
    """Send a request and return the status and the body of the answer."""
    headers = JSON if token is None else {**JSON, "Authorization": f"Bearer {token}"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


@contextmanager
def redis_server(*options: str) -> Iterator[str]:
    """Start a Redis server of its own, on a socket in a temporary folder, and yield its URL.

    Args:
        options (`str`): of the program.

    Raises:
        FileNotFoundError: if the program is not installed.
        RuntimeError: if it does not answer within ten seconds.
    """
    import redis

    program = shutil.which("redis-server")
    if program is None:
        raise FileNotFoundError("redis-server must be installed, as Debian's package of that name, found none")
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket must be short
        socket = f"{folder}/redis.sock"
        command = [program, "--port", "0", "--unixsocket", socket, "--dir", folder, "--save", "", *options]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _wait_for(redis.Redis(unix_socket_path=socket), redis.ConnectionError)
            yield f"unix://{socket}"
        finally:
            server.kill()
            server.wait()


def _wait_for(client, error: type[Exception]) -> None:
    """Wait until a server answers."""
    for _ in range(100):
        try:
            client.ping()
            return
        except error:
            time.sleep(0.1)
    raise RuntimeError("the Redis server must answer within ten seconds, found no answer")
