"""Measures what the documents state. One sub-command for each subject; each writes a JSON file, and a plot of lengths.

python examples/run_benchmark.py inference    # histories to user embeddings, by length, beside other models
python examples/run_benchmark.py training     # a training step, by length, beside other models
python examples/run_benchmark.py memory       # peak memory of both
python examples/run_benchmark.py profile      # which operators the time of both goes into
python examples/run_benchmark.py streaming    # one more item after 100 and after 100,000 of them
python examples/run_benchmark.py catalogue    # training and recommending with up to a million items
python examples/run_benchmark.py memory-bank  # an interest memory of up to 262,144 slots against none
python examples/run_benchmark.py onnx         # ONNX Runtime beside PyTorch
python examples/run_benchmark.py data         # 20 million interactions from a file to split histories
python examples/run_benchmark.py tokenizer    # item ids to token ids, by Arrow and one call at a time

Both sides of every ratio are measured in the same process, taking turns; seconds are the median of the repetitions.
Leave the machine alone meanwhile.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

from reporting import git_commit, processor, write_json


RESULTS = Path(__file__).parent / "results"


def in_fresh_process(function, *args):
    """Runs a function in a new process, so that one measurement's memory does not count into the next one's peak."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def report(file: Path, results: dict) -> None:
    write_json(file, results)
    print(json.dumps(results, indent=2))


# 1. models: the same width, layers, heads and batch for every side

LONG = [1_024, 2_048, 4_096]
BIDIRECTIONAL = {"is_causal": False, "training_objective": "prefix"}
SIDES = {
    "elastic": ("elastic", {}),
    "elastic, no memory": ("elastic", {"num_memory_subkeys": 0}),
    "elastic, bidirectional": ("elastic", BIDIRECTIONAL),
    "elastic, checkpointed": ("elastic", {}),
    "elastic, compiled": ("elastic", {}),
    "elastic, bidirectional, compiled": ("elastic", BIDIRECTIONAL),
    "sasrec, sdpa": ("sasrec", {}),
    "sasrec, sdpa, compiled": ("sasrec", {}),
    "sasrec, naive": ("sasrec", {}),
    "linrec": ("linrec", {}),
    "lightsans": ("lightsans", {}),
}


