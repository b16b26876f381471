"""Linear dispatcher attention (LDA) as pure functions of tensors.

The paper (arXiv 2408.09380) lets a few interest experts read the history ("aggregate") and the items read the experts
("dispatch"). In the causal form the experts have read items up to t only, each with its own forgetting; they read a
shallow stream x of the items, and a query reads what they hold:

    s[j,m]   = cap tanh(P_m . x_j / cap)                                           score of item j by expert m
    a[t,m,j] = exp(s[j,m]) * exp(sum of log_forget[l,m] for l in j+1..t)           j <= t
    c[t,m]   = sum_j a[t,m,j] x_j / sum_j a[t,m,j]                                 compressed interest of expert m at t
    y_t      = sum_m softmax_m(q_t . W_k c[t,m] / sqrt(K)) W_v c[t,m]

Keys and values are linear in c. At one position, `pool_history` compresses x and `dispatch` reads the projections of
c (serving); at all positions, `prepare_chunks` and `read_chunks` compress the projections W_k x_j and W_v x_j instead
(training). Both compute the same y, at a cost linear in the length.

Axis letters: B batch, L history length, D hidden size, H heads, K head size, E interest experts per head, M experts of
all heads, J chunks, C chunk size. The leading axes `...` are usually (B, H).

Range: with |scores| <= 10 and a half-life of at least one item, every exponent in a chunk of 64 items stays within
+-33, so that even squares fit float32; and in a chunk of 32 items within +-44, where a pause counts two half-lives at
most. Give float32 or float64 tensors, also under autocast.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .limits import MAX_CHUNKS, limit


# Bound on an expert's score of an item: contrast enough, and within the range above.
SCORE_CAP = 10.0
# A smaller weight counts for nothing beside that of the latest item, which is at least exp(-10); and a processor's exp
# takes several times as long where its results are denormal.
MIN_EXPONENT = -80.0
CHUNK_SIZE = 64
CHUNK_SIZE_WITH_PAUSES = 32
# A pause in a history takes no more of what an expert holds than so many of its half-lives.
MAX_HALF_LIVES = 2.0
# Positions of a block of [`sum_later`].
SUM_BLOCK = 8
# So many states come from one closed form, the next ones from the last of these.
MAX_PREFIX = 64


def expert_scores(stream: Tensor, experts: Tensor) -> Tensor:
    """Score each item by each expert, `cap tanh(P x / cap)`, written as `2 cap sigmoid(2 P x / cap) - cap`.

    Args:
        stream (`torch.Tensor` of shape `(..., D)`).
        experts (`torch.Tensor` of shape `(M, D)`).

    Returns:
        `torch.Tensor` of shape `(..., M)`: the sigmoid alone, which [`to_exponent`] turns into scores.
    """
    return F.linear(stream, experts * (2 / SCORE_CAP)).sigmoid_()


def to_exponent(sigmoids: Tensor, log_kept: Tensor) -> Tensor:
    """Return `score + log_kept` of each item and expert, from the sigmoids of [`expert_scores`], in one operation."""
    return torch.add(log_kept - SCORE_CAP, sigmoids, alpha=2 * SCORE_CAP)


def forgetting(log_forget: Tensor, pauses: Tensor, half_lives: Tensor) -> Tensor:
    """Add what experts forget in the pauses before the items to what they forget at each item.

    Args:
        log_forget (`torch.Tensor` of shape `(M,)`): log of what an expert keeps of its state at each new item, <= 0.
        pauses (`torch.Tensor` of shape `(B, L)`): seconds since the item before, below 0 where there is none.
        half_lives (`torch.Tensor` of shape `(M,)`): seconds; a pause counts `MAX_HALF_LIVES` at most.

    Returns:
        `torch.Tensor` of shape `(B, L, M)`: log of what an expert keeps of its state when each item comes.
    """
    kept = torch.addcmul(log_forget, pauses.clamp(min=0)[..., None], -math.log(2) / half_lives)
    return kept.clamp_(min=log_forget - MAX_HALF_LIVES * math.log(2))


def sum_later(values: Tensor, start: float) -> Tensor:
    """Return the sum of `start` and of the values after each position: (B, L, M) -> (B, L, M).

    Summed from the latest on: a difference of two sums over the whole would round off what is recent. Blocks of
    positions are summed side by side, which a processor does sooner than one long sum.
    """
    if torch.compiler.is_compiling():  # blocks of a length that is not known are slow to trace
        return values.flip(1).cumsum(1).flip(1).sub(values).add(start)
    length = values.shape[1]
    size = min(SUM_BLOCK, length)
    if length % size > 0:
        values = F.pad(values, (0, 0, 0, -length % size))
    blocks = values.unflatten(1, (-1, size))
    *sums, whole = itertools.accumulate(blocks.unbind(2)[::-1])  # from the last of each block on, (B, J, M)
    after = whole.flip(1).cumsum_(1).flip(1).sub_(whole).add_(start)
    return torch.stack([*(some + after for some in reversed(sums)), after], dim=2).flatten(1, 2)[:, :length]


def final_weights(sigmoids: Tensor, log_forget: Tensor) -> Tensor:
    """Return the weight of each item in what each expert holds after the last one, a[L,m,j].

    Args:
        sigmoids (`torch.Tensor` of shape `(B, L, M)`): of [`expert_scores`].
        log_forget (`torch.Tensor` of shape `(M,)` or `(B, L, M)`): log of what an expert keeps of its state at each
            new item, <= 0.

    Returns:
        `torch.Tensor` of shape `(B, M, L)`.
    """
    if log_forget.dim() == 1:
        length = sigmoids.shape[1]
        later_items = torch.arange(length - 1, -1, -1, device=sigmoids.device, dtype=sigmoids.dtype)
        exponents = to_exponent(sigmoids, later_items[:, None] * log_forget)
    else:
        exponents = sum_later(log_forget, -SCORE_CAP).add_(sigmoids, alpha=2 * SCORE_CAP)
    return exponents.clamp_(min=MIN_EXPONENT).exp_().mT


def pool_history(
    stream: Tensor, sigmoids: Tensor, log_forget: Tensor, attention_mask: Tensor, state: Tensor | None = None
) -> Tensor:
    """Compress a history, or the items that follow one, into the state of each expert after the last item.

    Args:
        stream (`torch.Tensor` of shape `(B, L, D)`): zeros at padding.
        sigmoids (`torch.Tensor` of shape `(B, L, M)`): of [`expert_scores`].
        log_forget (`torch.Tensor` of shape `(M,)` or `(B, L, M)`): as in [`final_weights`].
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): False for padding, which is on the left.
        state (`torch.Tensor` of shape `(B, M, D + 1)`, *optional*): before these items; `None` is no history.

    Returns:
        `torch.Tensor` of shape `(B, M, D + 1)`: `[sum_j a x_j | sum_j a]`.
    """
    weights = final_weights(sigmoids, log_forget)
    is_item = attention_mask.to(stream.dtype)[..., None]  # (B, L, 1)
    pooled = weights @ torch.cat([stream, is_item], dim=-1)
    if state is None:
        return pooled
    if log_forget.dim() == 1:
        log_kept = is_item.sum(dim=1) * log_forget
    else:
        log_kept = (is_item * log_forget).sum(dim=1)
    return torch.addcmul(pooled, log_kept.exp()[..., None], state)  # kept is (B, M)


def compressed_interests(state: Tensor) -> Tensor:
    """Return the interests that a state holds, zeros where nothing has been read: (..., D + 1) -> (..., D)."""
    total = state[..., -1:]
    return state[..., :-1] / torch.where(total == 0, 1.0, total)


def dispatch(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Let queries read the projected interests of one position, by softmax attention over the experts.

    Args:
        query (`torch.Tensor` of shape `(B, H, Q, K)`).
        key, value (`torch.Tensor` of shape `(B, H, E, K)`).
        bias (`torch.Tensor` of shape `(B, H, Q, E)`, *optional*): added to the logits of the experts.

    Returns:
        `torch.Tensor` of shape `(B, H, Q, K)`.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


class Chunks(NamedTuple):
    """What depends on the items alone of causal LDA at all positions, in J chunks of C; see [`prepare_chunks`]."""

    items: Tensor  # (..., J, C, F)
    weights: Tensor  # (..., J, C, E), of each item in its chunk
    total: Tensor  # (..., J, C, E), the normaliser at each position
    past: Tensor  # (..., J, E, F), weighted sums over the items before the chunk


def prepare_chunks(items: Tensor, scores: Tensor, log_forget: Tensor, chunk_size: int = CHUNK_SIZE) -> Chunks:
    """Cut histories into chunks, with the state of every expert before each: O(L F E / C) numbers.

    Numerator and normaliser of a compressed interest share every factor that depends on t alone, so the forgetting
    since item j needs no (L x L) table per expert: `exp(scores_j - elapsed_j)` weighs item j at all later positions
    of its chunk.

    Args:
        items (`torch.Tensor` of shape `(..., L, F)`): projections of x_j, such as the keys and values of all layers.
        scores (`torch.Tensor` of shape `(..., L, E)`): -inf marks padding.
        log_forget (`torch.Tensor` of shape `(..., L or 1, E)`): log of what an expert keeps of its state at each new
            item, <= 0; leading axes broadcast.
        chunk_size (`int`): C at most; chunks are as short as their number allows.

    Returns:
        [`Chunks`]
    """
    length, size = items.shape[-2:]
    num_chunks = (length + chunk_size - 1) // chunk_size
    if not torch.compiler.is_compiling():  # 200 items are 4 chunks of 50, not 3 of 64 and a padded one
        chunk_size = (length + num_chunks - 1) // num_chunks
    padding = num_chunks * chunk_size - length
    log_forget = log_forget.expand(*log_forget.shape[:-2], length, log_forget.shape[-1])
    if not isinstance(padding, int) or padding > 0:
        items, log_forget = (F.pad(x, (0, 0, 0, padding)) for x in (items, log_forget))
        scores = F.pad(scores, (0, 0, 0, padding), value=-math.inf)
    items, scores, log_forget = (
        x.unflatten(-2, (num_chunks, chunk_size)) for x in (items, scores, log_forget)
    )  # (..., J, C, .)

    elapsed = log_forget.cumsum(dim=-2)  # (..., J, C, E)
    whole = elapsed[..., -1, :]  # (..., J, E), over the chunk
    # Counting from the middle of the chunk halves the largest exponent.
    middle = elapsed[..., chunk_size // 2, :]
    weights = torch.exp(scores - (elapsed - middle[..., None, :]))  # (..., J, C, E)
    total = weights.cumsum(dim=-2)

    added = torch.cat([weights.mT @ items, total[..., -1, :, None]], dim=-1)  # (..., J, E, F + 1)
    to_next_middle = whole - middle + F.pad(middle[..., 1:, :], (0, 0, 0, 1))
    past, past_total = prefix_states(added, to_next_middle).split([size, 1], dim=-1)
    total = total + past_total.mT
    # Where nothing has been read yet (left padding), 0 / 1 instead of 0 / 0.
    total = torch.where(total == 0, 1.0, total)
    return Chunks(items, weights, total, past)


def prefix_states(added: Tensor, log_kept: Tensor) -> Tensor:
    """Return the state before each chunk, `state[j+1] = kept[j] * (state[j] + added[j])` from zero on.

    Args:
        added (`torch.Tensor` of shape `(..., J, E, F)`): by each chunk, as of the moment of the state before it.
        log_kept (`torch.Tensor` of shape `(..., J, E)`): log of what is kept from each chunk to the next one.

    Returns:
        `torch.Tensor` of shape `(..., J, E, F)`.
    """
    num_chunks = added.shape[-3] if torch.compiler.is_compiling() else MAX_PREFIX
    states, state = [], None
    for some, kept in zip(added.split(num_chunks, dim=-3), log_kept.split(num_chunks, dim=-2), strict=True):
        start = kept.cumsum(dim=-2) - kept
        fading = start[..., :, None, :] - start[..., None, :, :]  # (..., J, J, E)
        is_earlier = torch.ones(fading.shape[-3:-1], dtype=torch.bool, device=some.device).tril(-1)
        fading = fading.masked_fill(~is_earlier[..., None], -math.inf).exp()
        before = (fading.movedim(-1, -3) @ some.transpose(-3, -2)).transpose(-3, -2)
        if state is not None:
            before = torch.addcmul(before, start.exp()[..., None], state[..., None, :, :])
        states.append(before)
        state = kept[..., -1, :].exp()[..., None] * (before[..., -1, :, :] + some[..., -1, :, :])
    return torch.cat(states, dim=-3) if len(states) > 1 else before


def read_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    total: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Let the query of each position read the state of the experts there.

    Args:
        query (`torch.Tensor` of shape `(..., L, K)`).
        key, value (`torch.Tensor` of shape `(..., J, C, K)`): `W_k x_j` and `W_v x_j`, of the items of [`Chunks`].
        weights, total (`torch.Tensor` of shape `(..., J, C, E)`): of [`Chunks`].
        past_keys, past_values (`torch.Tensor` of shape `(..., J, E, K)`): of the past of [`Chunks`].
        bias (`torch.Tensor` of shape `(..., L, E)`, *optional*): added to the logits of the experts.

    Returns:
        `torch.Tensor` of shape `(..., L, K)`.
    """
    length = query.shape[-2]
    num_chunks, chunk_size = key.shape[-3:-1]
    padding = num_chunks * chunk_size - length
    if not isinstance(padding, int) or padding > 0:
        query = F.pad(query, (0, 0, 0, padding))
        bias = None if bias is None else F.pad(bias, (0, 0, 0, padding))
    inputs = [query.reshape(-1, chunk_size, query.shape[-1])]
    inputs += [x.flatten(0, -3) for x in (key, value, weights, total, past_keys, past_values)]
    if bias is not None:
        inputs.append(bias.reshape(-1, chunk_size, bias.shape[-1]))
    output = (_read if torch.compiler.is_compiling() else _Read.apply)(*inputs)
    return output.view_as(query)[..., :length, :]


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    total: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """[`read_chunks`] with all chunks along one axis: (J, C, .) and (J, E, .) -> (J, C, K)."""
    scale = 1 / math.sqrt(query.shape[-1])
    logits = (query @ past_keys.mT).baddbmm_((query @ key.mT).tril_(), weights, beta=scale, alpha=scale)
    logits = logits.div_(total)
    if bias is not None:
        logits += bias
    shares = logits.softmax(dim=-1) / total  # (J, C, E)
    del logits
    return (shares @ past_values).baddbmm_((shares @ weights.mT).tril_(), value)


