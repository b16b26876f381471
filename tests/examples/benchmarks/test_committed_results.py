"""Committed results are what a run wrote: their figures agree with each other, and they say where they are from."""

import json
import math
import re
from pathlib import Path

import pytest

import elastic_hf
from elastic_hf.results import RunResults


FOLDER = Path(elastic_hf.__file__).parents[1] / "examples" / "benchmarks" / "results"
FILES = sorted(FOLDER.glob("*.json"))
RESULTS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in FILES}
TRAINED = [
    name for name, results in RESULTS.items() if "main_row" in results and results["model_type"] != "popularity"
]


def metric_of(results):
    """The metric that the checkpoint was chosen by."""
    return f"eval_ndcg@10{RunResults.from_dict(results).suffix}"


def test_there_are_results():
    assert len(TRAINED) > 5 and len(RESULTS) > len(TRAINED)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_names_its_hardware_and_a_commit(name):
    results = RESULTS[name]
    assert results.get("hardware"), "the hardware must be named"
    assert re.fullmatch(r"[0-9a-f]{40}", str(results.get("git_commit"))), "the commit must be whole, and not dirty"


@pytest.mark.parametrize("name", TRAINED)
def test_the_seconds_of_a_run_agree(name):
    results = RESULTS[name]
    assert 0 < results["train_seconds"] <= results["total_seconds"]


@pytest.mark.parametrize("name", TRAINED)
def test_epochs_and_steps_of_a_run_agree_with_its_log(name):
    results = RESULTS[name]
    logs = results["log_history"]
    epochs = [float(epoch) for epoch in range(1, int(results["epochs"]) + 1)]
    assert results["epochs"] == epochs[-1] <= results["training"]["epochs"]
    assert results["stopped_early"] == (results["epochs"] < results["training"]["epochs"])
    assert [log["epoch"] for log in logs if "loss" in log] == epochs
    delay = re.search(r"--eval_delay (\d+)", results["command"])
    first = int(delay[1]) if delay else 1
    evaluated = [log["epoch"] for log in logs if metric_of(results) in log]
    assert [epoch for epoch in evaluated if epoch >= first] == epochs[first - 1 :]
    if "steps" in results:
        assert [log["step"] for log in logs] == [log["epoch"] * results["steps"] / results["epochs"] for log in logs]


@pytest.mark.parametrize("name", TRAINED)
def test_the_figures_of_a_run_agree_with_its_log(name):
    """The train loss is the mean of all steps, and the validation is that of the best epoch."""
    results = RESULTS[name]
    losses = [log["loss"] for log in results["log_history"] if "loss" in log]
    assert results["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    metric = metric_of(results)
    scores = {log["epoch"]: log[metric] for log in results["log_history"] if metric in log}
    assert scores[results["best_epoch"]] == max(scores.values())
    assert results[metric.replace("eval", "validation")] == pytest.approx(max(scores.values()), rel=1e-3)


def test_no_figure_is_infinite():
    def numbers(value):
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from numbers(part)
        elif isinstance(value, float):
            yield value

    assert all(math.isfinite(number) for results in RESULTS.values() for number in numbers(results))
