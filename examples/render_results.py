"""Writes the tables of README.md, examples/README.md and examples/results.md from the files in examples/results.

python examples/render_results.py
"""

import itertools
import json
import re
import shlex
import statistics
from pathlib import Path

from elastic_hf.model_card import mean_and_deviation, table


EXAMPLES = Path(__file__).parent
DOCUMENTS = (
    EXAMPLES.parent / "README.md",
    EXAMPLES / "README.md",
    EXAMPLES / "results.md",
    EXAMPLES / "benchmarks.md",
)


def read_results(pattern: str) -> dict[str, dict]:
    """The results files that match, by name."""
    return {path.name: json.loads(path.read_text()) for path in sorted((EXAMPLES / "results").glob(pattern))}


def runs(pattern: str = "*.json") -> list[dict]:
    """The results of run_seqrec.py that match."""
    return [run for run in read_results(pattern).values() if "main_row" in run]


def accuracy_rows(chosen: list[dict], keys: tuple[str, ...]) -> list[list[str]]:
    """One row for all seeds of a setting, the best of each dataset first."""

    def setting(run: dict) -> tuple:
        return (run["dataset"], *(str(run[key]) for key in keys))

    rows = []
    for _, group in itertools.groupby(sorted(chosen, key=setting), key=setting):
        seeds = list(group)
        first, ndcg = seeds[0], [run["test_ndcg@10"] for run in seeds]
        row = [first["dataset"], *(str(first[key]) for key in keys)]
        row += [mean_and_deviation([run["test_hr@10"] for run in seeds]), f"**{mean_and_deviation(ndcg)}**"]
        row += [mean_and_deviation([run[f"test_{name}@10_seen_kept"] for run in seeds]) for name in ("hr", "ndcg")]
        row += [f"{len(seeds)}", f"{first['num_parameters']:,}"]
        row += [f"{statistics.mean(run.get('train_seconds', 0) for run in seeds) / 60:.0f}", first["hardware"]]
        rows.append((first["dataset"], -statistics.mean(ndcg), row))
    return [row for *_, row in sorted(rows, key=lambda entry: entry[:2])]


ACCURACY = ["HR@10", "NDCG@10", "HR@10, seen kept", "NDCG@10, seen kept", "seeds", "parameters", "minutes", "hardware"]


def accuracy() -> str:
    """The main table: one row for each dataset and model."""
    chosen = [run for run in runs() if run["main_row"]]
    keys = ("model_type", "max_length")
    return table(["dataset", "model", "length", *ACCURACY], accuracy_rows(chosen, keys))


def differences() -> str:
    """ELASTIC's NDCG@10 less each baseline's, and the standard error of that difference of two means over seeds."""
    values = {}
    for run in runs():
        if run["main_row"]:
            models = values.setdefault((run["dataset"], run["max_length"]), {})
            models.setdefault(run["model_type"], []).append(run["test_ndcg@10"])
    rows = []
    for (dataset, length), models in sorted(values.items()):
        repeated = [seeds for seeds in models.values() if len(seeds) > 1]
        degrees = sum(len(seeds) - 1 for seeds in repeated)
        ours = models.pop("elastic", [])
        for model, theirs in sorted(models.items() if ours else ()):
            difference = statistics.mean(ours) - statistics.mean(theirs)
            row = [dataset, str(length), model, f"{difference:+.4f}", f"{difference / statistics.mean(theirs):+.1%}"]
            if degrees:
                variance = sum(statistics.variance(seeds) * (len(seeds) - 1) for seeds in repeated) / degrees
                error = (variance / len(ours) + variance / len(theirs)) ** 0.5
                row += [f"{error:.4f}", f"{difference / error:.1f}"]
            else:
                row += ["one seed", ""]
            rows.append(row)
    return table(
        ["dataset", "length", "ELASTIC less", "NDCG@10", "relative", "standard error", "in standard errors"], rows
    )


