"""Losses of next-item prediction, as pure functions that return the sum over targets, in nats.

Axis letters: T targets, B batch, L history length, D hidden size, V vocabulary, N negatives. Divide the sum by the
number of targets in the whole (accumulated, distributed) batch to train on its mean.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .catalogue import first_read, row_chunks


# Targets scored at once at least: each such chunk adds a gradient of the size of the item embeddings.
MIN_TARGETS = 64


class SeenItems(NamedTuple):
    """
    What has been read where a target is predicted, in memory linear in the length of the histories.

    Args:
        token_ids (`torch.LongTensor` of shape `(B, L)`): the histories.
        rows (`torch.LongTensor` of shape `(T,)`): the history of each target, in ascending order.
        positions (`torch.LongTensor` of shape `(T,)`): the last position that has been read.
    """

    token_ids: Tensor
    rows: Tensor
    positions: Tensor

    def contain(self, items: Tensor) -> Tensor:
        """Tell which items have been read, each target having its own: (T, N) -> (T, N)."""
        return first_read(self.token_ids, self.rows[:, None], items) <= self.positions[:, None]


def distinct_items(token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """List what each row holds, once, in the order of the first time.

    Args:
        token_ids (`torch.LongTensor` of shape `(B, L)`).

    Returns:
        The token ids and the indices of their first time, both `torch.LongTensor` of shape `(B, U)`, where U is the
        largest number of distinct ids in a row. Shorter lists are filled up at the index L.
    """
    values, order = token_ids.sort(dim=1, stable=True)
    is_first = F.pad(values[:, 1:] != values[:, :-1], (1, 0), value=True)
    is_first = torch.zeros_like(is_first).scatter_(1, order, is_first)
    length = token_ids.shape[1]
    indices = torch.arange(length, device=token_ids.device).masked_fill(~is_first, length)
    indices = indices.sort(dim=1).values[:, : int(is_first.sum(dim=1).max())]
    return token_ids.gather(1, indices.clamp(max=length - 1)), indices


def rows_of(items: Tensor, token_ids: Tensor) -> Tensor:
    """Return the index of each token id in a list of items, and the length of the list where it is not among them.

    Args:
        items (`torch.LongTensor` of shape `(N,)`): token ids, distinct and ascending.
        token_ids (`torch.LongTensor`).

    Returns:
        `torch.LongTensor` of the shape of `token_ids`.
    """
    rows = torch.searchsorted(items, token_ids)
    is_there = F.pad(items, (0, 1), value=-1)[rows] == token_ids
    return rows.masked_fill(~is_there, len(items))


def full_softmax_loss(
    user_embeddings: Tensor,
    lm_head: nn.Module,
    targets: Tensor,
    num_special_tokens: int,
    vocab_size: int,
    seen: SeenItems | None = None,
) -> Tensor:
    """Cross-entropy over the whole catalogue, holding the scores of a few targets at once ([`row_chunks`]).

    The gradient of a chunk of targets is taken while its scores are there, so that nothing is kept or computed again
    for the backward pass.

    Args:
        user_embeddings (`torch.Tensor` of shape `(T, D)`).
        lm_head (`torch.nn.Module`): maps `(T, D)` to the `(T, V)` scores. Its trainable weights get gradients.
        targets (`torch.LongTensor` of shape `(T,)`): token ids of items.
        num_special_tokens (`int`): the first token ids, which are no items and left out of the softmax.
        vocab_size (`int`): V.
        seen ([`SeenItems`], *optional*): what is left out of the softmax of each target, except the target itself.

    Returns:
        `torch.Tensor` of shape `()`.

    Raises:
        ValueError: if no gradient passes the head, or a trainable weight of it is sharded or offloaded.
    """
    needs_gradient = torch.is_grad_enabled()
    weights = _trainable_weights(lm_head) if needs_gradient else []
    return _FullSoftmaxLoss.apply(
        lm_head, targets, num_special_tokens, vocab_size, seen, needs_gradient, user_embeddings, *weights
    )


def _trainable_weights(lm_head: nn.Module) -> list[Tensor]:
    """The trainable parameters, and the tensors that a wrapper (such as FSDP) has put in their place."""
    must = "lm_head must hold its trainable weights whole, on its device, to train with the full softmax"
    if hasattr(lm_head, "unshard"):
        raise ValueError(
            f"{must}, found a {type(lm_head).__name__}, which FSDP2 gathers for each call: shard it with the model"
        )
    weights = {}
    for module in lm_head.modules():
        for weight in (*module.parameters(recurse=False), *vars(module).values()):
            if not isinstance(weight, Tensor) or not weight.requires_grad:
                continue
            if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or weight.numel() == 0:
                shape = tuple(weight.shape)
                raise ValueError(f"{must}, found a {type(weight).__name__} of shape {shape} on {weight.device}")
            weights[id(weight)] = weight
    return list(weights.values())


class _FullSoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        lm_head: nn.Module,
        targets: Tensor,
        num_special_tokens: int,
        vocab_size: int,
        seen: SeenItems | None,
        needs_gradient: bool,
        user_embeddings: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        total = user_embeddings.new_zeros((), dtype=_float32(user_embeddings))
        gradients = [torch.zeros_like(user_embeddings)] if needs_gradient else []
        gradients += [torch.zeros_like(weight, dtype=_float32(weight)) for weight in weights]
        if seen is not None:
            seen_ids, first_reads = distinct_items(seen.token_ids)
        for chunk in row_chunks(len(targets), vocab_size, targets.device, MIN_TARGETS):
            wanted = targets[chunk, None]
            with torch.set_grad_enabled(needs_gradient):
                users = user_embeddings[chunk].detach().requires_grad_(needs_gradient)
                logits = lm_head(users)
            scores = logits.detach().to(total.dtype)
            wanted_scores = scores.gather(-1, wanted)
            scores[:, :num_special_tokens] = -math.inf
            if seen is not None:
                rows = seen.rows[chunk]
                is_seen = first_reads[rows] <= seen.positions[chunk, None]
                left_out = torch.where(is_seen, seen_ids[rows], wanted)  # (chunk, U), U no more than L or V
                scores.scatter_(-1, left_out, -math.inf).scatter_(-1, wanted, wanted_scores)
            largest = scores.amax(dim=-1, keepdim=True)
            wanted_scores -= largest
            probabilities = scores.sub_(largest).exp_()
            normaliser = probabilities.sum(dim=-1, keepdim=True)
            total += (normaliser.log() - wanted_scores).sum()
            if needs_gradient:
                score_gradient = probabilities.div_(normaliser)
                score_gradient.scatter_add_(-1, wanted, torch.full_like(wanted_scores, -1.0))
                of_users, of_weights = _head_gradients(lm_head, logits, (users, *weights), score_gradient)
                gradients[0][chunk] = of_users
                for gradient, of_weight in zip(gradients[1:], of_weights, strict=True):
                    if of_weight is not None:
                        gradient += of_weight
        ctx.save_for_backward(
            *(gradient.to(of.dtype) for gradient, of in zip(gradients, (user_embeddings, *weights), strict=False))
        )
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *[None] * 6, *(output_gradient * gradient for gradient in ctx.saved_tensors)


def _head_gradients(
    lm_head: nn.Module, logits: Tensor, inputs: tuple[Tensor, ...], score_gradient: Tensor
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The gradients of users and of weights, of which a head may leave some out."""
    of_users, of_weights = None, []
    if logits.requires_grad:
        gradients = torch.autograd.grad(logits, inputs, score_gradient.to(logits.dtype), allow_unused=True)
        of_users, *of_weights = gradients
    if of_users is None:
        raise ValueError(
            "lm_head must pass gradients on to train with the full softmax, "
            f"found {type(lm_head).__module__}.{type(lm_head).__name__}, which does not"
        )
    return of_users, of_weights


