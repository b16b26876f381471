"""The embedded dataset: reproducible, well-formed, and unpredictable without the far past."""

import numpy as np
import polars as pl
import pytest

from elastic_hf.data.synthetic import make_interactions


SMALL = {"num_users": 30, "num_items": 1000, "history_length": (20, 60)}


@pytest.fixture(scope="module")
def tables() -> tuple[pl.DataFrame, pl.DataFrame]:
    return make_interactions()


@pytest.fixture(scope="module")
def histories(tables) -> list[pl.DataFrame]:
    """Each user's rows in time order, with what the titles say: interest, topic (interest and form) and style."""
    interactions, items = tables
    words = pl.col("title").str.split(" ").list
    described = items.with_columns(
        style=words.get(0), interest=words.get(1), topic=pl.concat_str(words.get(1), words.get(2), separator=" ")
    )
    rows = interactions.join(described, on="item_id", maintain_order="left").sort("user_id", "timestamp")
    return rows.partition_by("user_id", maintain_order=True)


def test_the_seed_decides_everything():
    first, again, other = (make_interactions(**SMALL, seed=seed) for seed in (1, 1, 2))
    assert first[0].equals(again[0]) and first[1].equals(again[1])
    assert not first[0].equals(other[0]) and not first[1].equals(other[1])


def test_tables_are_well_formed(tables):
    interactions, items = tables
    assert interactions.schema == {"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Int64}
    assert items.schema == {"item_id": pl.Int64, "title": pl.String}
    assert items["item_id"].to_list() == list(range(1, 1501))
    assert items["title"].is_unique().all() and items["title"].str.contains(r"^\w+ \w+ \w+ No\. \d+$").all()
    assert interactions["timestamp"].is_sorted() and interactions["timestamp"].min() > 0
    assert interactions.select("user_id", "item_id").is_unique().all()
    steps = interactions.select(pl.col("timestamp").diff().over("user_id").drop_nulls())
    assert steps.min().item() >= 1
    lengths = interactions["user_id"].value_counts()["count"]
    assert len(lengths) == 700 and lengths.min() >= 300 and lengths.max() <= 600


def test_arguments_are_kept():
    interactions, items = make_interactions(num_users=5, num_items=1001, history_length=(40, 40), seed=3)
    assert len(items) == 1001 and set(interactions["item_id"]) <= set(items["item_id"])
    assert interactions["user_id"].value_counts()["count"].to_list() == [40] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_users": 0}, "num_users must be at least 1, found 0"),
        ({"num_items": 49}, "num_items must be at least 50, found 49"),
        ({"history_length": (0, 10)}, "history_length"),
        ({"history_length": (20, 10)}, "history_length"),
        ({**SMALL, "history_length": (300, 900)}, "num_items must be large enough for histories of 900"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_interactions(**arguments)


def test_popularity_is_zipf_like_and_no_item_is_rare(tables):
    interactions, items = tables
    counts = interactions["item_id"].value_counts()["count"].sort(descending=True)
    assert len(counts) == len(items) and counts.min() >= 5
    assert counts.head(len(items) // 10).sum() > 0.2 * counts.sum()
    assert counts.tail(len(items) // 2).sum() < 0.33 * counts.sum()


def test_sessions_are_apart_in_time_and_stay_in_one_interest(histories):
    for history in histories[:20]:
        session = (history["timestamp"].diff().fill_null(0) > 3600).cum_sum()
        sizes = session.value_counts()["count"]
        assert 4 < sizes.mean() < 8 and sizes.max() <= 8
        assert history.group_by(session).agg(pl.col("interest").n_unique())["interest"].max() == 1


def test_interests_return_after_hundreds_of_items(histories):
    absence = pl.col("index").cast(pl.Int64).diff().over("interest")  # items since the interest was last met
    long_absences = [history.with_row_index().select((absence > 200).sum()).item() for history in histories]
    assert np.mean(np.array(long_absences) > 0) > 0.4


def test_interests_drift(histories):
    """What a user was interested in early on and what the user is interested in now are rather different things."""
    overlaps = []
    for history in histories:
        early, middle, late = (set(history["interest"][start : start + 30]) for start in (0, 30, len(history) - 30))
        overlaps.append((len(early & middle) / len(early | middle), len(early & late) / len(early | late)))
    near, far = np.mean(overlaps, axis=0)
    assert far < 0.6 * near


def counting_ndcg(histories: list[pl.DataFrame], window: int | None) -> float:
    """NDCG@10 for each user's last item of a predictor that counts the user's styles in the last `window` items only.

    All else it knows without limit: which topic follows which, how popular items are, and what the user has seen.
    """
    rows = pl.concat(histories)
    items = rows.group_by("item_id").agg(pl.col("topic", "style").first(), pl.len()).sort("item_id")
    topics, styles = items["topic"].unique().sort(), items["style"].unique().sort()
    topic_of_item = topics.search_sorted(items["topic"]).to_numpy()
    style_of_item = styles.search_sorted(items["style"]).to_numpy()
    columns = [items["item_id"].search_sorted(history["item_id"]).to_numpy() for history in histories]

    transitions = np.full((len(topics), len(topics)), 0.1)
    counts = np.zeros(len(items))
    for seen in (column[:-1] for column in columns):
        np.add.at(transitions, (topic_of_item[seen[:-1]], topic_of_item[seen[1:]]), 1)
        np.add.at(counts, seen, 1)
    transitions /= transitions.sum(axis=1, keepdims=True)
    style_counts = np.zeros((len(topics), len(styles)))
    np.add.at(style_counts, (topic_of_item, style_of_item), counts)
    within_style = counts / style_counts[topic_of_item, style_of_item]
    prior = style_counts / style_counts.sum(axis=1, keepdims=True)

    gains = []
    for *seen, target in columns:
        seen = np.array(seen)
        read = seen[-window:] if window else seen
        user_styles = 1.5 * prior
        np.add.at(user_styles, (topic_of_item[read], style_of_item[read]), 1)
        user_styles /= user_styles.sum(axis=1, keepdims=True)
        scores = transitions[topic_of_item[seen[-1]]][topic_of_item] * user_styles[topic_of_item, style_of_item]
        scores *= within_style
        scores[seen] = -1
        rank = (scores >= scores[target]).sum()
        gains.append(1 / np.log2(rank + 1) if rank <= 10 else 0)
    return float(np.mean(gains))


def test_the_far_past_tells_what_comes_next(histories):
    last_20, last_100, everything = (counting_ndcg(histories, window) for window in (20, 100, None))
    assert everything > 1.35 * last_20
    assert everything > 1.05 * last_100


def test_load_histories_keeps_everything():
    from elastic_hf.data.histories import load_histories

    loaded = load_histories("synthetic", k_core=5)
    assert loaded.counts["num_users"] == 700
    assert loaded.counts["num_items"] == 1500
    assert loaded.counts["num_filtered"] == 0
    assert loaded.items["title"][0] == make_interactions()[1]["title"][0]
