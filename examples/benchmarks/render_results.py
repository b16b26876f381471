"""Write the tables of the documents, and the figures, from the files in examples/benchmarks/results.

python examples/benchmarks/render_results.py
"""

import itertools
import json
import re
import shlex
import statistics
from functools import partial
from pathlib import Path

import yaml

from elastic_hf.baselines import BASELINES
from elastic_hf.results import CUTOFFS, RunResults
from elastic_hf.sharing.tables import describe_metric, mean_and_deviation, table


FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RESULTS = FOLDER / "results"
PUBLISHED = FOLDER / "published.yaml"
FIGURES = ROOT / "docs" / "figures"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), RESULTS / "trials" / "README.md")
NAMES = {
    "elastic": "ELASTIC",
    "elastic_paper": "ELASTIC as in the paper",
    "sasrec": "SASRec",
    "bert4rec": "BERT4Rec",
    "gru4rec": "GRU4Rec",
    "hstu": "HSTU",
    "lrurec": "LRURec",
    "linrec": "LinRec",
    "lightsans": "LightSANs",
    "popularity": "popularity",
}


def read_results(pattern: str) -> dict[str, dict]:
    """The results files that match, by name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def runs(pattern: str = "*.json") -> list[RunResults]:
    """The results of trainings that match."""
    files = read_results(pattern).items()
    return [RunResults.from_dict(results, name) for name, results in files if "main_row" in results]


def main_rows(
    dataset: str = "", with_times: bool = False, with_events: bool = False, split: str = "leave_one_out"
) -> list[RunResults]:
    """The runs of the main rows of a dataset, or of all, and of a split, of models that read times, or features of
    events, or that do not."""
    wanted = (with_times, with_events, split)

    def kind(run: RunResults) -> tuple[bool, bool, str]:
        read = (bool(run.config.get(name)) for name in ("use_timestamps", "event_features"))
        return (*read, run.protocol.split(",")[0])

    chosen = [run for run in runs(f"{dataset}*.json") if run.main_row and kind(run) == wanted]
    return [run for run in chosen if dataset in ("", run.dataset)]


# What figures are under unless a table says otherwise.
USUAL_PROTOCOL = "leave_one_out, full ranking"
ACCURACY = ["HR@10", "NDCG@10", "seeds", "parameters", "minutes"]
HEADERS = {"model_type": "model", "max_length": "length", "num_test_users": "test users"}


def with_protocol(chosen: list[RunResults], first: str, *keys: str) -> tuple[str, ...]:
    """The fields that tell the rows of a table apart, the protocol among them where it is not the usual one."""
    return (first, *(["protocol"] if {protocol(run) for run in chosen} - {USUAL_PROTOCOL} else []), *keys)


def protocol(run: RunResults) -> str:
    """How the data were split and ranked, and whether seen items could be recommended."""
    return str(run.protocol) if run.exclude_seen else f"{run.protocol}, seen items kept"


def main_runs(dataset: str) -> dict[str, list[RunResults]]:
    """The main rows' runs of a dataset under the usual protocol, by model: ELASTIC first, then the best first."""
    models = {}
    for run in main_rows(dataset):
        if protocol(run) == USUAL_PROTOCOL:
            models.setdefault(run.model_type, []).append(run)

    def order(model: str) -> tuple:
        return model != "elastic", -statistics.mean(run.metrics["test_ndcg@10"] for run in models[model])

    return {model: models[model] for model in sorted(models, key=order)}


def regime(run: RunResults) -> str:
    """The dataset and, where not all users were validated, that."""
    return f"{run.dataset}, sampled validation" if "sampled validation" in run.protocol else run.dataset


def headers(keys: tuple[str, ...]) -> list[str]:
    """What the columns of these fields are called."""
    return [HEADERS.get(key, key) for key in keys]


def cells(run: RunResults, keys: tuple[str, ...]) -> list[str]:
    """A run's values in these columns."""
    return [protocol(run) if key == "protocol" else str(getattr(run, key)) for key in keys]


def ndcg_of(run: RunResults) -> float:
    """NDCG@10 on the test items, with seen items excluded or kept as the model recommends."""
    return run.metrics[f"test_ndcg@10{run.suffix}"]


def accuracy_table(chosen: list[RunResults], *keys: str) -> str:
    """One row for all seeds of a setting; of each dataset and protocol, ELASTIC first and then the best first."""
    keys = with_protocol(chosen, "dataset", *keys)
    setting = partial(cells, keys=keys)
    rows = []
    for _, group in itertools.groupby(sorted(chosen, key=setting), key=setting):
        seeds = list(group)
        first = seeds[0]
        row = cells(first, keys)
        row.append(mean_and_deviation([run.metrics[f"test_hr@10{first.suffix}"] for run in seeds]))
        row.append(f"**{mean_and_deviation([*map(ndcg_of, seeds)])}**")
        row += [f"{len(seeds)}", f"{first.num_parameters:,}"]
        row.append(f"{statistics.mean(run.train_seconds or 0 for run in seeds) / 60:.0f}")
        order = (first.dataset, protocol(first), first.model_type != "elastic", -statistics.mean(map(ndcg_of, seeds)))
        rows.append((order, row))
    return table([*headers(keys), *ACCURACY], [row for _, row in sorted(rows)])


def accuracy() -> str:
    """The main table: one row for each dataset, protocol and model; models that are told times have one of theirs."""
    return accuracy_table(main_rows(), "model_type", "max_length")


def places() -> str:
    """How many targets are in the first place and among the first few, where histories are short."""
    rows = []
    for dataset in ("beauty", "beauty-5core", "sports-5core"):
        for model, seeds in itertools.islice(main_runs(dataset).items(), 4):
            shares = [[run.metrics[f"test_hr@{place}"] for run in seeds] for place in CUTOFFS]
            rows.append([dataset, model, *map(mean_and_deviation, shares), str(len(seeds))])
    return table(["dataset", "model", *(f"HR@{place}" for place in CUTOFFS), "seeds"], rows)


