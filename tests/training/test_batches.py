import pytest
import torch

from elastic_hf.data.collator import SequentialRecommendationCollator
from elastic_hf.training.batches import LengthGroupedEpochSampler, SeededCollator


ROWS = [{"input_ids": list(range(3, 3 + length))} for length in (9, 20, 14, 30)]


def collate(rows=ROWS, seed=1, epoch=0):
    collator = SequentialRecommendationCollator(0, 2, 40, objective="masked_item", mask_probability=0.5)
    return SeededCollator(collator, seed, torch.tensor(epoch))(rows)["labels"]


def test_draws_depend_on_seed_epoch_and_rows_alone():
    labels = collate()
    state = torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(labels, collate())
    torch.set_rng_state(state)
    assert not torch.equal(labels, collate(seed=2))
    assert not torch.equal(labels, collate(epoch=1))
    # The same rows in another order are another batch.
    assert not torch.equal(labels, collate(ROWS[::-1])[[3, 2, 1, 0]])


def test_the_global_generator_stays_where_it_is():
    state = torch.get_rng_state()
    collate()
    assert torch.equal(state, torch.get_rng_state())


def test_the_epoch_can_change():
    epoch = torch.tensor(0)
    collator = SeededCollator(SequentialRecommendationCollator(0, 2, 40, objective="prefix"), 1, epoch)
    batches = []
    for value in (0, 1, 0):
        epoch.fill_(value)
        batches.append(collator(ROWS)["labels"][:, -1].tolist())
    assert batches[0] == batches[2] != batches[1]


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = {}
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0)):
        sampler = LengthGroupedEpochSampler(4, list(range(40)), seed)
        sampler.set_epoch(epoch)
        torch.rand(1)
        order = list(sampler)
        assert sorted(order) == list(range(40))
        assert orders.setdefault((seed, epoch), order) == order
    assert len({tuple(order) for order in orders.values()}) > 1


def test_batches_of_similar_lengths_come_in_no_order_of_lengths():
    lengths = torch.randperm(1001, generator=torch.Generator().manual_seed(5)).tolist()
    order = list(LengthGroupedEpochSampler(10, lengths, seed=1))
    assert sorted(order) == list(range(1001))
    *batches, last = [[lengths[row] for row in order[start : start + 10]] for start in range(0, 1001, 10)]
    assert len(last) == 1  # the others are full
    assert max(batches[0]) == 1000
    firsts = [max(batch) for batch in batches[1:]]
    falling = sum(later < earlier for earlier, later in zip(firsts, firsts[1:], strict=False))
    assert 30 < falling < 70  # 95 of 99 in the stock order
    spreads = sorted(max(batch) - min(batch) for batch in batches[1:])
    assert spreads[len(spreads) // 2] < 100  # 843 in a random one, 34 here


@pytest.mark.parametrize("num_rows", [1, 4, 5, 8, 9])
def test_few_rows_are_all_seen_once(num_rows):
    order = list(LengthGroupedEpochSampler(4, [7] * num_rows, seed=1))
    assert sorted(order) == list(range(num_rows))
