"""ELASTIC: linear dispatcher attention over a whole history, widened by a sparsely read interest memory.

Axis letters: B batch, L history length, D hidden size, H heads, K head size (D / H), E interest experts, G memory
heads, S sub-keys per half of the interest memory, M = S * S memory slots, R retrieved slots.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_elastic import ElasticCache
from .configuration_elastic import ElasticConfig
from .dispatcher_attention import causal_lda_chunked, dispatch, final_state, read_weights
from .modeling_recommender import SequentialRecommendationOutput, SequentialRecommenderMixin


# Longest wavelength of the rotations, over 2 pi (Su et al. 2021, section 3.2.2).
ROTARY_BASE = 10000.0
# Bound on an expert's score of an item: contrast enough, and within the range that dispatcher_attention.py states.
SCORE_CAP = 10.0
# Positions of a batch that are encoded at once where no gradient is needed: what fits a processor's cache, or keeps a
# GPU busy.
MAX_POSITIONS = {"cpu": 2**12, "cuda": 2**17}
# Items of a history that are read at once at least, so that their attention has whole chunks.
MIN_PIECE = 1024
# Scores of sub-keys held at once while slots are searched: 8 MiB of float32.
MAX_SUBKEY_SCORES = 2**21
# Fewer columns than this are left to `topk`; the rows of longer tables are searched by groups first.
MIN_COLUMNS = 256
ROWS_PER_GROUP = 4
# Scale of the gradient that balances sub-keys, per retrieval: next to nothing where the norm of all gradients is
# clipped, enough for optimisers such as Adam, whose steps do not depend on it.
BALANCE_SCALE = 1e-8


def max_positions(device: torch.device) -> int:
    """[`MAX_POSITIONS`] of a device."""
    return MAX_POSITIONS.get(device.type, MAX_POSITIONS["cuda"])


@dataclass
class ElasticExplanation(ModelOutput):
    """
    How causal ELASTIC arrived at its recommendations. N layers, H heads, E interest experts; zeros at padding.

    Args:
        half_lives (`torch.FloatTensor` of shape `(N, H, E)`):
            How far back each expert looks: the number of items after which it has forgotten half of what it held.
        assignments (`torch.FloatTensor` of shape `(batch_size, N, H, history_length, E)`):
            How each item is shared out among the experts of a head; sums to 1 over them.
        item_weights (`torch.FloatTensor` of shape `(batch_size, N, H, history_length)`):
            The weight of each item in what the last position reads from the experts; sums to 1 over the items.
        token_ids (`torch.LongTensor` of shape `(batch_size, top_k)`):
            The recommended items, best first.
        contributions (`torch.FloatTensor` of shape `(batch_size, top_k, history_length)`):
            How much each item of the history carried each recommendation, to first order: the gradient of the score
            by the item's embedding, times that embedding. Negative where the item spoke against it.
    """

    half_lives: torch.FloatTensor | None = None
    assignments: torch.FloatTensor | None = None
    item_weights: torch.FloatTensor | None = None
    token_ids: torch.LongTensor | None = None
    contributions: torch.FloatTensor | None = None


@dataclass
class ElasticModelOutput(BaseModelOutput):
    """A [`~transformers.modeling_outputs.BaseModelOutput`], and the `cache` where `use_cache=True` asked for it."""

    cache: ElasticCache | None = None


def causal_convolution(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution over the latest items, beside the item itself: `y_t = x_t + sum_i weight_i * x_(t-i)`.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, kernel_size - 1 + L, D)`): those before the first position, too.
        weight (`torch.Tensor` of shape `(kernel_size, D)`).

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.
    """
    before = weight.shape[0] - 1
    length = hidden_states.shape[1] - before
    output = hidden_states[:, before:]
    for i in range(weight.shape[0]):
        output = torch.addcmul(output, weight[i], hidden_states[:, before - i : before - i + length])
    return output