def temporal() -> str:
    """The main rows of the temporal split, which is for data with times alone."""
    chosen = main_rows(split="temporal")
    return accuracy_table(chosen, "model_type", "max_length", "num_test_users") if chosen else NOT_MEASURED


def published() -> str:
    """What others report for our datasets, beside ELASTIC and the best baseline here under their regime."""
    rows = []
    for dataset, reports in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).items():
        by_protocol = {}
        for run in main_rows(dataset):
            by_protocol.setdefault(protocol(run), {}).setdefault(run.model_type, []).append(run)
        found = []
        for name, models in sorted(by_protocol.items()):
            theirs = [model for model in models if model != "elastic"]
            best = sorted(theirs, key=lambda model: -statistics.mean(map(ndcg_of, models[model])))[:1]
            for model in [*(["elastic"] if "elastic" in models else []), *best]:
                hits = [run.metrics[f"test_hr@10{run.suffix}"] for run in models[model]]
                values = (mean_and_deviation(hits), mean_and_deviation([*map(ndcg_of, models[model])]))
                regime = "" if name == USUAL_PROTOCOL else name
                found.append([f"**{NAMES[model]}**, this project", *values, regime, "measured here"])
        if found:
            theirs = [
                [report["model"], f"{report['hr@10']:.4f}", f"{report['ndcg@10']:.4f}", report.get("differs", "")]
                + [report["source"]]
                for report in reports
            ]
            rows += [[dataset, *row] for row in [*found, *theirs]]
    return table(["dataset", "model", "HR@10", "NDCG@10", "what differs", "source"], rows) if rows else NOT_MEASURED


def times() -> str:
    """Models that read times, told when the test items came and not told, beside the same models without times."""
    models = {}
    for is_timed in (False, True):
        for run in main_rows(with_times=is_timed):
            models.setdefault((regime(run), run.model_type), {}).setdefault(is_timed, []).append(run)
    rows = []
    for (dataset, model), of_model in sorted(
        models.items(), key=lambda entry: (entry[0][0], entry[0][1] != "elastic")
    ):
        if not {True, False} <= of_model.keys():
            continue
        suffix = of_model[True][0].suffix
        columns = [(of_model[False], "test"), (of_model[True], "untimed"), (of_model[True], "test")]
        values = [[run.metrics[f"{prefix}_ndcg@10{suffix}"] for run in seeds] for seeds, prefix in columns]
        without, _, told = map(statistics.mean, values)
        seeds = " and ".join(dict.fromkeys(str(len(of_model[is_timed])) for is_timed in (False, True)))
        rows.append([dataset, model, *map(mean_and_deviation, values), f"{told / without - 1:+.1%}", seeds])
    header = ["dataset", "model", "without times", "with times, not told the target's", "told the target's"]
    return table([*header, "told against without", "seeds"], rows) if rows else NOT_MEASURED


def events() -> str:
    """Models that read features of events, beside the same models without them."""
    without, with_them = {}, {}
    for run in main_rows():
        without.setdefault((regime(run), run.model_type, run.max_length), []).append(ndcg_of(run))
    for run in main_rows(with_events=True):
        names = " and ".join(run.config["event_features"])
        with_them.setdefault((regime(run), run.model_type, run.max_length, names), []).append(ndcg_of(run))
    rows = []
    for (*setting, names), values in sorted(with_them.items()):
        if plain := without.get(tuple(setting)):
            seeds = " and ".join(dict.fromkeys(str(len(of_model)) for of_model in (plain, values)))
            change = f"{statistics.mean(values) / statistics.mean(plain) - 1:+.1%}"
            row = [*setting[:2], names, mean_and_deviation(plain), mean_and_deviation(values), change, seeds]
            rows.append(row)
    header = ["dataset", "model", "event features", "without", "with", "with against without", "seeds"]
    return table(header, rows) if rows else NOT_MEASURED


def differences() -> str:
    """ELASTIC's NDCG@10 less each baseline's, and the standard error of that difference of two means over seeds."""
    chosen = main_rows()
    keys = with_protocol(chosen, "dataset", "max_length")
    values = {}
    for run in sorted(chosen, key=lambda run: run.max_length):
        models = values.setdefault(tuple(cells(run, keys)), {})
        models.setdefault(run.model_type, []).append(ndcg_of(run))
    rows = []
    for setting, models in sorted(values.items(), key=lambda entry: entry[0][:-1]):
        repeated = [seeds for seeds in models.values() if len(seeds) > 1]
        degrees = sum(len(seeds) - 1 for seeds in repeated)
        ours = models.pop("elastic", [])
        for model, theirs in sorted(models.items() if ours else ()):
            difference = statistics.mean(ours) - statistics.mean(theirs)
            row = [*setting, model, f"{difference:+.4f}", f"{difference / statistics.mean(theirs):+.1%}"]
            if degrees:
                variance = sum(statistics.variance(seeds) * (len(seeds) - 1) for seeds in repeated) / degrees
                error = (variance / len(ours) + variance / len(theirs)) ** 0.5
                row += [f"{error:.4f}", f"{difference / error:.1f}"]
            else:
                row += ["one seed", ""]
            rows.append(row)
    header = ["ELASTIC less", "NDCG@10", "relative", "standard error", "in standard errors"]
    return table([*headers(keys), *header], rows)


