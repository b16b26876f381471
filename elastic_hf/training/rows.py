"""The rows of a dataset that can be trained on and evaluated, as far as its type lets them be looked at beforehand."""

import logging
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc


logger = logging.getLogger(__name__)


def history_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Return the number of items of each row's `input_ids`, of shape `(num_rows,)`."""
    return pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"]).to_numpy()


def leave_out_short_histories(train_dataset: Any) -> Any:
    """Return the rows that have something to predict, two items at least, and log how many have not.

    Raises:
        ValueError: If no row has, or there is no column `input_ids`.
    """
    if not isinstance(train_dataset, datasets.Dataset):
        return train_dataset
    if "input_ids" not in train_dataset.column_names:
        raise ValueError(
            f"train_dataset must have the column input_ids, found {', '.join(train_dataset.column_names)}"
        )
    (long_enough,) = np.nonzero(history_lengths(train_dataset) >= 2)
    num_short = len(train_dataset) - len(long_enough)
    if num_short == 0:
        return train_dataset
    if len(long_enough) == 0:
        raise ValueError(f"train_dataset must have histories of at least 2 items, found {num_short:,} of fewer")
    logger.warning(f"{num_short:,} training histories of fewer than 2 items, with nothing to predict, are left out")
    return train_dataset.select(long_enough)


def check_columns(dataset: Any, field: str, columns: Sequence[str], setting: str) -> None:
    """Check that rows have the columns that a `setting` of the model asks for.

    Raises:
        ValueError: If a column is missing; the message names the `field`.
    """
    if isinstance(dataset, dict):
        for name, rows in dataset.items():
            check_columns(rows, f"{field}[{name!r}]", columns, setting)
    if not isinstance(dataset, datasets.Dataset):
        return
    if not {*columns} <= {*dataset.column_names}:
        wanted = f"column{'s' if len(columns) > 1 else ''} {' and '.join(columns)}"
        raise ValueError(
            f"{field} must have the {wanted} for a model with {setting}, found {', '.join(dataset.column_names)}"
        )


def check_evaluation_rows(eval_dataset: Any, field: str = "eval_dataset") -> None:
    """Check that all rows have a history and a target.

    Raises:
        ValueError: If a column is missing or a history is empty; the message names the `field`.
    """
    if isinstance(eval_dataset, dict):
        for name, rows in eval_dataset.items():
            check_evaluation_rows(rows, f"{field}[{name!r}]")
    if not isinstance(eval_dataset, datasets.Dataset):
        return
    columns = eval_dataset.column_names
    if not {"input_ids", "target"} <= set(columns):
        raise ValueError(f"{field} must have the columns input_ids and target, found {', '.join(columns)}")
    num_empty = int((history_lengths(eval_dataset) < 1).sum())
    if num_empty:
        raise ValueError(f"{field} must have at least 1 item in each history, found {num_empty:,} empty ones")
