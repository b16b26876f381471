"""Model cards that state what a run's own files say, and nothing else: what is unknown is left out."""

import inspect
import json
import os
import statistics
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..registry import MODELS
from ..results import CUTOFFS


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"

TAGS = ("sequential-recommendation", "recommender-system", "elastic_hf")

# Pictures that a card shows where its folder has them, and what they show.
PICTURES = {
    "training_curve": "Training loss and validation NDCG@10 by epoch",
    "expert_horizons": "Half-life of each interest expert, in items, by layer and head",
}


class DataSource(NamedTuple):
    """
    What a card says about a dataset beside its counts. Texts are Markdown, empty where unknown.

    Attributes:
        name (`str`): The name as it is to be read.
        description (`str`): What the interactions are, where they come from, and what that means for the model.
        terms (`str`): The licence or the terms of use, as what follows a colon.
        citation (`str`): BibTeX.
    """

    name: str
    description: str = ""
    terms: str = ""
    citation: str = ""


DATA_SOURCES = {
    name: DataSource(**texts)
    for name, texts in yaml.safe_load(Path(__file__).with_name("data_sources.yaml").read_text("utf-8")).items()
}

# The first of these that was measured is what a card reports.
EVALUATIONS = {"test": "test items", "validation": "validation items", "eval": "evaluation dataset"}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def mean_and_deviation(values: list[float]) -> str:
    """`mean ± standard deviation` of several seeds, or the value of one."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def render_model_card(folder: str | os.PathLike, repo_id: str, known: dict | None = None, **options) -> ModelCard:
    """
    Renders the card of a model folder that `examples/run_seqrec.py` wrote, from the files in it:

    - `all_results.json`: the run's own results;
    - `config.json`, which must be of that run's model. Where it has an `auto_map`, the folder holds the model's code,
      and the card says how to load it with `trust_remote_code`;
    - `training_curve.png` and `expert_horizons.png`, where they are there;
    - `results/*.json`: results of other seeds and of baselines to compare with, on the same data, split and length,
      and `benchmark-inference.json` of `examples/benchmarks/run_benchmark.py`.

    Args:
        folder (`str` or `os.PathLike`): The model folder.
        repo_id (`str`): Where the model will be loaded from: its Hub id, or the folder.
        known (`dict`, *optional*): What holds where `all_results.json` says nothing; then that file may be missing.
        options: As for [`make_model_card`].

    Returns:
        `ModelCard`: The card, not yet saved.

    Raises:
        `ValueError`: if a file is missing or broken, or if the files do not belong together.
    """
    folder = Path(folder)
    results_file, config_file = folder / "all_results.json", folder / "config.json"
    if known is None and not results_file.exists():
        raise ValueError(f"{folder} must hold all_results.json, as examples/run_seqrec.py writes it")
    results = _read_json(results_file) if results_file.exists() else {}
    config = _read_json(config_file) if config_file.exists() else {}
    for name, value in results.get("config", {}).items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{results_file} must be of the model in config.json, found {name} {value!r} and {config[name]!r}"
            )
    others = {str(file): _read_json(file) for file in sorted((folder / "results").glob("*.json"))}
    benchmark = others.pop(str(folder / "results" / "benchmark-inference.json"), None)
    pictures = {name: f"{name}.png" for name in PICTURES if (folder / f"{name}.png").exists()}
    return make_model_card(
        repo_id,
        (known or {}) | results,
        others,
        benchmark=benchmark,
        pictures=pictures,
        **{"has_code": "auto_map" in config, **options},
    )


def make_model_card(
    repo_id: str,
    results: dict,
    others: dict[str, dict] | None = None,
    *,
    benchmark: dict | None = None,
    pictures: dict[str, str] | None = None,
    has_code: bool = False,
    model_name: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: list[str] | None = None,
    base_model: str | None = None,
    datasets: str | list[str] | None = None,
    data_source: DataSource | None = None,
) -> ModelCard:
    """
    Fills the template of the cards. What is not given is left out of the card.

    Args:
        repo_id (`str`): Where the model will be loaded from: a Hub id, or a folder.
        results (`dict`): The results of the run that made the model, as in `all_results.json`.
        others (`dict[str, dict]`, *optional*):
            Results of other seeds and of baselines by the names of their files.
        benchmark (`dict`, *optional*): The results of `examples/benchmarks/run_benchmark.py inference`.
        pictures (`dict[str, str]`, *optional*): Relative links to the pictures, by their names in `PICTURES`.
        has_code (`bool`, *optional*, defaults to `False`): Whether the model's code lies beside it.
        model_name (`str`, *optional*): Title of the card; defaults to the last part of `repo_id`.
        license (`str`, *optional*): Hub id of the licence of the weights.
        language (`str` or `list[str]`, *optional*): Languages of the items' titles.
        tags (`list[str]`, *optional*): Tags beside those of every card.
        base_model (`str`, *optional*): Hub id of the model that this one was trained on from.
        datasets (`str` or `list[str]`, *optional*):
            Hub ids of the training data; defaults to the results' `hub_dataset`.
        data_source ([`DataSource`], *optional*): The training data; known for the names in `DATA_SOURCES`.

    Returns:
        `ModelCard`: The card, not yet saved.

    Raises:
        `ValueError`: if `repo_id` or the `model_type` of `results` is missing, or if `others` are not comparable with
            `results`.
    """
    if "model_type" not in results:
        raise ValueError(f"results must have a model_type, found {', '.join(results) or 'nothing'}")
    if not repo_id:
        raise ValueError(f"repo_id must name where the model will be loaded from, found {repo_id!r}")
    others = others or {}
    _check_comparable(results, others)
    model_name = model_name or repo_id.rstrip("/").split("/")[-1]
    datasets = datasets or results.get("hub_dataset")
    if data_source is None and results.get("dataset"):
        data_source = DATA_SOURCES.get(results["dataset"], DataSource(_dataset_name(results)))
    evaluation = next((prefix for prefix in EVALUATIONS if f"{prefix}_ndcg@10" in results), None)
    eval_results = _eval_results(results, evaluation, data_source)
    card_data = ModelCardData(
        model_name=model_name if eval_results else None,
        language=language,
        license=license,
        library_name="transformers",
        tags=[*TAGS, results["model_type"], *(tags or ())],
        base_model=base_model,
        datasets=[datasets] if isinstance(datasets, str) else datasets,
        metrics=["hr", "ndcg", "mrr"] if evaluation else None,
        eval_results=eval_results or None,
    )
    # The code of ELASTIC, which repositories hold a copy of, leaves what is said about it to the card.
    about = MODELS.get({"elastic": "elastic_paper"}.get(results["model_type"], results["model_type"]))
    models = _group_by_model(results, others)
    citations = [inspect.cleandoc(source.citation) for source in (about, data_source) if source and source.citation]
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=model_name,
        repo_id=repo_id,
        has_code=has_code,
        results=results,
        config=results.get("config", {}),
        model_description=about and about.description,
        data_source=data_source,
        evaluation=evaluation,
        evaluated_on=EVALUATIONS.get(evaluation),
        selection=_selection(results),
        coverage=results.get(f"{evaluation}_coverage@10"),
        models=models,
        own_seeds=models[_model_name(results)],
        table=table,
        metric_rows=_metric_rows(results, evaluation),
        comparison_rows=_comparison_rows(results, models),
        training_rows=_training_rows(results),
        cost_rows=_cost_rows(models),
        latency_table=_latency_table(benchmark),
        benchmark=benchmark,
        pictures=[(PICTURES[picture], link) for picture, link in (pictures or {}).items()],
        citations=citations,
    )


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must hold JSON: {error}") from error


def _check_comparable(results: dict, others: dict[str, dict]) -> None:
    """The same data, split and length for all, and the same settings for all seeds of a model."""
    runs = {"the model's own results": results}
    for file, other in others.items():
        for key in ("dataset", "protocol", "num_users", "num_items", "num_interactions", "max_length"):
            value, expected = other.get(key), results.get(key)
            if value != expected:
                raise ValueError(f"{file}: {key} must be {expected!r}, as for the card's model, found {value!r}")
        if "test_ndcg@10" not in other:
            raise ValueError(f"{file}: a model to compare with must have been evaluated on the test items")
        for earlier_file, earlier in runs.items():
            if _model_name(earlier) != _model_name(other):
                continue
            if earlier.get("seed") == other.get("seed"):
                raise ValueError(f"{file}: {_model_name(other)} with seed {other.get('seed')} is also {earlier_file}")
            for section in ("config", "training"):
                for key, value in other.get(section, {}).items():
                    expected = earlier.get(section, {}).get(key, value)
                    if value != expected:
                        raise ValueError(f"{file}: {key} must be {expected!r} as in {earlier_file}, found {value!r}")
        runs[file] = other


def _dataset_name(results: dict) -> str:
    """The Hub id, or the name without the folders that it lies in."""
    return results.get("hub_dataset") or Path(results["dataset"]).name


def _model_name(run: dict) -> str:
    return ", ".join(part for part in (run["model_type"], run.get("variant")) if part)


def _group_by_model(results: dict, others: dict[str, dict]) -> dict[str, list[dict]]:
    """The seeds of each model by its name, the card's own first."""
    models = {_model_name(results): [results]}
    for run in others.values():
        models.setdefault(_model_name(run), []).append(run)
    return models


