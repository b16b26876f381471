"""SASRec (Kang and McAuley 2018, "Self-Attentive Sequential Recommendation").

The defaults are the paper's. Layers may have what later work added: a wider feed-forward network, another activation,
an output projection of the attention, and the gates of LiGR (Borisyuk et al. 2025, "From Features to Transformers:
Redefining Ranking for Scalable Impact").
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from .common import (
    SELF_ATTENTIONS,
    BaselineForSequentialRecommendation,
    BaselineModel,
    BaselinePreTrainedModel,
    ItemEmbeddings,
    SelfAttention,
    TransformerConfig,
)


@strict
class SASRecConfig(TransformerConfig):
    r"""
    Configuration of [`SASRecModel`] and [`SASRecForSequentialRecommendation`]: the fields of [`RecommenderConfig`] and
    these.

    Args:
        num_hidden_layers (`int`, defaults to 2):
            Number of self-attention blocks.
        num_attention_heads (`int`, defaults to 1):
            Attention heads; must divide `hidden_size`.
        intermediate_size (`int`, defaults to 64):
            Width of the point-wise feed-forward network.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings and of each residual branch.
        hidden_act (`str`, defaults to `"relu"`):
            Activation of the feed-forward network, one of Transformers' names.
        attention_output (`bool`, defaults to `False`):
            Give the attention an output projection, which mixes its heads.
        residual_gate (`bool`, defaults to `False`):
            Multiply what each residual branch adds to h by sigmoid(W h + b), as LiGR does.
        max_position_embeddings (`int`, defaults to 200):
            Number of learned absolute positions: the longest history that can be read.
        layer_norm_eps (`float`, defaults to 1e-8):
            Epsilon of the layer norms.
    """

    model_type = "sasrec"
    supports_event_features = True

    num_attention_heads: int = 1
    intermediate_size: int = 64
    hidden_act: str = "relu"
    attention_output: bool = False
    residual_gate: bool = False
    max_position_embeddings: int = 200
    layer_norm_eps: float = 1e-8

    def validate_causal(self):
        """SASRec predicts the next item at every position."""
        if not self.is_causal:
            raise ValueError("is_causal must be True for sasrec, found False")


class SASRecLayer(GradientCheckpointingLayer):
    """
    h = h + dropout(SA(norm(h)));   h = h + dropout(FFN(norm(h)))   (section III.B and III.C)

    With gates, the second terms are multiplied by sigmoid(W h + b).
    """

    def __init__(self, config: SASRecConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config, has_output_projection=config.attention_output)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            ACT2FN[config.hidden_act],
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.attention_gate = self.feed_forward_gate = None
        if config.residual_gate:
            self.attention_gate = nn.Linear(config.hidden_size, config.hidden_size)
            self.feed_forward_gate = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None, last_position_only: bool = False) -> Tensor:
        """(B, L, D) -> (B, L, D), or (B, 1, D) with `last_position_only`."""
        attended, _ = self.attention(self.attention_norm(hidden_states), mask, last_position_only)
        if last_position_only:
            hidden_states = hidden_states[:, -1:]
        hidden_states = self.add(hidden_states, attended, self.attention_gate)
        transformed = self.feed_forward(self.feed_forward_norm(hidden_states))
        return self.add(hidden_states, transformed, self.feed_forward_gate)

    def add(self, hidden_states: Tensor, branch: Tensor, gate: nn.Module | None) -> Tensor:
        """Return what goes on after a residual branch: twice (B, L, D) -> (B, L, D)."""
        branch = self.dropout(branch)
        return hidden_states + (branch if gate is None else gate(hidden_states).sigmoid() * branch)


class SASRecPreTrainedModel(BaselinePreTrainedModel):
    config: SASRecConfig
    config_class = SASRecConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["SASRecLayer"]
    _can_record_outputs = {"hidden_states": SASRecLayer, "attentions": SELF_ATTENTIONS}


def open_diagonal(mask: Tensor | None) -> Tensor | None:
    """Let every position attend to itself, so that padding has a key, too: without one, kernels may return NaN.

    `mask` is as Transformers makes it, (B, 1, L, L): booleans, or what is added to scores. Items see the same keys.
    """
    if mask is None:
        return None
    diagonal = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask | diagonal if mask.dtype == torch.bool else mask.masked_fill(diagonal, 0.0)


class SASRecModel(BaselineModel, SASRecPreTrainedModel):
    """Embeddings and positions, self-attention blocks and the final norm: token ids to a vector at each position."""

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.embeddings = ItemEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        last_position_only: bool,
        event_features: Tensor | None = None,
    ) -> Tensor:
        embeddings = self.embeddings(input_ids, math.sqrt(self.config.hidden_size), event_features)
        hidden_states = self.dropout(embeddings)
        mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values=None)
        mask = open_diagonal(mask)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, mask, last_position_only and i == last)
        return self.norm(hidden_states)


class SASRecForSequentialRecommendation(BaselineForSequentialRecommendation, SASRecPreTrainedModel):
    """SASRec with its scores over the catalogue, its training losses and `recommend`."""

    base_model_class = SASRecModel
    paper = 'Kang and McAuley 2018; softmax attention, `attn_implementation="sdpa"` or `"eager"`'
    description = "SASRec reads the history with causal self-attention and predicts the next item at each position."
    citation = r"""
    @inproceedings{kang2018self,
      title = {Self-Attentive Sequential Recommendation},
      author = {Kang, Wang-Cheng and McAuley, Julian},
      booktitle = {ICDM},
      year = {2018},
    }
    """


__all__ = ["SASRecConfig", "SASRecForSequentialRecommendation", "SASRecModel"]
