"""ELASTIC as its paper has it (Deng et al. 2024, "Efficient Linear Attention for Sequential Interest Compression",
arXiv 2408.09380): layers over all positions, in each of which a few interest experts read the whole history
("aggregate") and every position reads the experts ("dispatch"):

    P' = Attention(P W_Q1, X W_K1, X W_V1)          X' = Attention(X W_Q2, P' W_K2, P' W_V2)

The experts P of a history are retrieved from an interest memory, once for all layers. Position t sees the items after
t, so that the model is trained on masked items or on prefixes.

Axis letters: B batch, L history length, D hidden size, H heads, K head size (D / H), E interest experts, G memory
heads, R retrieved slots of each memory head (E / G), Q readers.
"""

import math

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.configuration_recommender import RecommenderConfig
from ..models.interest_memory import ElasticInterestMemory
from ..models.modeling_elastic import ElasticFeedForward, ElasticForSequentialRecommendation
from ..models.modeling_recommender import leave_out_special_tokens, validate_histories
from .common import BaselineForSequentialRecommendation, BaselineModel, BaselinePreTrainedModel


@strict
class ElasticPaperConfig(RecommenderConfig):
    r"""
    Configuration of [`ElasticPaperModel`] and [`ElasticPaperForSequentialRecommendation`]: the fields of
    [`RecommenderConfig`], with `is_causal=False` and `training_objective="prefix"` by default, and these.

    Args:
        num_hidden_layers (`int`, defaults to 2):
            Number of layers.
        num_attention_heads (`int`, defaults to 2):
            Heads H of linear dispatcher attention; must divide `hidden_size`.
        num_interest_experts (`int`, defaults to 16):
            Interest experts E into which a history of any length is compressed; a multiple of `num_memory_heads` where
            there is a memory.
        intermediate_size (`int`, defaults to 256):
            Width of the feed-forward block.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the feed-forward block.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings and of each residual branch.
        conv_kernel_size (`int`, defaults to 3):
            Items seen by the causal depthwise convolution in front of the attention; 0 for none.
        num_memory_subkeys (`int`, defaults to 128):
            Sub-keys S per half of the interest memory, which then has S * S slots; 0 for experts that are learned, the
            same for every history.
        num_memory_heads (`int`, defaults to 4):
            Independent queries to the memory, each with its own sub-keys.
        layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the layer norms.
    """

    model_type = "elastic_paper"

    is_causal: bool = False
    training_objective: str = "prefix"
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_interest_experts: int = 16
    intermediate_size: int = 256
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.2
    conv_kernel_size: int = 3
    num_memory_subkeys: int = 128
    num_memory_heads: int = 4
    layer_norm_eps: float = 1e-6

    @property
    def memory_top_k(self) -> int:
        """Slots R that each memory head retrieves: together the experts."""
        return self.num_interest_experts // self.num_memory_heads

    def validate_causal(self):
        """The experts read the whole history."""
        if self.is_causal:
            raise ValueError("is_causal must be False for elastic_paper, found True")

    def validate_sizes(self):
        """Every size is positive; a kernel of 0 items is no convolution."""
        self._validate_at_least(
            1, "num_hidden_layers", "num_attention_heads", "num_interest_experts", "intermediate_size"
        )
        self._validate_at_least(0, "conv_kernel_size")
        self._validate_fractions("hidden_dropout")
        self._validate_heads()

    def validate_memory(self):
        """The memory has as many slots as there are experts, the same number for each of its heads; 0 sub-keys are
        no memory."""
        self._validate_at_least(0, "num_memory_subkeys")
        self._validate_at_least(1, "num_memory_heads")
        if self.num_memory_subkeys == 0:
            return
        self._validate_multiple("hidden_size", "num_memory_heads", times=2)
        self._validate_multiple("num_interest_experts", "num_memory_heads")
        if self.memory_top_k > self.num_memory_subkeys**2:
            raise ValueError(
                f"num_interest_experts asks for {self.memory_top_k} slots per memory head, "
                f"num_memory_subkeys={self.num_memory_subkeys} holds {self.num_memory_subkeys**2}"
            )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what each reader reads by softmax attention, at a cost of Q * L.

    Args:
        query (`torch.Tensor` of shape `(B, H, Q, K)`): the readers.
        key, value (`torch.Tensor` of shape `(B, H, L, K)`): what is read.
        mask (`torch.BoolTensor` of shape `(B, L)`, *optional*): False for what is not read.

    Returns:
        `torch.Tensor` of shape `(B, H, Q, K)`; zeros where there is nothing to read.
    """
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value)
    # A softmax over nothing is NaN, in the gradient too: an empty row reads its padding and is zeroed afterwards.
    is_empty = ~mask.any(dim=-1)[:, None, None, None]  # (B, 1, 1, 1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None] | is_empty)
    return output.masked_fill(is_empty, 0.0)


class ElasticBidirectionalAttention(nn.Module):
    """
    The paper's linear dispatcher attention: experts read the whole history, every position reads the experts.

    The biases of the keys would add the same to every score of a softmax, so there are none.
    """

    def __init__(self, config: ElasticPaperConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.aggregate_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.aggregate_key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.aggregate_value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dispatch_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.dispatch_key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dispatch_value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, readers: Tensor, hidden_states: Tensor, experts: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, Q, D), (B, L, D), (B, E, D) and a mask (B, L) -> (B, Q, D)"""
        interests = attend(
            self._split_heads(self.aggregate_query(experts)),
            self._split_heads(self.aggregate_key(hidden_states)),
            self._split_heads(self.aggregate_value(hidden_states)),
            attention_mask,
        )
        interests = interests.transpose(1, 2).flatten(2)  # (B, E, D)
        output = attend(
            self._split_heads(self.dispatch_query(readers)),
            self._split_heads(self.dispatch_key(interests)),
            self._split_heads(self.dispatch_value(interests)),
        )
        return self.output(output.transpose(1, 2).flatten(2))

    def _split_heads(self, states: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, K)"""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ElasticPaperConvolution(nn.Module):
    """y_t = x_t + sum_i w_i * x_(t-i): the item itself, and a depthwise convolution over it and those before it."""

    def __init__(self, config: ElasticPaperConfig):
        super().__init__()
        size, kernel_size = config.hidden_size, config.conv_kernel_size
        self.depthwise = nn.Conv1d(size, size, kernel_size, padding=kernel_size - 1, groups=size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)"""
        return hidden_states + self.depthwise(hidden_states.mT).mT[:, : hidden_states.shape[1]]


