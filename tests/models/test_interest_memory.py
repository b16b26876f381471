import pytest
import torch

import reference
from elastic_hf.models import interest_memory
from elastic_hf.models.interest_memory import ElasticInterestMemory, count_subkeys, retrieve_slots
from factories import elastic_config, elastic_model, histories


def make_memory():
    torch.manual_seed(0)
    memory = ElasticInterestMemory(elastic_config())
    memory.init_weights(std=0.3)
    return memory.eval()


@pytest.mark.parametrize("max_scores", [2**21, 100, 1], ids=["at once", "by 5", "by 1"])
@pytest.mark.parametrize("top_k", [1, 4, 7, 25])
def test_product_keys_find_the_best_of_all_slots(top_k, max_scores, monkeypatch):
    """S = 5 sub-keys, so that 7 and 25 retrieve more slots than one half has sub-keys."""
    monkeypatch.setitem(interest_memory.MAX_SUBKEY_SCORES, "cpu", max_scores)
    torch.manual_seed(0)
    query = torch.randn(3, 7, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    sub_keys = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2, 5, dtype=torch.float64)
    scores, slots = retrieve_slots(query, sub_keys, bias, top_k)
    expected, expected_slots = reference.retrieve_slots(query, sub_keys, bias, top_k)
    torch.testing.assert_close(scores, expected)
    assert (slots == expected_slots).all()
    with torch.no_grad():
        torch.testing.assert_close(retrieve_slots(query, sub_keys, bias, top_k), (scores, slots))
    for gradient, wanted in zip(
        torch.autograd.grad((scores**2).sum(), (query, sub_keys)),
        torch.autograd.grad((expected**2).sum(), (query, sub_keys)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted)


def test_many_float32_queries_find_the_best_of_all_slots():
    """Enough of them for the search that is made for processors."""
    torch.manual_seed(0)
    query, sub_keys, bias = torch.randn(300, 2, 2, 6), torch.randn(2, 2, 24, 6), torch.randn(2, 2, 24)
    scores, slots = retrieve_slots(query, sub_keys, bias, 4)
    expected, expected_slots = reference.retrieve_slots(query.double(), sub_keys.double(), bias.double(), 4)
    torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=1e-4)
    assert (slots == expected_slots).all()


def test_memory_adds_up_the_weighted_values_of_its_heads():
    memory = make_memory().double()
    hidden_states = torch.randn(3, 7, 24, dtype=torch.float64)
    weights, slots = memory.retrieve(hidden_states, 4)
    assert weights.shape == slots.shape == (3, 7, 2, 4)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 7, 2, dtype=torch.float64))
    expected = torch.zeros_like(hidden_states)
    for b in range(3):
        for t in range(7):
            for g in range(2):
                for r in range(4):
                    expected[b, t] += weights[b, t, g, r] * memory.values.weight[slots[b, t, g, r]]
    torch.testing.assert_close(memory(hidden_states), expected)


def test_subkeys_are_counted_one_by_one():
    slots = torch.randint(25, (3, 7, 2, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :2] = False
    expected = torch.zeros(2, 2, 5)
    for b in range(3):
        for t in range(7):
            for g in range(2):
                for slot in slots[b, t, g].tolist() if mask[b, t] else []:
                    expected[g, 0, slot // 5] += 1
                    expected[g, 1, slot % 5] += 1
    assert torch.equal(count_subkeys(slots, 5, mask), expected)


def test_training_steps_balance_the_subkeys():
    """Queries that all ask for the same slots come to use all sub-keys."""
    memory = make_memory().train()
    with torch.no_grad():
        memory.query.weight.zero_()
        memory.query.bias.normal_()
    optimizer = torch.optim.Adam([memory.bias], lr=1e-2)
    used = set()
    for _ in range(400):
        weights, slots = memory.retrieve(torch.zeros(1, 24), 2)
        used |= {*(slots // 5).flatten().tolist()}
        optimizer.zero_grad()
        weights.sum().backward()
        optimizer.step()
    assert used == set(range(5))


def test_the_balancing_gradient_is_the_excess_share_of_each_subkey():
    model = elastic_model(hidden_dropout=0.0).train()
    memory = model.model.layers[-1].retrieval.memory
    input_ids, attention_mask = histories()
    hidden_states = []
    memory.register_forward_pre_hook(lambda module, inputs: hidden_states.append(inputs[0]))
    model(input_ids, attention_mask, labels=input_ids).loss.backward()
    _, slots = memory.eval().retrieve(hidden_states[0], 4)
    counts = count_subkeys(slots, 5, attention_mask == 1)
    assert counts.sum() == 19 * 2 * 2 * 4
    torch.testing.assert_close(memory.bias.grad, 1e-8 * (counts - 19 * 4 / 5), rtol=1e-5, atol=1e-12)