def memory() -> str:
    """How much of the interest memory is alive."""
    rows = []
    chosen = [run for run in runs() if run.memory_slots is not None]
    keys = with_protocol(chosen, "dataset")
    for run in chosen:
        row = [*cells(run, keys), run.variant or "main row", str(run.seed)]
        row += [f"{run.memory_slots:,}", f"{run.num_users:,}", f"{run.memory_share_retrieved:.1%}"]
        rows.append([*row, f"{run.memory_entropy:.3f}"])
    header = [*keys, "run", "seed", "slots", "test users", "slots retrieved for one of them", "normalised entropy"]
    return table(header, sorted(rows))


def variants() -> str:
    """Ablations and other lengths: trained like the main rows, evaluated on the test items."""
    chosen = [run for run in runs() if not run.main_row and "test_ndcg@10" in run.metrics]
    return accuracy_table(chosen, "model_type", "variant", "max_length")


def trials() -> str:
    """Every trial of the search, the best of each dataset, protocol and number of epochs first."""
    rows = []
    chosen = runs("trials/*.json")
    keys = with_protocol(chosen, "dataset")
    for run in chosen:
        arguments = shlex.split(run.command)
        overrides = dict(zip(arguments, arguments[1:], strict=False)).get("--config_overrides", "")
        training = run.training
        setting = cells(run, keys)
        row = [*setting, f"{training['epochs']:g}", run.model_type, run.variant or "earlier main row", str(run.seed)]
        row += [overrides.replace(",", ", "), f"{training['learning_rate']:g}", f"{training['weight_decay']:g}"]
        row += [str(training["batch_size"])]
        row += ["yes" if run.split_into_windows else "no"]
        hit_rate, ndcg = (run.metrics[f"validation_{name}@10{run.suffix}"] for name in ("hr", "ndcg"))
        row += [f"{hit_rate:.4f}", f"**{ndcg:.4f}**"]
        row += [f"{run.num_parameters:,}", f"{run.train_seconds / 60:.0f}"]
        rows.append((setting, training["epochs"], -ndcg, row))
    header = [*keys, "epochs", "model", "trial", "seed", "configuration", "learning rate", "weight decay"]
    header += ["batch", "windows", "validation HR@10", "validation NDCG@10", "parameters", "minutes"]
    return table(header, [row for *_, row in sorted(rows)])


CHOICE = {
    "s8-shared": "one set of experts that all layers read, 16,384 slots in the memory",
    "s8-memory4k": "the model: 4,096 slots, as many as the catalogue asks for",
    "s8-memory4k-shuffled": "the same with the batches in random order, as the trainer takes them now",
    "s8-no-memory": "no memory",
    "s8-memory262k": "262,144 slots",
    "s8-memory-heads2": "two heads of the memory instead of four",
    "s8-shared-experts32": "32 experts a head instead of 16",
    "s8-experts64": "64 experts a head",
    "s8-rotated": "keys rotated by their position, 16,384 slots",
    "s8-wide512": "feed-forward width 512 instead of 256, learning rate 5e-3",
    "s8-wide1024": "feed-forward width 1,024, learning rate 4e-3",
    "s8-layers3": "three layers instead of two, learning rate 5e-3",
    "s8-layers4": "four layers, learning rate 4e-3",
    "s8-stream-wide": "a feed-forward block on the stream, 16,384 slots",
    "s8-stream-per-layer": "norm and convolution of the stream, and experts, of their own for each layer",
    "s8-relu": "ReLU instead of GELU",
    "s8": "experts of their own for each layer",
    "s8-silu": "experts of their own for each layer, SiLU instead of GELU",
}


def choice() -> str:
    """The forms of ELASTIC that were compared in the same 8 epochs."""
    values = {}
    for run in runs("trials/ml-1m-elastic-*-s8*.json"):
        values.setdefault(run.variant, []).append(run)
    chosen = statistics.mean(run.metrics["validation_ndcg@10"] for run in values["s8-shared"])
    rows = []
    for variant, label in CHOICE.items():
        seeds = values[variant]
        ndcg = [run.metrics["validation_ndcg@10"] for run in seeds]
        row = [label, mean_and_deviation([run.metrics["validation_hr@10"] for run in seeds]), mean_and_deviation(ndcg)]
        row += [f"{statistics.mean(ndcg) - chosen:+.4f}", str(len(seeds)), f"{seeds[0].num_parameters:,}"]
        rows.append(row)
    return table(["ELASTIC", "validation HR@10", "validation NDCG@10", "difference", "seeds", "parameters"], rows)


def commands() -> str:
    """The command behind each training."""
    return "\n".join(
        f"- `{name}`: `{results['command']}`"
        for name, results in read_results("*.json").items()
        if "protocol" in results
    )


def lengths() -> str:
    """Models that read less or more of the histories, and what an epoch costs, its evaluation included."""
    chosen = [run for run in runs() if (run.variant or "").startswith("length")]
    rows = []
    keys = with_protocol(chosen, "dataset", "model_type")
    for run in sorted(chosen, key=lambda run: (cells(run, keys), run.max_length)):
        row = [*cells(run, keys), f"{run.max_length:,}"]
        names = ("test_hr@10", "test_ndcg@10", "popularity_ndcg@10")
        row += [*(f"{run.metrics[f'{name}{run.suffix}']:.4f}" for name in names), f"{run.epochs:g}"]
        rows.append([*row, f"{run.train_seconds / run.epochs:.0f}"])
    header = ["items read", "HR@10", "NDCG@10", "popularity NDCG@10", "epochs", "seconds per epoch"]
    return table([*headers(keys), *header], rows)


def rounded(figure: float, digits: int) -> str:
    """A figure to so many digits, never as a power of ten."""
    return f"{float(f'{figure:.{digits}g}'):,.10g}"