def _read_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    total: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of [`_read`] by its arguments, from that by its output."""
    scale = 1 / math.sqrt(query.shape[-1])
    affinity = (query @ key.mT).tril_()
    logits = torch.baddbmm(query @ past_keys.mT, affinity, weights, beta=scale, alpha=scale).div_(total)
    probabilities = (logits if bias is None else logits + bias).softmax(dim=-1)
    shares = probabilities / total

    # output = (shares W^T, item by item) V + shares V_past
    value_gradient = (shares @ weights.mT).tril_().mT @ gradient
    table = (gradient @ value.mT).tril_()
    shares_gradient = torch.baddbmm(gradient @ past_values.mT, table, weights)
    weights_gradient = table.mT @ shares
    del table
    past_values_gradient = shares.mT @ gradient

    # shares = softmax(logits) / total
    total_gradient = shares_gradient * shares
    probabilities_gradient = shares_gradient.div_(total)
    inner = (probabilities_gradient * probabilities).sum(dim=-1, keepdim=True)
    logits_gradient = probabilities_gradient.sub_(inner).mul_(probabilities)

    # logits = ((Q K^T, item by item) W + Q K_past^T) / (total sqrt(K))
    total_gradient = total_gradient.addcmul_(logits_gradient, logits).div_(total).neg_()
    bias_gradients = () if bias is None else (logits_gradient.clone(),)
    logits_gradient = logits_gradient.div_(total).mul_(scale)
    weights_gradient = weights_gradient.baddbmm_(affinity.mT, logits_gradient)
    del affinity
    table = (logits_gradient @ weights.mT).tril_()
    query_gradient = torch.baddbmm(logits_gradient @ past_keys, table, key)
    key_gradient = table.mT @ query
    past_keys_gradient = logits_gradient.mT @ query
    return (
        query_gradient,
        key_gradient,
        value_gradient,
        weights_gradient,
        total_gradient,
        past_keys_gradient,
        past_values_gradient,
        *bias_gradients,
    )


class _Read(torch.autograd.Function):
    """[`_read`], whose backward pass computes its (C x C) tables again instead of keeping them, those of
    [`MAX_CHUNKS`] at once."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return _read(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors  # once: a checkpoint hands out each tensor once
        num_chunks = limit(MAX_CHUNKS, gradient.device)
        if gradient.shape[0] <= num_chunks:
            return _read_backward(gradient, *inputs)
        gradients = tuple(map(torch.empty_like, inputs))
        some_inputs = zip(*(x.split(num_chunks) for x in (gradient, *inputs)), strict=True)
        some_gradients = zip(*(x.split(num_chunks) for x in gradients), strict=True)
        for some, targets in zip(some_inputs, some_gradients, strict=True):
            for result, target in zip(_read_backward(*some), targets, strict=True):
                target.copy_(result)
        return gradients
