"""The embedded default dataset: a seeded generator of long histories whose next item depends on the far past.

Every item has one *interest*, one *form* and one *style*: "Harbour Jazz Waltz No. 12". What a user does next hangs on
three time scales:

- the last few items: a session stays in one interest and walks through its forms in a fixed order, with some stops
  and jumps;
- the last sessions: a user has three interests at a time. They drift: now and then one gives way to the next in the
  user's rotation, and comes back up to hundreds of items later;
- the whole past: for every interest and form a user has a personal style and mostly keeps to it. An item shows one of
  these many styles, so that only the past tells which to expect in the others, and only the far past when an interest
  comes back.

Items of one kind have Zipf popularity, and so have their styles. Nobody has the same item twice.
"""

import numpy as np
import polars as pl


INTERESTS = ("Jazz", "Folk", "Choral", "Tango", "Fiddle")
FORMS = ("Waltz", "March", "Ballad", "Nocturne", "Rondo")
STYLES = ("Harbour", "Winter")
NUM_POOLS = len(INTERESTS) * len(FORMS) * len(STYLES)
CURRENT_INTERESTS = 3
# Shortest and longest, in items.
SESSION_LENGTH = (4, 8)
# Chance that one of the current interests gives way to the next in the rotation, at the start of a session.
ROTATION_PROBABILITY = 0.06
# Chance that an item jumps to any form, and else that it stays in the form instead of walking on to the next one.
JUMP_PROBABILITY, STAY_PROBABILITY = 0.15, 0.25
# Chance that an item has the user's personal style.
LOYALTY = 0.9
# Exponents of Zipf's law: popularity is proportional to rank ** -exponent.
ITEM_EXPONENT, STYLE_EXPONENT = 1.5, 0.7
DAY = 24 * 60 * 60
FIRST_TIMESTAMP = 1_600_000_000