NOT_MEASURED = "Not measured yet."
SDPA, NAIVE, FASTEST = "sasrec, sdpa", "sasrec, naive", "fastest program"
WITH_BLOCK = "elastic, block on the stream"
LENGTHS = (50, 200, 500, 2048, 8192, 32768)


def benchmark(subject: str, variant: str = "") -> dict:
    """The results of one sub-command of run_benchmark.py; without rows where it has not run."""
    name = f"benchmark-{subject}{variant}.json"
    return read_results(name).get(name, {"rows": []})


def by_length(subject: str, wanted_pass: str, variant: str = "") -> dict[str, dict[int, float]]:
    """Seconds or bytes for one user, of each model at each length."""
    key = "peak_bytes" if subject == "memory" else "seconds"
    values = {}
    for row in benchmark(subject, variant)["rows"]:
        if row["pass"] == wanted_pass:
            for name, value in row[key].items():
                values.setdefault(name, {})[row["length"]] = value / row["batch_size"]
    return values


def length_table(subject: str, wanted_pass: str, variant: str = "") -> str:
    """One row for each model, one column for each length."""
    values = by_length(subject, wanted_pass, variant)
    measured = [row for row in benchmark(subject, variant)["rows"] if row["pass"] == wanted_pass]
    batch_sizes = {row["length"]: row["batch_size"] for row in measured}
    lengths = sorted({length for of_model in values.values() for length in of_model})
    if not lengths:
        return NOT_MEASURED
    unit = 1e6 if subject == "memory" else 1e-3
    rows = [["users in a batch", *(f"{batch_sizes[length]}" for length in lengths)]]
    rows += [
        [name, *(rounded(of_model[length] / unit, 3) if length in of_model else "" for length in lengths)]
        for name, of_model in values.items()
    ]
    return table(["items in the history", *(f"{length:,}" for length in lengths)], rows)


def inference(variant: str = "") -> str:
    """Milliseconds to encode a user."""
    return length_table("inference", "inference", variant)


def training(variant: str = "") -> str:
    """Milliseconds of a training step for one user of a batch."""
    return length_table("training", "training", variant)


def inference_memory(variant: str = "") -> str:
    """Peak megabytes to encode a user."""
    return length_table("memory", "inference", variant)


def training_memory(variant: str = "") -> str:
    """Peak megabytes of a training step for one user of a batch."""
    return length_table("memory", "training", variant)


def default_memory(variant: str = "") -> str:
    """Peak megabytes of a training step on one user, with the defaults of the configuration."""
    return length_table("memory", "training, defaults", variant)


def streaming(variant: str = "") -> str:
    """One more item and the ten best, by what was read before."""
    seconds = benchmark("streaming", variant).get("seconds", {})
    if not seconds:
        return NOT_MEASURED
    first = next(iter(seconds.values()))
    rows = [[length, f"{1e3 * value:.3f}", f"{value / first:.2f}"] for length, value in seconds.items()]
    return table(["items read before", "milliseconds", "ratio to the first"], rows)


def event_costs() -> str:
    """What times and features of events cost, beside ids alone."""
    results = benchmark("events")
    if "encoding_seconds" not in results:
        return NOT_MEASURED
    encoding, appends = results["encoding_seconds"], results["append_seconds"]
    few, many = {name.split(", ", 1)[1]: None for name in appends}
    rows = []
    for kind, seconds in encoding.items():
        first, last = appends[f"{kind}, {few}"], appends[f"{kind}, {many}"]
        rows.append([kind, f"{seconds / encoding['ids']:.2f}", f"{first / appends[f'ids, {few}']:.2f}"])
        rows[-1].append(f"{last / first:.2f}")
    header = ["what is read", f"encoding {results['length']:,} events, ids alone = 1"]
    header += ["one more event, ids alone = 1", f"one more event after {many} over after {few}"]
    return table(header, rows)


def added_items() -> str:
    """How long a trained catalogue takes to get new items."""
    results = benchmark("added-items")
    rows = []
    for row in results["rows"]:
        same = "yes" if row["old_scores_are_the_same"] else "no"
        rows.append([f"{row['num_items']:,}", f"{results['num_new_items']:,}", f"{row['seconds']:.1f}", same])
    header = ["items trained on", "items added", "seconds", "scores of the others the same, bit for bit"]
    return table(header, rows) if rows else NOT_MEASURED


def service() -> str:
    """What clients of the service wait, by their number."""
    rows = []
    for row in benchmark("service")["rows"]:
        line = [row["store"], str(row["clients"]), f"{row['seconds'] / 60:.1f}", f"{row['requests_per_second']:,.0f}"]
        waited = [row[kind][f"p{p}_seconds"] for kind in ("events", "recommendations") for p in (50, 99)]
        first, last = (row["resident_bytes"][i] / 1e6 for i in (0, -1))
        line += [*(f"{1e3 * seconds:.1f}" for seconds in waited), str(row["errors"])]
        rows.append([*line, f"{first:.0f}", f"{last:.0f}"])
    header = ["states in", "clients", "minutes", "requests per second", "events, p50 (ms)", "p99 (ms)"]
    header += ["recommendations, p50 (ms)", "p99 (ms)", "errors", "memory at first (MB)", "at last (MB)"]
    return table(header, rows) if rows else NOT_MEASURED


def onnx() -> str:
    """Exported programs beside PyTorch."""
    rows = []
    for row in benchmark("onnx")["rows"]:
        seconds = row["seconds"]
        line = [row["program"], f"{row['length']:,}", *(f"{1e3 * value:.2f}" for value in seconds.values())]
        rows.append([*line, f"{seconds['pytorch'] / seconds['onnxruntime']:.2f}"])
    header = ["program", "items", "PyTorch (ms)", "ONNX Runtime (ms)", "times as fast"]
    return table(header, rows) if rows else NOT_MEASURED


