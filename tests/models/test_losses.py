import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from adapters import LowRankAdapter
from elastic_hf.models import catalogue, losses
from elastic_hf.models.losses import (
    SeenItems,
    bce_loss,
    distinct_items,
    full_softmax_loss,
    gbce_loss,
    sampled_softmax_loss,
)


T, D, V, NUM_SPECIAL = 13, 5, 11, 3
NEGATIVES = torch.tensor([3, 5, 7, 3, 10, 8, 6])
LOG_Q = torch.linspace(-2, 1, 7, dtype=torch.float64)


@pytest.fixture
def inputs():
    """User embeddings, item embeddings, and targets that are items."""
    torch.manual_seed(0)
    users = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    items = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    return users, items, torch.randint(NUM_SPECIAL, V, (T,))


@pytest.fixture
def seen():
    """Four histories, targets in three of them; some positions are padding, and one target has read nothing."""
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, V, (4, 9), generator=generator)
    token_ids[2, :5] = 0
    rows = torch.tensor([0, 0, 0, 0, 0, 2, 2, 3, 3, 3, 3, 3, 3])
    positions = torch.tensor([0, 2, 3, 7, 8, 4, 8, 1, 2, 3, 4, 5, 8])
    return SeenItems(token_ids, rows, positions)


def make_head(items):
    head = nn.Linear(D, V, bias=False, dtype=items.dtype)
    head.weight = nn.Parameter(items.detach().clone())
    return head


