"""Measure the service: requests per second, and what a client waits, by the number of clients.

python examples/benchmarks/load_test.py                         # three levels of each store, the last for ten minutes
python examples/benchmarks/load_test.py --seconds 20 20 20      # a minute for each store

`serve.py` runs in a process of its own for each store of states, with a model of random weights and the default
sizes: with SQLite, and with a Redis server that this program starts. Both have on the disk what they acknowledge. Each
client sends one request after the other over one connection, half of them an event of a random user and half a request
for ten recommendations; nobody waits in between. The stores take turns, level by level. The clients are threads of
this process, on the same machine: they take their share of its processors. Writes `results/benchmark-service.json`;
any answer but 200 counts as an error.
"""

import argparse
import http.client
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from elastic_hf import ElasticItemTokenizer
from run_benchmark import RESULTS, make_model, report, setting
from servers import Service, ask, redis_server


STORES = ("SQLite", "Redis")
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")  # options of Redis: on the disk, as SQLite
EVENTS_PER_REQUEST = 1_000  # while histories are made
SAMPLES = 20  # of the service's memory, in each level


@contextmanager
def start_service(store: str, folder: Path) -> Iterator[Service]:
    """Yield a service of the model of a folder, whose states are in a new store of one of the `STORES`."""
    with ExitStack() as stack:
        name = str(folder / "users.sqlite") if store == "SQLite" else stack.enter_context(redis_server(*DURABLE))
        service = Service(folder, name)
        stack.callback(service.stop)
        yield service


def make_histories(service: Service, args: argparse.Namespace) -> None:
    """Append events of all users."""
    connection, rng = service.connect(), random.Random(0)
    users_per_request = max(1, EVENTS_PER_REQUEST // args.history_length)
    for start in tqdm(range(0, args.num_users, users_per_request), desc="Making histories"):
        events = [
            {"user": f"user {user}", "item": rng.randrange(args.num_items), "event_id": str(i)}
            for user in range(start, min(start + users_per_request, args.num_users))
            for i in range(args.history_length)
        ]
        status, body = ask(connection, "POST", "/events", {"events": events})
        if status != 200:
            raise RuntimeError(f"events must be appended, found the status {status}: {body[:500]!r}")


class Client(threading.Thread):
    """Asks and tells until the time is over."""

    def __init__(self, name: str, service: Service, end: float, args: argparse.Namespace) -> None:
        super().__init__(name=name)
        self.service = service
        self.end = end
        self.args = args
        self.seconds: dict[str, list[float]] = {"events": [], "recommendations": []}
        self.errors: list[str] = []

    def run(self) -> None:
        rng, number = random.Random(self.name), 0
        connection = self.service.connect()
        while time.monotonic() < self.end:
            user, number = rng.randrange(self.args.num_users), number + 1
            kind = "events" if rng.random() < 0.5 else "recommendations"
            start = time.monotonic()
            try:
                if kind == "events":
                    item, event_id = rng.randrange(self.args.num_items), f"{self.name}.{number}"
                    event = {"user": f"user {user}", "item": item, "event_id": event_id}
                    status, body = ask(connection, "POST", "/events", {"events": [event]})
                else:
                    status, body = ask(connection, "GET", f"/recommendations/user%20{user}?top_k=10")
            except (OSError, http.client.HTTPException) as error:
                status, body = 0, str(error).encode()
                connection = self.service.connect()
            self.seconds[kind].append(time.monotonic() - start)
            if status != 200:
                self.errors.append(f"{status}: {body[:200]!r}")


def measure(store: str, service: Service, num_clients: int, seconds: float, args: argparse.Namespace) -> dict:
    """Let clients ask for some seconds, and return what they and the service say."""
    start = time.monotonic()
    clients = [Client(f"{num_clients}.{i}", service, start + seconds, args) for i in range(num_clients)]
    for client in clients:
        client.start()
    resident = []
    for _ in tqdm(range(SAMPLES), desc=f"{store}, {num_clients} clients"):
        time.sleep(seconds / SAMPLES)
        resident.append(service.resident_bytes())
    for client in clients:
        client.join()
    elapsed = time.monotonic() - start
    row = {"store": store, "clients": num_clients, "seconds": elapsed, "resident_bytes": resident}
    errors = [error for client in clients for error in client.errors]
    row |= {"errors": len(errors), "first_errors": errors[:3]}
    for kind in ("events", "recommendations"):
        waited = np.array([value for client in clients for value in client.seconds[kind]])
        row[kind] = {"requests": len(waited), "requests_per_second": len(waited) / elapsed}
        if len(waited):
            row[kind] |= {f"p{p}_seconds": float(np.percentile(waited, p)) for p in (50, 99)}
    row["requests_per_second"] = sum(row[kind]["requests_per_second"] for kind in ("events", "recommendations"))
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64], help="Clients of each level.")
    parser.add_argument("--seconds", type=float, nargs="+", default=[60, 60, 600], help="Seconds of each level.")
    parser.add_argument("--num_users", type=int, default=10_000, help="Users.")
    parser.add_argument("--history_length", type=int, default=50, help="Events of each user before the first level.")
    parser.add_argument("--num_items", type=int, default=10_000, help="Items of the catalogue.")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES, help="Where the states are.")
    parser.add_argument("--output", type=Path, help="JSON file; one of results here by default.")
    args = parser.parse_args()
    if len(args.seconds) != len(args.clients):
        raise ValueError(f"seconds must be {len(args.clients)} numbers, one for each level, found {len(args.seconds)}")
    args.subject, args.dtype = "service", "float32"
    results = {**setting(args), "num_users": args.num_users, "num_items": args.num_items}
    results |= {"history_length": args.history_length, "rows": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_model("elastic", 0, args.num_items).save_pretrained(folder)
        ElasticItemTokenizer.from_items(range(args.num_items), model_max_length=200).save_pretrained(folder)
        services = {store: stack.enter_context(start_service(store, folder)) for store in args.stores}
        for service in services.values():
            make_histories(service, args)
        for num_clients, seconds in zip(args.clients, args.seconds, strict=True):
            for store, service in services.items():
                results["rows"].append(measure(store, service, num_clients, seconds, args))
    report(args.output or RESULTS / "benchmark-service.json", results)


if __name__ == "__main__":
    main()
