"""Measure `examples/score_users.py`: two workers beside one process, and what a killed worker and states change.

    python examples/benchmarks/run_scoring.py --folder /a/large/disk

For each number of users it makes a file of histories and a model of random weights, scores the users by the script and
by a single process that reads the same file, with one thread as each worker has and with all, and compares both. For
the first number of users it also kills a worker in the middle, compares the files with those before, compares some
users with `elastic-hf recommend`, and reads a day of new events on top of states. It writes a JSON file; it needs
`pip install -e ".[ray]"`. Leave the machine alone meanwhile.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import pipeline

from elastic_hf import ElasticItemTokenizer
from elastic_hf.commands import recommend
from elastic_hf.commands.recommend import recommend_for_users, recommendations_schema
from run_benchmark import EXAMPLES, RESULTS, in_fresh_process, make_model, report, setting


USERS_PER_GROUP = 10_000
START = 1_700_000_000
WORKER = "ray::MapWorker"
NUM_NEW_EVENTS = 3
PARTS = "part-*.parquet"


def make_histories(file: Path, num_users: int, length: int, num_items: int) -> None:
    """Write the histories of users: popularity follows Zipf's law, with a pause of about an hour between items."""
    generator = np.random.default_rng(0)
    cumulative = np.cumsum(1 / (np.arange(num_items) + 10))
    writer = None
    for first in range(0, num_users, USERS_PER_GROUP):
        users = np.arange(first, min(first + USERS_PER_GROUP, num_users))
        size = len(users), length
        items = np.searchsorted(cumulative, generator.random(size) * cumulative[-1])
        times = START + generator.integers(1, 7_200, size).cumsum(axis=1)
        offsets = pa.array(np.arange(len(users) + 1) * length, pa.int32())
        columns = {"user_id": users}
        for name, values in (("item_ids", items), ("timestamps", times)):
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    writer.close()


def make_day(histories: Path, file: Path, num_items: int, share: float) -> None:
    """Write some new events of a share of the users, one every hour of a day after all others, as interactions."""
    users = pq.read_table(histories, columns=["user_id"])["user_id"].to_numpy()
    generator = np.random.default_rng(1)
    users = np.repeat(generator.choice(users, max(1, int(share * len(users))), replace=False), NUM_NEW_EVENTS)
    midnight = START + 7_200 * pq.ParquetFile(histories).metadata.num_rows  # after the last event of any user
    times = midnight + np.tile(np.arange(NUM_NEW_EVENTS) * 3_600, len(users) // NUM_NEW_EVENTS)
    items = generator.integers(num_items, size=len(users))
    pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times}).write_parquet(file)


def score_in_one_process(histories: Path, model: str, output: Path, top_k: int, threads: int) -> int:
    """Score the same file without Ray, and return the largest memory that this process had, in bytes."""
    torch.set_num_threads(threads)
    recommend = pipeline("sequential-recommendation", model=model, top_k=top_k, device="cpu")
    schema = recommendations_schema(pa.int64(), recommend)
    with pq.ParquetFile(histories) as file, pq.ParquetWriter(output, schema, compression="zstd") as writer:
        for batch in file.iter_batches(256, columns=["user_id", "item_ids"]):
            writer.write_table(recommend_for_users(recommend, pa.table(batch), None, schema))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch(threading.Thread):
    """Follow the memory of a process and its children, and kill a worker when `is_time` says so, once."""

    def __init__(self, process: psutil.Process, is_time=lambda: False) -> None:
        super().__init__(daemon=True)
        self.process, self.is_time = process, is_time
        self.peak_bytes = self.peak_worker_bytes = self.num_killed = 0
        self.ended = threading.Event()

    def run(self) -> None:
        with suppress(psutil.NoSuchProcess):  # when the script has ended
            while not self.ended.wait(1):
                self.look([self.process, *self.process.children(recursive=True)])

    def look(self, processes: list[psutil.Process]) -> None:
        total, workers = 0, []
        for process in processes:
            with suppress(psutil.Error):  # when it has just ended
                memory, name = process.memory_full_info(), " ".join(process.cmdline())
                total += memory.pss  # of memory that several processes share, each has a part
                if name.startswith(WORKER):
                    workers.append((memory.uss, process))
        self.peak_bytes = max(self.peak_bytes, total)
        self.peak_worker_bytes = max([self.peak_worker_bytes, *(size for size, _ in workers)])
        if workers and not self.num_killed and self.is_time():
            workers[0][1].kill()
            self.num_killed = 1