def memory() -> str:
    """How much of the interest memory is alive."""
    rows = []
    for run in runs():
        if "memory_slots" in run:
            row = [run["dataset"], run["variant"] or "main row", str(run["seed"]), f"{run['memory_slots']:,}"]
            row += [f"{run['num_users']:,}", f"{run['memory_share_retrieved']:.1%}", f"{run['memory_entropy']:.3f}"]
            rows.append(row)
    header = ["dataset", "run", "seed", "slots", "test users", "slots retrieved for one of them", "evenness"]
    return table(header, sorted(rows))


def variants() -> str:
    """Ablations and other lengths: trained like the main rows, evaluated on the test items."""
    chosen = [run for run in runs() if not run["main_row"] and "test_ndcg@10" in run]
    keys = ("model_type", "variant", "max_length")
    return table(["dataset", "model", "variant", "length", *ACCURACY], accuracy_rows(chosen, keys))


def trials() -> str:
    """Every trial of the search, the best of each dataset and number of epochs first."""
    rows = []
    for run in runs("trials/*.json"):
        arguments = shlex.split(run["command"])
        overrides = dict(zip(arguments, arguments[1:], strict=False)).get("--config_overrides", "")
        training = run["training"]
        row = [run["dataset"], f"{training['epochs']:g}", run["model_type"], run["variant"], str(run["seed"])]
        row += [overrides.replace(",", ", "), f"{training['learning_rate']:g}", str(training["batch_size"])]
        row += ["yes" if run["split_into_windows"] else "no"]
        row += [f"{run['validation_hr@10']:.4f}", f"**{run['validation_ndcg@10']:.4f}**"]
        row += [f"{run['num_parameters']:,}", f"{run['train_seconds'] / 60:.0f}"]
        rows.append((run["dataset"], training["epochs"], -run["validation_ndcg@10"], row))
    header = ["dataset", "epochs", "model", "trial", "seed", "configuration", "learning rate", "batch", "windows"]
    header += ["validation HR@10", "validation NDCG@10", "parameters", "minutes"]
    return table(header, [row for *_, row in sorted(rows)])


ABLATIONS = {
    "r8": "the recipe",
    "r8-no-memory": "without interest memory",
    "r8-forget-none": "without forgetting",
    "r8-forget-fixed": "half-lives fixed at their initial values",
    "r8-conv0": "without convolution",
    "r8-bidirectional-prefix": "bidirectional, trained on prefixes",
    "r8-bidirectional-cloze": "bidirectional, trained on masked items",
    "r8-bidirectional-static": "the same with static experts instead of the memory's",
}


def ablation() -> str:
    """What ELASTIC loses without its parts, from the trials of the same 8 epochs."""
    values = {}
    for run in runs("trials/ml-1m-elastic-*-r8*.json"):
        if run["variant"] in ABLATIONS:
            values.setdefault(run["variant"], []).append(run)
    rows = []
    for variant, label in ABLATIONS.items():
        seeds = values.get(variant, [])
        if seeds:
            ndcg = statistics.mean(run["validation_ndcg@10"] for run in seeds)
            recipe = statistics.mean(run["validation_ndcg@10"] for run in values["r8"])
            row = [label, mean_and_deviation([run["validation_hr@10"] for run in seeds])]
            row += [mean_and_deviation([run["validation_ndcg@10"] for run in seeds])]
            row += [f"{ndcg - recipe:+.4f}", str(len(seeds)), f"{seeds[0]['num_parameters']:,}"]
            rows.append([*row, f"{statistics.mean(run['train_seconds'] for run in seeds) / 60:.0f}"])
    header = ["ELASTIC", "validation HR@10", "validation NDCG@10", "difference", "seeds", "parameters", "minutes"]
    return table(header, rows)


def commands() -> str:
    """The command behind each run of run_seqrec.py."""
    return "\n".join(
        f"- `{name}`: `{run['command']}`" for name, run in read_results("*.json").items() if "protocol" in run
    )


