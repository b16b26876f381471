"""Model cards that state what a run's own files say, and nothing else: what is unknown is left out."""

import inspect
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..registry import MODELS
from ..results import FEW_USERS, RESULTS_FILE, SUFFIXES, RunResults, read_json
from .privacy import without_personal_data
from .tables import (
    METRICS,
    comparison_table,
    cost_rows,
    group_by_model,
    latency_table,
    metric_table,
    name_of_model,
    rankings,
    table,
    training_rows,
)
from .trial import MODEL_FILES, load_pipeline, recommend_example


TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE = TEMPLATES / "model_card.md"
REQUIREMENTS = (TEMPLATES / "requirements.txt").read_text(encoding="utf-8").split()

# As Transformers knows it, though it is none of the Hub's own tasks.
TASK = "sequential-recommendation"
TAGS = (TASK, "recommender-system", "elastic_hf")

# Figures that a card shows where its folder has them, and what they show.
FIGURES = {
    "training_curve": "Training loss and validation NDCG@10 by epoch",
    "expert_horizons": "Half-life of each interest expert, in items, by head",
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

# What results have in common that stand in one table.
COMPARED = ("dataset", "protocol", "num_users", "num_items", "num_interactions", "max_length", "exclude_seen")

# The first of these that was measured is what a card reports.
EVALUATIONS = {"test": "test items", "validation": "validation items", "eval": "evaluation dataset"}


def render_model_card(
    folder: str | os.PathLike,
    repo_id: str,
    known: RunResults | None = None,
    *,
    example: dict | None = None,
    **options,
) -> ModelCard:
    """
    Render the card of a model folder that `elastic-hf train` wrote, from the files in it:

    - `all_results.json`: the run's own results;
    - `config.json`, which must be of that run's model. Where it has an `auto_map`, the folder holds the model's code,
      and the card says how to load it with `trust_remote_code`;
    - the model and its tokenizer, where they are there beside the results: they recommend for the card's example;
    - `training_curve.png` and `expert_horizons.png`, where they are there;
    - `results/*.json`: results of other seeds and of baselines to compare with, on the same data, split and length,
      and `benchmark-inference.json` of `examples/benchmarks/run_benchmark.py`.

    Args:
        folder (`str` or `os.PathLike`): The model folder.
        repo_id (`str`): Where the model will be loaded from: its Hub id, or the folder.
        known ([`RunResults`], *optional*):
            What holds where `all_results.json` says nothing; then that file may be missing.
        example (`dict`, *optional*): As [`recommend_example`] returns it, where the model was loaded before.
        options: As for [`make_model_card`].

    Returns:
        `ModelCard`: The card, not yet saved.

    Raises:
        ValueError: if a file is missing or broken, or if the files do not belong together.
    """
    folder = Path(folder)
    results_file, config_file = folder / RESULTS_FILE, folder / "config.json"
    if known is None and not results_file.exists():
        raise ValueError(f"{folder} must hold {RESULTS_FILE}, as elastic-hf train writes it")
    contents = read_json(results_file) if results_file.exists() else {}
    config = read_json(config_file) if config_file.exists() else {}
    for name, value in contents.get("config", {}).items():
        if config.get(name, value) not in (value, None):  # null follows other fields
            raise ValueError(
                f"{results_file} must be of the model in config.json, found {name} {value!r} and {config[name]!r}"
            )
    results = RunResults.from_dict((known.to_dict() if known is not None else {}) | contents, str(results_file))
    # In the middle of a training, before there are results, the folder may hold an older model.
    has_model = bool(contents) and all((folder / name).exists() for name in MODEL_FILES)
    if example is None and results.example is None and has_model:
        example = recommend_example(load_pipeline(folder))
    benchmark_file = folder / "results" / "benchmark-inference.json"
    files = sorted({*(folder / "results").glob("*.json")} - {benchmark_file})
    figures = {name: f"{name}.png" for name in FIGURES if (folder / f"{name}.png").exists()}
    return make_model_card(
        repo_id,
        results,
        {str(file): RunResults.read(file) for file in files},
        benchmark=read_json(benchmark_file) if benchmark_file.exists() else None,
        figures=figures,
        example=example,
        **{"has_code": "auto_map" in config, **options},
    )


def make_model_card(
    repo_id: str,
    results: RunResults,
    others: dict[str, RunResults] | None = None,
    *,
    benchmark: dict | None = None,
    figures: dict[str, str] | None = None,
    example: dict | None = None,
    has_code: bool = False,
    revision: str | None = None,
    model_name: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: list[str] | None = None,
    base_model: str | None = None,
    datasets: str | list[str] | None = None,
    data_source: DataSource | None = None,
) -> ModelCard:
    """
    Fill the template of the cards. What is not given is left out of the card, and so is whatever is personal in the
    results: users, histories and the folders of a machine.

    Args:
        repo_id (`str`): Where the model will be loaded from: a Hub id, or a folder.
        results ([`RunResults`]): The results of the run that made the model.
        others (`dict[str, RunResults]`, *optional*):
            Results of other seeds and of baselines by the names of their files.
        benchmark (`dict`, *optional*): The results of `examples/benchmarks/run_benchmark.py inference`.
        figures (`dict[str, str]`, *optional*): Relative links to the figures, by their names in `FIGURES`.
        example (`dict`, *optional*):
            As [`recommend_example`] returns it; defaults to the results' `example`.
        has_code (`bool`, *optional*, defaults to `False`): Whether the model's code lies beside it.
        revision (`str`, *optional*): Tag of this version, which the card's code asks for.
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
        ValueError: if `repo_id` is missing, or if `others` are not comparable with `results`.
    """
    if not repo_id:
        raise ValueError(f"repo_id must name where the model will be loaded from, found {repo_id!r}")
    _check_comparable(results, others or {})
    results = _public(results)
    others = {file: _public(other) for file, other in (others or {}).items()}
    benchmark = benchmark and without_personal_data(benchmark)
    if data_source is None and results.dataset:
        data_source = DATA_SOURCES.get(results.dataset, DataSource(results.dataset))
    metric = f"ndcg@10{results.suffix}"
    evaluation = next((prefix for prefix in EVALUATIONS if f"{prefix}_{metric}" in results.metrics), None)
    eval_results = _eval_results(results, evaluation, data_source)
    datasets = datasets or results.hub_dataset
    name = model_name or repo_id.rstrip("/").split("/")[-1]
    card_data = ModelCardData(
        model_name=name if eval_results else None,
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=[*TAGS, results.model_type, *(tags or ())],
        base_model=base_model,
        datasets=[datasets] if isinstance(datasets, str) else datasets,
        metrics=[metric.split("@")[0].lower() for metric in METRICS] if eval_results else None,
        eval_results=eval_results or None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        has_code=has_code,
        requirements=REQUIREMENTS,
        revision=revision,
        example=example or results.example,
        as_code=partial(json.dumps, ensure_ascii=False),
        as_python=repr,
        results=results,
        data_source=data_source,
        benchmark=benchmark,
        latency_table=latency_table(benchmark),
        figures=[(FIGURES[figure], link) for figure, link in (figures or {}).items()],
        **_describe_model(results, data_source),
        **_describe_results(results, others, evaluation),
    )


def _public(results: RunResults) -> RunResults:
    """What everyone may read of results."""
    return RunResults.from_dict(without_personal_data(results.to_dict()))


def _describe_model(results: RunResults, data_source: DataSource | None) -> dict[str, Any]:
    """What the card says about the model whatever the run was like."""
    about = MODELS.get(results.model_type)
    sources = [source for source in (about, data_source) if source and source.citation]
    return {
        "config": results.config,
        "model_description": about and about.description,
        "citations": [inspect.cleandoc(source.citation) for source in sources],
    }


def _describe_results(results: RunResults, others: dict[str, RunResults], evaluation: str | None) -> dict[str, Any]:
    """What the card says about the run, beside others."""
    models = group_by_model(results, others)
    num_users = {"validation items": results.num_validation_users, "test items": results.num_test_users}
    return {
        "evaluation": evaluation,
        "evaluated_on": EVALUATIONS.get(evaluation),
        "num_users": {items: number for items, number in num_users.items() if number is not None},
        "few_users": FEW_USERS,
        "selection": _selection(results),
        "share_seen": _share_seen(results),
        "coverage": results.metrics.get(f"{evaluation}_coverage@10"),
        "models": models,
        "own_seeds": models[name_of_model(results)],
        "table": table,
        "metric_table": metric_table(results, evaluation),
        "comparison_table": comparison_table(results, models),
        "training_rows": training_rows(results),
        "cost_rows": cost_rows(models),
    }


def _check_comparable(results: RunResults, others: dict[str, RunResults]) -> None:
    """The same data, split and length for all, and the same settings for all seeds of a model."""
    runs = {"the model's own results": results}
    for file, other in others.items():
        for key in COMPARED:
            value, expected = getattr(other, key), getattr(results, key)
            if value != expected:
                raise ValueError(f"{file}: {key} must be {expected!r}, as for the card's model, found {value!r}")
        if f"test_ndcg@10{results.suffix}" not in other.metrics:
            raise ValueError(f"{file}: a model to compare with must have been evaluated on the test items")
        for earlier_file, earlier in runs.items():
            if name_of_model(earlier) != name_of_model(other):
                continue
            if earlier.seed == other.seed:
                raise ValueError(f"{file}: {name_of_model(other)} with seed {other.seed} is also {earlier_file}")
            for section in ("config", "training"):
                for key, value in getattr(other, section).items():
                    expected = getattr(earlier, section).get(key, value)
                    if value != expected:
                        raise ValueError(f"{file}: {key} must be {expected!r} as in {earlier_file}, found {value!r}")
        runs[file] = other


def _eval_results(results: RunResults, evaluation: str | None, data_source: DataSource | None) -> list[EvalResult]:
    """The metrics of the card for the Hub's own tables."""
    if evaluation is None or data_source is None:
        return []
    metrics = {
        f"{evaluation}_{name.lower()}{suffix}": (name, f"{name}, full ranking, seen items {words}")
        for suffix, words in rankings(results)
        for name in METRICS
    }
    return [
        EvalResult(
            task_type=TASK,
            task_name="Sequential recommendation",
            dataset_type=results.hub_dataset or results.dataset or data_source.name,
            dataset_name=data_source.name,
            dataset_split=evaluation,
            metric_type=name.lower().replace("@", "_at_"),
            metric_name=words,
            metric_value=round(float(results.metrics[key]), 4),
        )
        for key, (name, words) in metrics.items()
        if key in results.metrics
    ]


def _share_seen(results: RunResults) -> float | None:
    """The share of the validation targets that the users had before, where that is known."""
    if results.num_seen_targets is None or not results.num_validation_users:
        return None
    return results.num_seen_targets / results.num_validation_users


def _selection(results: RunResults) -> str:
    """What the checkpoint was chosen by."""
    on = EVALUATIONS["validation" if "validation_ndcg@10" in results.metrics else "eval"]
    metric = results.training.get("metric_for_best_model")
    if metric is None:
        return f"chosen on the {on}"
    metric = metric.removeprefix("eval_")
    values = [results.metrics[key] for key in (f"validation_{metric}", f"eval_{metric}") if key in results.metrics]
    name = metric.removesuffix(SUFFIXES[False])
    kept = "" if name == metric else " with seen items kept"
    value = f": {values[0]:.4f}" if values else ""
    return f"the one with the best {name.upper()}{kept} on the {on}{value}"
