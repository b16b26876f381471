"""Linear dispatcher attention (LDA) as pure functions of tensors.

The paper (arXiv 2408.09380) lets a few interest experts read the history ("aggregate") and each item read the experts
("dispatch"): two softmax attentions, in `modeling_elastic.py`. The `causal_lda_*` functions are its causal form: at
position t the experts have read items up to t only, each with its own forgetting,

    a[t,m,j] = exp(scores[j,m]) * exp(sum of log_forget[l,m] for l in j+1..t)       j <= t
    Z[t,m]   = sum_j a[t,m,j]
    Kc[t,m]  = sum_j a[t,m,j] k_j / Z[t,m]            Vc[t,m] = sum_j a[t,m,j] v_j / Z[t,m]
    p[t,:]   = softmax_m(q_t . Kc[t,m] / sqrt(K))     y_t     = sum_m p[t,m] Vc[t,m]

and they are three ways to compute the same y: recurrent (constant cost per new item), parallel (one quadratic block)
and chunked (linear cost; the training path).

Axis letters: B batch, H heads, L history length, K head size, E interest experts, N chunks, C chunk size. The leading
axes `...` are usually (B, H). Arguments shared by the causal functions:

    query, key, value   (..., L, K)
    scores              (..., L, E)         expert m's score of item j, P_m . k_j / sqrt(K); -inf marks padding
    log_forget          (..., L or 1, E)    log of the share of its state that an expert keeps at each new item, <= 0;
                                            leading axes broadcast
    state               (..., E, 2K + 1)    [sum_j a k_j | sum_j a v_j | sum_j a]; None is an empty history

Range: with |scores| <= 10 and a half-life of at least one item, every exponent in a chunk of 64 items stays within
+-33, so that even squares fit float32. Give float32 or float64 tensors, also under autocast.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


CHUNK_SIZE = 64
# The states of up to this many chunks come from one closed form; a longer history is cut into blocks of that size.
CHUNKS_PER_BLOCK = 64
# Chunks, over all histories and heads, whose tables of C * C a backward pass holds at once.
MAX_CHUNKS = {"cpu": 64, "cuda": 2**14}


def dispatch(query: Tensor, state: Tensor) -> Tensor:
    """Each query reads the E compressed interests held by its own state.

    Args:
        query (`torch.Tensor` of shape `(..., K)`).
        state (`torch.Tensor` of shape `(..., E, 2K + 1)`).

    Returns:
        `torch.Tensor` of shape `(..., K)`; zeros where the state is empty.
    """
    head_size = query.shape[-1]
    keys, values, total = state.split([head_size, head_size, 1], dim=-1)
    total = torch.where(total == 0, 1.0, total)
    logits = (keys / total) @ query[..., None] / math.sqrt(head_size)  # (..., E, 1)
    weights = logits.softmax(dim=-2)
    return ((values / total) * weights).sum(dim=-2)


def final_state(key: Tensor, value: Tensor, scores: Tensor, log_forget: Tensor, state: Tensor | None = None) -> Tensor:
    """The state after the whole history, in one product, without the states on the way.

    Returns:
        `torch.Tensor` of shape `(..., E, 2K + 1)`.
    """
    elapsed = _elapsed(log_forget, key.shape[-2])  # (..., L, E)
    weights = torch.exp(scores + (elapsed[..., -1:, :] - elapsed))  # (..., L, E)
    items = torch.cat([key, value, torch.ones_like(key[..., :1])], dim=-1)  # (..., L, 2K + 1)
    new = weights.transpose(-1, -2) @ items
    return new if state is None else new + elapsed[..., -1, :].exp()[..., None] * state


def read_weights(query: Tensor, key: Tensor, scores: Tensor, log_forget: Tensor) -> tuple[Tensor, Tensor]:
    """What a reader at the end of a history reads: `sum_m shares_m sum_j weights_mj v_j` is the last output.

    Args:
        query (`torch.Tensor` of shape `(..., K)`): of the last position.

    Returns:
        The share of each expert in what is read, of shape `(..., E)`, and that of each item in what each expert holds,
        of shape `(..., E, L)`. Both sum to 1, or are zeros where the history is empty.
    """
    elapsed = _elapsed(log_forget, key.shape[-2])  # (..., L, E)
    weights = torch.exp(scores + (elapsed[..., -1:, :] - elapsed)).mT  # (..., E, L)
    total = weights.sum(dim=-1, keepdim=True)
    has_items = total != 0
    weights = weights / torch.where(has_items, total, 1.0)
    logits = (weights @ key @ query[..., None])[..., 0] / math.sqrt(query.shape[-1])  # (..., E)
    return logits.softmax(dim=-1) * has_items[..., 0], weights


def causal_lda_recurrent(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, log_forget: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal LDA one item at a time: O(E K) per item, whatever the length of the history behind `state`.

    Returns:
        The outputs, of shape `(..., L, K)`, and the state after the last item, of shape `(..., E, 2K + 1)`.
    """
    length = key.shape[-2]
    log_forget = log_forget.expand(*log_forget.shape[:-2], length, log_forget.shape[-1])
    outputs = []
    for t in range(length):
        now = slice(t, t + 1)
        state = final_state(key[..., now, :], value[..., now, :], scores[..., now, :], log_forget[..., now, :], state)
        outputs.append(dispatch(query[..., t, :], state))
    return torch.stack(outputs, dim=-2), state


