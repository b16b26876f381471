"""Losses of next-item prediction, as pure functions that return the sum over targets, in nats.

Axis letters: T targets, D hidden size, V items, N negatives. Divide the sum by the number of targets in the whole
(accumulated, distributed) batch to train on its mean.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


# Scores held at once by a softmax: 4 MiB of float32 stay in a processor's cache, 64 MiB keep a GPU busy.
MAX_SCORES = {"cpu": 2**20, "cuda": 2**24}


def full_softmax_loss(
    user_embeddings: Tensor, item_embeddings: Tensor, targets: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Cross-entropy over the whole catalogue, never holding more than [`MAX_SCORES`] scores (or one target's V).

    The gradient of a chunk of targets is taken while its scores are there, so that nothing is kept or computed again
    for the backward pass.

    Args:
        user_embeddings (`torch.Tensor` of shape `(T, D)`).
        item_embeddings (`torch.Tensor` of shape `(V, D)`).
        targets (`torch.LongTensor` of shape `(T,)`): rows of `item_embeddings`.
        seen (`torch.LongTensor` of shape `(T, S)`, *optional*): rows of `item_embeddings` that are left out of the
            softmax of each target, except the target itself; V fills up what is shorter than S.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return _FullSoftmaxLoss.apply(*_autocast(user_embeddings, item_embeddings), targets, seen)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the precision that autocast wants for their products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _chunks(user_embeddings: Tensor, num_scores: int) -> Iterator[slice]:
    """Targets whose scores are held at once, each with so many."""
    limit = MAX_SCORES.get(user_embeddings.device.type, MAX_SCORES["cuda"])
    size = max(1, limit // num_scores)
    return (slice(start, start + size) for start in range(0, user_embeddings.shape[0], size))


class _FullSoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, user_embeddings: Tensor, item_embeddings: Tensor, targets: Tensor, seen: Tensor | None) -> Tensor:
        dtype = torch.promote_types(user_embeddings.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=user_embeddings.device)
        user_gradient = torch.empty_like(user_embeddings)
        item_gradient = torch.zeros_like(item_embeddings, dtype=dtype)
        for chunk in _chunks(user_embeddings, item_embeddings.shape[0]):
            users, wanted = user_embeddings[chunk], targets[chunk, None]
            scores = (users @ item_embeddings.T).to(dtype)
            scores -= scores.amax(dim=-1, keepdim=True)
            wanted_scores = scores.gather(-1, wanted)
            if seen is not None:
                left_out = torch.where(seen[chunk] == item_embeddings.shape[0], wanted, seen[chunk])
                scores.scatter_(-1, left_out, -math.inf).scatter_(-1, wanted, wanted_scores)
            probabilities = scores.exp_()
            normaliser = probabilities.sum(dim=-1, keepdim=True)
            total += (normaliser.log() - wanted_scores).sum()
            score_gradient = probabilities.div_(normaliser)
            score_gradient.scatter_add_(-1, wanted, torch.full_like(wanted_scores, -1.0))
            score_gradient = score_gradient.to(users.dtype)
            user_gradient[chunk] = score_gradient @ item_embeddings
            item_gradient += score_gradient.T @ users
        ctx.save_for_backward(user_gradient, item_gradient.to(item_embeddings.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        user_gradient, item_gradient = ctx.saved_tensors
        return output_gradient * user_gradient, output_gradient * item_gradient, None, None


def sampled_softmax_loss(
    user_embeddings: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_q: Tensor,
    sparse: bool = False,
) -> Tensor:
    """Cross-entropy over the target and one shared sample of negatives, corrected for how they were drawn.

    Subtracting from each negative's score the log of its expected count makes the sampled normaliser an unbiased
    estimate of the full one (Bengio and Senecal 2008). A negative that is the target of a row is left out there.
    Like [`full_softmax_loss`], it takes the gradient of a chunk of targets while its scores are there.

    Args:
        user_embeddings (`torch.Tensor` of shape `(T, D)`).
        item_embeddings (`torch.Tensor` of shape `(V, D)`).
        targets (`torch.LongTensor` of shape `(T,)`).
        negatives (`torch.LongTensor` of shape `(N,)`): rows of `item_embeddings`, drawn from all items.
        log_q (`torch.Tensor` of shape `(N,)`): log of the expected number of times each is drawn, `log(N q_i)`.
        sparse (`bool`, defaults to `False`): make the gradient of `item_embeddings` a sparse tensor, which is added in
            place to a dense one from elsewhere: one gradient of the size of the catalogue instead of two.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    # One look-up for all, so that one gradient of the size of the catalogue is made, not two.
    rows = F.embedding(torch.cat([targets, negatives]), item_embeddings, sparse=sparse)
    user_embeddings, rows = _autocast(user_embeddings, rows)
    target_embeddings, negative_embeddings = rows.split([len(targets), len(negatives)])
    return _SampledSoftmaxLoss.apply(
        user_embeddings, target_embeddings, negative_embeddings, targets, negatives, log_q
    )