def run_script(args: argparse.Namespace, source: Path, output: Path, *more: str, kill: bool = False) -> dict:
    """Run the script as a user does, with its start and its end, and return what that took."""
    command = [sys.executable, str(EXAMPLES / "score_users.py"), "--input", str(source), "--output", str(output)]
    command += ["--model", str(args.folder / "model"), "--top_k", str(args.top_k)]
    command += ["--num_workers", str(args.num_workers), "--object_store_memory", str(args.object_store_memory), *more]
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"})
    watch = Watch(psutil.Process(process.pid), lambda: kill and any(output.glob("part-*.parquet.tmp")))
    watch.start()
    returncode = process.wait()
    seconds = time.perf_counter() - start
    watch.ended.set()
    watch.join()
    if returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {returncode}")
    num_users = sum(pq.read_metadata(file).num_rows for file in output.glob(PARTS)) // args.top_k
    measured = {"seconds": seconds, "users_per_second": num_users / seconds, "num_users": num_users}
    measured |= {"peak_bytes": watch.peak_bytes, "peak_worker_bytes": watch.peak_worker_bytes}
    return measured | ({"workers_killed": watch.num_killed} if kill else {})


def read_rows(files: Path | str, users: pl.Series) -> pl.DataFrame:
    """Return the recommendations for some users."""
    return pl.scan_parquet(files).filter(pl.col("user_id").is_in(users.implode())).collect()


def compare(found: pl.DataFrame, wanted: pl.DataFrame) -> dict:
    """Return how much of the recommendations for some users is the same: items by their place, and scores."""
    joined = wanted.join(found, on=["user_id", "rank"], suffix="_found", how="full", coalesce=True)
    is_same = (joined["item_id"] == joined["item_id_found"]).fill_null(False)
    return {
        "num_users": wanted["user_id"].n_unique(),
        "rows": len(wanted),
        "rows_found": len(found),
        "share_of_equal_items": is_same.mean(),
        "largest_score_difference": (joined["score"] - joined["score_found"]).abs().max(),
    }


def recommend_command(histories: pl.DataFrame, args: argparse.Namespace) -> pl.DataFrame:
    """Return what `elastic-hf recommend` writes for whole histories."""
    source, output = args.folder / "some.parquet", args.folder / "recommended.parquet"
    histories.explode("item_ids", "timestamps").rename(
        {"item_ids": "item_id", "timestamps": "timestamp"}
    ).write_parquet(source)
    arguments = {"model_name_or_path": args.folder / "model", "input_file": source, "output_file": output}
    arguments |= {"top_k": args.top_k, "cache_dir": args.folder / "cache"}
    recommend.main([str(part) for name, value in arguments.items() for part in (f"--{name}", value)])
    return pl.read_parquet(output)


def measure_size(args: argparse.Namespace, histories: Path, num_users: int) -> dict:
    """Both sides on one file."""
    row = {"num_users": num_users, "file_bytes": histories.stat().st_size}
    scored, output = args.folder / f"scored-{num_users}", args.folder / "single.parquet"
    row["ray"] = run_script(args, histories, scored)
    users = pl.Series(np.arange(args.num_compared))
    rows = read_rows(scored / PARTS, users)
    for name, threads in (("one_process", 1), ("one_process_all_threads", os.cpu_count())):
        arguments = (histories, str(args.folder / "model"), output, args.top_k, threads)
        start = time.perf_counter()
        peak = in_fresh_process(score_in_one_process, *arguments)
        seconds = time.perf_counter() - start
        row[name] = {"threads": threads, "seconds": seconds, "users_per_second": num_users / seconds}
        row[name] |= {"peak_bytes": peak, "compared": compare(rows, read_rows(output, users))}
    return row