def prepend(earlier: Tensor, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Puts what came earlier right in front of each row's first item, behind its padding.

    Args:
        earlier (`torch.Tensor` of shape `(B, P, D)`).
        hidden_states (`torch.Tensor` of shape `(B, L, D)`): zeros at padding.
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): False for padding, which is on the left.

    Returns:
        `torch.Tensor` of shape `(B, P + L, D)`.
    """
    num_earlier = earlier.shape[1]
    padding = (~attention_mask).sum(dim=1)  # (B,)
    places = padding[:, None] + torch.arange(num_earlier, device=padding.device)  # (B, P)
    places = places[..., None].expand(-1, -1, hidden_states.shape[-1])
    return F.pad(hidden_states, (0, 0, num_earlier, 0)).scatter(1, places, earlier.to(hidden_states.dtype))


def rotary_table(positions: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """How each pair of features is rotated at each position, by the angle `position / ROTARY_BASE^(2 i / K)`.

    Args:
        positions (`torch.LongTensor` of shape `(B, L)`).
        head_size (`int`): K, even.

    Returns:
        Cosines and sines, two `torch.FloatTensor` of shape `(B, 1, L, K / 2)`, for all heads.
    """
    pairs = torch.arange(0, head_size, 2, device=positions.device)
    angles = positions[:, None, :, None] / ROTARY_BASE ** (pairs / head_size)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates features i and i + K / 2 by their angle, so that the product of a query and a key depends on how far
    apart they are ("RoFormer", Su et al. 2021, equation 34, with these pairs of features).

    Args:
        states (`torch.Tensor` of shape `(B, H, L, K)`): queries or keys.
        cos, sin (`torch.Tensor` of shape `(B, 1, L, K / 2)`): of [`rotary_table`].

    Returns:
        `torch.Tensor` of shape `(B, H, L, K)`.
    """
    first, second = states.chunk(2, dim=-1)
    rotated_first = torch.addcmul(first * cos, second, sin, value=-1)
    return torch.cat([rotated_first, torch.addcmul(second * cos, first, sin)], dim=-1)