def _eval_results(results: dict, evaluation: str | None, data_source: DataSource | None) -> list[EvalResult]:
    if evaluation is None or data_source is None:
        return []
    keys = {
        f"{metric}@{k}{suffix}": (f"{metric}_at_{k}", f"{metric.upper()}@{k}, full ranking, seen items {words}")
        for suffix, words in (("", "excluded"), ("_seen_kept", "kept"))
        for metric in ("hr", "ndcg", "mrr")
        for k in CUTOFFS
    }
    keys["coverage@10"] = ("coverage_at_10", "Coverage@10: share of the catalogue in anyone's first ten")
    return [
        EvalResult(
            task_type="sequential-recommendation",
            task_name="Sequential recommendation",
            dataset_type=_dataset_name(results) if results.get("dataset") else data_source.name,
            dataset_name=data_source.name,
            dataset_split=evaluation,
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=round(float(results[f"{evaluation}_{key}"]), 4),
        )
        for key, (metric_type, metric_name) in keys.items()
        if f"{evaluation}_{key}" in results
    ]


def _selection(results: dict) -> str:
    """What the checkpoint was chosen by."""
    on = EVALUATIONS["validation" if "validation_ndcg@10" in results else "eval"]
    metric = results.get("training", {}).get("metric_for_best_model")
    if metric is None:
        return f"chosen on the {on}"
    metric = metric.removeprefix("eval_")
    values = [results[key] for key in (f"validation_{metric}", f"eval_{metric}") if key in results]
    return f"the one with the best {metric.upper()} on the {on}" + "".join(f": {value:.4f}" for value in values[:1])