def _float32(tensor: Tensor) -> torch.dtype:
    """The type that sums over a tensor are taken in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the precision that autocast wants for their products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def sampled_softmax_loss(
    user_embeddings: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_q: Tensor,
    sparse: bool = False,
    seen: SeenItems | None = None,
) -> Tensor:
    """Cross-entropy over the target and one shared sample of negatives, corrected for how they were drawn.

    Subtracting from each negative's score the log of its expected count makes the sampled normaliser an unbiased
    estimate of the full one (Bengio and Senecal 2008). A negative that is a row's target, or seen there, is left out.
    Like [`full_softmax_loss`], it takes the gradient of a chunk of targets while its scores are there.

    Args:
        user_embeddings (`torch.Tensor` of shape `(T, D)`).
        item_embeddings (`torch.Tensor` of shape `(V, D)`).
        targets (`torch.LongTensor` of shape `(T,)`): token ids.
        negatives (`torch.LongTensor` of shape `(N,)`): token ids, drawn from all items.
        log_q (`torch.Tensor` of shape `(N,)`): log of the expected number of times each is drawn, `log(N q_i)`.
        sparse (`bool`, defaults to `False`): make the gradient of `item_embeddings` a sparse tensor, which is added in
            place to a dense one from elsewhere: one gradient of the size of the catalogue instead of two.
        seen ([`SeenItems`], *optional*): what is left out for each target.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    # One look-up for all, so that one gradient of the size of the catalogue is made, not two.
    rows = F.embedding(torch.cat([targets, negatives]), item_embeddings, sparse=sparse)
    user_embeddings, rows = _autocast(user_embeddings, rows)
    target_embeddings, negative_embeddings = rows.split([len(targets), len(negatives)])
    return _SampledSoftmaxLoss.apply(
        user_embeddings, target_embeddings, negative_embeddings, targets, negatives, log_q, seen
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
        seen: SeenItems | None,
    ) -> Tensor:
        dtype = _float32(user_embeddings)
        total = torch.zeros((), dtype=dtype, device=user_embeddings.device)
        user_gradient = torch.empty_like(user_embeddings)
        target_gradient = torch.empty_like(target_embeddings)
        negative_gradient = torch.zeros_like(negative_embeddings, dtype=dtype)
        if seen is not None:
            rows = torch.arange(len(seen.token_ids), device=negatives.device)
            first_reads = first_read(seen.token_ids, rows[:, None], negatives)  # (B, N)
        for chunk in row_chunks(len(targets), len(negatives), targets.device, MIN_TARGETS):
            users, wanted = user_embeddings[chunk], target_embeddings[chunk]
            wanted_scores = (users * wanted).sum(dim=-1, keepdim=True).to(dtype)
            scores = (users @ negative_embeddings.T).to(dtype).sub_(log_q)
            scores.masked_fill_(negatives == targets[chunk, None], -math.inf)
            if seen is not None:
                scores.masked_fill_(first_reads[seen.rows[chunk]] <= seen.positions[chunk, None], -math.inf)
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
        return *(output_gradient * gradient for gradient in ctx.saved_tensors), *[None] * 4