def lengths() -> str:
    """Models that read less or more of the histories, and what an epoch costs, its evaluation included."""
    chosen = [run for run in runs() if (run["variant"] or "").startswith("length")]
    rows = []
    for run in sorted(chosen, key=lambda run: (run["dataset"], run["model_type"], run["max_length"])):
        row = [run["dataset"], run["model_type"], f"{run['max_length']:,}"]
        row += [f"{run[f'test_{metric}']:.4f}" for metric in ("hr@10", "ndcg@10")]
        row += [f"{run['popularity_ndcg@10']:.4f}", f"{run['epochs']:g}"]
        rows.append([*row, f"{run['train_seconds'] / run['epochs']:.0f}"])
    header = ["dataset", "model", "items read", "HR@10", "NDCG@10", "popularity NDCG@10", "epochs"]
    return table([*header, "seconds per epoch"], rows)


def rounded(figure: float, digits: int) -> str:
    """A figure to so many digits, never as a power of ten."""
    return f"{float(f'{figure:.{digits}g}'):,.10g}"


def benchmark(subject: str) -> dict:
    """The results of one sub-command of run_benchmark.py; without rows where it has not run."""
    return read_results(f"benchmark-{subject}.json").get(f"benchmark-{subject}.json", {"rows": []})


def by_length(subject: str, wanted_pass: str, key: str) -> dict[str, dict[int, float]]:
    """Seconds or bytes for one user, of each side at each length."""
    values = {}
    for row in benchmark(subject)["rows"]:
        if row["pass"] == wanted_pass:
            for side, value in row[key].items():
                values.setdefault(side, {})[row["length"]] = value / row["batch_size"]
    return values


def length_table(subject: str, wanted_pass: str, key: str, unit: float) -> str:
    """One row for each side, one column for each length."""
    values = by_length(subject, wanted_pass, key)
    lengths = sorted({length for side in values.values() for length in side})
    rows = [
        [side, *(rounded(of_side[length] / unit, 3) if length in of_side else "" for length in lengths)]
        for side, of_side in values.items()
    ]
    return table(["items in the history", *(f"{length:,}" for length in lengths)], rows)


def inference() -> str:
    """Milliseconds to encode a user."""
    return length_table("inference", "inference", "seconds", 1e-3)


def training() -> str:
    """Milliseconds of a training step for one user of a batch."""
    return length_table("training", "training", "seconds", 1e-3)


def inference_memory() -> str:
    """Peak megabytes to encode a user."""
    return length_table("memory", "inference", "peak_bytes", 1e6)


def training_memory() -> str:
    """Peak megabytes of a training step for one user of a batch."""
    return length_table("memory", "training", "peak_bytes", 1e6)


def streaming() -> str:
    """One more item and the ten best, by what was read before."""
    results = benchmark("streaming")
    seconds = results.get("seconds", {})
    first = next(iter(seconds.values()), None)
    rows = [[length, f"{1e3 * value:.3f}", f"{value / first:.2f}"] for length, value in seconds.items()]
    return table(["items read before", "milliseconds", "ratio to the first"], rows)


def onnx() -> str:
    """Exported programs beside PyTorch."""
    rows = []
    for row in benchmark("onnx")["rows"]:
        seconds = row["seconds"]
        line = [row["program"], f"{row['length']:,}", *(f"{1e3 * value:.2f}" for value in seconds.values())]
        rows.append([*line, f"{seconds['pytorch'] / seconds['onnxruntime']:.2f}"])
    return table(["program", "items", "PyTorch (ms)", "ONNX Runtime (ms)", "times as fast"], rows)


def profile() -> str:
    """The operators that the time goes into, with their shares of it."""
    rows = []
    for row in benchmark("profile")["rows"]:
        operators = [f"{o['name'].removeprefix('aten::')} {o['share']:.0%} ({o['calls']})" for o in row["operators"]]
        rows.append([row["side"], row["pass"], f"{row['calls']:,}", ", ".join(operators)])
    return table(["model", "pass", "calls in a step", "operator, share of the time (calls)"], rows)