class _SampledSoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        user_embeddings: Tensor,
        target_embeddings: Tensor,
        negative_embeddings: Tensor,
        targets: Tensor,
        negatives: Tensor,
        log_q: Tensor,
    ) -> Tensor:
        dtype = torch.promote_types(user_embeddings.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=user_embeddings.device)
        user_gradient = torch.empty_like(user_embeddings)
        target_gradient = torch.empty_like(target_embeddings)
        negative_gradient = torch.zeros_like(negative_embeddings, dtype=dtype)
        for chunk in _chunks(user_embeddings, len(negatives)):
            users, wanted = user_embeddings[chunk], target_embeddings[chunk]
            wanted_scores = (users * wanted).sum(dim=-1, keepdim=True).to(dtype)
            scores = (users @ negative_embeddings.T).to(dtype).sub_(log_q)
            scores.masked_fill_(negatives == targets[chunk, None], -math.inf)
            largest = torch.maximum(scores.amax(dim=-1, keepdim=True), wanted_scores)
            wanted_scores -= largest
            probabilities = scores.sub_(largest).exp_()
            normaliser = probabilities.sum(dim=-1, keepdim=True) + wanted_scores.exp()
            total += (normaliser.log() - wanted_scores).sum()
            score_gradient = probabilities.div_(normaliser).to(users.dtype)
            wanted_gradient = (wanted_scores.exp() / normaliser - 1).to(users.dtype)
            user_gradient[chunk] = torch.addcmul(score_gradient @ negative_embeddings, wanted_gradient, wanted)
            target_gradient[chunk] = wanted_gradient * users
            negative_gradient += score_gradient.T @ users
        ctx.save_for_backward(user_gradient, target_gradient, negative_gradient.to(negative_embeddings.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(output_gradient * gradient for gradient in ctx.saved_tensors), None, None, None


def bce_loss(user_embeddings: Tensor, item_embeddings: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Binary cross-entropy of the target against its own negatives (SASRec, Kang and McAuley 2018, section III.E).

    Args:
        user_embeddings (`torch.Tensor` of shape `(T, D)`).
        item_embeddings (`torch.Tensor` of shape `(V, D)`).
        targets (`torch.LongTensor` of shape `(T,)`).
        negatives (`torch.LongTensor` of shape `(T, N)`). One that is the row's target is left out.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return gbce_loss(user_embeddings, item_embeddings, targets, negatives, calibration=0.0)


def gbce_loss(
    user_embeddings: Tensor, item_embeddings: Tensor, targets: Tensor, negatives: Tensor, calibration: float
) -> Tensor:
    """Generalised binary cross-entropy (gSASRec, Petrov and Macdonald 2023, equations 7 and 9).

    The target's probability is raised to the power `beta = a (t (1 - 1/a) + 1/a)` where `a = N / (V - 1)` is the share
    of negatives sampled and t the calibration: t = 0 is BCE, t = 1 undoes its overconfidence.

    Args: as [`bce_loss`], and
        calibration (`float`): t, from 0 to 1.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    sampling_rate = negatives.shape[-1] / (item_embeddings.shape[0] - 1)
    beta = sampling_rate * (calibration * (1 - 1 / sampling_rate) + 1 / sampling_rate)
    positive = (user_embeddings * item_embeddings[targets]).sum(dim=-1).float()  # (T,)
    negative = torch.einsum("td,tnd->tn", user_embeddings, item_embeddings[negatives]).float()
    penalty = F.softplus(negative).masked_fill(negatives == targets[:, None], 0.0)
    return (beta * F.softplus(-positive)).sum() + penalty.sum()
