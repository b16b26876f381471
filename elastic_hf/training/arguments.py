"""The arguments of a training that this package's trainer cannot honour, refused by name before the first step."""

import math
from typing import Any

import numpy as np
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType

from .metrics import ranking_metrics


RANKING_METRICS = tuple(ranking_metrics(np.ones((1, 2)), np.zeros((1, 10)), 1))
# Schedules that follow a metric of the evaluations.
METRIC_SCHEDULES = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
# What counts something, and cannot be less.
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "num_train_epochs": 0,
}


def check_arguments(args: TrainingArguments, train_dataset: Any, eval_dataset: Any, has_ranking_metrics: bool) -> None:
    """
    Check the arguments of a training.

    Args:
        args ([`TrainingArguments`]): The arguments.
        train_dataset (`Dataset`, *optional*): What is trained on.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): What is evaluated while training.
        has_ranking_metrics (`bool`): Whether the metrics are those of [`ranking_metrics`].

    Raises:
        ValueError: If an argument has a value that the trainer cannot honour; the message names it.
    """
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    if not math.isfinite(args.learning_rate):
        raise ValueError(f"learning_rate must be a finite number, found {args.learning_rate}")
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor must be 0, since the model computes its loss without the scores of all items at "
            f"all positions, found {args.label_smoothing_factor}"
        )
    rows_per_batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and hasattr(train_dataset, "__len__") and len(train_dataset) < rows_per_batch:
        raise ValueError(
            "dataloader_drop_last must be False with fewer rows than a batch has, found "
            f"{len(train_dataset):,} rows and batches of {rows_per_batch:,}"
        )
    if has_ranking_metrics and not args.eval_do_concat_batches:
        raise ValueError("eval_do_concat_batches must be True unless compute_metrics is given, found False")
    if args.eval_use_gather_object:
        raise ValueError("eval_use_gather_object must be False, since ranks are gathered as tensors, found True")
    if args.push_to_hub and args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise ValueError(
            "hub_strategy must be 'end' or 'every_save', since optimizer states are pickled and not published, "
            f"found {args.hub_strategy.value!r}"
        )
    is_evaluated = args.eval_strategy != IntervalStrategy.NO
    if args.save_strategy == SaveStrategy.BEST and not is_evaluated:
        raise ValueError("eval_strategy must be 'steps' or 'epoch' with save_strategy 'best', found 'no'")
    if is_evaluated and args.metric_for_best_model is not None:
        _check_metric(args.metric_for_best_model, eval_dataset, has_ranking_metrics)


def _check_metric(metric: str, eval_dataset: Any, has_ranking_metrics: bool) -> None:
    """Check that evaluations have the metric, which is the loss where only a choice of the best was asked for."""
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    known = {f"{prefix}{name}" for prefix in prefixes for name in RANKING_METRICS}
    name = metric.removeprefix("eval_")
    if name not in known if has_ranking_metrics else name == "loss":
        raise ValueError(
            f"metric_for_best_model must be a metric of the evaluations, such as '{prefixes[0]}ndcg@10', found "
            f"{metric!r}" + (", the default: evaluations rank and have no loss" if name == "loss" else "")
        )