def set_chunks(monkeypatch, rows):
    monkeypatch.setattr(catalogue, "MAX_SCORES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(losses, "MIN_TARGETS", rows)


def softmax_loop(scores, targets, candidates, seen=None, log_q=None):
    """The loss over each target and its candidates, one target at a time. `log_q` is taken off all but the target."""
    total = 0
    for t, target in enumerate(targets.tolist()):
        left = range(len(candidates))
        if seen is not None:
            unseen = reference.items_in_loss(seen.token_ids, seen.rows[t], seen.positions[t], target, candidates)
            left = [i for i in left if candidates[i] in unseen]
        left = [i for i in left if candidates[i] != target]
        others = [scores[t, candidates[i]] - (0 if log_q is None else log_q[i]) for i in left]
        total = total + reference.softmax_loss([torch.stack([scores[t, target], *others])], [0])
    return total


def assert_same_gradients(result, expected, parameters):
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(3 * result, parameters)
    for gradient, wanted in zip(gradients, torch.autograd.grad(3 * expected, parameters), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("has_seen", [False, True])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_full_softmax_equals_the_loop_with_gradients(inputs, seen, has_seen, is_adapted, rows, monkeypatch):
    set_chunks(monkeypatch, rows)
    users, items, targets = inputs
    head = LowRankAdapter(make_head(items)) if is_adapted else make_head(items)
    seen = seen if has_seen else None
    expected = softmax_loop(head(users), targets, list(range(NUM_SPECIAL, V)), seen)
    result = full_softmax_loss(users, head, targets, NUM_SPECIAL, V, seen)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    assert len(trained) == 1 + is_adapted
    assert_same_gradients(result, expected, (users, *trained))
    if has_seen:
        assert result < full_softmax_loss(users, head, targets, NUM_SPECIAL, V)


def test_seen_targets_and_padding_are_among_the_cases(inputs, seen):
    _, _, targets = inputs
    read = [
        seen.token_ids[row, : position + 1].tolist() for row, position in zip(seen.rows, seen.positions, strict=True)
    ]
    is_seen = [target in ids for target, ids in zip(targets.tolist(), read, strict=True)]
    assert any(is_seen) and not all(is_seen)
    assert max(read[5]) == 0 or max(read[5][:-1]) == 0


def test_seen_items_equal_a_loop(seen):
    expected = [
        [token in seen.token_ids[row, : position + 1].tolist() for token in range(V)]
        for row, position in zip(seen.rows, seen.positions, strict=True)
    ]
    assert seen.contain(torch.arange(V).expand(T, V)).tolist() == expected


def test_distinct_items_equal_a_loop(seen):
    token_ids = torch.cat([seen.token_ids, torch.full((1, 9), 4)])
    lists = [list(dict.fromkeys(row)) for row in token_ids.tolist()]
    assert len({len(items) for items in lists}) > 1
    found_ids, found_indices = distinct_items(token_ids)
    assert found_ids.shape == found_indices.shape == (5, max(map(len, lists)))
    for row, items, ids, indices in zip(
        token_ids.tolist(), lists, found_ids.tolist(), found_indices.tolist(), strict=True
    ):
        assert ids[: len(items)] == items
        assert indices[: len(items)] == [row.index(item) for item in items]
        assert set(indices[len(items) :]) <= {9}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("loss_function", ["full_softmax", "sampled_softmax"])
def test_a_softmax_never_holds_the_scores_of_all_targets(inputs, seen, loss_function, rows, monkeypatch):
    """No tensor of scores that is computed on the way to the loss and its gradients has more rows than a chunk."""
    users, items, targets = inputs
    head = make_head(items)
    num_scores = V if loss_function == "full_softmax" else NEGATIVES.shape[0]
    set_chunks(monkeypatch, rows)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[-1] == num_scores:
                    largest = max(largest, tensor.shape[0])
            return output

    with Watch():
        if loss_function == "full_softmax":
            full_softmax_loss(users, head, targets, NUM_SPECIAL, V, seen).backward()
        else:
            sampled_softmax_loss(users, head.weight, targets, NEGATIVES, LOG_Q, seen=seen).backward()
    assert 0 < largest <= max(rows, D)  # the transposed embeddings of items or negatives have D rows


def test_memory_of_what_was_seen_is_linear_in_the_length():
    """Eight times the targets and the length: no tensor grows more than eight times."""

    def largest_tensor(length):
        token_ids = torch.randint(NUM_SPECIAL, V, (1, length))
        seen = SeenItems(token_ids, torch.zeros(length, dtype=torch.long), torch.arange(length))
        users = torch.randn(length, D, dtype=torch.float64, requires_grad=True)
        head = make_head(torch.randn(V, D, dtype=torch.float64))
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                output = function(*args, **(kwargs or {}))
                for tensor in output if isinstance(output, tuple | list) else (output,):
                    if isinstance(tensor, torch.Tensor):
                        largest = max(largest, tensor.numel())
                return output

        with Watch():
            full_softmax_loss(users, head, token_ids[0], NUM_SPECIAL, V, seen).backward()
            sampled_softmax_loss(users, head.weight, token_ids[0], NEGATIVES, LOG_Q, seen=seen).backward()
            seen.contain(NEGATIVES.expand(length, -1))
        return largest

    assert largest_tensor(1600) <= 8 * largest_tensor(200)


def test_without_gradients_the_loss_is_the_same(inputs, seen):
    users, items, targets = inputs
    head = make_head(items)
    expected = full_softmax_loss(users, head, targets, NUM_SPECIAL, V, seen)
    with torch.no_grad():
        result = full_softmax_loss(users, head, targets, NUM_SPECIAL, V, seen)
    assert not result.requires_grad and torch.equal(result, expected)


def test_full_softmax_under_autocast(inputs, seen):
    """Parameters in float32 get the gradients of all chunks, although the products are taken in bfloat16."""
    users, items, targets = inputs
    users, head = users.detach().float().requires_grad_(), make_head(items).float()
    expected = full_softmax_loss(users, head, targets, NUM_SPECIAL, V, seen)
    wanted = torch.autograd.grad(expected, (users, head.weight))
    with pytest.MonkeyPatch.context() as patch:
        set_chunks(patch, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                head(users)  # of the weight, autocast keeps a cast without a graph
            result = full_softmax_loss(users, head, targets, NUM_SPECIAL, V, seen)
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0)
    for gradient, of_float32 in zip(torch.autograd.grad(result, (users, head.weight)), wanted, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, of_float32, rtol=0.05, atol=0.05)


def test_special_tokens_of_any_score_take_no_part(inputs):
    """exp(800) is no number, and beside it the items' probabilities would be 0."""
    users, items, targets = inputs
    items = items.detach().clone()
    items[0] = 1000 * users[0].detach()
    head = make_head(items)
    expected = softmax_loop(head(users), targets, list(range(NUM_SPECIAL, V)))
    assert_same_gradients(full_softmax_loss(users, head, targets, NUM_SPECIAL, V), expected, (users, head.weight))


def test_a_weight_that_is_no_parameter_is_trained(inputs, seen):
    """FSDP puts views of a flat parameter in the place of parameters."""
    users, items, targets = inputs
    head, flat = make_head(items), items.detach().flatten().requires_grad_()
    wanted = torch.autograd.grad(full_softmax_loss(users, head, targets, NUM_SPECIAL, V, seen), head.weight)
    del head.weight
    head.weight = flat.view(V, D)
    gradient = torch.autograd.grad(full_softmax_loss(users, head, targets, NUM_SPECIAL, V, seen), flat)
    torch.testing.assert_close(gradient[0].view(V, D), wanted[0])


def test_heads_that_cannot_be_trained_are_named(inputs):
    users, items, targets = inputs

    class Detached(nn.Linear):
        def forward(self, states):
            return super().forward(states).detach()

    with pytest.raises(ValueError, match="lm_head must pass gradients on .* found .*Detached, which does not"):
        full_softmax_loss(users, Detached(D, V, False, dtype=torch.float64), targets, NUM_SPECIAL, V)
    with pytest.raises(ValueError, match="lm_head must hold its trainable weights .* found a Parameter .* on meta"):
        full_softmax_loss(users, nn.Linear(D, V, False, "meta"), targets, NUM_SPECIAL, V)
    released = nn.Linear(D, V, False)  # as ZeRO-3 leaves a weight between two calls
    released.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"lm_head must hold its trainable weights .* of shape \(0,\) on cpu"):
        full_softmax_loss(users, released, targets, NUM_SPECIAL, V)


@pytest.mark.parametrize("has_seen", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_sampled_softmax_equals_the_loop_with_gradients(inputs, seen, has_seen, rows, monkeypatch):
    set_chunks(monkeypatch, rows)
    users, items, targets = inputs
    assert (targets[:, None] == NEGATIVES).any(dim=-1).sum() not in (0, T)
    seen = seen if has_seen else None
    expected = softmax_loop(users @ items.T, targets, NEGATIVES.tolist(), seen, LOG_Q)
    result = sampled_softmax_loss(users, items, targets, NEGATIVES, LOG_Q, seen=seen)
    assert_same_gradients(result, expected, (users, items))
    if has_seen:
        assert result < sampled_softmax_loss(users, items, targets, NEGATIVES, LOG_Q)


def test_sampled_softmax_holds_scores_of_any_size():
    """exp(100) is no float32: the largest score of a row is taken off first, be it the target's or a negative's."""
    users = torch.tensor([[100.0], [-100.0]])
    items = torch.tensor([[1.0], [0.0]])
    result = sampled_softmax_loss(users, items, torch.tensor([0, 0]), torch.tensor([1]), torch.zeros(1))
    assert result.item() == pytest.approx(100)


def test_sampled_softmax_with_every_item_once_is_the_full_softmax(inputs):
    users, items, targets = inputs
    num_items = V - NUM_SPECIAL
    result = sampled_softmax_loss(users, items, targets, torch.arange(NUM_SPECIAL, V), torch.zeros(num_items))
    torch.testing.assert_close(result, full_softmax_loss(users, make_head(items), targets, NUM_SPECIAL, V))


def test_log_q_correction_makes_the_normaliser_unbiased(inputs):
    """The mean of the sampled normaliser over all draws of a skewed proposal equals the full normaliser."""
    users, items, targets = (x[:1] if x.shape[0] == T else x for x in inputs)
    probabilities = torch.arange(1, V + 1, dtype=torch.float64) / (V * (V + 1) / 2)
    normaliser = 0
    for i in range(V):  # one negative per draw: the expectation is a sum over the V possible draws
        log_q = probabilities[i : i + 1].log()
        negative_log_likelihood = sampled_softmax_loss(users, items, targets, torch.tensor([i]), log_q)
        normaliser = normaliser + probabilities[i] * torch.exp(negative_log_likelihood)
    full = torch.exp(reference.softmax_loss(users @ items.T, targets))
    torch.testing.assert_close(normaliser, full.to(normaliser.dtype), rtol=1e-5, atol=1e-6)


def test_bce_by_hand():
    """One target of score log 3, negatives of score 0 and log 3, the target itself among them: -log 3/4 - log 1/2."""
    users = torch.tensor([[1.0]])
    items = torch.tensor([[math.log(3)], [0.0]])
    result = bce_loss(users, items, torch.tensor([0]), torch.tensor([[1, 0]]))
    assert result.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2))