def causal_lda_parallel(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, log_forget: Tensor, state: Tensor | None = None
) -> Tensor:
    """Causal LDA as one chunk: two masked (L x L) products, in float64 for more than a short history.

    Returns:
        `torch.Tensor` of shape `(..., L, K)`.
    """
    return causal_lda_chunked(query, key, value, scores, log_forget, state, chunk_size=key.shape[-2])[0]


def causal_lda_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    log_forget: Tensor,
    state: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Causal LDA in O(L (C + E) K): item by item inside chunks of C items, a carried state between them.

    Numerator and normaliser of a compressed interest share every factor that depends on t alone, so the forgetting
    since item j needs no (L x L) table per expert: `exp(scores_j - elapsed_j)` weighs item j at all later positions.

    Returns:
        The outputs, of shape `(..., L, K)`, and the state after the last item, of shape `(..., E, 2K + 1)`.
    """
    length, head_size = key.shape[-2:]
    block = chunk_size * CHUNKS_PER_BLOCK
    if length > block:
        outputs = []
        log_forget = log_forget.expand(*log_forget.shape[:-2], length, log_forget.shape[-1])
        for parts in zip(*(x.split(block, dim=-2) for x in (query, key, value, scores, log_forget)), strict=True):
            output, state = causal_lda_chunked(*parts, state, chunk_size)
            outputs.append(output)
        return torch.cat(outputs, dim=-2), state

    # cut into N chunks of C; the padding behind the end weighs nothing
    num_chunks = (length + chunk_size - 1) // chunk_size
    if torch.compiler.is_exporting():
        # A program for every length must not specialise to one chunk, nor to the lengths that need no padding.
        num_chunks = torch.sym_max(length // chunk_size + 1, 2)
    elif not torch.compiler.is_compiling():
        # Chunks as short as their number allows: 200 items are 4 of 50, not 3 of 64 and a padded one. A program for
        # every length keeps to one size.
        chunk_size = (length + num_chunks - 1) // num_chunks
    padding = num_chunks * chunk_size - length
    log_forget = log_forget.expand(*log_forget.shape[:-2], length, log_forget.shape[-1])
    if not isinstance(padding, int) or padding > 0:
        query, key, value, log_forget = (F.pad(x, (0, 0, 0, padding)) for x in (query, key, value, log_forget))
        scores = F.pad(scores, (0, 0, 0, padding), value=-math.inf)
    query, key, value, scores, log_forget = (
        x.unflatten(-2, (num_chunks, chunk_size)) for x in (query, key, value, scores, log_forget)
    )  # (..., N, C, .)

    elapsed = log_forget.cumsum(dim=-2)  # (..., N, C, E)
    whole = elapsed[..., -1, :]  # (..., N, E), over the chunk
    # Counting from the middle of the chunk halves the largest exponent.
    middle = elapsed[..., chunk_size // 2, :]
    weights = torch.exp(scores - (elapsed - middle[..., None, :]))  # (..., N, C, E)
    total = weights.cumsum(dim=-2)

    # the state at the start of each chunk: what every earlier chunk added, faded by the chunks in between
    added = torch.cat([weights.mT @ key, weights.mT @ value, total[..., -1, :, None]], dim=-1)  # (..., N, E, 2K + 1)
    added = (whole - middle).exp()[..., None] * added
    end = whole.cumsum(dim=-2)
    start = end - whole
    fading = start[..., :, None, :] - end[..., None, :, :]  # (..., N, N, E)
    earlier = torch.ones(fading.shape[-3:-1], dtype=torch.bool, device=key.device).tril(-1)
    fading = fading.masked_fill(~earlier[..., None], -math.inf).exp()
    states = (fading.movedim(-1, -3) @ added.transpose(-3, -2)).transpose(-3, -2)  # (..., N, E, 2K + 1)
    if state is not None:
        states = states + start.exp()[..., None] * state[..., None, :, :]
    last = whole[..., -1, :].exp()[..., None] * states[..., -1, :, :] + added[..., -1, :, :]

    past_keys, past_values, past_total = (middle.exp()[..., None] * states).split([head_size, head_size, 1], dim=-1)
    total = total + past_total.mT
    # Where nothing has been read yet (left padding), 0 / 1 instead of 0 / 0.
    total = torch.where(total == 0, 1.0, total)
    read = _read_chunks if torch.compiler.is_compiling() else _ReadChunks.apply
    output = read(*(x.flatten(0, -3) for x in (query, key, value, weights, total, past_keys, past_values)))
    return output.view_as(query).flatten(-3, -2)[..., :length, :], last


def _read_chunks(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, total: Tensor, past_keys: Tensor, past_values: Tensor
) -> Tensor:
    """Each position of a chunk reads the experts' state there: what they held before the chunk, and its items so far.

    Args:
        query, key, value (`torch.Tensor` of shape `(N, C, K)`).
        weights, total (`torch.Tensor` of shape `(N, C, E)`): of each item, and summed up to each position.
        past_keys, past_values (`torch.Tensor` of shape `(N, E, K)`): the state before the chunk.

    Returns:
        `torch.Tensor` of shape `(N, C, K)`.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    logits = (query @ past_keys.mT).baddbmm_((query @ key.mT).tril_(), weights, beta=scale, alpha=scale)
    shares = logits.div_(total).softmax(dim=-1) / total  # (N, C, E)
    del logits
    return (shares @ past_values).baddbmm_((shares @ weights.mT).tril_(), value)


