"""HSTU (Zhai et al. 2024, "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations") as its authors' public code has it for item ids, with the position bias and, with `use_timestamps`,
the time bias.

Attention is pointwise, with no softmax over the items, and its result is gated:

    u, v, q, k = SiLU(norm(x) W)                    a_t = 1/n sum_(j <= t) SiLU(q_t k_j + b[t - j] + c[s_tj]) v_j
    x = x + W_o dropout(u * norm(a)) + b_o

s_tj is the bucket of the time from item j to the item after t, floor(log(max(1, seconds)) / 0.301). Where that is not
known, item t itself takes its place.

n is the longest history that the model can read, `max_position_embeddings`, as in that code, and not the length of a
batch or of a history: padding changes nothing. As a norm follows, n counts only against its epsilon. The norms of the
layers have no weights.

The last norm is a layer norm, which that code offers beside the cosine with a temperature: scores are dot products in
all models here.

Axis letters: B batch, H heads, L history length, D hidden size, K head size, Q readers.
"""

import math

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.configuration_recommender import RecommenderConfig
from ..models.event_time import UNKNOWN
from .common import BaselineForSequentialRecommendation, BaselineModel, BaselinePreTrainedModel, ItemEmbeddings


# As in the authors' code.
NUM_TIME_BUCKETS = 128
LOG_SECONDS_PER_BUCKET = 0.301


@strict
class HSTUConfig(RecommenderConfig):
    r"""
    Configuration of [`HSTUModel`] and [`HSTUForSequentialRecommendation`]: the fields of [`RecommenderConfig`] and
    these.

    Args:
        num_hidden_layers (`int`, defaults to 2):
            Number of sequential transduction units.
        num_attention_heads (`int`, defaults to 1):
            Attention heads; must divide `hidden_size`.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings and of what each layer's last projection reads.
        max_position_embeddings (`int`, defaults to 200):
            Number of learned absolute and relative positions: the longest history that can be read.
        layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the layer norms.
    """

    model_type = "hstu"
    supports_timestamps = True
    supports_event_features = True

    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    hidden_dropout: float | int = 0.2
    max_position_embeddings: int = 200
    layer_norm_eps: float = 1e-6

    def validate_sizes(self):
        """Every size is positive."""
        self._validate_at_least(1, "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        self._validate_fractions("hidden_dropout")
        self._validate_heads()

    def validate_causal(self):
        """HSTU predicts the next item at every position."""
        if not self.is_causal:
            raise ValueError("is_causal must be True for hstu, found False")


class HSTUAttention(nn.Module):
    """a_t = 1/n sum_(j <= t) SiLU(q_t k_j + b[t - j] + c[s_tj]) v_j, one b and one c for all heads."""

    def __init__(self, config: HSTUConfig):
        super().__init__()
        self.head_size = config.hidden_size // config.num_attention_heads
        self.longest = config.max_position_embeddings
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.position_bias = nn.Embedding(config.max_position_embeddings, 1)
        self.time_bias = nn.Embedding(NUM_TIME_BUCKETS, 1) if config.use_timestamps else None

    def forward(self, readers: Tensor, hidden_states: Tensor, mask: Tensor, time_buckets: Tensor | None) -> Tensor:
        """The last Q positions (B, Q, D), all of them (B, L, D), who reads what (B, 1, Q, L) and the buckets of the
        times between them (B, Q, L) -> (B, Q, D)."""
        query, key, value = (
            F.silu(projection(states)).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection, states in ((self.query, readers), (self.key, hidden_states), (self.value, hidden_states))
        )  # (B, H, L, K)
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        lags = (positions[-readers.shape[1] :, None] - positions).clamp(min=0)
        scores = query @ key.transpose(-1, -2) + self.position_bias(lags)[..., 0]  # (B, H, Q, L)
        if self.time_bias is not None:
            scores = scores + self.time_bias(time_buckets)[:, None, ..., 0]
        weights = (F.silu(scores) / self.longest).masked_fill(~mask, 0.0).to(value.dtype)
        return (weights @ value).transpose(1, 2).flatten(2)


class HSTULayer(GradientCheckpointingLayer):
    """A sequential transduction unit: x = x + W_o dropout(u * norm(a)) + b_o"""

    def __init__(self, config: HSTUConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.attention = HSTUAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: Tensor, mask: Tensor, time_buckets: Tensor | None, last_position_only: bool
    ) -> Tensor:
        """(B, L, D), who reads what (B, 1, L, L) and the buckets of the times between them (B, L, L), or those of the
        last position, -> (B, L, D), or (B, 1, D) with `last_position_only`."""
        normed = self.norm(hidden_states)
        readers = normed
        if last_position_only:
            hidden_states, readers, mask = hidden_states[:, -1:], normed[:, -1:], mask[:, :, -1:]
            time_buckets = None if time_buckets is None else time_buckets[:, -1:]
        attended = self.attention_norm(self.attention(readers, normed, mask, time_buckets))
        return hidden_states + self.output(self.dropout(F.silu(self.gate(readers)) * attended))


class HSTUPreTrainedModel(BaselinePreTrainedModel):
    config: HSTUConfig
    config_class = HSTUConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["HSTULayer"]
    _can_record_outputs = {"hidden_states": HSTULayer}


class HSTUModel(BaselineModel, HSTUPreTrainedModel):
    """Embeddings and positions, transduction units and a norm: token ids to a vector at each position."""

    def __init__(self, config: HSTUConfig):
        super().__init__(config)
        self.embeddings = ItemEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        last_position_only: bool,
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        event_features: Tensor | None = None,
    ) -> Tensor:
        embeddings = self.embeddings(input_ids, math.sqrt(self.config.hidden_size), event_features)
        hidden_states = self.dropout(embeddings)
        length = input_ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        mask = earlier & attention_mask[:, None, None]  # (B, 1, L, L)
        time_buckets = None
        if timestamps is not None:
            time_buckets = buckets_between(timestamps, request_timestamps)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, mask, time_buckets, last_position_only and i == last)
        return self.norm(hidden_states)


