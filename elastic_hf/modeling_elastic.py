"""ELASTIC: linear dispatcher attention over a whole history, widened by a sparsely read interest memory.

Axis letters: B batch, L history length, D hidden size, H heads, K head size (D / H), E interest experts, G memory
heads, S sub-keys per half of the interest memory, M = S * S memory slots, R retrieved slots.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_elastic import ElasticConfig
from .dispatcher_attention import attend, causal_lda_chunked, dispatch, final_state
from .modeling_recommender import SequentialRecommenderMixin


# Bound on an expert's score of an item: contrast enough, and within the range that dispatcher_attention.py states.
SCORE_CAP = 10.0
# Scale of the gradient that balances sub-keys, per retrieval: next to nothing where the norm of all gradients is
# clipped, enough for optimisers such as Adam, whose steps do not depend on it.
BALANCE_SCALE = 1e-8


def causal_convolution(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution over the latest items: `y_t = sum_i weight_i * x_(t-i)`, zeros before the first item.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, D)`).
        weight (`torch.Tensor` of shape `(kernel_size, D)`).

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.
    """
    length = hidden_states.shape[1]
    padded = F.pad(hidden_states, (0, 0, weight.shape[0] - 1, 0))
    output = weight[0] * hidden_states
    for i in range(1, weight.shape[0]):
        start = weight.shape[0] - 1 - i
        output = output + weight[i] * padded[:, start : start + length]
    return output