class ElasticPaperDispatch(GradientCheckpointingLayer):
    """h + LDA(conv(norm(h)))"""

    def __init__(self, config: ElasticPaperConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.convolution = ElasticPaperConvolution(config) if config.conv_kernel_size else nn.Identity()
        self.attention = ElasticBidirectionalAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: Tensor, experts: Tensor, attention_mask: Tensor, last_position_only: bool
    ) -> Tensor:
        """(B, L, D), (B, E, D) and a mask (B, L) -> (B, L, D), or (B, 1, D) with `last_position_only`."""
        stream = self.convolution(self.norm(hidden_states) * attention_mask[..., None])
        first = -1 if last_position_only else 0
        dispatched = self.attention(stream[:, first:], stream, experts, attention_mask)
        return hidden_states[:, first:] + self.dropout(dispatched)


class ElasticPaperLayer(nn.Module):
    """h = h + LDA(conv(norm(h)));   h = h + FeedForward(norm(h))"""

    def __init__(self, config: ElasticPaperConfig):
        super().__init__()
        self.dispatch = ElasticPaperDispatch(config)
        self.feed_forward = ElasticFeedForward(config, config.intermediate_size)

    def forward(
        self, hidden_states: Tensor, experts: Tensor, attention_mask: Tensor, last_position_only: bool
    ) -> Tensor:
        """(B, L, D), (B, E, D) and a mask (B, L) -> (B, L, D), or (B, 1, D) with `last_position_only`."""
        return self.feed_forward(self.dispatch(hidden_states, experts, attention_mask, last_position_only))