def ceiling() -> str:
    """How much faster than SASRec a model would be whose attention cost nothing."""
    lines = []
    for row in benchmark("profile")["rows"]:
        if row["side"] == "sasrec, sdpa":
            share = sum(o["share"] for o in row["operators"] if "attention" in o["name"])
            lines.append(
                f"- {row['pass']}: {share:.0%} of SASRec's time is its attention; with the rest of its time, and an "
                f"attention that cost nothing, a model would be {1 / (1 - share):.1f} times as fast."
            )
    return "\n".join(lines)


def memory_bank() -> str:
    """The interest memory by its number of slots."""
    rows = []
    for row in benchmark("memory-bank")["rows"]:
        for slots, seconds in row["seconds"].items():
            line = [row["pass"], f"{int(slots):,}", f"{1e3 * seconds:.1f}", f"{seconds / row['seconds']['0']:.2f}"]
            rows.append([*line, f"{row['peak_bytes'][slots] / 1e6:.1f}"])
    return table(["pass", "slots", "milliseconds", "ratio to none", "peak megabytes"], rows)


def catalogue() -> str:
    """Training and recommending by the number of items."""
    rows = []
    measured = benchmark("catalogue")["rows"]
    for row in measured:
        line = [f"{row['num_items']:,}", f"{row['num_parameters']:,}", f"{1e3 * row['training_seconds']:.0f}"]
        line += [f"{row['training_seconds'] / measured[0]['training_seconds']:.2f}"]
        line += [f"{row['training_peak_bytes'] / 1e6:.0f}", f"{1e3 * row['ranking_seconds']:.0f}"]
        line += [f"{row['ranking_peak_bytes'] / 1e6:.0f}", f"{1e3 * row['exact_seconds']:.0f}"]
        rows.append([*line, f"{1e3 * row['index_seconds']:.0f}", f"{row['index_recall@10']:.3f}"])
    header = ["items", "parameters", "training step (ms)", "ratio", "its peak (MB)", "ranking (ms)", "its peak (MB)"]
    return table([*header, "`recommend` (ms)", "with an index (ms)", "recall@10 of the index"], rows)


def hardware() -> str:
    """Where the benchmarks ran."""
    rows = []
    for subject in ("inference", "training", "memory", "profile", "streaming", "onnx", "memory-bank", "catalogue"):
        results = benchmark(subject)
        if "hardware" in results:
            versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
            rows.append([subject, results["hardware"], str(results["threads"]), versions, results["git_commit"][:9]])
    return table(["benchmark", "hardware", "threads", "versions", "commit"], rows)


