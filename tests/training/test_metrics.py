import math

import numpy as np
import pytest

from elastic_hf.training.metrics import popularity_bias, ranking_metrics, standard_errors


NUM_ITEMS = 31
VOCAB_SIZE = NUM_ITEMS + 3


def test_metrics_worked_by_hand():
    ranks = np.array([[1, 1], [3, 7], [10, 21], [31, 31]])
    top_ids = np.array([[3, 4, 5] + [-1] * 17, [3, 6, 7] + [-1] * 17, [3] * 10 + [30] * 10, [8] + [-1] * 19])
    metrics = ranking_metrics(ranks, top_ids, num_items=NUM_ITEMS)
    assert metrics["hr@1"] == 1 / 4
    assert metrics["hr@5"] == 2 / 4
    assert metrics["hr@10"] == metrics["hr@20"] == 3 / 4
    assert metrics["ndcg@1"] == 1 / 4
    assert metrics["ndcg@5"] == pytest.approx((1 + 1 / 2) / 4)  # 1 / log2(3 + 1) = 1 / 2
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(11)) / 4)
    assert metrics["mrr@10"] == pytest.approx((1 + 1 / 3 + 1 / 10) / 4)
    assert metrics["hr@5_seen_kept"] == 1 / 4
    assert metrics["hr@10_seen_kept"] == metrics["hr@20_seen_kept"] == 2 / 4
    assert metrics["mrr@20_seen_kept"] == pytest.approx((1 + 1 / 7) / 4)
    # Items 3 to 8; item 30 is in nobody's first ten and -1 is no item.
    assert metrics["coverage@10"] == 6 / NUM_ITEMS
    assert len(metrics) == 2 * 3 * 4 + 1


def test_standard_errors_worked_by_hand():
    ranks = np.array([[1, 1], [3, 7], [10, 21], [31, 31]])
    errors = standard_errors(ranks)
    # Three of four hit: each is 1/4 or 3/4 from their mean.
    assert errors["hr@10"] == pytest.approx(math.sqrt((3 * (1 / 4) ** 2 + (3 / 4) ** 2) / 3 / 4))
    gains = [1, 1 / 2, 0, 0]
    assert errors["ndcg@5"] == pytest.approx(math.sqrt(sum((gain - 3 / 8) ** 2 for gain in gains) / 3 / 4))
    assert errors["hr@1_seen_kept"] == errors["ndcg@1_seen_kept"] == pytest.approx(1 / 4)
    assert errors.keys() == ranking_metrics(ranks, np.ones((4, 20)), NUM_ITEMS).keys() - {"coverage@10"}
    assert standard_errors(ranks[:1]) == {}


@pytest.mark.parametrize(
    ("ranks", "top_ids", "message"),
    [
        (np.zeros((0, 2)), np.zeros((0, 20)), "at least one user"),
        (np.ones(4), np.ones((4, 20)), "ranks must have shape"),
        (np.zeros((4, 2)), np.ones((4, 20)), "start at 1"),
        (np.ones((4, 2)), np.ones((3, 20)), "top_ids must have shape"),
    ],
)
def test_bad_ranks_are_named(ranks, top_ids, message):
    with pytest.raises(ValueError, match=message):
        ranking_metrics(ranks, top_ids, num_items=NUM_ITEMS)


def test_popularity_bias_worked_by_hand():
    counts = np.array([99, 99, 99, *(7, 0, 20, 7, 1, 2, 3, 4, 5, 6)])  # items 3 to 12
    # Ten items: 20 beats nine of them and half of itself; each 7 beats seven, and half of the two of them.
    percentile = {3: 8 / 10, 4: 0.5 / 10, 5: 9.5 / 10, 6: 8 / 10, 7: 1.5 / 10}
    top_ids = np.array([[5, 3] + [-1] * 18, [5, 4] + [-1] * 18, [7] * 10 + [5] * 10])
    bias = popularity_bias(top_ids, np.array([6, 4, 5]), counts)
    first_ten = [percentile[item] for item in (5, 3, 5, 4, *[7] * 10)]
    assert bias["popularity_percentile@10"] == pytest.approx(sum(first_ten) / 14)
    assert bias["popularity_percentile_target"] == pytest.approx((8 / 10 + 0.5 / 10 + 9.5 / 10) / 3)
    assert bias["head_share@10"] == 2 / 14  # the second ten of the third user do not count
    assert bias["head_share_target"] == 1 / 3
    assert len(bias) == 4


def test_popularity_percentiles_average_one_half_whatever_the_ties():
    catalogue = np.arange(3, VOCAB_SIZE)
    for counts in (np.arange(VOCAB_SIZE), np.ones(VOCAB_SIZE), np.arange(VOCAB_SIZE) // 5):
        bias = popularity_bias(catalogue[:, None], catalogue, counts)
        assert bias["popularity_percentile@10"] == bias["popularity_percentile_target"] == pytest.approx(0.5)
    assert popularity_bias(catalogue[:, None], catalogue, np.arange(VOCAB_SIZE))["head_share@10"] == 3 / NUM_ITEMS
    assert popularity_bias(catalogue[:, None], catalogue, np.ones(VOCAB_SIZE))["head_share@10"] == 0


@pytest.mark.parametrize(
    ("top_ids", "target_ids", "message"),
    [
        ([[3, 4]], [5, 6], r"found \(1, 2\) and \(2,\)"),
        ([[3, 2]], [5], r"top_ids must be items, in \[3, 34\), found values from 2 to 3"),
        ([[3, VOCAB_SIZE]], [5], "found values from 3 to 34"),
        ([[-1, -1]], [5], "top_ids must be items, .* found none"),
        ([[3, 4]], [-1], "target_ids must be items"),
    ],
)
def test_popularity_of_what_is_no_item_is_refused(top_ids, target_ids, message):
    with pytest.raises(ValueError, match=message):
        popularity_bias(np.array(top_ids), np.array(target_ids), np.ones(VOCAB_SIZE))
