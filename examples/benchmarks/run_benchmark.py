"""Measure what the documents state. One sub-command for each subject; each writes a JSON file.

python examples/benchmarks/run_benchmark.py inference    # histories to user embeddings, by length, beside other models
python examples/benchmarks/run_benchmark.py training     # a training step, by length, beside other models
python examples/benchmarks/run_benchmark.py memory       # peak memory of both
python examples/benchmarks/run_benchmark.py profile      # which operators the time of both goes into
python examples/benchmarks/run_benchmark.py streaming    # one more item after 100 and after 100,000 of them
python examples/benchmarks/run_benchmark.py events       # what times and features of events cost
python examples/benchmarks/run_benchmark.py catalogue    # training and recommending with up to a million items
python examples/benchmarks/run_benchmark.py added-items  # new items in a trained catalogue of up to a million
python examples/benchmarks/run_benchmark.py memory-bank  # an interest memory of up to 262,144 slots against none
python examples/benchmarks/run_benchmark.py distributed  # memory of a large catalogue in each of two processes
python examples/benchmarks/run_benchmark.py onnx         # ONNX Runtime beside PyTorch
python examples/benchmarks/run_benchmark.py quantization # exported programs with weights in int8
python examples/benchmarks/run_benchmark.py data         # interactions from a file to histories, in memory and on disk
python examples/benchmarks/run_benchmark.py tokenizer    # item ids to token ids, by Arrow and one call at a time

Both models of every ratio are measured in the same process, taking turns; seconds are the median of the repetitions.
Leave the machine alone meanwhile. The first three need torch and transformers alone (and `PYTHONPATH=.` where this
package is not installed). On a machine with a GPU they run on it, in `--dtype float32` or `bfloat16`, and write files
of their own. `render_results.py` makes tables and figures.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

from elastic_hf.results import git_commit, processor, write_json


RESULTS = Path(__file__).parent / "results"
EXAMPLES = Path(__file__).parents[1]


def in_fresh_process(function, *args):
    """Run a function in a new process, so that one measurement's memory does not count into the next one's peak."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def report(file: Path, results: dict) -> None:
    write_json(file, results)
    print(json.dumps(results, indent=2))


# 1. models: the same width, layers, heads and batch for every model

MODELS = {
    "elastic": ("elastic", {}),
    "elastic, no memory": ("elastic", {"num_memory_subkeys": 0}),
    "elastic, 4 layers": ("elastic", {"num_hidden_layers": 4}),
    "elastic, block on the stream": ("elastic", {"stream_intermediate_size": 256}),
    "elastic, checkpointed": ("elastic", {}),
    "elastic, compiled": ("elastic", {}),
    "elastic, CUDA graph": ("elastic", {}),
    "elastic_paper": ("elastic_paper", {}),
    "sasrec, sdpa": ("sasrec", {}),
    "sasrec, sdpa, checkpointed": ("sasrec", {}),
    "sasrec, sdpa, compiled": ("sasrec", {}),
    "sasrec, sdpa, CUDA graph": ("sasrec", {}),
    "sasrec, naive": ("sasrec", {}),
    "sasrec, naive, CUDA graph": ("sasrec", {}),
    "hstu": ("hstu", {}),
    "lrurec": ("lrurec", {}),
    "linrec": ("linrec", {}),
    "lightsans": ("lightsans", {}),
}
NAIVE = ("sasrec, naive", "sasrec, naive, CUDA graph", "hstu")  # these hold a number for each pair of items

PROGRAMS = ("compiled", "CUDA graph")  # a program for each length


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make_model(name: str, length: int, num_items: int, **changes):
    """Return a model with random weights: hidden size 64, 2 layers, 2 heads, feed-forward 256, 16 interests."""
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    import elastic_hf  # noqa: F401

    model_type, own = MODELS[name]
    settings = {
        "vocab_size": num_items + 3,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "num_interest_experts": 16,
        "num_latent_interests": 16,
        "max_position_embeddings": length,
        **own,
        **changes,
    }
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{key: value for key, value in settings.items() if key in known})
    attention = {"attn_implementation": "eager"} if name.startswith("sasrec, naive") else {}
    model = AutoModel.from_config(config, **attention)
    if name.endswith("compiled"):
        model.model.compile()
    if name.endswith("CUDA graph"):
        model.model.compile(backend="cudagraphs")
    if name.endswith("checkpointed"):
        model.activation_checkpointing_enable()
    return model.to(device())


