"""The tables of model cards, from results."""

import statistics

from ..results import SUFFIXES, RunResults


# What a card states of all that was measured, each with seen items excluded and kept.
METRICS = ("HR@10", "NDCG@10", "MRR@10")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def mean_and_deviation(values: list[float]) -> str:
    """Return `mean ± standard deviation` of several seeds, the value of one, nothing for none."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def describe_metric(metrics: dict[str, float], key: str) -> str:
    """Return a metric and, where that is known, its standard error."""
    values = [metrics[name] for name in (key, f"{key}_standard_error") if name in metrics]
    return " ± ".join(f"{value:.4f}" for value in values)


def name_of_model(run: RunResults) -> str:
    """Return the name of a run's model: its type and, of an ablation, its variant."""
    return ", ".join(part for part in (run.model_type, run.variant) if part)


def group_by_model(results: RunResults, others: dict[str, RunResults]) -> dict[str, list[RunResults]]:
    """Return the seeds of each model by its name, the card's own first."""
    models = {name_of_model(results): [results]}
    for run in others.values():
        models.setdefault(name_of_model(run), []).append(run)
    return models


def rankings(results: RunResults) -> list[tuple[str, str]]:
    """Return the metrics' suffix in each ranking, and what becomes of seen items in it, that of the model first."""
    words = {True: "excluded", False: "kept"}
    return [(SUFFIXES[excluded], words[excluded]) for excluded in (results.exclude_seen, not results.exclude_seen)]


def metric_table(results: RunResults, evaluation: str | None) -> str | None:
    """Return each of `METRICS` with seen items excluded and kept."""
    rows = []
    for name in METRICS:
        keys = [f"{evaluation}_{name.lower()}{suffix}" for suffix, _ in rankings(results)]
        if keys[0] in results.metrics:
            rows.append([name, *(describe_metric(results.metrics, key) for key in keys)])
    return table(["metric", *(f"seen items {words}" for _, words in rankings(results))], rows) if rows else None


def comparison_table(results: RunResults, models: dict[str, list[RunResults]]) -> str | None:
    """Return every model on the test items, the most accurate first."""
    ndcg = f"ndcg@10{results.suffix}"
    if f"test_{ndcg}" not in results.metrics:
        return None
    columns = {
        f"{name.lower()}{suffix}": f"{name}, seen {words}" if suffix else name
        for suffix, words in rankings(results)
        for name in ("HR@10", "NDCG@10")
    } | {"coverage@10": "coverage@10"}
    measured = {name: [(run, "test") for run in runs] for name, runs in models.items()}
    if f"popularity_{ndcg}" in results.metrics:
        measured.setdefault("popularity", [(results, "popularity")])
    rows = []
    for name, runs in measured.items():
        values = {
            key: [run.metrics[f"{prefix}_{key}"] for run, prefix in runs if f"{prefix}_{key}" in run.metrics]
            for key in columns
        }
        label = f"**{name}**, this model" if name == name_of_model(results) else name
        row = [label, str(len(runs)), *(mean_and_deviation(seeds) for seeds in values.values())]
        rows.append((-statistics.mean(values[ndcg]), row))
    return table(["model", "seeds", *columns.values()], [row for _, row in sorted(rows)])


def cost_rows(models: dict[str, list[RunResults]]) -> list[list[str]]:
    """Return the parameters of every model, the minutes of its training and the hardware."""
    rows = []
    for name, runs in models.items():
        if runs[0].num_parameters is not None and runs[0].hardware is not None:
            minutes = [run.train_seconds / 60 for run in runs if run.train_seconds is not None]
            spent = f"{statistics.mean(minutes):.{0 if statistics.mean(minutes) >= 10 else 1}f}" if minutes else ""
            hardware = "; ".join(dict.fromkeys(run.hardware for run in runs))
            rows.append([name, f"{runs[0].num_parameters:,}", spent, hardware])
    return rows


def training_rows(results: RunResults) -> list[list[str]]:
    """Return the settings of the training that are known."""
    config, training = results.config, results.training
    settings = {
        "parameters": None if results.num_parameters is None else f"{results.num_parameters:,}",
        "objective": config.get("training_objective"),
        "loss": config.get("training_loss"),
        "longest input (items)": results.max_length,
    }
    if results.epochs is not None:
        settings |= {
            "long histories cut into windows": results.split_into_windows,
            "all prefixes of the histories": results.split_into_prefixes or None,
            "epochs": f"{results.epochs:g}",
            "batch size (histories)": training.get("batch_size"),
            "learning rate": training.get("learning_rate"),
            "warm-up (steps)": training.get("warmup_steps"),
            "weight decay": training.get("weight_decay"),
            "bfloat16": training.get("bf16"),
            "seed": results.seed,
        }
    words = {True: "yes", False: "no"}
    return [
        [name, words[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)]
        for name, value in settings.items()
        if value is not None
    ]


def latency_table(benchmark: dict | None) -> str | None:
    """Return the milliseconds per user by length of the history, one column for each model of the benchmark."""
    if benchmark is None:
        return None
    models = list(dict.fromkeys(model for row in benchmark["rows"] for model in row["seconds"]))
    rows = []
    for row in benchmark["rows"]:
        times = [row["seconds"].get(model) for model in models]
        milliseconds = ["" if time is None else f"{1000 * time / row['batch_size']:.2f}" for time in times]
        rows.append([f"{row['length']:,}", str(row["batch_size"]), *milliseconds])
    return table(["history (items)", "batch", *models], rows)
