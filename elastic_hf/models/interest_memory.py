"""Interest memory retrieval: a large bank of learned interest vectors of which each query reads the best few.

Axis letters: D hidden size, G memory heads, S sub-keys per half, M = S * S slots, R retrieved slots, T queries.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .cpu_top_k import top_k_rows
from .limits import MAX_SUBKEY_SCORES, limit


# Scale of the gradient that balances sub-keys, per retrieval: next to nothing where the norm of all gradients is
# clipped, enough for optimisers such as Adam, whose steps do not depend on it.
BALANCE_SCALE = 1e-8


def retrieve_slots(query: Tensor, sub_keys: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the best of all S * S product-key slots among the best of each half (Lample et al. 2019, section 3.1).

    Slot `i * S + j` has the score `query_1 . sub_key_1i + bias_1i + query_2 . sub_key_2j + bias_2j`. Only the scores
    of what is found are computed with gradients, so that nothing of size S is kept for the backward pass.

    Args:
        query (`torch.Tensor` of shape `(..., G, 2, key_size)`): both halves of the query of each memory head.
        sub_keys (`torch.Tensor` of shape `(G, 2, S, key_size)`).
        bias (`torch.Tensor` of shape `(G, 2, S)`).
        top_k (`int`): R, at most S * S.

    Returns:
        Scores and slots, best first, each of shape `(..., G, R)`.
    """
    with torch.no_grad():
        queries = query.reshape(-1, *query.shape[-3:])  # (T, G, 2, key_size)
        if torch.compiler.is_compiling():  # a graph for every length has no loop over parts of it
            scores, slots = _search_slots(queries, sub_keys, bias, top_k)
        else:
            num_queries = max(1, limit(MAX_SUBKEY_SCORES, query.device) // bias.numel())
            found = [_search_slots(some, sub_keys, bias, top_k) for some in queries.split(num_queries)]
            scores, slots = map(torch.cat, zip(*found, strict=True))
    scores, slots = (x.view(*query.shape[:-2], top_k) for x in (scores, slots))
    if not torch.is_grad_enabled():
        return scores, slots
    if torch.compiler.is_compiling():
        return _score_slots(query, sub_keys, bias, slots), slots
    # The sub-keys of each query are read again in the backward pass: they are the largest tensors of a retrieval.
    return checkpoint(_score_slots, query, sub_keys, bias, slots, use_reentrant=False), slots


def _score_slots(query: Tensor, sub_keys: Tensor, bias: Tensor, slots: Tensor) -> Tensor:
    """(..., G, 2, key_size) and slots (..., G, R) -> (..., G, R)"""
    num_heads, _, num_subkeys, _ = sub_keys.shape
    indices = torch.stack([slots // num_subkeys, slots % num_subkeys], dim=-2)  # (..., G, 2, R)
    rows = indices + num_subkeys * torch.arange(2 * num_heads, device=slots.device).view(num_heads, 2, 1)
    keys = F.embedding(rows, sub_keys.flatten(0, 2))  # (..., G, 2, R, key_size)
    halves = (keys * query[..., None, :]).sum(dim=-1) + bias.flatten()[rows]
    return halves.sum(dim=-2)


def _search_slots(query: Tensor, sub_keys: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(T, G, 2, key_size) -> scores and slots, (T, G, R)"""
    num_heads, _, num_subkeys, _ = sub_keys.shape
    queries = query.permute(1, 2, 3, 0).flatten(0, 1)  # (2G, key_size, T)
    halves = torch.baddbmm(bias.flatten(0, 1)[..., None], sub_keys.flatten(0, 1), queries)  # (2G, S, T)
    scores, indices = top_k_rows(halves, min(top_k, num_subkeys))
    scores, indices = scores.unflatten(0, (num_heads, 2)), indices.unflatten(0, (num_heads, 2))  # (G, 2, R, T)
    # A pair of the i-th and the j-th best has i * j pairs before it: those of the R best have i * j <= R.
    ranks = range(scores.shape[2])
    pairs = [(i, j) for i in ranks for j in ranks if (i + 1) * (j + 1) <= top_k]
    first, second = torch.tensor(pairs, device=scores.device).T
    scores = scores[:, 0, first] + scores[:, 1, second]
    slots = indices[:, 0, first] * num_subkeys + indices[:, 1, second]
    scores, order = top_k_rows(scores, top_k)
    return scores.permute(2, 0, 1), slots.gather(1, order).permute(2, 0, 1)


def count_subkeys(slots: Tensor, num_subkeys: int, mask: Tensor) -> Tensor:
    """Count how often each sub-key is part of a retrieved slot.

    Args:
        slots (`torch.LongTensor` of shape `(..., G, R)`): as [`retrieve_slots`] returns them.
        num_subkeys (`int`): S.
        mask (`torch.BoolTensor` of shape `(...,)`): False for what does not count.

    Returns:
        `torch.Tensor` of shape `(G, 2, S)`.
    """
    num_heads, top_k = slots.shape[-2:]
    slots = slots.reshape(-1, num_heads, top_k).transpose(0, 1)  # (G, T, R)
    indices = torch.stack([slots // num_subkeys, slots % num_subkeys], dim=1).flatten(2)  # (G, 2, T * R)
    weights = mask.reshape(-1, 1).expand(-1, top_k).flatten().float().expand(indices.shape)
    return weights.new_zeros(num_heads, 2, num_subkeys).scatter_add_(-1, indices, weights)


class _BalanceSubkeys(torch.autograd.Function):
    """Leaves the weights as they are, and gives the bias a gradient that lowers it where sub-keys are used more."""

    @staticmethod
    def forward(ctx, weights: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, weights_gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts,) = ctx.saved_tensors
        # Counts, not shares, so that the gradients of the parts of a batch add up to that of the whole.
        return weights_gradient, BALANCE_SCALE * (counts - counts.mean(dim=-1, keepdim=True)), None


class MemoryConfig(Protocol):
    """The fields of a configuration that an interest memory reads."""

    hidden_size: int
    num_memory_heads: int
    num_memory_subkeys: int
    memory_top_k: int
    layer_norm_eps: float


class ElasticInterestMemory(nn.Module):
    """
    Interest memory retrieval: M = S * S learned interest vectors, of which each query reads the best few.

    So that no slots die, each sub-key has a bias whose gradient is not the loss's, but how much more often than the
    average sub-key it was retrieved (after Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts").
    """

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.num_heads = config.num_memory_heads
        self.top_k = config.memory_top_k
        self.num_subkeys = config.num_memory_subkeys
        key_size = config.hidden_size // config.num_memory_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        # Normalised queries reach more of the slots (Lample et al. 2019, section 4.5).
        self.query_norm = nn.LayerNorm(key_size, eps=config.layer_norm_eps)
        self.sub_keys = nn.Parameter(
            torch.empty(config.num_memory_heads, 2, config.num_memory_subkeys, key_size // 2)
        )  # (G, 2, S, key_size / 2)
        self.bias = nn.Parameter(torch.empty(config.num_memory_heads, 2, config.num_memory_subkeys))  # (G, 2, S)
        self.values = nn.EmbeddingBag(config.num_memory_subkeys**2, config.hidden_size, mode="sum")

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Draw sub-keys of unit length and values of a standard deviation."""
        init.normal_(self.sub_keys, std=1 / math.sqrt(self.sub_keys.shape[-1]))
        init.zeros_(self.bias)
        init.normal_(self.values.weight, std=std)

    def retrieve(self, hidden_states: Tensor, top_k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(..., D) and a mask (...,) -> weights and slots, each (..., G, top_k); the weights of a head sum to 1."""
        query = self.query_norm(self.query(hidden_states).unflatten(-1, (self.num_heads, -1))).unflatten(-1, (2, -1))
        with torch.autocast(query.device.type, enabled=False):  # a product in bfloat16 has ties among its best
            scores, slots = retrieve_slots(query.to(self.sub_keys.dtype), self.sub_keys, self.bias.detach(), top_k)
            weights = scores.softmax(dim=-1)
        if self.training:
            if mask is None:
                mask = torch.ones(slots.shape[:-2], dtype=torch.bool, device=slots.device)
            weights = _BalanceSubkeys.apply(weights, self.bias, count_subkeys(slots, self.num_subkeys, mask))
        return weights, slots

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum up the values that each position retrieves: (..., D) and a mask (...,) -> (..., D)."""
        weights, slots = self.retrieve(hidden_states, self.top_k, mask)
        slots, weights = (x.flatten(-2).reshape(-1, self.num_heads * self.top_k) for x in (slots, weights))
        return self.values(slots, per_sample_weights=weights.to(self.values.weight.dtype)).view_as(hidden_states)