def buckets_between(timestamps: Tensor, request_timestamps: Tensor) -> Tensor:
    """Return the buckets of the times from each item to the one after each position.

    Args:
        timestamps (`torch.Tensor` of shape `(B, L)`): Unix seconds.
        request_timestamps (`torch.Tensor` of shape `(B, L)` or `(B, 1)`):
            When the item after each position comes, -1 where that is not known; or after the last one alone: those
            of the others are then known, from their next items, or not known, as it is.

    Returns:
        `torch.LongTensor` of shape `(B, L, L)`: at [t, j] that of the time from item j to the item after t.
    """
    if request_timestamps.shape[1] < timestamps.shape[1]:
        earlier = torch.where(request_timestamps == UNKNOWN, UNKNOWN, timestamps[:, 1:])
        request_timestamps = torch.cat([earlier, request_timestamps], dim=1)
    nexts = torch.where(request_timestamps == UNKNOWN, timestamps, request_timestamps)
    seconds = (nexts[:, :, None] - timestamps[:, None]).float().clamp(min=1)
    return (seconds.log() / LOG_SECONDS_PER_BUCKET).floor().long().clamp(max=NUM_TIME_BUCKETS - 1)


class HSTUForSequentialRecommendation(BaselineForSequentialRecommendation, HSTUPreTrainedModel):
    """HSTU with its scores over the catalogue, its training losses and `recommend`."""

    base_model_class = HSTUModel
    paper = "Zhai et al. 2024; item ids, positions and, if asked for, times"
    description = (
        "HSTU weighs each item of the history by itself, with no softmax over them, by what it is and how far back it "
        "lies, and gates what it has read."
    )
    citation = r"""
    @inproceedings{zhai2024actions,
      title = {Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
        Recommendations},
      author = {Zhai, Jiaqi and Liao, Lucy and Liu, Xing and Wang, Yueming and Li, Rui and Cao, Xuan and Gao, Leon and
        Gong, Zhaojie and Gu, Fangda and He, Jiayuan and Lu, Yinghai and Shi, Yu},
      booktitle = {ICML},
      year = {2024},
    }
    """


__all__ = ["HSTUConfig", "HSTUForSequentialRecommendation", "HSTUModel"]