def make_step(model, batch_size: int, length: int, subject: str, dtype: str = "float32"):
    """Return what is measured: a function that encodes a batch of users, or one that trains on it.

    Users are encoded with weights of the `dtype`; training keeps float32 weights, under autocast.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    config, dtype = model.config, getattr(torch, dtype)
    input_ids = torch.randint(config.num_special_tokens, config.vocab_size, (batch_size, length), generator=generator)
    input_ids = input_ids.to(model.device)
    if subject == "inference":
        model.eval().requires_grad_(False).to(dtype)
        return lambda: model.get_user_embeddings(input_ids)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    labels = input_ids.roll(-1, dims=1)
    if not config.is_causal:
        labels[:, :-1] = -100

    def step():
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def median_seconds(steps: dict, repetitions: int, warmup: int) -> dict[str, float]:
    """Run the functions in turns and return the median time of each."""
    from torch.utils.benchmark import timer  # waits for a GPU

    times = {name: [] for name in steps}
    for repetition in range(warmup + repetitions):
        for name, step in steps.items():
            start = timer()
            step()
            seconds = timer() - start
            if repetition >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(step) -> int:
    """Return the most memory that one call holds beyond what was there before it, by the allocator's own account."""
    import torch

    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return peak_bytes_of_processor(step)


def peak_bytes_of_processor(function) -> int:
    """Return the most memory that one call holds beyond what was there before it, on the processor."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def setting(args: argparse.Namespace) -> dict:
    """Return where and how it was measured."""
    import torch
    import transformers

    return {
        "benchmark": args.subject,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "device": device(),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),  # other work on the machine, in busy cores
        "git_commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def benchmark_models(args: argparse.Namespace) -> None:
    """Measure time or memory of every model at every length."""
    import torch

    results = {**setting(args), "num_items": args.num_items, "rows": []}
    passes = ("inference", "training") if args.subject == "memory" else (args.subject,)
    batch_sizes = args.batch_sizes * len(args.lengths) if len(args.batch_sizes) == 1 else args.batch_sizes
    if len(batch_sizes) != len(args.lengths):
        raise ValueError(f"batch_sizes must be 1 or {len(args.lengths)} numbers, found {len(batch_sizes)}")
    for length, batch_size in zip(args.lengths, batch_sizes, strict=True):
        names = [name for name in args.models if length <= args.longest_naive or name not in NAIVE]
        names = [name for name in names if length in args.compiled_lengths or not name.endswith(PROGRAMS)]
        names = [name for name in names if torch.cuda.is_available() or not name.endswith("CUDA graph")]
        for subject in passes:
            steps = {}
            for name in names:
                if subject == "inference" and name.endswith("checkpointed"):
                    continue
                model = make_model(name, length, args.num_items, training_loss="sampled_softmax")
                steps[name] = make_step(model, batch_size, length, subject, args.dtype)
            row = {"pass": subject, "length": length, "batch_size": batch_size}
            if args.subject == "memory":
                row["peak_bytes"] = {name: peak_bytes(step) for name, step in steps.items()}
            else:
                row["seconds"] = median_seconds(steps, args.repetitions, args.warmup)
            results["rows"].append(row)
            print(json.dumps(row))
            torch.compiler.reset()  # programs of another length are other programs
    if args.subject == "memory":
        results["rows"] += [measure_default(length, args.dtype) for length in args.default_lengths]
    write_json(args.output, results)


def measure_default(length: int, dtype: str) -> dict:
    """Measure the peak memory of training on one user with the defaults of the configuration."""
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model("elastic")).to(device())
    step = make_step(model, 1, length, "training", dtype)
    row = {"pass": "training, defaults", "length": length, "batch_size": 1}
    row["peak_bytes"] = {"elastic": peak_bytes(step)}
    print(json.dumps(row))
    return row


def onnx_options():
    """Return the options of a session whose threads do not wait for more work in a loop, in the way of the others."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def benchmark_onnx(args: argparse.Namespace) -> None:
    """Measure exported programs beside PyTorch: whole histories by length, and one more item on top of a state."""
    import onnxruntime
    import torch

    sys.path.append(str(EXAMPLES))
    from elastic_hf.commands.export import export, make_inputs

    model = make_model("elastic", 0, args.num_items).eval().requires_grad_(False)
    results = {**setting(args), "num_items": args.num_items, "batch_size": args.batch_size, "rows": []}
    results["versions"]["onnxruntime"] = version("onnxruntime")
    options = onnx_options()
    with tempfile.TemporaryDirectory() as folder:
        for name, lengths in (("history", args.lengths), ("step", [1])):
            with_state = name == "step"
            program = export(model, Path(folder) / f"{name}.onnx", with_state)
            session = onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx", options)
            for length in lengths:
                inputs = make_inputs(model, args.batch_size, length, with_state)
                arrays = {key: value.numpy() for key, value in inputs.items()}
                steps = {
                    "pytorch": torch.no_grad()(lambda program=program, inputs=inputs: program(*inputs.values())),
                    "onnxruntime": lambda session=session, arrays=arrays: session.run(None, arrays),
                }
                seconds = median_seconds(steps, args.repetitions, args.warmup)
                results["rows"].append({"program": name, "length": length, "seconds": seconds})
    report(args.output, results)