class ElasticPaperPreTrainedModel(BaselinePreTrainedModel):
    config: ElasticPaperConfig
    config_class = ElasticPaperConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["ElasticPaperLayer", "ElasticInterestMemory"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ElasticPaperLayer}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ElasticInterestMemory):
            module.init_weights(self.config.initializer_range)
        elif isinstance(module, ElasticPaperModel) and module.experts is not None:
            init.normal_(module.experts, std=1.0)


class ElasticPaperModel(BaselineModel, ElasticPaperPreTrainedModel):
    """Item embeddings, experts, layers and the final norm: token ids to a vector at each position."""

    def __init__(self, config: ElasticPaperConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        has_memory = config.num_memory_subkeys > 0
        self.memory = ElasticInterestMemory(config) if has_memory else None
        self.experts = (
            None if has_memory else nn.Parameter(torch.empty(config.num_interest_experts, config.hidden_size))
        )
        self.layers = nn.ModuleList(ElasticPaperLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def encode(self, input_ids: Tensor, attention_mask: Tensor, last_position_only: bool) -> Tensor:
        embeddings = self.embed(input_ids, attention_mask)
        if self.memory is None:
            experts = self.experts.expand(input_ids.shape[0], -1, -1)
        else:
            experts = self.combine_slots(*self.retrieve_slots(embeddings, attention_mask))
        hidden_states = self.dropout(embeddings)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, experts, attention_mask, last_position_only and i == last)
        return self.norm(hidden_states)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the embeddings of the items, and zeros for padding: (B, L) -> (B, L, D)."""
        # Tied embeddings are small for the softmax; as inputs they are learned much sooner at unit scale.
        embeddings = self.embed_tokens(input_ids) * math.sqrt(self.config.hidden_size)
        return embeddings.masked_fill(~attention_mask[..., None], 0.0)

    def retrieve_slots(self, embeddings: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ask the memory with the mean of each history: (B, L, D) -> weights and slots, each (B, G, R)."""
        num_items = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return self.memory.retrieve(embeddings.sum(dim=1) / num_items, self.memory.top_k)

    def combine_slots(self, weights: Tensor, slots: Tensor) -> Tensor:
        """Return the values of the slots times their weights, the experts: (B, G, R) -> (B, E, D)."""
        weights = weights.to(self.memory.values.weight.dtype)
        experts = self.memory.values(slots.reshape(-1, 1), per_sample_weights=weights.reshape(-1, 1))
        # Weights of one on average, so that retrieved experts have the scale of learned ones.
        return experts.unflatten(0, (-1, self.config.num_interest_experts)) * self.memory.top_k


class ElasticPaperForSequentialRecommendation(BaselineForSequentialRecommendation, ElasticPaperPreTrainedModel):
    """The paper's ELASTIC with its scores over the catalogue, its training losses and `recommend`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    base_model_class = ElasticPaperModel
    paper = "Deng et al. 2024, ELASTIC as published: bidirectional layers over all positions"
    description = (
        "ELASTIC in the form of its paper compresses a history of any length into a fixed number of interest "
        "experts, and every position reads them, in each of several layers. This is an implementation "
        "independent of the paper's authors, who published no code."
    )
    citation = ElasticForSequentialRecommendation.citation

    @torch.no_grad()
    def get_retrieved_slots(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the slots of the interest memory that are each history's experts.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`): as in `forward`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*): as in `forward`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_memory_heads, num_interest_experts / num_memory_heads)`: best
            first, from 0 to `num_memory_subkeys**2 - 1`.

        Raises:
            ValueError: if the model has no interest memory, and as `forward`.
        """
        if self.model.memory is None:
            raise ValueError("num_memory_subkeys must be at least 1 for a model that retrieves slots, found 0")
        attention_mask = validate_histories(input_ids, attention_mask, self.config)
        input_ids, attention_mask, *_ = leave_out_special_tokens(input_ids, attention_mask, self.config)
        if self.config.training_objective == "masked_item":
            input_ids = F.pad(input_ids, (0, 1), value=self.config.mask_token_id)
            attention_mask = F.pad(attention_mask, (0, 1), value=True)
        return self.model.retrieve_slots(self.model.embed(input_ids, attention_mask), attention_mask)[1]


__all__ = ["ElasticPaperConfig", "ElasticPaperForSequentialRecommendation", "ElasticPaperModel"]