def measure_killed(args: argparse.Namespace, histories: Path, undisturbed: Path) -> dict:
    """A worker is killed while the first files are written."""
    measured = run_script(args, histories, args.folder / "killed", kill=True)
    names = sorted(file.name for file in undisturbed.glob(PARTS))
    same = [(undisturbed / name).read_bytes() == (args.folder / "killed" / name).read_bytes() for name in names]
    return {**measured, "files": len(names), "files_of_equal_bytes": sum(same)}


def measure_states(args: argparse.Namespace, histories: Path) -> dict:
    """Whole histories into states, then a day of new events on top of them, beside whole histories again."""
    states = ["--states", str(args.folder / "states")]
    whole = run_script(args, histories, args.folder / "first", *states)
    make_day(histories, args.folder / "day.parquet", args.num_items, args.share_of_users)
    day = run_script(args, args.folder / "day.parquet", args.folder / "day", *states)
    size = sum(file.stat().st_size for file in (args.folder / "states").glob(PARTS))
    events = pl.read_parquet(args.folder / "day.parquet")
    users = events["user_id"].unique().sort()[: args.num_compared]
    new = events.filter(pl.col("user_id").is_in(users.implode())).group_by("user_id", maintain_order=True)
    new = new.agg(pl.col("item_id").alias("new_items"), pl.col("timestamp").alias("new_times"))
    old = pl.scan_parquet(histories).filter(pl.col("user_id").is_in(users.implode())).collect()
    joined = old.join(new, on="user_id").select(
        "user_id",
        pl.concat_list("item_ids", "new_items").alias("item_ids"),
        pl.concat_list("timestamps", "new_times").alias("timestamps"),
    )
    compared = compare(read_rows(args.folder / "day" / PARTS, users), recommend_command(joined, args))
    return {"whole_histories": whole, "day": day, "state_bytes": size, "day_beside_whole_histories": compared}


def measure(args: argparse.Namespace) -> dict:
    """Return what was found, by number of users."""
    model = make_model("elastic", args.length, args.num_items)
    model.save_pretrained(args.folder / "model")
    items = pa.table({"item_id": pa.array(np.arange(args.num_items))})
    # States hold whole histories: the model must read them whole, too, for both to say the same.
    tokenizer = ElasticItemTokenizer.from_items(items, model_max_length=args.length + NUM_NEW_EVENTS)
    tokenizer.save_pretrained(args.folder / "model")
    args.subject, args.dtype = "scoring", "float32"
    results = setting(args)
    results["versions"]["ray"] = version("ray")
    names = ("length", "num_items", "top_k", "num_workers", "object_store_memory", "share_of_users")
    results |= {name: getattr(args, name) for name in names} | {"rows": []}
    for num_users in args.num_users:
        histories = args.folder / f"histories-{num_users}.parquet"
        in_fresh_process(make_histories, histories, num_users, args.length, args.num_items)
        results["rows"].append(measure_size(args, histories, num_users))
    first = args.folder / f"histories-{args.num_users[0]}.parquet"
    scored = args.folder / f"scored-{args.num_users[0]}"
    some = pl.scan_parquet(first).head(args.num_compared).collect()
    results["beside_recommend"] = compare(read_rows(scored / PARTS, some["user_id"]), recommend_command(some, args))
    results["killed"] = measure_killed(args, first, scored)
    results["states"] = measure_states(args, first)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_users", type=int, nargs="+", default=[500_000, 2_000_000], help="Sizes, one by one.")
    parser.add_argument("--length", type=int, default=200, help="Items in a history.")
    parser.add_argument("--num_items", type=int, default=10_000)
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--object_store_memory", type=int, default=2**30)
    parser.add_argument("--num_compared", type=int, default=10_000, help="Users compared.")
    parser.add_argument("--share_of_users", type=float, default=0.1, help="Of those who have new events on the day.")
    parser.add_argument("--folder", type=Path, help="Where the files are made; a temporary folder by default.")
    parser.add_argument("--output", type=Path, default=RESULTS / "benchmark-scoring.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        args.folder = Path(folder)
        report(args.output, measure(args))


if __name__ == "__main__":
    main()