def benchmark_quantization(args: argparse.Namespace) -> None:
    """Measure exported programs whose matrices are in int8, and their inputs as they come, beside those in float32."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    from elastic_hf.commands.export import export, make_inputs

    model = AutoModel.from_pretrained(args.model).eval().requires_grad_(False)
    users = read_test_users(args.model, args.num_users)
    results = {**setting(args), "model": Path(args.model).name, "num_users": len(users), "rows": []}
    results["batch_size"] = args.batch_size
    results["versions"]["onnxruntime"] = version("onnxruntime")
    options = onnx_options()
    with tempfile.TemporaryDirectory() as folder:
        for program, lengths in (("history", args.lengths), ("step", [1])):
            with_state = program == "step"
            files = {name: Path(folder, f"{program}-{name}.onnx") for name in ("float32", "int8")}
            export(model, files["float32"], with_state)
            quantize_dynamic(files["float32"], files["int8"], weight_type=QuantType.QInt8)
            sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}
            row = {"program": program, "bytes": {name: file.stat().st_size for name, file in files.items()}}
            row["seconds"] = {}
            for length in lengths:
                inputs = make_inputs(model, args.batch_size, length, with_state)
                arrays = {name: value.numpy() for name, value in inputs.items()}
                steps = {
                    name: lambda session=session, arrays=arrays: session.run(None, arrays)
                    for name, session in sessions.items()
                }
                row["seconds"][str(length)] = median_seconds(steps, args.repetitions, args.warmup)
            if not with_state:
                row["metrics"] = {name: rank_test_items(session, users) for name, session in sessions.items()}
            results["rows"].append(row)
    report(args.output, results)


def read_test_users(model: str, num_users: int) -> list[tuple[list[int], list[int], int]]:
    """Return what a model reads of the histories of the embedded dataset, the whole histories, and the test items."""
    from elastic_hf import ElasticItemTokenizer, load_histories

    tokenizer = ElasticItemTokenizer.from_pretrained(model)
    users = tokenizer.tokenize_histories(load_histories("synthetic").histories)["test"]
    rows = users.select(range(min(num_users, len(users))))
    return [(row["input_ids"][-tokenizer.model_max_length :], row["input_ids"], row["target"]) for row in rows]


def rank_test_items(session, users: list[tuple[list[int], list[int], int]]) -> dict[str, float]:
    """Return the metrics of a program that takes whole histories, seen items excluded."""
    import numpy as np

    from elastic_hf.models.item_tokenizer import NUM_SPECIAL_TOKENS
    from elastic_hf.training.metrics import ranking_metrics

    ranks, top_ids = [], []
    for history, seen, target in users:
        input_ids = np.array([history])
        (logits,) = session.run(None, {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)})[0]
        logits[[*range(NUM_SPECIAL_TOKENS), *(item for item in seen if item != target)]] = -np.inf
        ranks.append((logits >= logits[target]).sum())
        top_ids.append(np.argsort(-logits, kind="stable")[:20])
    metrics = ranking_metrics(np.array([ranks, ranks]).T, np.array(top_ids), len(logits) - NUM_SPECIAL_TOKENS)
    return {name: metrics[name] for name in ("hr@10", "ndcg@10", "mrr@10")}


def benchmark_profile(args: argparse.Namespace) -> None:
    """Find the operators in which ELASTIC and SASRec spend their time, the costliest first."""
    import torch

    results = {**setting(args), "num_items": args.num_items, "length": args.length, "batch_size": args.batch_size}
    results["rows"] = []
    on_gpu = torch.cuda.is_available()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    for subject in ("inference", "training"):
        for name in args.models:
            model = make_model(name, args.length, args.num_items, training_loss="sampled_softmax")
            step = make_step(model, args.batch_size, args.length, subject)
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
            results["rows"].append({"pass": subject, "model": name, "calls": calls, "operators": operators})
    report(args.output, results)


def benchmark_memory_bank(args: argparse.Namespace) -> None:
    """Measure what an interest memory costs by its number of slots: encoding users, and a training step."""
    results = {**setting(args), "length": args.length, "batch_size": args.batch_size, "rows": []}
    results["num_items"] = args.num_items
    for subject in ("inference", "training"):
        steps = {}
        for num_subkeys in args.num_subkeys:
            changes = {"num_memory_subkeys": num_subkeys, "training_loss": "sampled_softmax"}
            model = make_model("elastic", args.length, args.num_items, **changes)
            steps[str(num_subkeys**2)] = make_step(model, args.batch_size, args.length, subject)
        seconds = median_seconds(steps, args.repetitions, args.warmup)
        peaks = {name: peak_bytes(step) for name, step in steps.items()}
        results["rows"].append({"pass": subject, "seconds": seconds, "peak_bytes": peaks})
    report(args.output, results)


def benchmark_catalogue(args: argparse.Namespace) -> None:
    """Measure training with a sampled softmax, ranking and recommending, by the number of items."""
    import torch

    from elastic_hf import ItemIndex
    from elastic_hf.models.catalogue import CatalogueQuery

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
        training[name] = make_step(model, args.batch_size, args.length, "training")
        users = torch.randint(3, num_items + 3, (args.num_users, args.length + 1), generator=generator)
        histories, targets = users.to(model.device).split([args.length, 1], dim=1)

        query = CatalogueQuery(top_k=20, seen_ids=histories, target_ids=targets[:, 0])

        @torch.no_grad()
        def rank(model=model, histories=histories, query=query):
            model.eval()(histories, query=query)
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


# How each process holds the model, and what trains it. Transformers' Adafactor trains no sharded one.
HOLDINGS = (("whole", "adamw"), ("whole", "adafactor"), ("sharded", "adamw"))


def measure_process(
    rank: int,
    file: str,
    num_processes: int,
    num_items: int,
    held_as: str,
    optimizer: str,
    length: int,
    batch_size: int,
) -> dict:
    """Return what one of several processes holds after a training step, and at most from the start, in bytes."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers import Adafactor

    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=num_processes)
    input_ids = torch.randint(3, num_items + 3, (batch_size, length), generator=torch.Generator().manual_seed(rank))
    held = {}

    def train():
        model = make_model("elastic", length, num_items, training_loss="sampled_softmax").cpu()
        if held_as == "sharded":
            mesh = init_device_mesh("cpu", (num_processes,))
            for module in (*model.model.layers, model):
                fully_shard(module, mesh=mesh)
        else:
            model = DistributedDataParallel(model)
        parameters = list(model.parameters())
        if optimizer == "adafactor":  # as --optim adafactor
            steps = Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
        else:
            steps = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        for _ in range(2):
            model(input_ids, labels=input_ids.roll(-1, dims=1)).loss.backward()
            steps.step()
            steps.zero_grad()
        states = [value for state in steps.state.values() for value in state.values() if torch.is_tensor(value)]
        for name, tensors in (("weights_bytes", model.parameters()), ("optimizer_bytes", states)):
            held[name] = sum((x.to_local() if hasattr(x, "to_local") else x).nbytes for x in tensors)

    peak = peak_bytes_of_processor(train)
    torch.distributed.destroy_process_group()
    return {**held, "peak_bytes": peak}