def findings() -> list[tuple[str, float, str, bool]]:
    """What was aimed at: its name, the figure found, the figure wanted, and whether it was reached."""
    seconds = by_length("inference", "inference", "seconds")
    steps = by_length("training", "training", "seconds")
    peaks = {name: by_length("memory", name, "peak_bytes") for name in ("inference", "training")}
    found = []

    def at_least(name: str, figure: float, wanted: float, unit: str = "x"):
        found.append((name, f"{rounded(figure, 3)}{unit}", f"at least {wanted:g}{unit}", figure >= wanted))

    def at_most(name: str, figure: float, wanted: float, unit: str = "x"):
        shown = f"{figure:,}" if isinstance(figure, int) else rounded(figure, 3)
        found.append((name, f"{shown}{unit}", f"at most {wanted:g}{unit}", figure <= wanted))

    sdpa, naive = "sasrec, sdpa", "sasrec, naive"
    if all(peaks.values()):
        for side in ("elastic", "elastic, bidirectional"):
            saved = 100 * (1 - peaks["inference"][side][2048] / peaks["inference"][naive][2048])
            at_least(f"{side}: peak memory saved, encoding 2,048 items, naive attention", saved, 95, " %")
        for side in ("elastic", "elastic, checkpointed", "elastic, bidirectional"):
            saved = 100 * (1 - peaks["training"][side][2048] / peaks["training"][naive][2048])
            at_least(f"{side}: peak memory saved, training on 2,048 items, naive attention", saved, 90, " %")
            share = peaks["training"][side][2048] / peaks["training"][sdpa][2048]
            at_most(f"{side}: peak memory, training on 2,048 items, over SDPA's", share, 1)
    if seconds:
        causal, bidirectional = (2.7, 8, 20), (3, 8, 25)
        for side, wanted in (
            ("elastic", causal),
            ("elastic, compiled", causal),
            ("elastic, bidirectional", bidirectional),
            ("elastic, bidirectional, compiled", bidirectional),
        ):
            for length, times in zip((2048, 8192, 32768), wanted, strict=True):
                ratio = seconds[sdpa][length] / seconds[side][length]
                at_least(f"{side}: speed of encoding {length:,} items against SDPA", ratio, times)
        for side in ("elastic", "elastic, compiled"):
            ratio = seconds[naive][2048] / seconds[side][2048]
            at_least(f"{side}: speed of encoding 2,048 items against naive attention", ratio, 15)
        for side in ("elastic", "elastic, bidirectional"):
            faster = [length for length in seconds[side] if seconds[side][length] < seconds[sdpa][length]]
            at_most(f"{side}: shortest measured history encoded faster than by SDPA", min(faster), 300, " items")
            growth = seconds[side][32768] / seconds[side][4096]
            at_most(f"{side}: time at 32,768 items over time at 4,096", growth, 8.8)
        (row,) = [row for row in benchmark("inference")["rows"] if row["length"] == 2048]
        floor = row["operations"]["elastic"] / benchmark("inference")["product_rate"]
        for side in ("elastic", "elastic, compiled"):
            at_least(f"{side}: arithmetic floor over the time, 2,048 items", floor / row["seconds"][side], 0.4)
    if steps:
        for side in (
            "elastic",
            "elastic, no memory",
            "elastic, checkpointed",
            "elastic, compiled",
            "elastic, bidirectional",
        ):
            ratio = steps[sdpa][2048] / steps[side][2048]
            at_least(f"{side}: speed of a training step on 2,048 items against SDPA", ratio, 2.5)
            at_most(
                f"{side}: time of a training step on 200 items over SDPA's", steps[side][200] / steps[sdpa][200], 1.15
            )
    if benchmark("streaming").get("seconds"):
        times = benchmark("streaming")["seconds"]
        at_most("elastic: one more item after 100,000 items over after 100", times["100,000"] / times["100"], 1.1)
    for row in benchmark("memory-bank")["rows"]:
        wanted = {"inference": 1.1, "training": 1.6}[row["pass"]]
        ratio = row["seconds"]["262144"] / row["seconds"]["0"]
        at_most(f"interest memory of 262,144 slots over none, {row['pass']}", ratio, wanted)
    if benchmark("catalogue")["rows"]:
        times = {row["num_items"]: row["training_seconds"] for row in benchmark("catalogue")["rows"]}
        at_most("training step with 1,000,000 items over 10,000", times[1_000_000] / times[10_000], 1.5)
    return found


def targets() -> str:
    """What was aimed at, and what was found."""
    rows = [[name, figure, wanted, "yes" if reached else "no"] for name, figure, wanted, reached in findings()]
    return table(["what", "found", "aimed at", "reached"], rows)


def claims() -> str:
    """The abstract's two figures beside what was found for them, at the lengths of the benchmark."""
    seconds = by_length("inference", "inference", "seconds")
    peaks = by_length("memory", "training", "peak_bytes")
    sides = ("elastic", "elastic, compiled", "elastic, bidirectional", "elastic, bidirectional, compiled")
    rows = []
    for attention, side in itertools.product(("naive", "sdpa"), (*sides, "elastic, checkpointed")):
        other = f"sasrec, {attention}"
        for length in (200, 2048, 8192, 32768):
            ratio = saved = ""
            if length in seconds.get(other, {}) and length in seconds.get(side, {}):
                ratio = f"{rounded(seconds[other][length] / seconds[side][length], 2)}x"
            if length in peaks.get(other, {}) and length in peaks.get(side, {}):
                saved = f"{1 - peaks[side][length] / peaks[other][length]:.0%}"
            if ratio or saved:
                rows.append([side, attention, f"{length:,}", ratio, saved])
    header = ["ELASTIC", "SASRec's attention", "items", "encoding, times as fast (claim: 2.7x)"]
    return table([*header, "memory saved in training (claim: up to 90 %)"], rows)


