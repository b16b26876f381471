import math

import pytest
import torch
import torch.nn.functional as F

import reference
from elastic_hf.models import losses
from elastic_hf.models.losses import bce_loss, full_softmax_loss, gbce_loss, sampled_softmax_loss


T, D, V = 13, 5, 11
NEGATIVES = torch.tensor([3, 0, 7, 3, 10, 2, 6])
LOG_Q = torch.linspace(-2, 1, 7, dtype=torch.float64)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    users = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    items = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    return users, items, torch.randint(V, (T,))


@pytest.mark.parametrize("max_scores", [1, V * 3, V * 100], ids=["one row", "three rows", "one chunk"])
def test_full_softmax_equals_the_naive_loss_with_gradients(inputs, max_scores, monkeypatch):
    users, items, targets = inputs
    monkeypatch.setitem(losses.MAX_SCORES, "cpu", max_scores)
    expected = reference.softmax_loss(users @ items.T, targets)
    result = full_softmax_loss(users, items, targets)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(3 * result, (users, items))
    for gradient, wanted in zip(gradients, torch.autograd.grad(3 * expected, (users, items)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_scores", [1, V * 3, V * 100], ids=["one row", "three rows", "one chunk"])
def test_full_softmax_leaves_out_what_was_seen_but_not_the_target(inputs, max_scores, monkeypatch):
    users, items, targets = inputs
    monkeypatch.setitem(losses.MAX_SCORES, "cpu", max_scores)
    seen = torch.randint(V + 1, (T, 4))  # V is no item
    assert (seen == targets[:, None]).any() and (seen == V).any()
    scores = users @ items.T
    for row in range(T):
        for item in {*seen[row].tolist()} - {V, int(targets[row])}:
            scores = scores.index_put((torch.tensor(row), torch.tensor(item)), torch.tensor(-math.inf).double())
    expected = reference.softmax_loss(scores, targets)
    result = full_softmax_loss(users, items, targets, seen)
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(result, (users, items))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (users, items)), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("loss_function", ["full_softmax", "sampled_softmax"])
def test_a_softmax_never_holds_the_scores_of_all_targets(inputs, loss_function, rows, monkeypatch):
    """No tensor of scores that is computed on the way to the loss and its gradients has more rows than a chunk."""
    users, items, targets = inputs
    num_scores = V if loss_function == "full_softmax" else NEGATIVES.shape[0]
    monkeypatch.setitem(losses.MAX_SCORES, "cpu", num_scores * rows)
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
            full_softmax_loss(users, items, targets).backward()
        else:
            sampled_softmax_loss(users, items, targets, NEGATIVES, LOG_Q).backward()
    assert 0 < largest <= max(rows, D)  # the transposed embeddings of items or negatives have D rows


@pytest.mark.parametrize("max_scores", [1, 7 * 3, 7 * 100], ids=["one row", "three rows", "one chunk"])
def test_sampled_softmax_equals_the_naive_loss_with_gradients(inputs, max_scores, monkeypatch):
    users, items, targets = inputs
    assert (targets[:, None] == NEGATIVES).any(dim=-1).sum() not in (0, T)
    monkeypatch.setitem(losses.MAX_SCORES, "cpu", max_scores)
    rows = []
    for t in range(T):
        scores = [users[t] @ items[targets[t]]]
        for negative, log_q in zip(NEGATIVES, LOG_Q, strict=True):
            if negative != targets[t]:
                scores.append(users[t] @ items[negative] - log_q)
        rows.append(torch.stack(scores))
    expected = reference.softmax_loss(rows, [0] * T)
    result = sampled_softmax_loss(users, items, targets, NEGATIVES, LOG_Q)
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(3 * result, (users, items))
    for gradient, wanted in zip(gradients, torch.autograd.grad(3 * expected, (users, items)), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_sampled_softmax_holds_scores_of_any_size():
    """exp(100) is no float32: the largest score of a row is taken off first, be it the target's or a negative's."""
    users = torch.tensor([[100.0], [-100.0]])
    items = torch.tensor([[1.0], [0.0]])
    result = sampled_softmax_loss(users, items, torch.tensor([0, 0]), torch.tensor([1]), torch.zeros(1))
    assert result.item() == pytest.approx(100)


def test_sampled_softmax_with_every_item_once_is_the_full_softmax(inputs):
    users, items, targets = inputs
    result = sampled_softmax_loss(users, items, targets, torch.arange(V), torch.zeros(V))
    torch.testing.assert_close(result.double(), reference.softmax_loss(users @ items.T, targets), rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
def test_gbce_equals_a_loop(inputs, calibration):
    users, items, targets = inputs
    negatives = torch.randint(V, (T, 4), generator=torch.Generator().manual_seed(1))
    alpha = 4 / (V - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        expected = expected - beta * F.logsigmoid(users[t] @ items[targets[t]])
        for n in negatives[t]:
            if n != targets[t]:
                expected = expected - F.logsigmoid(-users[t] @ items[n])
    result = gbce_loss(users, items, targets, negatives, calibration)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    if calibration == 0:
        torch.testing.assert_close(result, bce_loss(users, items, targets, negatives))