def retrieve_slots(query: Tensor, sub_keys: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best of all S * S product-key slots, found among the best of each half (Lample et al. 2019, section 3.1).

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
    num_heads, _, num_subkeys, _ = sub_keys.shape
    with torch.no_grad():
        queries = query.reshape(-1, *query.shape[-3:])  # (T, G, 2, key_size)
        if torch.compiler.is_compiling():  # a program for every length has no loop over its parts
            slots = _search_slots(queries, sub_keys, bias, top_k)
        else:
            parts = queries.split(max(1, MAX_SUBKEY_SCORES // bias.numel()))
            slots = torch.cat([_search_slots(part, sub_keys, bias, top_k) for part in parts])
    slots = slots.view(*query.shape[:-2], top_k)
    places = torch.stack([slots // num_subkeys, slots % num_subkeys], dim=-2)  # (..., G, 2, R)
    rows = places + num_subkeys * torch.arange(2 * num_heads, device=slots.device).view(num_heads, 2, 1)
    keys = F.embedding(rows, sub_keys.flatten(0, 2))  # (..., G, 2, R, key_size)
    halves = (keys * query[..., None, :]).sum(dim=-1) + bias.flatten()[rows]
    return halves.sum(dim=-2), slots


def _search_slots(query: Tensor, sub_keys: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """(T, G, 2, key_size) -> (T, G, R)"""
    num_heads, _, num_subkeys, _ = sub_keys.shape
    queries = query.permute(1, 2, 3, 0).flatten(0, 1)  # (2G, key_size, T)
    halves = torch.baddbmm(bias.flatten(0, 1)[..., None], sub_keys.flatten(0, 1), queries)  # (2G, S, T)
    scores, places = top_k_rows(halves, min(top_k, num_subkeys))
    scores, places = scores.unflatten(0, (num_heads, 2)), places.unflatten(0, (num_heads, 2))  # (G, 2, R, T)
    # A pair of the i-th and the j-th best has i * j pairs before it: those of the R best have i * j <= R.
    ranks = range(scores.shape[2])
    pairs = [(i, j) for i in ranks for j in ranks if (i + 1) * (j + 1) <= top_k]
    first, second = torch.tensor(pairs, device=scores.device).T
    scores = scores[:, 0, first] + scores[:, 1, second]
    slots = places[:, 0, first] * num_subkeys + places[:, 1, second]
    return slots.gather(1, top_k_rows(scores, top_k)[1]).permute(2, 0, 1)


def top_k_rows(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest of each column, largest first: `scores.topk(top_k, dim=-2)`, several times as fast on a processor.

    Args:
        scores (`torch.Tensor` of shape `(..., N, T)`).
        top_k (`int`): at most N.

    Returns:
        Values and rows, each of shape `(..., top_k, T)`.
    """
    num_rows = scores.shape[-2]
    many = scores.dtype == torch.float32 and scores.device.type == "cpu" and not torch.compiler.is_compiling()
    if not many or scores.shape[-1] < MIN_COLUMNS:
        return scores.topk(top_k, dim=-2)
    num_groups = num_rows // ROWS_PER_GROUP
    if num_rows % ROWS_PER_GROUP == 0 and num_groups > top_k:
        # The groups with the largest maxima hold all that is sought.
        groups = top_k_rows(scores.unflatten(-2, (ROWS_PER_GROUP, num_groups)).amax(dim=-3), top_k)[1]
        members = num_groups * torch.arange(ROWS_PER_GROUP)[:, None, None]
        rows = (members + groups[..., None, :, :]).flatten(-3, -2)  # (..., ROWS_PER_GROUP * top_k, T)
        values, places = _insert_rows(scores.gather(-2, rows), top_k)
        return values, rows.gather(-2, places)
    return _insert_rows(scores, top_k)


def _insert_rows(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """[`top_k_rows`] by inserting row after row into a sorted list, all columns at once."""
    # A float32 leaves the last 29 bits of a float64 free: the row goes along in them.
    num_rows = scores.shape[-2]
    rows = torch.arange(num_rows)[:, None]
    keyed = (scores.double().view(torch.int64) | rows).view(torch.float64)
    best = keyed.new_full((top_k, *keyed.shape[:-2], keyed.shape[-1]), -math.inf)
    smaller = torch.empty_like(best)
    for row in keyed.unbind(-2):
        for i in range(top_k):
            torch.minimum(best[i], row, out=smaller[i])
            torch.maximum(best[i], row, out=best[i])
            row = smaller[i]
    best = best.movedim(0, -2).contiguous()
    # A column with a NaN is NaN throughout, and its rows are any rows.
    places = (best.view(torch.int64) & (2 ** num_rows.bit_length() - 1)).clamp_(max=num_rows - 1)
    return best.float(), places


def count_subkeys(slots: Tensor, num_subkeys: int, mask: Tensor) -> Tensor:
    """How often each sub-key is part of a retrieved slot.

    Args:
        slots (`torch.LongTensor` of shape `(..., G, R)`): as [`retrieve_slots`] returns them.
        num_subkeys (`int`): S.
        mask (`torch.BoolTensor` of shape `(...,)`): False for what does not count.

    Returns:
        `torch.Tensor` of shape `(G, 2, S)`.
    """
    num_heads, top_k = slots.shape[-2:]
    slots = slots.reshape(-1, num_heads, top_k).transpose(0, 1)  # (G, T, R)
    places = torch.stack([slots // num_subkeys, slots % num_subkeys], dim=1).flatten(2)  # (G, 2, T * R)
    weights = mask.reshape(-1, 1).expand(-1, top_k).flatten().float().expand(places.shape)
    return weights.new_zeros(num_heads, 2, num_subkeys).scatter_add_(-1, places, weights)


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


class ElasticInterestMemory(nn.Module):
    """
    Interest memory retrieval: M = S * S learned interest vectors, of which each query reads the best few.

    So that no slots die, each sub-key has a bias whose gradient is not the loss's, but how much more often than the
    average sub-key it was retrieved (after Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts").
    """

    def __init__(self, config: ElasticConfig):
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
        self.values = nn.Embedding(config.num_memory_subkeys**2, config.hidden_size)

    def retrieve(self, hidden_states: Tensor, top_k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(..., D) and a mask (...,) -> weights and slots, each (..., G, top_k); the weights of a head sum to 1."""
        query = self.query_norm(self.query(hidden_states).unflatten(-1, (self.num_heads, -1)))
        scores, slots = retrieve_slots(query.unflatten(-1, (2, -1)), self.sub_keys, self.bias.detach(), top_k)
        weights = scores.softmax(dim=-1)
        if self.training:
            if mask is None:
                mask = torch.ones(slots.shape[:-2], dtype=torch.bool, device=slots.device)
            weights = _BalanceSubkeys.apply(weights, self.bias, count_subkeys(slots, self.num_subkeys, mask))
        return weights, slots

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """What each position retrieves: (B, L, D) and (B, L) -> (B, L, D)."""
        weights, slots = self.retrieve(hidden_states, self.top_k, attention_mask)
        values = F.embedding_bag(
            slots.flatten(2).flatten(0, 1),
            self.values.weight,
            per_sample_weights=weights.flatten(2).flatten(0, 1).to(self.values.weight.dtype),
            mode="sum",
        )
        return values.view_as(hidden_states)

    def retrieve_experts(self, history: Tensor, num_experts: int) -> Tensor:
        """The interest experts of whole histories: (B, D) -> (B, E, D), each head's best slots times their weights."""
        weights, slots = self.retrieve(history, num_experts // self.num_heads)
        # Weights of one on average, so that retrieved experts have the scale of learned ones.
        return (self.values(slots) * weights[..., None] * weights.shape[-1]).flatten(1, 2)


class ElasticCausalAttention(nn.Module):
    """
    Causal linear dispatcher attention: the experts at position t have read the items up to t. Queries and the keys
    that experts keep are rotated by their positions; what a position reads from the experts passes a gate of its own.
    """

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.key_value = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.query_gate = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.experts = nn.Parameter(torch.empty(self.num_heads, config.num_interest_experts, self.head_size))
        self.log_half_life = nn.Parameter(torch.empty(self.num_heads, config.num_interest_experts))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        rotations: tuple[Tensor, Tensor],
        state: Tensor | None,
        last_position_only: bool,
    ) -> tuple[Tensor, Tensor]:
        """
        (B, L, D), rotations of [`rotary_table`] and the state before them, (B, H, E, 2K + 1), to (B, L, D), or
        (B, 1, D) with `last_position_only`, and the state after them.
        """
        readers = hidden_states[:, -1:] if last_position_only else hidden_states
        query, gate = self.query_gate(readers).chunk(2, dim=-1)
        key_value = self.key_value(hidden_states)

        # States add up thousands of items: float32 at least, whatever autocast says.
        with torch.autocast(hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(query.dtype, torch.float32)
            query, key, value, scores = self._split(query.to(dtype), key_value.to(dtype), attention_mask, rotations)
            del key_value
            log_forget = self.log_forget(dtype)  # (H, 1, E)
            if state is not None:
                state = state.to(dtype)
                log_forget = log_forget * attention_mask[:, None, :, None]  # a state forgets nothing at padding
            if last_position_only:
                state = final_state(key, value, scores, log_forget, state)
                output = dispatch(query[:, :, 0], state)[:, :, None]
            else:
                output, state = causal_lda_chunked(query, key, value, scores, log_forget, state)
        output = output.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return self.output(output * F.silu(gate)), state

    def _split(
        self, query: Tensor, key_value: Tensor, attention_mask: Tensor, rotations: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, Q, D) and (B, L, 2D) -> query (B, H, Q, K), key and value (B, H, L, K) and scores (B, H, L, E)."""
        # Heads first in memory, too, or each product over chunks would copy its operands.
        key_value = key_value.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        key, value = key_value.unbind()  # (B, H, L, K)
        experts = self.experts.to(key.dtype) / (math.sqrt(self.head_size) * SCORE_CAP)
        scores = torch.tanh(key @ experts.mT)  # (B, H, L, E)
        unread = torch.where(attention_mask, 0.0, -math.inf).to(key.dtype)[:, None, :, None]
        scores = torch.add(unread, scores, alpha=SCORE_CAP)
        cos, sin = (table.to(key.dtype) for table in rotations)
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, Q, K)
        query = rotate(query, cos[:, :, -query.shape[2] :], sin[:, :, -query.shape[2] :])
        return query, rotate(key, cos, sin), value, scores

    def explain(
        self, hidden_states: Tensor, attention_mask: Tensor, rotations: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The share of each item that each expert takes, (B, H, L, E), and the weight of each item in what the last
        position reads, (B, H, L)."""
        query, _ = self.query_gate(hidden_states[:, -1:]).chunk(2, dim=-1)
        dtype = torch.promote_types(query.dtype, torch.float32)
        key_value = self.key_value(hidden_states).to(dtype)
        query, key, _, scores = self._split(query.to(dtype), key_value, attention_mask, rotations)
        shares, weights = read_weights(query[:, :, 0], key, scores, self.log_forget(dtype))
        taken = scores.masked_fill(~attention_mask[:, None, :, None], 0).softmax(dim=-1)
        return taken * attention_mask[:, None, :, None], (shares[..., None] * weights).sum(dim=-2)

    @property
    def half_lives(self) -> Tensor:
        """After how many items each expert has forgotten half of what it held: (H, E), at least 1."""
        dtype = torch.promote_types(self.log_half_life.dtype, torch.float32)
        return 1 + self.log_half_life.to(dtype).exp()

    def log_forget(self, dtype: torch.dtype) -> Tensor:
        """Log of what each expert keeps of its state at each new item: (H, 1, E). A half-life is at least one item."""
        return (-math.log(2) / self.half_lives.to(dtype))[:, None]


class ElasticBidirectionalAttention(nn.Module):
    """
    The paper's linear dispatcher attention: experts read the whole history, every item reads the experts.

    The history is not projected: `(P W_Q) (X W_K)^T = (P W_Q W_K^T) X^T` costs H * E * D products an item where
    `X W_K` alone would cost D * D, and likewise for the values and for the items' queries and output. The biases of
    the keys would add the same to every score of a softmax, so there are none.
    """

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.aggregate_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.aggregate_key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.aggregate_value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dispatch_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.dispatch_key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dispatch_value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def aggregate(
        self, hidden_states: Tensor, attention_mask: Tensor, experts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The experts, (B, E, D), read the history, (B, L, D): what [`dispatch`] reads from them."""
        query = self._heads(self.aggregate_query(experts)) / math.sqrt(self.head_size)  # (B, H, E, K)
        query = self._absorb(query, self.aggregate_key.weight)  # (B, H * E, D)
        # A softmax over nothing is NaN, in the gradient too: an empty row reads its padding and is zeroed afterwards.
        has_items = attention_mask.any(dim=-1, keepdim=True)  # (B, 1)
        readable = (attention_mask | ~has_items)[:, None]  # (B, 1, L)
        weights = (query @ hidden_states.mT).masked_fill(~readable, -math.inf).softmax(dim=-1)  # (B, H * E, L)
        pooled = (weights @ hidden_states).unflatten(1, (self.num_heads, -1))  # (B, H, E, D)
        interests = pooled @ self.aggregate_value.weight.unflatten(0, (self.num_heads, -1)).mT  # (B, H, E, K)
        interests = interests.transpose(1, 2).flatten(2) + self.aggregate_value.bias  # (B, E, D)
        interests = interests * has_items[..., None]
        key = self._heads(self.dispatch_key(interests)) / math.sqrt(self.head_size)  # (B, H, E, K)
        bias = (key @ self.dispatch_query.bias.view(self.num_heads, -1, 1)).flatten(1)[:, None]  # (B, 1, H * E)
        key = self._absorb(key, self.dispatch_query.weight)  # (B, H * E, D)
        value = self._absorb(self._heads(self.dispatch_value(interests)), self.output.weight.T)  # (B, H * E, D)
        return key, bias, value

    def dispatch(self, hidden_states: Tensor, key: Tensor, bias: Tensor, value: Tensor) -> Tensor:
        """Each item reads what [`aggregate`] returned: (B, L, D) -> (B, L, D)."""
        logits = torch.baddbmm(bias, hidden_states, key.mT)  # (B, L, H * E)
        shares = logits.unflatten(-1, (self.num_heads, -1)).softmax(dim=-1).flatten(2)
        return torch.baddbmm(self.output.bias, shares.to(value.dtype), value)

    def _heads(self, states: Tensor) -> Tensor:
        """(B, E, D) -> (B, H, E, K)"""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _absorb(self, states: Tensor, weight: Tensor) -> Tensor:
        """States of the experts times the weight that the history would be projected by: (B, H, E, K), (D, D) ->
        (B, H * E, D)."""
        return (states @ weight.unflatten(0, (self.num_heads, -1))).flatten(1, 2)


class ElasticFeedForward(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)"""
        return self.down(self.activation(self.up(hidden_states)))


class ElasticLayer(nn.Module):
    """h = h + LDA(norm(h));   h = h + Memory(norm(h)) where the layer has one;   h = h + FeedForward(norm(h))"""

    def __init__(self, config: ElasticConfig, has_memory: bool):
        super().__init__()
        self.is_causal = config.is_causal
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.convolution = (
            nn.Parameter(torch.empty(config.conv_kernel_size, config.hidden_size)) if config.conv_kernel_size else None
        )
        self.attention = (ElasticCausalAttention if config.is_causal else ElasticBidirectionalAttention)(config)
        self.memory_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_memory else None
        self.memory = ElasticInterestMemory(config) if has_memory else None
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = ElasticFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        experts: Tensor | None = None,
        last_position_only: bool = False,
        rotations: tuple[Tensor, Tensor] | None = None,
        state: Tensor | None = None,
        latest: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, L, D)`).
            attention_mask (`torch.BoolTensor` of shape `(B, L)`): False for padding.
            experts (`torch.Tensor` of shape `(B, E, D)`, *optional*): the history's experts (bidirectional mode).
            last_position_only (`bool`): compute the output of the last position only.
            rotations (`tuple` of two `torch.Tensor`, *optional*): of [`rotary_table`] (causal mode).
            state (`torch.Tensor` of shape `(B, H, E, 2K + 1)`, *optional*): of the experts, before these items.
            latest (`torch.Tensor` of shape `(B, k - 1, D)`, *optional*): the convolution's inputs before these items.

        Returns:
            The output of shape `(B, L, D)`, or `(B, 1, D)` with `last_position_only`, then `state` and `latest` after
            these items (causal mode).
        """
        if self.is_causal:
            hidden_states, state, latest = self._checkpoint(
                self._attend, hidden_states, attention_mask, last_position_only, rotations, state, latest
            )
            return self._transform(hidden_states, attention_mask), state, latest

        # Where no gradient is needed, position by position means part by part, so that parts stay in a cache.
        size = hidden_states.shape[1]
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            size = max(1, max_positions(hidden_states.device) // hidden_states.shape[0])
        normed, *read = self._checkpoint(self._aggregate, hidden_states, attention_mask, experts, size)
        if last_position_only:
            hidden_states, normed = hidden_states[:, -1:], normed[:, -1:]
        outputs = []
        for part, reader in zip(hidden_states.split(size, dim=1), normed.split(size, dim=1), strict=True):
            outputs.append(self._transform(self._checkpoint(self._dispatch, part, reader, *read), attention_mask))
        return torch.cat(outputs, dim=1), None, None

    def _checkpoint(self, part: Callable, *inputs):
        """A part of the layer, whose backward pass computes it again if activations are checkpointed. Parts need less
        than a layer at once: what one keeps is gone before the next is computed again."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(part, *inputs)
        return part(*inputs)

    def _prepare(self, hidden_states: Tensor, attention_mask: Tensor, latest: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the attention reads: norm and convolution, and what the convolution of the next items starts from."""
        normed = self.attention_norm(hidden_states) * attention_mask[..., None]
        if self.convolution is None:
            return normed, normed.new_empty(normed.shape[0], 0, normed.shape[2])
        num_latest = self.convolution.shape[0] - 1
        if latest is None:
            inputs = F.pad(normed, (0, 0, num_latest, 0))
        else:
            inputs = prepend(latest, normed, attention_mask)
        latest = inputs[:, inputs.shape[1] - num_latest :].clone()  # a view would keep all inputs
        return causal_convolution(inputs, self.convolution), latest

    def _attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        last_position_only: bool,
        rotations: tuple[Tensor, Tensor],
        state: Tensor | None,
        latest: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, latest = self._prepare(hidden_states, attention_mask, latest)
        if last_position_only:
            hidden_states = hidden_states[:, -1:]
        attended, state = self.attention(normed, attention_mask, rotations, state, last_position_only)
        return hidden_states + self.dropout(attended), state, latest

    def _aggregate(
        self, hidden_states: Tensor, attention_mask: Tensor, experts: Tensor, size: int
    ) -> tuple[Tensor, ...]:
        normed, latest = [], None
        for part, mask in zip(hidden_states.split(size, dim=1), attention_mask.split(size, dim=1), strict=True):
            prepared, latest = self._prepare(part, mask, latest)
            normed.append(prepared)
        normed = torch.cat(normed, dim=1)
        return normed, *self.attention.aggregate(normed, attention_mask, experts)

    def _dispatch(self, hidden_states: Tensor, normed: Tensor, *read: Tensor) -> Tensor:
        return hidden_states + self.dropout(self.attention.dispatch(normed, *read))

    def _transform(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """What follows the attention, position by position."""
        if self.memory is not None:
            readers = attention_mask[:, -hidden_states.shape[1] :]
            hidden_states = self._checkpoint(self._retrieve, hidden_states, readers)
        return self._checkpoint(self._feed, hidden_states)

    def _retrieve(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        return hidden_states + self.dropout(self.memory(self.memory_norm(hidden_states), attention_mask))

    def _feed(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))


class ElasticPreTrainedModel(PreTrainedModel):
    config: ElasticConfig
    config_class = ElasticConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ElasticLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ElasticLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ElasticCausalAttention):
            init.normal_(module.experts, std=1.0)
            # Half-lives from 2 to 1,025 items, evenly spaced in the logarithm.
            steps = torch.linspace(0, 1, module.experts.shape[1]).expand_as(module.log_half_life)
            init.copy_(module.log_half_life, steps * math.log(1024))
        elif isinstance(module, ElasticInterestMemory):
            init.normal_(module.sub_keys, std=1 / math.sqrt(module.sub_keys.shape[-1]))
            init.zeros_(module.bias)
        elif isinstance(module, ElasticLayer) and module.convolution is not None:
            init.normal_(module.convolution, std=self.config.initializer_range)
        elif isinstance(module, ElasticModel) and module.experts is not None:
            init.normal_(module.experts, std=1.0)


class ElasticModel(ElasticPreTrainedModel):
    """Item embeddings, layers and the final norm: token ids to a vector at each position."""

    def __init__(self, config: ElasticConfig):
        super().__init__(config)
        has_memory = config.num_memory_subkeys > 0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        # The bidirectional mode's experts come from the memory where there is one, once for all layers.
        self.memory = ElasticInterestMemory(config) if has_memory and not config.is_causal else None
        self.experts = (
            nn.Parameter(torch.empty(config.num_interest_experts, config.hidden_size))
            if not has_memory and not config.is_causal
            else None
        )
        # The causal mode reads its memory in the last layer only: serving then reads it once per user.
        last = config.num_hidden_layers - 1
        self.layers = nn.ModuleList(
            ElasticLayer(config, has_memory=has_memory and config.is_causal and i == last)
            for i in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        last_position_only: bool = False,
        cache: ElasticCache | None = None,
        use_cache: bool = False,
        **kwargs,
    ) -> ElasticModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`):
                Histories, oldest item first, padded on the left.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                1 for items, 0 for padding. Defaults to everything that is not `pad_token_id`.
            last_position_only (`bool`, defaults to `False`):
                Compute the last layer at the last position only: `last_hidden_state` has shape
                `(batch_size, 1, hidden_size)`.
            cache ([`ElasticCache`], *optional*):
                What was read before: `input_ids` are the items after it (causal mode).
            use_cache (`bool`, defaults to `False`):
                Return the `cache` after these items (causal mode).
        """
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        attention_mask = attention_mask.bool()
        if cache is not None or use_cache:
            if not self.config.is_causal:
                raise ValueError(
                    "cache and use_cache need is_causal=True: a bidirectional model reads whole histories"
                )
        if cache is not None:
            cache.check(self.config, input_ids.shape[0])
        # Tied embeddings are small for the softmax; as inputs they are learned much sooner at unit scale.
        scale = math.sqrt(self.config.hidden_size) * attention_mask
        embeddings = self.embed_tokens(input_ids) * scale[..., None].to(self.dtype)  # (B, L, D)
        experts = self._experts(embeddings, attention_mask)
        hidden_states = self.dropout(embeddings)
        rotations = None
        if experts is None:
            positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)  # (B, L)
            if cache is not None:
                positions = positions + cache.num_items[:, None]
            rotations = rotary_table(positions, self.config.hidden_size // self.config.num_attention_heads)
        last = len(self.layers) - 1
        states, convolution = [], []
        for i, layer in enumerate(self.layers):
            past = {} if cache is None else {"state": cache.states[:, i], "latest": cache.convolution[:, i]}
            hidden_states, state, latest = layer(
                hidden_states, attention_mask, experts, last_position_only and i == last, rotations, **past
            )
            if use_cache:
                states.append(state)
                convolution.append(latest)
        if use_cache:
            num_items = attention_mask.sum(dim=1) + (0 if cache is None else cache.num_items)
            cache = ElasticCache(torch.stack(states, 1).float(), torch.stack(convolution, 1).float(), num_items)
        return ElasticModelOutput(last_hidden_state=self.norm(hidden_states), cache=cache if use_cache else None)

    def _experts(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor | None:
        """The experts of each history in the bidirectional mode: (B, L, D) -> (B, E, D). The causal mode has none."""
        if self.memory is not None:
            num_items = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
            return self.memory.retrieve_experts(embeddings.sum(dim=1) / num_items, self.config.num_interest_experts)
        if self.experts is not None:
            return self.experts.expand(embeddings.shape[0], -1, -1)
        return None


class ElasticForSequentialRecommendation(SequentialRecommenderMixin, ElasticPreTrainedModel):
    """ELASTIC with its scores over the catalogue, its training losses and `recommend`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ElasticConfig):
        super().__init__(config)
        self.model = ElasticModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: ElasticCache | None = None,
        use_cache: bool = False,
        **kwargs,
    ) -> SequentialRecommendationOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`):
                Histories, oldest item first, padded on the left; with a `cache`, the items that came after it.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                1 for items, 0 for padding. Defaults to everything that is not `pad_token_id`.
            labels (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                `labels[:, t]` is the item to be predicted at position t (nothing is shifted). Special tokens and -100
                are not predicted.
            num_items_in_batch (`int`, *optional*):
                What to divide the summed loss by; defaults to the number of targets in this batch.
            cache ([`ElasticCache`], *optional*):
                What was read before, by causal ELASTIC without `labels`. The scores are those of the whole histories.
            use_cache (`bool`, defaults to `False`):
                Return the `cache` that holds these items, too.
        """
        if labels is not None and (cache is not None or use_cache):
            raise ValueError("labels must not be given with cache or use_cache: training reads whole histories")
        if cache is not None or use_cache:
            kwargs |= {"cache": cache, "use_cache": use_cache}
        return super().forward(input_ids, attention_mask, labels, num_items_in_batch, **kwargs)

    def _read_histories(self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs) -> ModelOutput:
        """
        Without gradients, a large batch is read a few rows at a time and long histories in pieces, each from the cache
        of those before it (causal mode), so that memory grows with neither.
        """
        at_once = torch.is_grad_enabled() or torch.compiler.is_compiling()
        at_once |= bool(kwargs.get("output_hidden_states", self.config.output_hidden_states))
        limit = max_positions(input_ids.device)
        if at_once or input_ids.numel() <= limit:
            return super()._read_histories(input_ids, attention_mask, **kwargs)
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        batch_size, length = input_ids.shape
        piece = min(length, MIN_PIECE) if self.config.is_causal else length
        num_rows = max(1, limit // piece)
        if batch_size > num_rows:
            cache = kwargs.pop("cache", None)
            outputs = []
            for rows in torch.arange(batch_size, device=input_ids.device).split(num_rows):
                past = None if cache is None else cache.select(rows)
                outputs.append(self._read_histories(input_ids[rows], attention_mask[rows], cache=past, **kwargs))
            caches = [output.cache for output in outputs]
            return ElasticModelOutput(
                torch.cat([output.last_hidden_state for output in outputs]),
                cache=None if caches[0] is None else ElasticCache.cat(caches),
            )
        if not self.config.is_causal:
            return super()._read_histories(input_ids, attention_mask, **kwargs)
        piece = max(piece, limit // batch_size)
        pieces = zip(input_ids.split(piece, dim=1), attention_mask.split(piece, dim=1), strict=True)
        use_cache = kwargs.pop("use_cache", False)
        cache = kwargs.pop("cache", None)
        for ids, mask in pieces:
            outputs = self.model(ids, mask, last_position_only=True, cache=cache, use_cache=True, **kwargs)
            cache = outputs.cache
        return ElasticModelOutput(outputs.last_hidden_state, cache=cache if use_cache else None)

    def explain(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None, top_k: int = 10
    ) -> ElasticExplanation:
        """Which experts took each interaction, how far back they look, and which items carried the recommendations.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`): as in `recommend`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*): as in `recommend`.
            top_k (`int`, defaults to 10): how many recommendations are explained, each by a backward pass.

        Returns:
            [`ElasticExplanation`]

        Raises:
            ValueError: if the model is not causal, and as `recommend`.
        """
        if not self.config.is_causal:
            raise ValueError("explain needs is_causal=True: the experts of a bidirectional model have no half-lives")
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        token_ids = self.recommend(input_ids, attention_mask, top_k).token_ids
        layers = [layer.attention for layer in self.model.layers]
        explained, embedded = [], []

        def keep_explanation(attention: nn.Module, inputs: tuple) -> None:
            with torch.no_grad():
                explained.append(attention.explain(*inputs[:3]))

        def keep_embeddings(embedding: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        hooks = [layer.register_forward_pre_hook(keep_explanation) for layer in layers]
        hooks.append(self.model.embed_tokens.register_forward_hook(keep_embeddings))
        try:
            with torch.enable_grad():
                logits = self(input_ids, attention_mask).logits
        finally:
            for hook in hooks:
                hook.remove()
        scores = logits.gather(1, token_ids).sum(dim=0)  # (top_k,): rows do not depend on each other
        gradients = [torch.autograd.grad(score, embedded[0], retain_graph=True)[0] for score in scores]
        contributions = torch.stack([(gradient * embedded[0]).sum(dim=-1) for gradient in gradients], dim=1)
        assignments, item_weights = (torch.stack(parts, dim=1) for parts in zip(*explained, strict=True))
        return ElasticExplanation(
            half_lives=torch.stack([layer.half_lives for layer in layers]).detach(),
            assignments=assignments,
            item_weights=item_weights,
            token_ids=token_ids,
            contributions=contributions.detach(),
        )

    @torch.no_grad()
    def get_retrieved_slots(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None
    ) -> torch.LongTensor:
        """The slots of the interest memory that answer for each history: at its last position, or for its experts.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`): as in `forward`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*): as in `forward`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_memory_heads, num_slots)`: best first, from 0 to
            `num_memory_subkeys**2 - 1`.

        Raises:
            ValueError: if the model has no interest memory.
        """
        memory = self.model.layers[-1].memory if self.config.is_causal else self.model.memory
        if memory is None:
            raise ValueError("num_memory_subkeys must be at least 1 for a model that retrieves slots, found 0")
        queries = []
        handle = memory.query_norm.register_forward_hook(lambda module, inputs, output: queries.append(output))
        try:
            super()._read_histories(input_ids, attention_mask)  # at once: one query for each history
        finally:
            handle.remove()
        query = queries[0].reshape(input_ids.shape[0], self.config.num_memory_heads, 2, -1)
        num_slots = self.config.memory_top_k
        if not self.config.is_causal:
            num_slots = self.config.num_interest_experts // self.config.num_memory_heads
        return retrieve_slots(query, memory.sub_keys, memory.bias, num_slots)[1]


__all__ = ["ElasticForSequentialRecommendation", "ElasticModel", "ElasticPreTrainedModel"]