def benchmark_distributed(args: argparse.Namespace) -> None:
    """Measure the memory of each of several processes that train a large catalogue, whole and sharded."""
    on = {"device": "cpu", "hardware": processor(), "num_processes": args.num_processes}
    results = {**setting(args), **on, "length": args.length, "batch_size": args.batch_size, "rows": []}
    for (held_as, optimizer), num_items in itertools.product(HOLDINGS, args.num_items):
        row = {"model": held_as, "optimizer": optimizer, "num_items": num_items}
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(args.num_processes, multiprocessing.get_context("spawn")) as executor,
        ):
            shared = (f"{folder}/processes", args.num_processes, num_items, held_as, optimizer)
            shared += (args.length, args.batch_size)
            measured = [executor.submit(measure_process, rank, *shared) for rank in range(args.num_processes)]
            measured = [process.result() for process in measured]
        row |= {name: max(process[name] for process in measured) for name in measured[0]}
        print(json.dumps(row))
        results["rows"].append(row)
    report(args.output, results)


def benchmark_streaming(args: argparse.Namespace) -> None:
    """Measure one more item and the ten best recommendations, after histories of several lengths."""
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
    state_bytes = sum(tensor.nbytes for tensor in cache.tensors.values())
    results = {**setting(args), "num_items": args.num_items, "bytes_per_user": state_bytes, "seconds": seconds}
    report(args.output, results)