def quantization() -> str:
    """Exported programs with weights in int8 beside those in float32."""
    rows = []
    for row in benchmark("quantization")["rows"]:
        sizes = row["bytes"]
        size = [f"{sizes[name] / 1e6:.2f}" for name in ("float32", "int8")]
        metrics = row.get("metrics")
        ndcg = [f"{metrics[name]['ndcg@10']:.4f}" for name in ("float32", "int8")] if metrics else ["", ""]
        for length, seconds in row["seconds"].items():
            times = [f"{1e3 * seconds[name]:.2f}" for name in ("float32", "int8")]
            line = [row["program"], f"{int(length):,}", *times, f"{seconds['float32'] / seconds['int8']:.2f}"]
            rows.append([*line, *size, *ndcg])
    header = ["program", "items", "float32 (ms)", "int8 (ms)", "times as fast", "float32 (MB)", "int8 (MB)"]
    header += ["NDCG@10, float32", "NDCG@10, int8"]
    return table(header, rows) if rows else NOT_MEASURED


def scoring() -> str:
    """All users by two workers on Ray beside one process."""
    rows = []
    for row in benchmark("scoring")["rows"]:
        single = row["one_process"]["users_per_second"]
        for name in ("ray", "one_process", "one_process_all_threads"):
            side = row[name]
            peak = [f"{side[key] / 1e9:.2f}" if key in side else "" for key in ("peak_bytes", "peak_worker_bytes")]
            rate = side["users_per_second"]
            line = [f"{row['num_users']:,}", name.replace("_", " "), f"{side['seconds']:,.0f}", f"{rate:,.0f}"]
            rows.append([*line, f"{rate / single:.2f}", *peak])
    header = ["users", "side", "seconds", "users per second", "ratio", "peak (GB)", "peak of a worker (GB)"]
    return table(header, rows) if rows else NOT_MEASURED


def scoring_checks() -> str:
    """What both sides, a killed worker and states have in common with what they stand for."""
    results = benchmark("scoring")
    if not results["rows"]:
        return NOT_MEASURED
    killed, states, first = results["killed"], results["states"], results["rows"][0]
    compared = {
        "beside one process": first["one_process"]["compared"],
        "beside `elastic-hf recommend`": results["beside_recommend"],
        "new events on top of states beside whole histories": states["day_beside_whole_histories"],
    }
    rows = [
        [
            name,
            f"{found['num_users']:,}",
            f"{found['share_of_equal_items']:.4%}",
            f"{found['largest_score_difference']:.1g}",
        ]
        for name, found in compared.items()
    ]
    day, whole = states["day"], states["whole_histories"]
    lines = [
        f"With {killed['workers_killed']} worker killed in the middle, {killed['files_of_equal_bytes']} of "
        f"{killed['files']} files have the same bytes as without, after {killed['seconds']:,.0f} seconds instead of "
        f"{first['ray']['seconds']:,.0f}.",
        f"The new events of {day['num_users']:,} users took {day['seconds']:,.0f} seconds, and whole histories of "
        f"{whole['num_users']:,} into states ({states['state_bytes'] / 1e9:.2f} GB) {whole['seconds']:,.0f}.",
    ]
    header = ["compared", "users", "equal items", "largest difference of a score"]
    return "\n\n".join([table(header, rows), *lines])


def profile() -> str:
    """The operators that the time goes into, with their shares of it."""
    rows = []
    for row in benchmark("profile")["rows"]:
        operators = [f"{o['name'].removeprefix('aten::')} {o['share']:.0%} ({o['calls']})" for o in row["operators"]]
        rows.append([row["model"], row["pass"], f"{row['calls']:,}", ", ".join(operators)])
    header = ["model", "pass", "calls in a step", "operator, share of the time (calls)"]
    return table(header, rows) if rows else NOT_MEASURED


def memory_bank() -> str:
    """The interest memory by its number of slots."""
    rows = []
    for row in benchmark("memory-bank")["rows"]:
        for slots, seconds in row["seconds"].items():
            line = [row["pass"], f"{int(slots):,}", f"{1e3 * seconds:.1f}", f"{seconds / row['seconds']['0']:.2f}"]
            rows.append([*line, f"{row['peak_bytes'][slots] / 1e6:.1f}"])
    header = ["pass", "slots", "milliseconds", "ratio to none", "peak megabytes"]
    return table(header, rows) if rows else NOT_MEASURED


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
    header += ["`recommend` (ms)", "with an index (ms)", "recall@10 of the index"]
    return table(header, rows) if rows else NOT_MEASURED


def distributed() -> str:
    """The memory of each process that trains a large catalogue, and of ten million items by the slope."""
    measured, rows = benchmark("distributed")["rows"], []
    for first, last in zip(measured[::2], measured[1::2], strict=True):
        line = [first["model"], {"adamw": "AdamW", "adafactor": "Adafactor"}[first["optimizer"]]]
        for name in ("weights_bytes", "optimizer_bytes", "peak_bytes"):
            of_an_item = (last[name] - first[name]) / (last["num_items"] - first["num_items"])
            millions = last[name] + of_an_item * (10_000_000 - last["num_items"])
            line += [f"{last[name] / 1e9:.2f}", f"{millions / 1e9:.2f}"]
        rows.append(line)
    if not rows:
        return NOT_MEASURED
    sizes = [f"{last['num_items']:,} items", "10,000,000"]
    header = [f"{name}, {size}" for name in ("weights", "optimizer", "peak") for size in sizes]
    return table(["model", "optimizer", *header], rows)