def test_gbce_by_hand():
    """N = 2 of V - 1 = 4: a = 1/2, t = 1/2: beta = 1/2 (1/2 (1 - 2) + 2) = 3/4, the target's share of the loss."""
    users = torch.tensor([[1.0]])
    items = torch.tensor([[math.log(3)], [0.0], [0.0], [0.0], [0.0]])
    result = gbce_loss(users, items, torch.tensor([0]), torch.tensor([[1, 2]]), calibration=0.5)
    assert result.item() == pytest.approx(-3 / 4 * math.log(3 / 4) - 2 * math.log(1 / 2))


@pytest.mark.parametrize("has_seen", [False, True])
@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
def test_gbce_equals_a_loop(inputs, seen, has_seen, calibration):
    users, items, targets = inputs
    negatives = torch.randint(V, (T, 4), generator=torch.Generator().manual_seed(1))
    is_seen = seen.contain(negatives) if has_seen else None
    alpha = 4 / (V - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        expected = expected - beta * F.logsigmoid(users[t] @ items[targets[t]])
        for i, n in enumerate(negatives[t]):
            if n != targets[t] and not (has_seen and is_seen[t, i]):
                expected = expected - F.logsigmoid(-users[t] @ items[n])
    result = gbce_loss(users, items, targets, negatives, calibration, is_seen)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    if calibration == 0:
        torch.testing.assert_close(result, bce_loss(users, items, targets, negatives, is_seen))