def rotate(states: Tensor, length: int) -> Tensor:
    half = states.shape[-1] // 2
    frequency = 10000 ** (-torch.arange(half, device=states.device) / half)
    angle = torch.arange(length - states.shape[-2], length, device=states.device)[:, None] * frequency
    first, second = states[..., :half], states[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def retrieve_slots(query: Tensor, sub_keys: Tensor, bias: Tensor, top_k: int, slot_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best of all S * S product-key slots, found among the best of each half (Lample et al. 2019, section 3.1).

    Slot `i * S + j` has the score `query_1 . sub_key_1i + bias_1i + query_2 . sub_key_2j + bias_2j`.

    Args:
        query (`torch.Tensor` of shape `(..., G, 2, key_size)`): both halves of the query of each memory head.
        sub_keys (`torch.Tensor` of shape `(G, 2, S, key_size)`).
        bias (`torch.Tensor` of shape `(G, 2, S)`).
        top_k (`int`): R, at most S * S.

    Returns:
        Scores and slots, best first, each of shape `(..., G, R)`.
    """
    num_subkeys = sub_keys.shape[2]
    halves = torch.einsum("...ghk,ghsk->...ghs", query, sub_keys) + bias  # (..., G, 2, S)
    scores, places = halves.topk(min(top_k, num_subkeys), dim=-1)
    scores = (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2)  # (..., G, R * R)
    slots = (places[..., 0, :, None] * num_subkeys + places[..., 1, None, :]).flatten(-2)
    if slot_bias is not None:
        offsets = torch.arange(slots.shape[-2], device=slots.device)[:, None] * slot_bias.shape[1]
        scores = scores + F.embedding(slots + offsets, slot_bias.reshape(-1, 1))[..., 0]
    scores, order = scores.topk(top_k, dim=-1)
    return scores, slots.gather(-1, order)


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
        self.num_banks = config.num_memory_heads if config.memory_split else 1
        self.values = nn.Embedding(self.num_banks * config.num_memory_subkeys**2, config.hidden_size)
        self.scale = config.memory_scale
        self.slot_bias = None
        if config.memory_balance == "slots":
            self.slot_bias = nn.Parameter(torch.zeros(config.num_memory_heads, config.num_memory_subkeys**2))

    def retrieve(self, hidden_states: Tensor, top_k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(..., D) and a mask (...,) -> weights and slots, each (..., G, top_k); the weights of a head sum to 1."""
        query = self.query_norm(self.query(hidden_states).unflatten(-1, (self.num_heads, -1)))
        scores, slots = retrieve_slots(query.unflatten(-1, (2, -1)), self.sub_keys, self.bias.detach(), top_k, None if self.slot_bias is None else self.slot_bias.detach())
        weights = scores.softmax(dim=-1)
        if self.training:
            if mask is None:
                mask = torch.ones(slots.shape[:-2], dtype=torch.bool, device=slots.device)
            weights = _BalanceSubkeys.apply(weights, self.bias, count_subkeys(slots, self.num_subkeys, mask))
            if self.slot_bias is not None:
                flat = slots.reshape(-1, self.num_heads, slots.shape[-1]).transpose(0, 1).flatten(1)
                ones = mask.reshape(-1, 1).expand(-1, slots.shape[-1]).flatten().float().expand(flat.shape)
                counts = torch.zeros_like(self.slot_bias).scatter_add_(1, flat, ones)
                weights = _BalanceSubkeys.apply(weights, self.slot_bias, counts)
        return weights, slots

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """What each position retrieves: (B, L, D) and (B, L) -> (B, L, D)."""
        weights, slots = self.retrieve(hidden_states, self.top_k, attention_mask)
        if self.num_banks > 1:
            slots = slots + torch.arange(self.num_heads, device=slots.device)[:, None] * self.num_subkeys**2
        values = F.embedding_bag(
            slots.flatten(2).flatten(0, 1),
            self.values.weight,
            per_sample_weights=weights.flatten(2).flatten(0, 1).to(self.values.weight.dtype),
            mode="sum",
        )
        return self.scale * values.view_as(hidden_states)

    def retrieve_experts(self, history: Tensor, num_experts: int) -> Tensor:
        """The interest experts of whole histories: (B, D) -> (B, E, D), each head's best slots times their weights."""
        weights, slots = self.retrieve(history, num_experts // self.num_heads)
        # Weights of one on average, so that retrieved experts have the scale of learned ones.
        return (self.values(slots) * weights[..., None] * weights.shape[-1]).flatten(1, 2)


class ElasticCausalAttention(nn.Module):
    """
    Causal linear dispatcher attention: the experts at position t have read the items up to t. What a position reads
    from them passes a gate of its own.
    """

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.experts = nn.Parameter(torch.empty(self.num_heads, config.num_interest_experts, self.head_size))
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.forgetting, self.rotary = config.forgetting, config.rotary
        self.log_half_life = nn.Parameter(torch.empty(self.num_heads, config.num_interest_experts))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, experts: Tensor | None, last_position_only: bool
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), or (B, 1, D) with `last_position_only`."""
        heads = (-1, self.head_size)
        readers = hidden_states[:, -1:] if last_position_only else hidden_states
        query = self.query(readers).unflatten(-1, heads).transpose(1, 2)  # (B, H, L or 1, K)
        key = self.key(hidden_states).unflatten(-1, heads).transpose(1, 2)  # (B, H, L, K)
        value = self.value(hidden_states).unflatten(-1, heads).transpose(1, 2)

        # States add up thousands of items: float32 at least, whatever autocast says.
        with torch.autocast(hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(query.dtype, torch.float32)
            query, key, value, experts = (x.to(dtype) for x in (query, key, value, self.experts))
            scores = key @ experts.transpose(-1, -2) / math.sqrt(self.head_size)  # (B, H, L, E)
            scores = SCORE_CAP * torch.tanh(scores / SCORE_CAP)
            scores = scores.masked_fill(~attention_mask[:, None, :, None], -math.inf)
            if self.rotary:
                query, key = rotate(query, key.shape[2]), rotate(key, key.shape[2])
            if last_position_only:
                state = final_state(key, value, scores, self.log_forget(dtype))
                output = dispatch(query[:, :, 0], state)[:, :, None]
            else:
                output, _ = causal_lda_chunked(query, key, value, scores, self.log_forget(dtype))
        output = output.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return self.output(output * F.silu(self.gate(readers)))

    def log_forget(self, dtype: torch.dtype) -> Tensor:
        """Log of what each expert keeps of its state at each new item: (H, 1, E). A half-life is at least one item."""
        half_life = 1 + self.log_half_life.to(dtype).exp()
        if self.forgetting == "none":
            return torch.zeros_like(half_life)[:, None]
        if self.forgetting == "fixed":
            half_life = half_life.detach()
        return (-math.log(2) / half_life)[:, None]


class ElasticBidirectionalAttention(nn.Module):
    """The paper's linear dispatcher attention: experts read the whole history, every item reads the experts."""

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.aggregate_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.aggregate_key = nn.Linear(config.hidden_size, config.hidden_size)
        self.aggregate_value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dispatch_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.dispatch_key = nn.Linear(config.hidden_size, config.hidden_size)
        self.dispatch_value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, experts: Tensor, last_position_only: bool
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), or (B, 1, D) with `last_position_only`; `experts` is (B, E, D)."""
        readers = hidden_states[:, -1:] if last_position_only else hidden_states
        interests = attend(
            self._split(self.aggregate_query(experts)),
            self._split(self.aggregate_key(hidden_states)),
            self._split(self.aggregate_value(hidden_states)),
            attention_mask,
        )  # (B, H, E, K)
        interests = interests.transpose(1, 2).flatten(2)  # (B, E, D)
        output = attend(
            self._split(self.dispatch_query(readers)),
            self._split(self.dispatch_key(interests)),
            self._split(self.dispatch_value(interests)),
        )  # (B, H, L or 1, K)
        return self.output(output.transpose(1, 2).flatten(2))

    def _split(self, states: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, K)"""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


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


class ElasticLayer(GradientCheckpointingLayer):
    """h = h + LDA(norm(h));   h = h + Memory(norm(h)) where the layer has one;   h = h + FeedForward(norm(h))"""

    def __init__(self, config: ElasticConfig, has_memory: bool):
        super().__init__()
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

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        experts: Tensor | None = None,
        last_position_only: bool = False,
    ) -> Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, L, D)`).
            attention_mask (`torch.BoolTensor` of shape `(B, L)`): False for padding.
            experts (`torch.Tensor` of shape `(B, E, D)`, *optional*): the history's experts (bidirectional mode).
            last_position_only (`bool`): compute the output of the last position only.

        Returns:
            `torch.Tensor` of shape `(B, L, D)`, or `(B, 1, D)` with `last_position_only`.
        """
        normed = self.attention_norm(hidden_states) * attention_mask[..., None]
        if self.convolution is not None:
            normed = normed + causal_convolution(normed, self.convolution)
        if last_position_only:
            hidden_states = hidden_states[:, -1:]
        attended = self.attention(normed, attention_mask, experts, last_position_only)
        hidden_states = hidden_states + self.dropout(attended)
        if self.memory is not None:
            readers = attention_mask[:, -hidden_states.shape[1] :]
            hidden_states = hidden_states + self.dropout(self.memory(self.memory_norm(hidden_states), readers))
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
            if module.slot_bias is not None:
                init.zeros_(module.slot_bias)
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
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.max_position_embeddings
            else None
        )
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
        **kwargs,
    ) -> BaseModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`):
                Histories, oldest item first, padded on the left.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                1 for items, 0 for padding. Defaults to everything that is not `pad_token_id`.
            last_position_only (`bool`, defaults to `False`):
                Compute the last layer at the last position only: `last_hidden_state` has shape
                `(batch_size, 1, hidden_size)`.
        """
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        attention_mask = attention_mask.bool()
        # Tied embeddings are small for the softmax; as inputs they are learned much sooner at unit scale.
        embeddings = self.embed_tokens(input_ids) * math.sqrt(self.config.hidden_size)  # (B, L, D)
        embeddings = embeddings * attention_mask[..., None]
        experts = self._experts(embeddings, attention_mask)
        hidden_states = embeddings
        if self.embed_positions is not None:
            if input_ids.shape[1] > self.config.max_position_embeddings:
                raise ValueError(
                    "input_ids must not be longer than max_position_embeddings "
                    f"({self.config.max_position_embeddings}), found {input_ids.shape[1]}"
                )
            positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            hidden_states = hidden_states + self.embed_positions(positions)
        hidden_states = self.dropout(hidden_states)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, attention_mask, experts, last_position_only and i == last)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def _experts(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor | None:
        """The experts of each history in the bidirectional mode: (B, L, D) -> (B, E, D)."""
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
            self.get_user_embeddings(input_ids, attention_mask)
        finally:
            handle.remove()
        query = queries[0].reshape(input_ids.shape[0], self.config.num_memory_heads, 2, -1)
        num_slots = self.config.memory_top_k
        if not self.config.is_causal:
            num_slots = self.config.num_interest_experts // self.config.num_memory_heads
        slots = retrieve_slots(query, memory.sub_keys, memory.bias, num_slots, memory.slot_bias)[1]
        if memory.num_banks > 1:
            slots = slots + torch.arange(memory.num_heads, device=slots.device)[:, None] * memory.num_subkeys**2
        return slots


__all__ = ["ElasticForSequentialRecommendation", "ElasticModel", "ElasticPreTrainedModel"]