def benchmark_events(args: argparse.Namespace) -> None:
    """Measure what times and two features of events cost: encoding users, and one more event after short and long
    histories."""
    import torch

    generator = torch.Generator().manual_seed(0)
    features = {"price": 0, "rating": 5}

    def make_events(batch_size: int, length: int, kind: str) -> dict[str, torch.Tensor]:
        shape = batch_size, length
        events = {"input_ids": torch.randint(3, args.num_items + 3, shape, generator=generator)}
        if "times" in kind:
            events["timestamps"] = torch.randint(100_000, shape, generator=generator).cumsum(dim=1)
        if "features" in kind:
            ratings = torch.randint(6, shape, generator=generator)
            events["event_features"] = torch.stack([torch.randn(shape, generator=generator), ratings.float()], dim=-1)
        return {name: values.to(device()) for name, values in events.items()}

    encoding, appends = {}, {}
    for kind in ("ids", "times", "features", "times and features"):
        changes = {"use_timestamps": "times" in kind, "event_features": features if "features" in kind else {}}
        model = make_model("elastic", 0, args.num_items, **changes).eval().model
        events = make_events(args.batch_size, args.length, kind)
        encoding[kind] = torch.inference_mode()(
            lambda model=model, events=events: model(**events, last_position_only=True)
        )
        for num_events in args.lengths:
            events = make_events(1, num_events + 1, kind)
            latest = {name: values[:, -1:] for name, values in events.items()}
            with torch.inference_mode():
                earlier = {name: values[:, :-1] for name, values in events.items()}
                cache = model(**earlier, use_cache=True, last_position_only=True).cache
            appends[f"{kind}, {num_events:,}"] = torch.inference_mode()(
                lambda model=model, latest=latest, cache=cache: model(
                    **latest, cache=cache, use_cache=True, last_position_only=True
                )
            )
    results = {**setting(args), "num_items": args.num_items, "length": args.length, "batch_size": args.batch_size}
    results["encoding_seconds"] = median_seconds(encoding, args.repetitions, args.warmup)
    results["append_seconds"] = median_seconds(appends, args.append_repetitions, args.warmup)
    report(args.output, results)


