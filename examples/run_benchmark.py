"""Measures what the README states. One sub-command for each subject, and one JSON file of results for each.

python examples/run_benchmark.py data         # 20 million interactions from a file to split histories
python examples/run_benchmark.py tokenizer    # item ids to token ids, by Arrow and one call at a time
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

from reporting import processor, write_json


RESULTS = Path(__file__).parent / "results"


def in_fresh_process(function, *args):
    """Runs a function in a new process, so that one measurement's memory does not count into the next one's peak."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def report(file: Path, results: dict) -> None:
    write_json(file, results)
    print(json.dumps(results, indent=2))


# 1. data: rows in a file -> split histories


def make_files(folder: str, formats: list[str], num_rows: int, num_users: int, num_items: int, seed: int) -> None:
    """Writes rows in random order: popularity and activity follow Zipf's law, times are uniform over five years."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(seed)

    def zipf(size: int, offset: int) -> np.ndarray:
        cumulative = np.cumsum(1 / (np.arange(size) + offset))
        return np.searchsorted(cumulative, rng.random(num_rows) * cumulative[-1]) + 1

    rows = pl.DataFrame(
        {
            "user_id": zipf(num_users, offset=num_users // 10),
            "item_id": zipf(num_items, offset=1),
            "timestamp": rng.integers(1_500_000_000, 1_500_000_000 + 5 * 365 * 86_400, num_rows),
        }
    )
    if "parquet" in formats:
        rows.write_parquet(Path(folder) / "interactions.parquet")
    if "csv" in formats:
        rows.write_csv(Path(folder) / "interactions.csv")


def measure_load(path: str, cache_dir: str) -> dict:
    from elastic_hf.interactions import load_histories

    start, cpu_start = time.perf_counter(), time.process_time()
    _, _, counts = load_histories(path, cache_dir=cache_dir)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    bytes_per_unit = 1 if platform.system() == "Darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_memory_gb": round(peak_bytes / 1e9, 2),
        **counts,
    }


def benchmark_data(args: argparse.Namespace) -> None:
    results = {
        "benchmark": "data",
        "num_rows": args.num_rows,
        "num_users": args.num_users,
        "num_items": args.num_items,
        "seed": args.seed,
        "cpu_count": os.cpu_count(),
        "cpu_model": processor(),
        "load_average_before": round(os.getloadavg()[0], 2),  # other work on the machine, in busy cores
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("datasets", "numpy", "pyarrow")},
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = (args.num_rows, args.num_users, args.num_items, args.seed)
        in_fresh_process(make_files, folder, args.formats, *settings)
        for name in args.formats:
            path = Path(folder) / f"interactions.{name}"
            measured = in_fresh_process(measure_load, str(path), str(Path(folder) / "cache"))
            results[name] = {"file_mb": round(path.stat().st_size / 1e6), **measured}
    report(args.output, results)


# 2. tokenizer: item ids -> token ids


def benchmark_tokenizer(args: argparse.Namespace) -> None:
    import numpy as np
    import pyarrow as pa

    from elastic_hf import ElasticItemTokenizer

    rng = np.random.default_rng(args.seed)
    item_ids = rng.choice(10 * args.num_items, args.num_items, replace=False)
    num_histories = args.num_rows // args.history_length
    offsets = np.arange(num_histories + 1, dtype=np.int32) * args.history_length
    results = {
        "benchmark": "tokenizer",
        "num_rows": num_histories * args.history_length,
        "history_length": args.history_length,
        "num_items": args.num_items,
        "seed": args.seed,
        "cpu_count": os.cpu_count(),
        "cpu_model": processor(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("pyarrow", "tokenizers", "transformers")},
        },
    }
    for kind, ids in (("integer", pa.array(item_ids)), ("string", pa.array(item_ids).cast(pa.string()))):
        tokenizer = ElasticItemTokenizer.from_items(pa.table({"item_id": ids}), model_max_length=args.history_length)
        interactions = ids.take(pa.array(rng.integers(args.num_items, size=offsets[-1])))
        histories = pa.ListArray.from_arrays(pa.array(offsets), interactions)
        few = histories[: args.num_slow].to_pylist()

        start = time.perf_counter()
        token_ids = tokenizer.encode_histories(histories)
        arrow_seconds = time.perf_counter() - start
        start = time.perf_counter()
        slow_token_ids = tokenizer(few, is_split_into_words=True)["input_ids"]
        slow_seconds = time.perf_counter() - start
        if token_ids[: args.num_slow].to_pylist() != slow_token_ids:
            raise RuntimeError(f"the two paths disagree on {kind} ids")

        arrow_rate = results["num_rows"] / arrow_seconds
        slow_rate = args.num_slow * args.history_length / slow_seconds
        results[kind] = {
            "arrow_million_items_per_second": round(arrow_rate / 1e6, 1),
            "call_million_items_per_second": round(slow_rate / 1e6, 2),
            "ratio": round(arrow_rate / slow_rate, 1),
        }
    report(args.output, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subjects = parser.add_subparsers(required=True)

    data = subjects.add_parser("data", help="seconds and peak memory from a file of interactions to split histories")
    data.add_argument("--num_rows", type=int, default=20_000_000)
    data.add_argument("--num_users", type=int, default=150_000)
    data.add_argument("--num_items", type=int, default=60_000)
    data.add_argument("--formats", nargs="+", choices=("parquet", "csv"), default=["parquet", "csv"])
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--output", type=Path, default=RESULTS / "benchmark-data.json")
    data.set_defaults(run=benchmark_data)

    tokenizer = subjects.add_parser("tokenizer", help="items per second from item ids to token ids")
    tokenizer.add_argument("--num_rows", type=int, default=20_000_000)
    tokenizer.add_argument("--history_length", type=int, default=200)
    tokenizer.add_argument("--num_items", type=int, default=60_000)
    tokenizer.add_argument("--num_slow", type=int, default=2_000, help="Histories that take the slow path as well.")
    tokenizer.add_argument("--seed", type=int, default=0)
    tokenizer.add_argument("--output", type=Path, default=RESULTS / "benchmark-tokenizer.json")
    tokenizer.set_defaults(run=benchmark_tokenizer)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