def _metric_rows(results: dict, evaluation: str | None) -> list[list[str]]:
    rows = []
    for name in ("HR", "NDCG", "MRR"):
        for k in CUTOFFS:
            key = f"{evaluation}_{name.lower()}@{k}"
            if key in results:
                rows.append([f"{name}@{k}", f"{results[key]:.4f}", f"{results[f'{key}_seen_kept']:.4f}"])
    return rows


def _comparison_rows(results: dict, models: dict[str, list[dict]]) -> list[list[str]]:
    """Every model on the test items, the most accurate first."""
    if "test_ndcg@10" not in results:
        return []
    measured = {name: [(run, "test") for run in runs] for name, runs in models.items()}
    if "popularity_ndcg@10" in results:
        measured.setdefault("popularity", [(results, "popularity")])
    rows = []
    for name, runs in measured.items():
        values = {
            key: [run[f"{prefix}_{key}"] for run, prefix in runs]
            for key in ("hr@10", "ndcg@10", "hr@10_seen_kept", "ndcg@10_seen_kept", "coverage@10")
        }
        label = f"**{name}**, this model" if name == _model_name(results) else name
        row = [label, str(len(runs)), *(mean_and_deviation(seeds) for seeds in values.values())]
        rows.append((-statistics.mean(values["ndcg@10"]), row))
    return [row for _, row in sorted(rows)]


def _cost_rows(models: dict[str, list[dict]]) -> list[list[str]]:
    rows = []
    for name, runs in models.items():
        if "num_parameters" in runs[0] and "hardware" in runs[0]:
            minutes = [run["train_seconds"] / 60 for run in runs if "train_seconds" in run]
            spent = f"{statistics.mean(minutes):.{0 if statistics.mean(minutes) >= 10 else 1}f}" if minutes else ""
            hardware = "; ".join(dict.fromkeys(run["hardware"] for run in runs))
            rows.append([name, f"{runs[0]['num_parameters']:,}", spent, hardware])
    return rows


def _training_rows(results: dict) -> list[list[str]]:
    config, training = results.get("config", {}), results.get("training", {})
    settings = {
        "parameters": f"{results['num_parameters']:,}" if "num_parameters" in results else None,
        "objective": config.get("training_objective"),
        "loss": config.get("training_loss"),
        "longest input (items)": results.get("max_length"),
    }
    if results.get("epochs") is not None:
        settings |= {
            "long histories cut into windows": results.get("split_into_windows"),
            "epochs": f"{results['epochs']:g}",
            "batch size (histories)": training.get("batch_size"),
            "learning rate": training.get("learning_rate"),
            "warm-up (steps)": training.get("warmup_steps"),
            "weight decay": training.get("weight_decay"),
            "bfloat16": training.get("bf16"),
            "seed": results.get("seed"),
        }
    words = {True: "yes", False: "no"}
    return [
        [name, words[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)]
        for name, value in settings.items()
        if value is not None
    ]


def _latency_table(benchmark: dict | None) -> str | None:
    """Milliseconds per user by length of the history, one column for each model of the benchmark."""
    if benchmark is None:
        return None
    models = list(dict.fromkeys(model for row in benchmark["rows"] for model in row["seconds"]))
    rows = []
    for row in benchmark["rows"]:
        times = [row["seconds"].get(model) for model in models]
        milliseconds = ["" if time is None else f"{1000 * time / row['batch_size']:.2f}" for time in times]
        rows.append([f"{row['length']:,}", str(row["batch_size"]), *milliseconds])
    return table(["history (items)", "batch", *models], rows)
