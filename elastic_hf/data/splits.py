"""Histories split for training, validation and test: which users are in a split, and where their histories end."""

import logging

import numpy as np

from ..results import FEW_USERS
from .interactions import Interactions


logger = logging.getLogger(__name__)

MIN_TRAINING_ITEMS = 2  # of a user in the train split: one to read and one to predict
# Not the seed of a training: all models, and all their seeds, are validated on the same users.
VALIDATION_SEED = 42

# The users in a split, and how many interactions of each come before the target.
Prefixes = tuple[np.ndarray, np.ndarray]


def leave_one_out(lengths: np.ndarray, validation_users: int | None = None) -> dict[str, Prefixes]:
    """Return the users of each split, and their interactions before the last one or two.

    With `validation_users`, so many users are drawn for validation, and the others train on their second last item.

    Raises:
        ValueError: if there are not so many users.
    """
    rows = validated = np.arange(lengths.size)
    if validation_users is not None:
        if validation_users > rows.size:
            raise ValueError(
                f"validation_users must be at most the number of users, {rows.size:,}, found {validation_users:,}"
            )
        generator = np.random.default_rng(VALIDATION_SEED)
        validated = np.sort(generator.choice(rows.size, validation_users, replace=False))
    train_lengths = lengths - 1
    train_lengths[validated] -= 1
    return {
        "train": (rows, train_lengths),
        "validation": (validated, lengths[validated] - 2),
        "test": (rows, lengths - 1),
    }


def temporal(
    interactions: Interactions, lengths: np.ndarray, validation_fraction: float, test_fraction: float
) -> dict[str, Prefixes]:
    """Return for each split the users in it and how many of each one's interactions come before the target."""
    users, timestamps = interactions.users, interactions.timestamps
    cutoffs = np.quantile(timestamps, [1 - validation_fraction - test_fraction, 1 - test_fraction], method="higher")
    before_validation, before_test = (
        np.bincount(users[timestamps < cutoff], minlength=lengths.size) for cutoff in cutoffs
    )
    in_split = {
        "train": (before_validation, before_validation > 0),
        "validation": (before_validation, before_test > before_validation),
        "test": (before_test, lengths > before_test),
    }
    prefixes = {}
    for name, (before, candidates) in in_split.items():
        rows = np.flatnonzero(candidates & (before > 0))
        if not rows.size:
            raise ValueError(
                f"the temporal split leaves {name} without users: change validation_fraction and test_fraction"
            )
        num_new = int(np.count_nonzero(candidates)) - rows.size
        if num_new:
            logger.warning(f"{name} leaves out {num_new:,} users who have no history before the cutoff")
        prefixes[name] = (rows, before[rows])
    return prefixes


def leave_out_short(train: Prefixes) -> Prefixes:
    """Leave out the users who have too few items to learn from."""
    rows, lengths = train
    is_long = lengths >= MIN_TRAINING_ITEMS
    num_short = int(np.count_nonzero(~is_long))
    if num_short:
        logger.warning(
            f"train leaves out {num_short:,} of {rows.size:,} users, who have fewer than {MIN_TRAINING_ITEMS} items "
            "to train on"
        )
    return rows[is_long], lengths[is_long]


def warn_of_few_users(prefixes: dict[str, Prefixes]) -> None:
    """Log how few users are evaluated, where that makes their metrics a matter of chance."""
    few = {name: prefixes[name][0].size for name in ("validation", "test") if prefixes[name][0].size < FEW_USERS}
    if few:
        logger.warning(
            f"few users are evaluated ({', '.join(f'{size} in {name}' for name, size in few.items())}): a metric over "
            f"fewer than {FEW_USERS} is mostly chance, one user moves a hit rate by {1 / min(few.values()):.4f}"
        )


def count_items(interactions: Interactions, lengths: np.ndarray, train: Prefixes) -> np.ndarray:
    """Return how often each item is among the interactions to train on."""
    rows, train_lengths = train
    starts = np.cumsum(lengths) - lengths
    train_items = interactions.items[flat_indices(starts[rows], train_lengths)]
    return np.bincount(train_items, minlength=len(interactions.item_ids))


def count_seen_targets(interactions: Interactions, lengths: np.ndarray, prefixes: Prefixes) -> int:
    """Return how many users of a split have their target among the interactions before it."""
    rows, before = prefixes
    starts = (np.cumsum(lengths) - lengths)[rows]
    targets = interactions.items[starts + before]
    is_target = interactions.items[flat_indices(starts, before)] == np.repeat(targets, before)
    return int(np.count_nonzero(np.logical_or.reduceat(is_target, np.cumsum(before) - before)))


def flat_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return `starts[0], starts[0] + 1, ...`, `lengths[0]` of them, then the same for `starts[1]` and so on."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())