def _read_chunks_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    total: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of [`_read_chunks`] by its arguments, from that by its output."""
    scale = 1 / math.sqrt(query.shape[-1])
    affinity = (query @ key.mT).tril_()
    logits = torch.baddbmm(query @ past_keys.mT, affinity, weights, beta=scale, alpha=scale).div_(total)
    probabilities = logits.softmax(dim=-1)
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
    )


class _ReadChunks(torch.autograd.Function):
    """[`_read_chunks`], whose backward pass computes its (C x C) tables again instead of keeping them, those of
    [`MAX_CHUNKS`] at once."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return _read_chunks(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors  # once: a checkpoint hands out each tensor once
        size = MAX_CHUNKS.get(gradient.device.type, MAX_CHUNKS["cuda"])
        if gradient.shape[0] <= size:
            return _read_chunks_backward(gradient, *inputs)
        gradients = tuple(map(torch.empty_like, inputs))
        parts = zip(*(x.split(size) for x in (gradient, *inputs)), strict=True)
        places = zip(*(x.split(size) for x in gradients), strict=True)
        for part, place in zip(parts, places, strict=True):
            for result, wanted in zip(place, _read_chunks_backward(*part), strict=True):
                result.copy_(wanted)
        return gradients


def _elapsed(log_forget: Tensor, length: int) -> Tensor:
    """Log of what is left at each position of a state held before the first: (..., L or 1, E) -> (..., L, E)."""
    return log_forget.expand(*log_forget.shape[:-2], length, log_forget.shape[-1]).cumsum(dim=-2)