def headline() -> str:
    """Three figures for the README."""
    seconds = by_length("inference", "inference", "seconds")
    peaks = by_length("memory", "training", "peak_bytes")
    if not seconds or not peaks or not benchmark("streaming").get("seconds"):
        return ""
    ratios = {
        side: [seconds["sasrec, sdpa"][length] / seconds[side][length] for length in (2048, 8192, 32768)]
        for side in ("elastic, compiled", "elastic")
    }
    compiled, plain = (", ".join(f"{ratio:.1f}" for ratio in of_side) for of_side in ratios.values())
    memory = {
        (attention, side): peaks[side][2048] / peaks[f"sasrec, {attention}"][2048]
        for attention in ("naive", "sdpa")
        for side in ("elastic", "elastic, checkpointed")
    }
    times = benchmark("streaming")["seconds"]
    return "\n".join(
        [
            f"- Encoding users of 2,048, 8,192 and 32,768 items: {compiled} times as fast as SASRec with PyTorch's "
            f"fused attention, after `model.model.compile()`; {plain} times without.",
            f"- Training on 2,048 items: {1 - memory['naive', 'elastic']:.0%} less memory than SASRec with naive "
            f"attention, and {memory['sdpa', 'elastic']:.1f} times that of SASRec with fused attention; with "
            f"`gradient_checkpointing=True`, {1 - memory['naive', 'elastic, checkpointed']:.0%} less and "
            f"{memory['sdpa', 'elastic, checkpointed']:.1f} times.",
            f"- One more interaction: {1e3 * times['100,000']:.1f} ms after 100,000 items, "
            f"{1e3 * times['100']:.1f} ms after 100.",
        ]
    )


def data() -> str:
    """How long 20 million interactions take to become split histories."""
    rows = []
    for run in read_results("benchmark-data.json").values():
        rows = [
            [name, f"{run['num_rows']:,}", f"{run[name]['seconds']:.1f}", f"{run[name]['peak_memory_gb']:.2f}"]
            for name in ("parquet", "csv")
        ]
    return table(["file", "rows", "seconds", "peak memory (GB)"], rows)


def tokenizer() -> str:
    """Item ids to token ids, by Arrow and by calling the tokenizer."""
    rows = []
    for run in read_results("benchmark-tokenizer.json").values():
        for kind in ("integer", "string"):
            rates = [str(run[kind][f"{path}_million_items_per_second"]) for path in ("arrow", "call")]
            rows.append([kind, *rates, str(run[kind]["ratio"])])
    header = ["item ids", "`encode_histories` (million items/s)", "`tokenizer(...)` (million items/s)", "ratio"]
    return table(header, rows)


def recommendations() -> str:
    """The first recommendations of the MovieLens-100k run."""
    parts = []
    for run in runs("ml-100k-elastic-42.json"):
        sample = run["sample"]
        parts = [f"The last items of user {sample['user_id']}:", *(f"    {title}" for title in sample["history"])]
        parts += ["Recommended:", *(f"{rank:4}  {title}" for rank, title in enumerate(sample["recommended"], start=1))]
        parts += [f"What came next: {sample['target']}"]
    return "```text\n" + "\n".join(parts) + "\n```"


TABLES = {
    function.__name__: function
    for function in (
        accuracy,
        differences,
        variants,
        memory,
        trials,
        ablation,
        commands,
        lengths,
        data,
        tokenizer,
        recommendations,
        inference,
        training,
        inference_memory,
        training_memory,
        streaming,
        onnx,
        profile,
        ceiling,
        memory_bank,
        catalogue,
        hardware,
        targets,
        claims,
        headline,
    )
}


def render(document: Path) -> str:
    """The document's text with every `<!-- results:NAME -->` block written anew."""

    def block(match: re.Match) -> str:
        return f"<!-- results:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- /results -->"

    return re.sub(r"<!-- results:(\w+) -->\n.*?<!-- /results -->", block, document.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(render(document))