def hardware(variant: str = "") -> str:
    """Where the benchmarks ran."""
    rows = []
    for subject in (
        "inference",
        "training",
        "memory",
        "profile",
        "streaming",
        "events",
        "added-items",
        "onnx",
        "quantization",
        "memory-bank",
        "catalogue",
        "service",
        "scoring",
        "distributed",
    ):
        results = benchmark(subject, variant)
        if "hardware" in results:
            versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
            row = [subject, results["hardware"], results["dtype"], str(results["threads"]), versions]
            rows.append([*row, (results["git_commit"] or "")[:9]])
    header = ["benchmark", "hardware", "type", "threads", "versions", "commit"]
    return table(header, rows) if rows else NOT_MEASURED


def fastest(seconds: dict[str, dict[int, float]], model: str) -> dict[int, float]:
    """The seconds of the fastest form of a model, eager, compiled or recorded as a CUDA graph, at the lengths that it
    was compiled or recorded for."""
    programs = [seconds.get(name, {}) for name in (model, f"{model}, compiled", f"{model}, CUDA graph")]
    made = {*programs[1], *programs[2]}
    return {length: min(of[length] for of in programs if length in of) for length in sorted(made)}


def ratios(variant: str = "") -> str:
    """What SASRec takes over what ELASTIC takes, with PyTorch's fused attention unless it says naive."""
    seconds, steps = (by_length(subject, subject, variant) for subject in ("inference", "training"))
    encoding, training = (by_length("memory", wanted, variant) for wanted in ("inference", "training"))
    plain, checkpointed = "elastic, no memory", "elastic, checkpointed"
    programs = {name: fastest(seconds, name) for name in ("elastic", SDPA, NAIVE)}
    compared = (
        ("time to encode a user", seconds, SDPA, "elastic"),
        ("time to encode a user, with a block on the stream", seconds, SDPA, WITH_BLOCK),
        ("time to encode a user, each by its fastest program", programs, SDPA, "elastic"),
        ("time to encode a user, naive attention", seconds, NAIVE, "elastic"),
        ("time to encode a user, naive attention, each by its fastest program", programs, NAIVE, "elastic"),
        ("memory to encode a user", encoding, SDPA, "elastic"),
        ("memory to encode a user, naive attention", encoding, NAIVE, "elastic"),
        ("time of a training step", steps, SDPA, "elastic"),
        ("time of a training step, no interest memory", steps, SDPA, plain),
        ("memory of a training step", training, SDPA, "elastic"),
        ("memory of a training step, ELASTIC checkpointed", training, SDPA, checkpointed),
        ("memory of a training step, naive attention", training, NAIVE, "elastic"),
        ("memory of a training step, naive attention, ELASTIC checkpointed", training, NAIVE, checkpointed),
    )
    rows = []
    for what, values, theirs, ours in compared:
        lengths = [length for length in values.get(theirs, {}) if length in values.get(ours, {})]
        found = {length: rounded(values[theirs][length] / values[ours][length], 3) for length in lengths}
        if found:
            rows.append([what, *(found.get(length, "") for length in LENGTHS)])
    header = ["SASRec's over ELASTIC's, by items in the history", *(f"{length:,}" for length in LENGTHS)]
    return table(header, rows) if rows else NOT_MEASURED


def claims(variant: str = "") -> str:
    """The abstract's two figures beside what was found for them, at the lengths of the benchmark."""
    seconds = by_length("inference", "inference", variant)
    peaks = by_length("memory", "training", variant)
    seconds |= {f"{name}, {FASTEST}": fastest(seconds, name) for name in ("elastic", NAIVE, SDPA)}
    names = ("elastic", "elastic, checkpointed", "elastic_paper")
    pairs = [*itertools.product((NAIVE, SDPA), names)]
    pairs += [(f"{other}, {FASTEST}", f"elastic, {FASTEST}") for other in (NAIVE, SDPA)]
    rows = []
    for (other, name), length in itertools.product(pairs, (200, 2048, 8192, 32768)):
        ratio = saved = ""
        if length in seconds.get(other, {}) and length in seconds.get(name, {}):
            ratio = f"{rounded(seconds[other][length] / seconds[name][length], 2)}x"
        if length in peaks.get(other, {}) and length in peaks.get(name, {}):
            saved = f"{1 - peaks[name][length] / peaks[other][length]:.0%}"
        if ratio or saved:
            rows.append([name, other.removeprefix("sasrec, "), f"{length:,}", ratio, saved])
    header = ["ELASTIC", "SASRec's attention", "items", "encoding, times as fast (claim: 2.7x)"]
    header += ["memory saved in training (claim: up to 90 %)"]
    return table(header, rows) if rows else NOT_MEASURED


def gpu() -> str:
    """The same tables on a GPU, in each type that was measured."""
    parts = []
    for dtype, variant in (("float32", "-cuda"), ("bfloat16", "-cuda-bfloat16")):
        tables = {
            "": hardware,
            "ELASTIC beside SASRec": ratios,
            "The paper's claims": claims,
            "Milliseconds to encode a user": inference,
            "Peak megabytes to encode a user": inference_memory,
            "Milliseconds of a training step for one user": training,
            "Peak megabytes of a training step for one user": training_memory,
            "One more item": streaming,
        }
        rendered = {title: function(variant) for title, function in tables.items()}
        if any(text != NOT_MEASURED for text in rendered.values()):
            parts.append(f"### {dtype}")
            for title, text in rendered.items():
                if text != NOT_MEASURED:
                    parts += [f"{title}:", text] if title else [text]
    return "\n\n".join(parts) or "Nothing has been measured on a GPU yet."