def benchmark_added_items(args: argparse.Namespace) -> None:
    """Measure how long a trained catalogue takes to get new items, and whether the scores of the others stay."""
    import numpy as np
    import pyarrow as pa
    import torch

    from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticItemTokenizer

    def make_items(first: int, num_items: int) -> pa.Table:
        vectors = np.random.default_rng(first).normal(size=num_items * 16).astype(np.float32)
        ids = range(first, first + num_items)
        return pa.table(
            {
                "item_id": [f"sku {number}" for number in ids],
                "brand": [f"brand {number % 5_000}" for number in ids],
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors), 16),
            }
        )

    results = {**setting(args), "num_new_items": args.num_new_items, "rows": []}
    for num_items in args.num_items:
        items = make_items(0, num_items)
        tokenizer = ElasticItemTokenizer.from_items(items, model_max_length=50)
        features = tokenizer.learn_item_features(items, ["brand", "vector"])
        config = ElasticConfig(vocab_size=len(tokenizer), hidden_size=32, item_features=features)
        model = ElasticForSequentialRecommendation(config).eval()
        model.set_item_features(tokenizer.encode_item_features(items))
        history = torch.randint(3, num_items + 3, (2, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = model(history).logits
            start = time.perf_counter()
            model.add_items(tokenizer, make_items(num_items, args.num_new_items))
            seconds = time.perf_counter() - start
            after = model(history).logits
        same = torch.equal(after[:, : before.shape[1]], before)
        results["rows"].append({"num_items": num_items, "seconds": seconds, "old_scores_are_the_same": same})
    report(args.output, results)


# 2. data: rows in a file -> split histories


ROWS_PER_CHUNK = 2_000_000
ROUTES = ("load_histories", "prepare_histories")


def make_file(path: Path, num_rows: int, num_users: int, num_items: int, seed: int) -> None:
    """Write rows in random order: popularity and activity follow Zipf's law, times are uniform over five years; each
    has a rating and an action."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    users = np.cumsum(1 / (np.arange(num_users) + num_users // 10))
    items = np.cumsum(1 / (np.arange(num_items) + 1))
    writer = None
    for first in range(0, num_rows, ROWS_PER_CHUNK):
        size = min(ROWS_PER_CHUNK, num_rows - first)
        actions = pa.array(rng.integers(3, size=size, dtype=np.int32))
        rows = pa.table(
            {
                "user_id": np.searchsorted(users, rng.random(size) * users[-1]) + 1,
                "item_id": np.searchsorted(items, rng.random(size) * items[-1]) + 1,
                "timestamp": rng.integers(1_500_000_000, 1_500_000_000 + 5 * 365 * 86_400, size),
                "rating": rng.integers(1, 11, size) / 2,
                "action": pa.array(["view", "cart", "buy"]).take(actions),
            }
        )
        if writer is None:
            of_kind = pq.ParquetWriter if path.suffix == ".parquet" else pa.csv.CSVWriter
            writer = of_kind(path, rows.schema)
        writer.write_table(rows)
    writer.close()


def measure_route(route: str, path: Path, folder: Path) -> dict:
    """Make histories of a file, and return the time, the most memory that the process ever held, and the counts."""
    from elastic_hf.data import histories, preparation

    columns = ["rating", "action"]
    start, cpu_start = time.perf_counter(), time.process_time()
    if route == "load_histories":
        counts = histories.load_histories(path, event_columns=columns, cache_dir=folder).counts
    else:
        counts = preparation.prepare_histories(path, folder / "prepared", event_columns=columns)
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
    """Measure both routes from a file to histories, each in a process of its own; files are deleted at once."""
    results = {
        "benchmark": "data",
        "quantities": args.quantities,  # seconds mean nothing on a machine that is not left alone, memory does
        "rows_per_user": args.rows_per_user,
        "rows_per_item": args.rows_per_item,
        "seed": args.seed,
        "cpu_count": os.cpu_count(),
        "hardware": processor(),
        "git_commit": git_commit(),
        "load_average_before": round(os.getloadavg()[0], 2),  # other work on the machine, in busy cores
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("datasets", "numpy", "pyarrow")},
        },
        "rows": [],
    }
    for num_rows, kind in itertools.product(args.num_rows, args.formats):
        fits = num_rows <= args.longest_in_memory
        if kind == "csv" and not fits:
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / f"interactions.{kind}"
            num_users, num_items = num_rows // args.rows_per_user, num_rows // args.rows_per_item
            in_fresh_process(make_file, path, num_rows, num_users, num_items, args.seed)
            for route in ROUTES:
                if fits or route == "prepare_histories":
                    measured = in_fresh_process(measure_route, route, path, Path(folder) / route)
                    if "seconds" not in args.quantities:
                        del measured["seconds"], measured["cpu_seconds"]
                    row = {"route": route, "file": kind, "file_mb": round(path.stat().st_size / 1e6), **measured}
                    results["rows"].append(row)
                    print(json.dumps(row))
                    shutil.rmtree(Path(folder) / route)
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
        "hardware": processor(),
        "git_commit": git_commit(),
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


# 4. arguments

LONG = [1_024, 2_048, 4_096]
HELP = {
    "lengths": "Items in a history.",
    "batch_sizes": "Histories in a batch: one number for each length, or one for all.",
    "compiled_lengths": "Lengths to compile and to record CUDA graphs for.",
    "longest_naive": "Longest history of attention that holds a number for each pair of items.",
    "default_lengths": "Lengths of one user's training with the defaults of the configuration.",
    "models": "Models to measure.",
    "dtype": "Type of the weights in inference, of autocast in training.",
    "model": "Folder of a model of the embedded dataset.",
    "num_users": "Users, of a catalogue those that are ranked and recommended to.",
    "num_operators": "Operators that are named.",
    "longest_in_memory": "Most rows that are loaded in memory, and written as CSV, which is read whole.",
    "quantities": "What to measure: memory alone, where the machine is not left alone.",
    "folder": "Where files are made: of 200 million rows they take 12 GB.",
    "num_new_items": "Items that are added.",
    "append_repetitions": "Repetitions of one more event.",
    "num_slow": "Histories that take the slow path as well.",
}
CHOICES = {
    "models": tuple(MODELS),
    "dtype": ("float32", "bfloat16"),
    "formats": ("parquet", "csv"),
    "quantities": ("seconds", "memory"),
}
# Each sub-command: the function, what it measures, and the options with their defaults.
OF_MODELS = {"models": list(MODELS), "longest_naive": 8_192, "num_items": 10_000, "dtype": "float32"}
REPEATED = {"repetitions": 15, "warmup": 2}
BENCHMARKS = {
    "inference": (
        benchmark_models,
        "seconds from histories to user embeddings, by length, beside other models",
        {
            "lengths": [50, 100, 200, 500, *LONG, 8_192, 32_768],
            "batch_sizes": [64, 64, 64, 32, 8, 4, 1, 1, 1],
            "compiled_lengths": [200, 2_048],
            **OF_MODELS,
            **REPEATED,
        },
    ),
    "training": (
        benchmark_models,
        "seconds of a training step, by length, beside other models",
        {
            "lengths": [50, 100, 200, 500, *LONG],
            "batch_sizes": [4],
            "compiled_lengths": [200, 2_048],
            **OF_MODELS,
            **REPEATED,
        },
    ),
    "memory": (
        benchmark_models,
        "peak memory of both, by length, beside other models",
        {
            "lengths": [200, 500, *LONG],
            "batch_sizes": [4, 4, 4, 4, 2],
            "compiled_lengths": [2_048],
            "default_lengths": [2_048, 16_384],
            **OF_MODELS,
        },
    ),
    "profile": (
        benchmark_profile,
        "the operators that the time goes into",
        {
            "models": ["elastic", "sasrec, sdpa"],
            "length": 2_048,
            "batch_size": 4,
            "num_items": 10_000,
            "num_operators": 12,
            "repetitions": 7,
            "warmup": 2,
        },
    ),
    "streaming": (
        benchmark_streaming,
        "seconds of one more item, by the length of the history",
        {
            "lengths": [100, 1_000, 10_000, 100_000],
            "num_items": 10_000,
            "repetitions": 200,
            "warmup": 20,
        },
    ),
    "events": (
        benchmark_events,
        "what times and features of events cost",
        {
            "length": 2_048,
            "batch_size": 4,
            "lengths": [100, 100_000],
            "num_items": 10_000,
            "repetitions": 25,
            "append_repetitions": 300,
            "warmup": 3,
        },
    ),
    "catalogue": (
        benchmark_catalogue,
        "training and recommending, by the number of items",
        {
            "num_items": [10_000, 100_000, 1_000_000],
            "length": 200,
            "batch_size": 64,
            "num_users": 256,
            "repetitions": 9,
            "warmup": 1,
        },
    ),
    "added-items": (
        benchmark_added_items,
        "new items in a trained catalogue, by its size",
        {"num_items": [10_000, 100_000, 1_000_000], "num_new_items": 1_000},
    ),
    "memory-bank": (
        benchmark_memory_bank,
        "the cost of the interest memory, by its number of slots",
        {
            "num_subkeys": [0, 32, 128, 512],
            "length": 2_048,
            "batch_size": 4,
            "num_items": 10_000,
            "repetitions": 7,
            "warmup": 2,
        },
    ),
    "distributed": (
        benchmark_distributed,
        "memory of a large catalogue in each of several processes, whole and sharded",
        {
            "num_items": [1_000_000, 2_000_000],
            "num_processes": 2,
            "length": 50,
            "batch_size": 8,
        },
    ),
    "onnx": (
        benchmark_onnx,
        "ONNX Runtime beside PyTorch",
        {
            "lengths": [50, 200, 2_048],
            "batch_size": 1,
            "num_items": 10_000,
            "repetitions": 50,
            "warmup": 5,
        },
    ),
    "quantization": (
        benchmark_quantization,
        "exported programs with weights in int8 beside those in float32",
        {
            "model": str(EXAMPLES / "elastic-tiny"),
            "num_users": 700,
            "lengths": [50, 200, 2_048],
            "batch_size": 1,
            "repetitions": 50,
            "warmup": 5,
        },
    ),
    "data": (
        benchmark_data,
        "seconds and peak memory from a file of interactions to histories, in memory and on disk",
        {
            "num_rows": [20_000_000, 50_000_000, 200_000_000],
            "longest_in_memory": 50_000_000,
            "rows_per_user": 133,
            "rows_per_item": 333,
            "formats": ["parquet", "csv"],
            "quantities": ["seconds", "memory"],
            "folder": tempfile.gettempdir(),
            "seed": 0,
        },
    ),
    "tokenizer": (
        benchmark_tokenizer,
        "items per second from item ids to token ids",
        {
            "num_rows": 20_000_000,
            "history_length": 200,
            "num_items": 60_000,
            "num_slow": 2_000,
            "seed": 0,
        },
    ),
}


def add_benchmark(subjects, subject: str, run, text: str, defaults: dict) -> None:
    """Add a sub-command: a list among the defaults is an option that takes several values."""
    parser = subjects.add_parser(subject, help=text)
    parser.set_defaults(run=run, subject=subject, dtype="float32")
    for name, default in defaults.items():
        several = {"nargs": "*", "type": type(default[0])} if isinstance(default, list) else {"type": type(default)}
        choices = CHOICES.get(name)
        parser.add_argument(f"--{name}", default=default, choices=choices, help=HELP.get(name), **several)
    parser.add_argument("--output", type=Path, help="JSON file; results/benchmark-<subject>.json here by default.")


def output_file(subject: str, device: str, dtype: str) -> Path:
    """Return where results go by default: `-cuda` and `-bfloat16` tell them from those of a processor in float32."""
    variant = [name for name in (device, dtype) if name not in ("cpu", "float32")]
    return RESULTS / f"benchmark-{'-'.join([subject, *variant])}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subjects = parser.add_subparsers(required=True)
    for subject, (run, text, defaults) in BENCHMARKS.items():
        add_benchmark(subjects, subject, run, text, defaults)

    args = parser.parse_args()
    if args.output is None:
        on = "cpu" if args.subject in ("data", "tokenizer", "distributed") else device()
        args.output = output_file(args.subject, on, args.dtype)
    args.run(args)


if __name__ == "__main__":
    main()
