import math

import numpy as np
import pytest
import torch

from elastic_hf.metrics import popularity_bias, rank_targets, ranking_metrics


NUM_ITEMS = 31
VOCAB_SIZE = NUM_ITEMS + 3


def brute_force_ranks(users, items, targets, seen, num_special_tokens=3):
    """One user, one item at a time, in exact Python numbers."""
    ranks = []
    for user, target, seen_row in zip(users.tolist(), targets.tolist(), seen.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(user, item, strict=True)) for item in items.tolist()]
        others = [i for i in range(num_special_tokens, len(scores)) if i != target and not scores[i] < scores[target]]
        excluded = len(scores) - num_special_tokens
        if target not in seen_row:
            excluded = 1 + sum(i not in seen_row for i in others)
        ranks.append([excluded, 1 + len(others)])
    return torch.tensor(ranks)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(-3, 4, (5, 2), generator=generator).float()
    items = torch.randint(-3, 4, (VOCAB_SIZE, 2), generator=generator).float()  # small integers: many ties
    targets = torch.randint(3, VOCAB_SIZE, (5,), generator=generator)
    seen = torch.randint(0, VOCAB_SIZE, (5, 12), generator=generator)
    seen[:, :3] = 0
    seen[0, 5:7] = 9  # the same item seen twice counts once
    seen[1, -1] = targets[1]
    return users, items, targets, seen


@pytest.mark.parametrize("chunk_size", [1, 7, NUM_ITEMS, 8192])
def test_ranks_equal_brute_force(batch, chunk_size):
    ranks = rank_targets(*batch, chunk_size=chunk_size)
    assert torch.equal(ranks, brute_force_ranks(*batch))
    assert ranks[1, 0] == NUM_ITEMS


def test_rank_worked_by_hand():
    #        PAD  UNK MASK    items 3, 4, 5, 6, 7
    items = torch.tensor([[99.0], [99.0], [99.0], [5.0], [4.0], [3.0], [3.0], [1.0]])
    user = torch.ones(1, 1)
    seen = torch.tensor([[0, 0, 3, 7]])
    # Items 3, 4 are above target 5 and item 6 ties with it: rank 4, or 3 without the seen item 3.
    assert rank_targets(user, items, torch.tensor([5]), seen).tolist() == [[3, 4]]
    # The special tokens' scores of 99 are no competition.
    assert rank_targets(user, items, torch.tensor([4]), seen).tolist() == [[1, 2]]
    # Target 3 has been seen: nothing that excludes seen items can recommend it.
    assert rank_targets(user, items, torch.tensor([3]), seen).tolist() == [[5, 1]]


@pytest.mark.parametrize("num_users", [1, 3, 64])
@pytest.mark.parametrize("chunk_size", [100, 333, 8192])
def test_constant_scorer_is_always_last(num_users, chunk_size):
    """Equal item embeddings, whose scores a matrix product does not round alike in all columns."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(1, 50, generator=generator).expand(1003, 50)
    users = torch.randn(num_users, 50, generator=generator)
    targets = torch.randint(3, 1003, (num_users,), generator=generator)
    ranks = rank_targets(users, items, targets, torch.zeros(num_users, 1, dtype=torch.long), chunk_size=chunk_size)
    assert ranks.unique().tolist() == [1000]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_count_against_the_model(batch, bad):
    users, items, targets, seen = batch
    unseen = torch.zeros(5, 1, dtype=torch.long)
    assert rank_targets(users * bad, items, targets, unseen).unique().tolist() == [NUM_ITEMS]
    items = items.clone()
    items[targets] = math.nan
    assert rank_targets(users, items, targets, unseen).unique().tolist() == [NUM_ITEMS]


def test_one_nan_competitor_counts_against_the_model(batch):
    users, items, targets, seen = batch
    items[3:] = 0.0
    items[targets] = users
    items[(set(range(3, VOCAB_SIZE)) - set(targets.tolist())).pop()] = math.nan
    alone = rank_targets(users[:1], items, targets[:1], torch.zeros(1, 1, dtype=torch.long))
    assert alone[0, 0] >= 2


def test_ranks_do_not_depend_on_the_batch_or_the_chunk():
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(17, 64, generator=generator), torch.randn(503, 64, generator=generator)
    targets = torch.randint(3, 503, (17,), generator=generator)
    seen = torch.randint(3, 503, (17, 20), generator=generator)
    ranks = rank_targets(users, items, targets, seen)
    assert torch.equal(ranks, brute_force_ranks(users.double(), items.double(), targets, seen))
    for chunk_size in (1, 10, 64):
        alone = [
            rank_targets(users[i : i + 1], items, targets[i : i + 1], seen[i : i + 1], chunk_size=chunk_size)
            for i in range(17)
        ]
        assert torch.equal(ranks, torch.cat(alone))


def test_low_precision_embeddings_are_compared_exactly():
    # In bfloat16 arithmetic 257 rounds to 256 and the two items would tie.
    items = torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16)
    user = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    assert rank_targets(user, items, torch.tensor([3]), torch.zeros(1, 1, dtype=torch.long)).tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_embeddings": torch.zeros(5, 3)}, "hidden_size"),
        ({"target_ids": torch.full((4,), 3)}, "target_ids"),
        ({"target_ids": torch.full((5,), 2)}, r"target_ids must be items, in \[3, 34\)"),
        ({"target_ids": torch.full((5,), VOCAB_SIZE)}, "found values from 34"),
        ({"seen_ids": torch.zeros(5, dtype=torch.long)}, "seen_ids"),
    ],
)
def test_bad_input_is_named(batch, change, message):
    arguments = dict(zip(("user_embeddings", "item_embeddings", "target_ids", "seen_ids"), batch, strict=True))
    with pytest.raises(ValueError, match=message):
        rank_targets(**{**arguments, **change})


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