def make_model(side: str, length: int, num_items: int, **changes):
    """A model with random weights: hidden size 64, 2 layers, 2 heads, feed-forward 256, 16 interests."""
    import torch
    from transformers import AutoConfig, AutoModel

    import elastic_hf  # noqa: F401

    model_type, settings = SIDES[side]
    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        **settings,
    }
    if model_type == "elastic":
        settings["num_interest_experts"] = 16
    else:
        settings["max_position_embeddings"] = length
    if model_type == "lightsans":
        settings["num_latent_interests"] = 16
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=num_items + 3, **{**settings, **changes})
    attention = {"attn_implementation": "eager"} if side == "sasrec, naive" else {}
    model = AutoModel.from_config(config, **attention)
    if side.endswith("compiled"):
        model.model.compile()
    if side.endswith("checkpointed"):
        model.activation_checkpointing_enable()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def make_step(model, batch_size: int, length: int, num_items: int, subject: str):
    """What is measured: a function that encodes a batch of users, or one that trains on it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, num_items + 3, (batch_size, length), generator=generator).to(model.device)
    if subject == "inference":
        model.eval().requires_grad_(False)
        return lambda: model.get_user_embeddings(input_ids)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    labels = input_ids.roll(-1, dims=1)
    if not model.config.is_causal:
        labels[:, :-1] = -100

    def step():
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def median_seconds(steps: dict, repetitions: int, warmup: int) -> dict[str, float]:
    """Runs the functions in turns and returns the median time of each."""
    import torch

    times = {name: [] for name in steps}
    for repetition in range(warmup + repetitions):
        for name, step in steps.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(step) -> int:
    """The most memory that one call holds beyond what was there before it, by the allocator's own account."""
    import torch

    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def setting(args: argparse.Namespace) -> dict:
    """Where and how it was measured."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "benchmark": args.subject,
        "hardware": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),  # other work on the machine, in busy cores
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
    }


def product_rate() -> float:
    """Multiplications and additions a second of a large matrix product, two for each."""
    import torch

    size = 2048 if torch.cuda.is_available() else 1024
    matrix = torch.randn(size, size, device="cuda" if torch.cuda.is_available() else "cpu")
    seconds = median_seconds({"product": lambda: matrix @ matrix}, repetitions=20, warmup=3)["product"]
    return 2 * size**3 / seconds


def count_operations(step) -> int:
    """The multiplications and additions of the matrix products of one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def benchmark_models(args: argparse.Namespace) -> None:
    """Time or memory of every side at every length."""
    import torch

    results = {**setting(args), "num_items": args.num_items, "rows": []}
    if args.subject == "inference":
        results["product_rate"] = product_rate()
    passes = ("inference", "training") if args.subject == "memory" else (args.subject,)
    for length in args.lengths:
        batch_size = max(1, min(args.batch_size, args.max_positions // length))
        sides = [side for side in args.sides if length <= args.longest_naive or side != "sasrec, naive"]
        sides = [side for side in sides if length in args.compiled_lengths or not side.endswith("compiled")]
        for subject in passes:
            steps = {}
            for side in sides:
                if subject == "inference" and side.endswith("checkpointed"):
                    continue
                model = make_model(side, length, args.num_items, training_loss="sampled_softmax")
                steps[side] = make_step(model, batch_size, length, args.num_items, subject)
            row = {"pass": subject, "length": length, "batch_size": batch_size}
            if args.subject == "memory":
                row["peak_bytes"] = {side: peak_bytes(step) for side, step in steps.items()}
            else:
                row["seconds"] = median_seconds(steps, args.repetitions, args.warmup)
            if args.subject == "inference":
                # The counter knows neither the fused attention of a processor nor compiled programs.
                ours = [side for side in steps if side.startswith("elastic") and not side.endswith("compiled")]
                row["operations"] = {side: count_operations(steps[side]) for side in ours}
            results["rows"].append(row)
            print(json.dumps(row))
            torch.compiler.reset()  # programs of another length are other programs
    plot(results, args.output.with_suffix(".png"))
    write_json(args.output, results)


def plot(results: dict, file: Path) -> None:
    """What was measured against the length, one line for each side, one panel for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    passes = list(dict.fromkeys(row["pass"] for row in results["rows"]))
    figure, axes = plt.subplots(1, len(passes), figsize=(6 * len(passes), 4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], passes, strict=True):
        rows = [row for row in results["rows"] if row["pass"] == name]
        key, label, unit = ("seconds", "milliseconds per user", 1e-3)
        if "peak_bytes" in rows[0]:
            key, label, unit = ("peak_bytes", "peak megabytes per user", 1e6)
        for side in rows[0][key]:
            points = [(row["length"], row[key][side] / unit / row["batch_size"]) for row in rows if side in row[key]]
            style = "-" if side.startswith("elastic") else "--"
            axis.plot(*zip(*points, strict=True), marker=".", linestyle=style, label=side)
        axis.set(xscale="log", yscale="log", xlabel="history length (items)", ylabel=f"{label}, {name}")
        axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def benchmark_onnx(args: argparse.Namespace) -> None:
    """Exported programs beside PyTorch: whole histories by length, and one more item on top of a state."""
    import onnxruntime
    import torch

    from export_onnx import History, Step, export, make_inputs

    model = make_model("elastic", 0, args.num_items).eval().requires_grad_(False)
    results = {**setting(args), "num_items": args.num_items, "batch_size": args.batch_size, "rows": []}
    results["versions"]["onnxruntime"] = version("onnxruntime")
    options = onnxruntime.SessionOptions()
    # Its threads would wait for more work in a loop, in the way of the other side.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        for name, program, lengths in (("history", History(model), args.lengths), ("step", Step(model), [1])):
            with_state = name == "step"
            export(program, Path(folder) / f"{name}.onnx", with_state)
            session = onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx", options)
            names = [value.name for value in session.get_inputs()]
            for length in lengths:
                inputs = make_inputs(model, args.batch_size, length, with_state)
                arrays = {key: value.numpy() for key, value in zip(names, inputs, strict=True)}
                steps = {
                    "pytorch": torch.no_grad()(lambda program=program, inputs=inputs: program(*inputs)),
                    "onnxruntime": lambda session=session, arrays=arrays: session.run(None, arrays),
                }
                seconds = median_seconds(steps, args.repetitions, args.warmup)
                results["rows"].append({"program": name, "length": length, "seconds": seconds})
    report(args.output, results)


def benchmark_profile(args: argparse.Namespace) -> None:
    """The operators in which ELASTIC and SASRec spend their time, the costliest first."""
    import torch

    results = {**setting(args), "num_items": args.num_items, "length": args.length, "batch_size": args.batch_size}
    results["rows"] = []
    on_gpu = torch.cuda.is_available()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    for subject in ("inference", "training"):
        for side in args.sides:
            model = make_model(side, args.length, args.num_items, training_loss="sampled_softmax")
            step = make_step(model, args.batch_size, args.length, args.num_items, subject)
            for _ in range(args.warmup):
                step()
            with torch.profiler.profile() as profile:
                for _ in range(args.repetitions):
                    step()
            events = sorted(profile.key_averages(), key=lambda event: -getattr(event, time_of))
            total = sum(getattr(event, time_of) for event in events)
            operators = [
                {
                    "name": event.key,
                    "calls": event.count // args.repetitions,
                    "share": getattr(event, time_of) / total,
                }
                for event in events[: args.num_operators]
            ]
            calls = sum(event.count for event in events) // args.repetitions
            results["rows"].append({"pass": subject, "side": side, "calls": calls, "operators": operators})
    report(args.output, results)


def benchmark_memory_bank(args: argparse.Namespace) -> None:
    """What an interest memory costs by its number of slots: encoding users, and a training step."""
    results = {**setting(args), "length": args.length, "batch_size": args.batch_size, "rows": []}
    results["num_items"] = args.num_items
    for subject in ("inference", "training"):
        steps = {}
        for num_subkeys in args.num_subkeys:
            changes = {"num_memory_subkeys": num_subkeys, "training_loss": "sampled_softmax"}
            model = make_model("elastic", args.length, args.num_items, **changes)
            steps[str(num_subkeys**2)] = make_step(model, args.batch_size, args.length, args.num_items, subject)
        seconds = median_seconds(steps, args.repetitions, args.warmup)
        peaks = {name: peak_bytes(step) for name, step in steps.items()}
        results["rows"].append({"pass": subject, "seconds": seconds, "peak_bytes": peaks})
    report(args.output, results)


def benchmark_catalogue(args: argparse.Namespace) -> None:
    """Training with a sampled softmax, ranking and recommending, by the number of items."""
    import torch

    from elastic_hf import ItemIndex
    from elastic_hf.metrics import rank_targets

    results = {**setting(args), "length": args.length, "batch_size": args.batch_size, "num_users": args.num_users}
    results["rows"] = []
    training, ranking, models = {}, {}, {}
    for num_items in args.num_items:
        name = str(num_items)
        model = make_model("elastic", args.length, num_items, training_loss="sampled_softmax")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # items in groups of a hundred, as a trained catalogue has them, not all alike
            groups = torch.randn(num_items // 100 + 1, model.config.hidden_size, generator=generator)
            near = torch.randint(len(groups), (num_items + 3,), generator=generator)
            noise = torch.randn(num_items + 3, model.config.hidden_size, generator=generator)
            model.get_input_embeddings().weight.copy_(0.02 * (groups[near] + noise))
        training[name] = make_step(model, args.batch_size, args.length, num_items, "training")
        users = torch.randint(3, num_items + 3, (args.num_users, args.length + 1), generator=generator)
        histories, targets = users.to(model.device).split([args.length, 1], dim=1)

        def rank(model=model, histories=histories, targets=targets[:, 0]):
            users = model.eval().get_user_embeddings(histories)
            rank_targets(users, model.get_output_embeddings().weight, targets, histories)
            model.train()

        ranking[name] = rank
        models[name] = (model, histories)
    seconds = {
        "training": median_seconds(training, args.repetitions, args.warmup),
        "ranking": median_seconds(ranking, args.repetitions, args.warmup),
    }
    for name, (model, histories) in models.items():
        model.eval()
        start = time.perf_counter()
        index = ItemIndex(model)
        build_seconds = time.perf_counter() - start
        recommend = {
            "exact": lambda model=model, histories=histories: model.recommend(histories, top_k=10),
            "index": lambda model=model, histories=histories, index=index: model.recommend(
                histories, top_k=10, index=index
            ),
        }
        recommend_seconds = median_seconds(recommend, args.repetitions, args.warmup)
        exact, found = (function().token_ids for function in recommend.values())
        recall = (exact[:, :, None] == found[:, None]).any(dim=-1).float().mean().item()
        results["rows"].append(
            {
                "num_items": int(name),
                "num_parameters": model.num_parameters(),
                "training_seconds": seconds["training"][name],
                "training_peak_bytes": peak_bytes(training[name]),
                "ranking_seconds": seconds["ranking"][name],
                "ranking_peak_bytes": peak_bytes(ranking[name]),
                "exact_seconds": recommend_seconds["exact"],
                "index_seconds": recommend_seconds["index"],
                "index_recall@10": recall,
                "index_build_seconds": build_seconds,
            }
        )
    report(args.output, results)


def benchmark_streaming(args: argparse.Namespace) -> None:
    """One more item and the ten best recommendations, after histories of several lengths."""
    import torch

    model = make_model("elastic", 0, args.num_items).eval()
    steps = {}
    for length in args.lengths:
        history = torch.randint(3, args.num_items + 3, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            cache = model(history.to(model.device), use_cache=True).cache
        item = history[:, :1].to(model.device)

        @torch.inference_mode()
        def step(item=item, cache=cache):
            model(item, cache=cache, use_cache=True).logits.topk(10)

        steps[f"{length:,}"] = step
    seconds = median_seconds(steps, args.repetitions, args.warmup)
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in vars(cache).values())
    results = {**setting(args), "num_items": args.num_items, "bytes_per_user": state_bytes, "seconds": seconds}
    report(args.output, results)


# 2. data: rows in a file -> split histories


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


# 3. tokenizer: item ids -> token ids


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

    for subject, text, lengths, compiled in (
        (
            "inference",
            "seconds from histories to user embeddings",
            [100, 200, 300, 500, *LONG, 8192, 32768],
            [200, 2048, 8192, 32768],
        ),
        ("training", "seconds of a training step", [50, 100, 200, 500, *LONG], [200, 2048]),
        ("memory", "peak memory of both", [200, 500, *LONG], [2048]),
    ):
        models = subjects.add_parser(subject, help=f"{text}, by length, beside other models")
        models.add_argument("--lengths", type=int, nargs="+", default=lengths)
        models.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES))
        models.add_argument("--batch_size", type=int, default=4, help="Histories in a batch.")
        models.add_argument("--max_positions", type=int, default=8_192, help="Positions in a batch of several.")
        models.add_argument("--compiled_lengths", type=int, nargs="*", default=compiled, help="To compile for.")
        models.add_argument("--longest_naive", type=int, default=8_192, help="Longest length of naive attention.")
        models.add_argument("--num_items", type=int, default=10_000)
        models.add_argument("--repetitions", type=int, default=15)
        models.add_argument("--warmup", type=int, default=2)
        models.add_argument("--output", type=Path, default=RESULTS / f"benchmark-{subject}.json")
        models.set_defaults(run=benchmark_models, subject=subject)

    streaming = subjects.add_parser("streaming", help="seconds of one more item, by the length of the history")
    streaming.add_argument("--lengths", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    streaming.add_argument("--num_items", type=int, default=10_000)
    streaming.add_argument("--repetitions", type=int, default=200)
    streaming.add_argument("--warmup", type=int, default=20)
    streaming.add_argument("--output", type=Path, default=RESULTS / "benchmark-streaming.json")
    streaming.set_defaults(run=benchmark_streaming, subject="streaming")

    catalogue = subjects.add_parser("catalogue", help="training and recommending, by the number of items")
    catalogue.add_argument("--num_items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    catalogue.add_argument("--length", type=int, default=200)
    catalogue.add_argument("--batch_size", type=int, default=64)
    catalogue.add_argument("--num_users", type=int, default=256, help="Users that are ranked and recommended to.")
    catalogue.add_argument("--repetitions", type=int, default=9)
    catalogue.add_argument("--warmup", type=int, default=1)
    catalogue.add_argument("--output", type=Path, default=RESULTS / "benchmark-catalogue.json")
    catalogue.set_defaults(run=benchmark_catalogue, subject="catalogue")

    onnx = subjects.add_parser("onnx", help="ONNX Runtime beside PyTorch")
    onnx.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 2_048])
    onnx.add_argument("--batch_size", type=int, default=1)
    onnx.add_argument("--num_items", type=int, default=10_000)
    onnx.add_argument("--repetitions", type=int, default=50)
    onnx.add_argument("--warmup", type=int, default=5)
    onnx.add_argument("--output", type=Path, default=RESULTS / "benchmark-onnx.json")
    onnx.set_defaults(run=benchmark_onnx, subject="onnx")

    profile = subjects.add_parser("profile", help="the operators that the time goes into")
    profile.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=["elastic", "sasrec, sdpa"])
    profile.add_argument("--length", type=int, default=2_048)
    profile.add_argument("--batch_size", type=int, default=4)
    profile.add_argument("--num_items", type=int, default=10_000)
    profile.add_argument("--num_operators", type=int, default=12, help="Operators that are named.")
    profile.add_argument("--repetitions", type=int, default=7)
    profile.add_argument("--warmup", type=int, default=2)
    profile.add_argument("--output", type=Path, default=RESULTS / "benchmark-profile.json")
    profile.set_defaults(run=benchmark_profile, subject="profile")

    bank = subjects.add_parser("memory-bank", help="the cost of the interest memory, by its number of slots")
    bank.add_argument("--num_subkeys", type=int, nargs="+", default=[0, 32, 128, 512])
    bank.add_argument("--length", type=int, default=2_048)
    bank.add_argument("--batch_size", type=int, default=4)
    bank.add_argument("--num_items", type=int, default=10_000)
    bank.add_argument("--repetitions", type=int, default=7)
    bank.add_argument("--warmup", type=int, default=2)
    bank.add_argument("--output", type=Path, default=RESULTS / "benchmark-memory-bank.json")
    bank.set_defaults(run=benchmark_memory_bank, subject="memory-bank")

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
