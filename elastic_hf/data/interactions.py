"""Rows as codes: sorted by user and time, without duplicates and without users and items that have too few of them."""

import logging
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from .columns import EVENT_PREFIX
from .encoding import drop_unused, encode_events, encode_ids


logger = logging.getLogger(__name__)

MIN_INTERACTIONS = 3  # of a user: one each for training, validation and test
YEAR_10_000 = 253_402_300_800  # in Unix seconds


@dataclass
class Interactions:
    """
    Rows as codes.

    Attributes:
        user_ids, item_ids (`pyarrow.Array`): The distinct ids, sorted.
        users, items (`np.ndarray` of shape `(num_rows,)`): The index of each row's user and item among them.
        timestamps (`np.ndarray` of shape `(num_rows,)`, *optional*): Unix seconds.
        events (`dict[str, pyarrow.Array]`): The values of each event column, `num_rows` of them.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray | None
    events: dict[str, pa.Array] = field(default_factory=dict)

    def keep(self, rows: np.ndarray) -> None:
        """Keep some rows, given by their indices or by a mask, in that order."""
        self.users = self.users[rows]
        self.items = self.items[rows]
        if self.timestamps is not None:
            self.timestamps = self.timestamps[rows]
        if self.events:
            indices = pa.array(np.flatnonzero(rows) if rows.dtype == bool else rows)
            self.events = {name: values.take(indices) for name, values in self.events.items()}


def encode_rows(table: pa.Table) -> Interactions:
    """Return the rows of a table with the columns `user`, `item` and, where there is time, `timestamp`, and those of
    events."""
    user_ids, users = encode_ids(table["user"])
    item_ids, items = encode_ids(table["item"])
    timestamps = table["timestamp"].to_numpy() if "timestamp" in table.column_names else None
    events = {
        name.removeprefix(EVENT_PREFIX): encode_events(table[name])
        for name in table.column_names
        if name.startswith(EVENT_PREFIX)
    }
    return Interactions(user_ids, item_ids, users, items, timestamps, events)


def warn_of_milliseconds(interactions: Interactions) -> None:
    """Log timestamps that are too large to be seconds."""
    timestamps = interactions.timestamps
    if timestamps is not None and timestamps.max() >= YEAR_10_000:
        logger.warning(
            f"timestamps are read as Unix seconds, of which {timestamps.max():,} is after the year 9999: divide them "
            "first if they are milliseconds or smaller"
        )


def sort_by_time(interactions: Interactions) -> None:
    """Sort by user, then by time; what is equal, or has no time, stays in the order of the source."""
    if interactions.timestamps is None:
        interactions.keep(np.argsort(interactions.users, kind="stable"))
    else:
        interactions.keep(np.lexsort((interactions.timestamps, interactions.users)))


def drop_duplicates(interactions: Interactions) -> int:
    """Drop rows that equal an earlier one, and return how many they were; without time none are."""
    if interactions.timestamps is None:
        return 0
    is_first = _is_first_of_its_kind(interactions.users, interactions.items, interactions.timestamps)
    num_duplicates = int(is_first.size - np.count_nonzero(is_first))
    if num_duplicates:
        logger.warning(f"dropped {num_duplicates:,} rows that repeat another's user, item and timestamp")
        interactions.keep(is_first)
    return num_duplicates


def _is_first_of_its_kind(users: np.ndarray, items: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Return False for rows that equal an earlier one; rows are sorted by user and time."""
    first = np.ones(users.size, bool)
    tied = (users[1:] == users[:-1]) & (timestamps[1:] == timestamps[:-1])
    in_tie = np.zeros(users.size, bool)
    in_tie[1:] = tied
    in_tie[:-1] |= tied
    rows = np.flatnonzero(in_tie)
    tie = np.cumsum(np.concatenate([[True], ~tied]))[rows]
    # (tie, item) as one integer: the stable sort puts equal rows side by side, the earliest first
    key = tie * (int(items.max()) + 1) + items[rows]
    order = np.argsort(key, kind="stable")
    first[rows[order[1:][key[order[1:]] == key[order[:-1]]]]] = False
    return first


def filter_by_count(interactions: Interactions, k_core: int, min_per_user: int) -> tuple[int, int]:
    """Remove users and items with too few interactions, and return how many interactions and users that removes."""
    num_interactions, num_users = interactions.users.size, len(interactions.user_ids)
    interactions.keep(_k_core(interactions.users, interactions.items, max(k_core, min_per_user), k_core))
    if not interactions.users.size:
        raise ValueError(
            f"none of {num_interactions:,} interactions is left with k_core={k_core}: a user needs at least "
            f"{max(k_core, min_per_user)}"
        )
    interactions.user_ids, interactions.users = drop_unused(interactions.user_ids, interactions.users)
    interactions.item_ids, interactions.items = drop_unused(interactions.item_ids, interactions.items)
    num_filtered_users = num_users - len(interactions.user_ids)
    if num_filtered_users and k_core < min_per_user:
        logger.warning(
            f"left out {num_filtered_users:,} of {num_users:,} users with fewer than {min_per_user} interactions"
        )
    return num_interactions - interactions.users.size, num_filtered_users


def _k_core(users: np.ndarray, items: np.ndarray, min_per_user: int, min_per_item: int) -> np.ndarray:
    """Return the indices of the rows that are left when no user and no item has fewer of them than it must have."""
    rows = np.arange(users.size)
    while True:
        row_users, row_items = users[rows], items[rows]
        kept = np.bincount(row_users)[row_users] >= min_per_user
        kept &= np.bincount(row_items)[row_items] >= min_per_item
        if kept.all():
            return rows
        rows = rows[kept]