def front_page() -> str:
    """The README's table."""
    models = main_runs("ml-1m")
    if "elastic" not in models:
        return NOT_MEASURED
    first = models["elastic"][0]
    rows = [
        [
            NAMES[model],
            *(mean_and_deviation([run.metrics[f"test_{metric}@10"] for run in seeds]) for metric in ("hr", "ndcg")),
            str(len(seeds)),
            f"{seeds[0].num_parameters:,}",
        ]
        for model, seeds in models.items()
    ]
    rows[0] = [f"**{cell}**" for cell in rows[0]]
    data = f"MovieLens-1M, {first.num_users:,} users, {first.num_items:,} items, {first.num_interactions:,}"
    caption = f"{data} interactions, the last {first.max_length} of each user read:"
    return f"{caption}\n\n{table(['model', 'HR@10', 'NDCG@10', 'seeds', 'parameters'], rows)}"


def highlights() -> str:
    """Three figures for the README."""
    seconds = by_length("inference", "inference")
    state = benchmark("streaming")
    accuracy = {
        model: statistics.mean(run.metrics["test_ndcg@10"] for run in seeds)
        for model, seeds in main_runs("ml-1m").items()
    }
    if not seconds or "seconds" not in state or "elastic" not in accuracy:
        return NOT_MEASURED
    best, theirs = max((item for item in accuracy.items() if item[0] != "elastic"), key=lambda item: item[1])
    speed, gain = seconds[SDPA][2048] / seconds["elastic"][2048], accuracy["elastic"] / theirs - 1
    with_block = seconds[SDPA][2048] / seconds[WITH_BLOCK][2048]
    return "\n".join(
        [
            f"- **Long histories are cheap.** Encoding a user of 2,048 items is {speed:.1f} times as fast as with "
            "SASRec and PyTorch's fused attention, on two cores, and the gap grows with the length; with the block on "
            f"the stream that MovieLens-1M gains from, {with_block:.1f} times as fast.",
            "- **One more interaction costs the same after any history**: "
            f"{1e3 * state['seconds']['100,000']:.1f} ms after 100,000 items, for reading it and ranking a catalogue "
            "of 10,000.",
            f"- **Accuracy does not pay for it.** On MovieLens-1M, NDCG@10 over the full catalogue is {gain:+.1%} "
            f"against the best of the baselines here, {NAMES[best]}.",
        ]
    )


def training_cost() -> str:
    """What training takes, beside SASRec: for the README's limits."""
    peaks = by_length("memory", "training")
    if not peaks:
        return NOT_MEASURED
    plain, checkpointed = (peaks[name][2048] / peaks[SDPA][2048] for name in ("elastic", "elastic, checkpointed"))
    limits = [
        "- **Training memory is what you are short of.** A training step on 2,048 items takes "
        f"{plain:.1f} times the memory of SASRec's with PyTorch's fused attention, {checkpointed:.1f} times with "
        "`gradient_checkpointing=True`."
    ]
    seconds = by_length("inference", "inference", "-cuda-bfloat16")
    if seconds:
        ratios = [seconds["elastic"][length] / seconds[SDPA][length] for length in (2_048, 32_768)]
        recorded = seconds.get("elastic, CUDA graph", {}).get(2_048)
        limit = (
            f"- **Users are encoded on a GPU.** At 2,048 items ELASTIC takes {ratios[0]:.1f} times as long there as "
            f"SASRec with fused attention, at 32,768 {ratios[1]:.1f} times"
        )
        if recorded is not None:
            ratio = recorded / fastest(seconds, SDPA)[2_048]
            limit += (
                "; recorded as a CUDA graph, for batches of one shape, it takes "
                f"{ratio:.1f} times as long at 2,048 as SASRec's fastest program"
            )
        limits.append(f"{limit} ([benchmarks](docs/benchmarks.md#on-a-gpu)).")
    return "\n".join(limits)


ENCODING = {
    "elastic": "ELASTIC",
    "linrec": "LinRec",
    SDPA: "SASRec, fused attention",
    NAIVE: "SASRec, naive attention",
}


def save(figure, name: str) -> None:
    """Write a figure as SVG, the same bytes for the same values."""
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def plot(subject: str) -> None:
    """Draw time or memory by length, one line for each model, one panel for each pass."""
    import matplotlib.pyplot as plt

    passes = ("inference", "training") if subject == "memory" else (subject,)
    measured = [(name, by_length(subject, name)) for name in passes]
    if not any(values for _, values in measured):
        return
    label, unit = ("peak megabytes", 1e6) if subject == "memory" else ("milliseconds", 1e-3)
    figure, axes = plt.subplots(1, len(passes), figsize=(6 * len(passes), 4), layout="constrained", squeeze=False)
    for axis, (name, values) in zip(axes[0], measured, strict=True):
        for model, of_model in values.items():
            style = "-" if model.startswith("elastic") else "--"
            axis.plot([*of_model], [value / unit for value in of_model.values()], style, marker=".", label=model)
        axis.set(xscale="log", yscale="log", xlabel="items in the history", ylabel=f"{label} per user, {name}")
        axis.legend()
    save(figure, subject)


def plot_encoding() -> None:
    """Draw the README's figure: milliseconds to encode a user, by length, of few models."""
    import matplotlib.pyplot as plt

    seconds = by_length("inference", "inference")
    if not seconds:
        return
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for model, name in ENCODING.items():
        if model not in seconds:
            continue
        style = {"color": "#d9480f", "linewidth": 2.5} if model == "elastic" else {"linestyle": "--"}
        axis.plot([*seconds[model]], [1e3 * value for value in seconds[model].values()], label=name, **style)
    axis.set(xscale="log", yscale="log", xlabel="items in the history", title="Milliseconds to encode a user")
    axis.set_xticks([50, 500, 5_000, 32_768], ["50", "500", "5,000", "32,768"], minor=False)
    axis.set_yticks([0.1, 1, 10, 100, 1_000], ["0.1", "1", "10", "100", "1,000"])
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    save(figure, "encoding")