def make_interactions(
    num_users: int = 700, num_items: int = 1500, history_length: tuple[int, int] = (300, 600), seed: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Generate interactions; the same arguments give the same tables.

    Args:
        num_users (`int`, *optional*, defaults to 700): Number of users.
        num_items (`int`, *optional*, defaults to 1500):
            Size of the catalogue, at least 50: one item for every interest, form and style.
        history_length (`tuple[int, int]`, *optional*, defaults to `(300, 600)`):
            Shortest and longest history, in items; lengths are uniform in between.
        seed (`int`, *optional*, defaults to 0): Seed of the generator.

    Returns:
        `tuple[polars.DataFrame, polars.DataFrame]`: The interactions in time order, with `user_id` (int64), `item_id`
        (int64) and `timestamp` (int64, Unix seconds, increasing within a user), and the items, sorted by `item_id`,
        with their `title`.

    Raises:
        ValueError: If an argument is out of range, or if the catalogue is too small for histories without repeats.
    """
    shortest, longest = history_length
    if num_users < 1:
        raise ValueError(f"num_users must be at least 1, found {num_users}")
    if num_items < NUM_POOLS:
        raise ValueError(f"num_items must be at least {NUM_POOLS}, found {num_items}")
    if not 1 <= shortest <= longest:
        raise ValueError(f"history_length must be positive and (shortest, longest), found {history_length}")

    # Axis letters: U users, T steps, N sessions. A topic is an interest and a form, a pool is a topic in one style.
    rng = np.random.default_rng(seed)
    # Twice the steps: a step whose pool is used up is left out.
    num_steps = 2 * longest
    num_sessions, is_start = _draw_sessions(rng, num_users, num_steps)
    topics = _draw_topics(rng, num_sessions, is_start)
    pools = topics * len(STYLES) + _draw_styles(rng, topics)  # (U, T)
    preferences = _draw_preferences(rng, num_users, num_items)
    timestamps = _draw_timestamps(rng, is_start)
    lengths = rng.integers(shortest, longest, size=num_users, endpoint=True)
    steps = (
        pl.DataFrame(
            {
                "user": np.repeat(np.arange(num_users), num_steps),
                "length": np.repeat(lengths, num_steps),
                "timestamp": timestamps.ravel(),
                "pool": pools.ravel(),
                "pool_size": np.bincount(np.arange(num_items) % NUM_POOLS)[pools].ravel(),
            }
        )
        .with_columns(visit=pl.int_range(pl.len()).over("user", "pool"))
        .filter(pl.col("visit") < pl.col("pool_size"))
        .filter(pl.int_range(pl.len()).over("user") < pl.col("length"))
        .sort("timestamp", "user")
    )
    if len(steps) < lengths.sum():
        raise ValueError(
            f"num_items must be large enough for histories of {longest} different items, found {num_items}: "
            "give more items or a shorter history_length"
        )

    # item ids tell nothing about the items
    item_ids = rng.permutation(num_items) + 1
    user, visit, pool = (steps[name].to_numpy() for name in ("user", "visit", "pool"))
    interactions = pl.DataFrame(
        {
            "user_id": user + 1,
            "item_id": item_ids[preferences[user, visit, pool] * NUM_POOLS + pool],
            "timestamp": steps["timestamp"],
        }
    )
    kinds = [f"{style} {interest} {form}" for interest in INTERESTS for form in FORMS for style in STYLES]
    titles = [f"{kinds[item % NUM_POOLS]} No. {item // NUM_POOLS + 1}" for item in range(num_items)]
    return interactions, pl.DataFrame({"item_id": item_ids, "title": titles}).sort("item_id")


def _draw_sessions(rng: np.random.Generator, num_users: int, num_steps: int) -> tuple[int, np.ndarray]:
    """Return how many sessions a user has at most, and which steps begin one: (U, T)."""
    num_sessions = num_steps // SESSION_LENGTH[0] + 1
    lengths = rng.integers(*SESSION_LENGTH, size=(num_users, num_sessions), endpoint=True)
    is_start = np.zeros((num_users, lengths.sum(axis=1).max()), dtype=bool)
    np.put_along_axis(is_start, np.cumsum(lengths, axis=1) - lengths, True, axis=1)
    return num_sessions, is_start[:, :num_steps]


def _draw_topics(rng: np.random.Generator, num_sessions: int, is_start: np.ndarray) -> np.ndarray:
    """Return the interest and form of each step as one number: (U, T)."""
    num_users = len(is_start)
    # each session's interest: one of the current neighbours in the user's rotation
    user_interests = rng.permuted(np.tile(np.arange(len(INTERESTS)), (num_users, 1)), axis=1)
    rotation = np.cumsum(rng.random((num_users, num_sessions)) < ROTATION_PROBABILITY, axis=1)
    rotation += rng.integers(CURRENT_INTERESTS, size=rotation.shape)
    session_interests = np.take_along_axis(user_interests, rotation % len(INTERESTS), axis=1)  # (U, N)
    interests = np.take_along_axis(session_interests, np.cumsum(is_start, axis=1) - 1, axis=1)

    jumps = is_start | (rng.random(is_start.shape) < JUMP_PROBABILITY)
    walk = rng.random(jumps.shape) >= STAY_PROBABILITY
    forms = np.cumsum(np.where(jumps, rng.integers(len(FORMS), size=jumps.shape), walk), axis=1) % len(FORMS)
    return interests * len(FORMS) + forms


def _draw_styles(rng: np.random.Generator, topics: np.ndarray) -> np.ndarray:
    """Return the style that goes with each step's topic, mostly the user's own: (U, T) -> (U, T)."""
    num_topics = len(INTERESTS) * len(FORMS)
    style_popularity = rng.permuted(np.tile(_log_zipf(len(STYLES), STYLE_EXPONENT), (num_topics, 1)), axis=1)
    noise = rng.gumbel(size=(len(topics), num_topics, len(STYLES)))
    user_styles = np.argmax(noise + style_popularity, axis=2)  # (U, topics)
    styles = np.take_along_axis(user_styles, topics, axis=1)
    other_styles = (styles + rng.integers(1, len(STYLES), size=styles.shape)) % len(STYLES)
    return np.where(rng.random(styles.shape) < LOYALTY, styles, other_styles)


def _draw_preferences(rng: np.random.Generator, num_users: int, num_items: int) -> np.ndarray:
    """Return each user's order within every pool: (U, pool_size, NUM_POOLS)."""
    pool_size = -(-num_items // NUM_POOLS)
    log_weights = np.repeat(_log_zipf(pool_size, ITEM_EXPONENT), NUM_POOLS)
    log_weights[num_items:] = -np.inf
    noise = rng.gumbel(size=(num_users, pool_size, NUM_POOLS))
    return np.argsort(-noise - log_weights.reshape(pool_size, NUM_POOLS), axis=1)


def _draw_timestamps(rng: np.random.Generator, is_start: np.ndarray) -> np.ndarray:
    """Return each step's Unix seconds: minutes pass between items, hours to days between sessions."""
    pauses = rng.uniform(60, 600, size=is_start.shape) + is_start * rng.exponential(3 * DAY, size=is_start.shape)
    pauses = (pauses + is_start * DAY / 8).astype(np.int64)
    return FIRST_TIMESTAMP + rng.integers(180 * DAY, size=(len(is_start), 1)) + np.cumsum(pauses, axis=1)


def _log_zipf(num_ranks: int, exponent: float) -> np.ndarray:
    """Return log weights, not normalised; adding Gumbel noise and sorting draws from them without replacement."""
    return -exponent * np.log(np.arange(1, num_ranks + 1))