def bce_loss(
    user_embeddings: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    negatives: Tensor,
    is_seen: Tensor | None = None,
    num_items: int | None = None,
) -> Tensor:
    """Binary cross-entropy of the target against its own negatives (SASRec, Kang and McAuley 2018, section III.E).

    Args:
        user_embeddings (`torch.Tensor` of shape `(T, D)`).
        item_embeddings (`torch.Tensor` of shape `(V, D)`): of items alone, without special tokens.
        targets (`torch.LongTensor` of shape `(T,)`): rows of `item_embeddings`.
        negatives (`torch.LongTensor` of shape `(T, N)`): rows of `item_embeddings`. One that is the row's target is
            left out.
        is_seen (`torch.BoolTensor` of shape `(T, N)`, *optional*): which other negatives are left out.
        num_items (`int`, *optional*): V, where `item_embeddings` are those of some items alone.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return gbce_loss(user_embeddings, item_embeddings, targets, negatives, 0.0, is_seen, num_items)


def gbce_loss(
    user_embeddings: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    negatives: Tensor,
    calibration: float,
    is_seen: Tensor | None = None,
    num_items: int | None = None,
) -> Tensor:
    """Generalised binary cross-entropy (gSASRec, Petrov and Macdonald 2023, equations 7 and 9).

    The target's probability is raised to the power `beta = a (t (1 - 1/a) + 1/a)` where `a = N / (V - 1)` is the share
    of negatives sampled and t the calibration: t = 0 is BCE, t = 1 undoes its overconfidence.

    Args: as [`bce_loss`], and
        calibration (`float`): t, from 0 to 1.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    sampling_rate = negatives.shape[-1] / ((num_items or item_embeddings.shape[0]) - 1)
    beta = sampling_rate * (calibration * (1 - 1 / sampling_rate) + 1 / sampling_rate)
    positive = (user_embeddings * item_embeddings[targets]).sum(dim=-1).float()  # (T,)
    negative = torch.einsum("td,tnd->tn", user_embeddings, item_embeddings[negatives]).float()
    is_left_out = negatives == targets[:, None]
    if is_seen is not None:
        is_left_out |= is_seen
    penalty = F.softplus(negative).masked_fill(is_left_out, 0.0)
    return (beta * F.softplus(-positive)).sum() + penalty.sum()