def data() -> str:
    """How long interactions take to become split histories, and how much memory that takes."""
    rows = [
        [
            f"{row['num_rows']:,}",
            row["file"],
            f"`{row['route']}`",
            f"{row['seconds']:,.0f}" if "seconds" in row else "not measured",
            f"{row['peak_memory_gb']:.2f}",
        ]
        for run in read_results("benchmark-data.json").values()
        for row in run["rows"]
    ]
    return table(["rows", "file", "by", "seconds", "peak memory (GB)"], rows)


def tokenizer() -> str:
    """Item ids to token ids, by Arrow and by calling the tokenizer."""
    rows = []
    for run in read_results("benchmark-tokenizer.json").values():
        for kind in ("integer", "string"):
            rates = [str(run[kind][f"{path}_million_items_per_second"]) for path in ("arrow", "call")]
            rows.append([kind, *rates, str(run[kind]["ratio"])])
    header = ["item ids", "`encode_histories` (million items/s)", "`tokenizer(...)` (million items/s)", "ratio"]
    return table(header, rows)


def peers() -> str:
    """Both libraries' recommendations by both libraries' metrics."""
    rows = []
    for run in read_results("peers-*.json").values():
        versions = " ".join(["RecTools", run["peer_versions"]["rectools"]])
        for side, model in (("elastic_hf", "SASRec of this package"), ("peer", f"SASRec of {versions}")):
            ours, theirs = run["metrics_of_elastic_hf"][side], run["metrics_of_peer"][side]
            row = [run["dataset"], model, *(describe_metric(ours, key) for key in ("hr@10", "ndcg@10"))]
            rows.append([*row, *(f"{theirs[key]:.4f}" for key in ("hr@10", "ndcg@10"))])
    header = ["dataset", "model", "HR@10", "NDCG@10", "HR@10 by RecTools", "NDCG@10 by RecTools"]
    return table(header, rows) if rows else NOT_MEASURED


def breakdowns() -> str:
    """Two models by length of the history and by popularity of the target."""
    rows = []
    for run in read_results("breakdown-*.json").values():
        models = f"{NAMES[run['model_type']]} against {NAMES[run['other_model_type']]}"
        for by, words in (("length", "items in the history"), ("popularity", "times that the target was trained on")):
            for part in run[by]:
                low, high = part["above"], part["up_to"]
                span = f"over {low:,}" if high is None else f"{low + 1 if low else 0:,} to {high:,}"
                row = [run["dataset"], models, f"{span} {words}", f"{part['num_users']:,}"]
                row += [f"{part['ndcg@10']:.4f}", f"{part['other_ndcg@10']:.4f}"]
                rows.append([*row, f"{part['difference']:+.4f} ± {part['standard_error']:.4f}"])
    header = ["dataset", "models", "users with", "users", "NDCG@10", "NDCG@10 of the other", "difference"]
    return table(header, rows) if rows else NOT_MEASURED


def new_items() -> str:
    """HR@10 of items that were held out of the training, and of the others."""
    names = {
        "nearest titles": "items whose titles are nearest to the last item's",
        "ids, trained items": "ids alone, among the items trained on",
        "features, trained items": "ids and features, among the items trained on",
        "features, all items": "ids and features, new items added",
    }
    found_by = read_results("new-items*.json").values()
    rows = []
    for run in found_by:
        for name, found in run["results"].items():
            rates = [describe_metric(found[on], "hr@10") if on in found else "" for on in ("new", "trained")]
            who, _, scale = name.partition(", id_scale ")
            rows.append([names[who], scale, *rates, str(run["seed"])])
    header = ["who recommends", "`id_scale`", "HR@10 where the target is new", "HR@10 where it was trained on", "seed"]
    if not rows:
        return NOT_MEASURED
    return "\n\n".join([table(header, rows), *(f"Trained by `{run['command']}`" for run in found_by)])


def recommendations() -> str:
    """The first recommendations of the MovieLens-100k run."""
    parts = []
    for run in runs("ml-100k-elastic-42.json"):
        sample = run.sample
        parts = [f"The last items of user {sample['user_id']}:", *(f"    {title}" for title in sample["history"])]
        parts += ["Recommended:", *(f"{rank:4}  {title}" for rank, title in enumerate(sample["recommended"], start=1))]
        parts += [f"What came next: {sample['target']}"]
    return "```text\n" + "\n".join(parts) + "\n```"


def baselines() -> str:
    """The published models beside ELASTIC."""
    rows = [[f"`{model.config_class.model_type}`", model.paper, model.description] for model in BASELINES]
    return table(["`--model_type`", "paper", "how it works"], rows)


TABLES = {
    function.__name__: function
    for function in (
        accuracy,
        differences,
        places,
        temporal,
        times,
        events,
        published,
        variants,
        memory,
        trials,
        choice,
        commands,
        lengths,
        data,
        tokenizer,
        recommendations,
        peers,
        breakdowns,
        new_items,
        inference,
        training,
        inference_memory,
        training_memory,
        default_memory,
        streaming,
        event_costs,
        added_items,
        service,
        onnx,
        quantization,
        scoring,
        scoring_checks,
        profile,
        memory_bank,
        catalogue,
        distributed,
        hardware,
        ratios,
        claims,
        gpu,
        front_page,
        highlights,
        training_cost,
        baselines,
    )
}


def render(document: Path) -> str:
    """The document's text with every `<!-- results:NAME -->` block written anew."""

    def block(match: re.Match) -> str:
        return f"<!-- results:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- /results -->"

    return re.sub(r"<!-- results:(\w+) -->\n.*?<!-- /results -->", block, document.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    plot_encoding()
    for subject in ("inference", "training", "memory"):
        plot(subject)
    for document in DOCUMENTS:
        document.write_text(render(document))
