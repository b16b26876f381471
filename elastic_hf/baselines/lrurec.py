"""LRURec (Yue et al. 2024, "Linear Recurrent Units for Sequential Recommendation").

A post-norm Transformer with a linear recurrent unit in the place of attention. Its state is N complex numbers, each of
which forgets and turns at a pace of its own, the same for all items:

    s_t = lambda * s_(t-1) + exp(gamma) * (B x_t + b)            lambda = exp(-exp(nu) + i exp(theta))
    y_t = Re(C s_t) + c

Training starts with |lambda| on a ring from 0.8 to 0.99 and with exp(gamma) = sqrt(1 - |lambda|^2), which makes states
as large as what they read. A state is zero until the first item: padding changes nothing. The bias of each item in the
scores is left out, as in all models here.

Axis letters: B batch, L history length, D hidden size, N states.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ..models.configuration_recommender import RecommenderConfig
from .common import BaselineForSequentialRecommendation, BaselineModel, BaselinePreTrainedModel, PostNormLayer


RING = (0.8, 0.99)


@strict
class LRURecConfig(RecommenderConfig):
    r"""
    Configuration of [`LRURecModel`] and [`LRURecForSequentialRecommendation`]: the fields of [`RecommenderConfig`] and
    these.

    Args:
        num_hidden_layers (`int`, defaults to 2):
            Number of layers.
        recurrent_size (`int`, defaults to 128):
            Number N of complex numbers in the state of a layer.
        intermediate_size (`int`, defaults to 256):
            Width of the point-wise feed-forward network.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings, of each residual branch and inside the feed-forward network.
        layer_norm_eps (`float`, defaults to 1e-5):
            Epsilon of the layer norms.
    """

    model_type = "lrurec"

    num_hidden_layers: int = 2
    recurrent_size: int = 128
    intermediate_size: int = 256
    hidden_dropout: float | int = 0.2
    layer_norm_eps: float = 1e-5

    def validate_sizes(self):
        """Every size is positive."""
        self._validate_at_least(1, "num_hidden_layers", "recurrent_size", "intermediate_size")
        self._validate_fractions("hidden_dropout")

    def validate_causal(self):
        """LRURec predicts the next item at every position."""
        if not self.is_causal:
            raise ValueError("is_causal must be True for lrurec, found False")


def linear_recurrence(inputs: Tensor, factor: Tensor) -> Tensor:
    """Return the states s_t = factor * s_(t-1) + inputs_t, from s = 0, by recursive doubling, in O(L log L).

    After n steps, states have read the last 2^n positions.

    Args:
        inputs (`torch.Tensor` of shape `(B, L, N)`): real or complex.
        factor (`torch.Tensor` of shape `(N,)`): of the same type.

    Returns:
        `torch.Tensor` of shape `(B, L, N)`.
    """
    states, num_read = inputs, 1
    while num_read < inputs.shape[1]:
        states = torch.cat([states[:, :num_read], states[:, num_read:] + factor * states[:, :-num_read]], dim=1)
        factor, num_read = factor * factor, 2 * num_read
    return states


class LinearRecurrentUnit(nn.Module):
    """The recurrence between two projections, of which complex numbers come out and go in as pairs of real ones."""

    def __init__(self, config: LRURecConfig):
        super().__init__()
        size = config.recurrent_size
        self.log_decay = nn.Parameter(torch.empty(size))
        self.log_angle = nn.Parameter(torch.empty(size))
        self.log_scale = nn.Parameter(torch.empty(size))
        self.input = nn.Linear(config.hidden_size, 2 * size)
        self.output = nn.Linear(2 * size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, last_position_only: bool) -> tuple[Tensor, None]:
        """(B, L, D) and a mask (B, L) -> (B, L, D), or (B, 1, D) with `last_position_only`, and no weights."""
        inputs = self.input(hidden_states)
        # States add up thousands of items: float32 at least, whatever autocast says.
        with torch.autocast(inputs.device.type, enabled=False):
            inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
            weights = (self.log_decay, self.log_angle, self.log_scale)
            decay, angle, scale = (weight.to(inputs.dtype).exp() for weight in weights)
            inputs = inputs.masked_fill(~attention_mask[..., None], 0.0).unflatten(-1, (-1, 2))
            inputs = torch.view_as_complex(inputs) * scale  # (B, L, N)
            log_factor = torch.complex(-decay, angle)
            if last_position_only:
                lags = torch.arange(inputs.shape[1] - 1, -1, -1, device=inputs.device)
                states = (torch.exp(lags[:, None] * log_factor) * inputs).sum(dim=1, keepdim=True)
            else:
                states = linear_recurrence(inputs, log_factor.exp())
            states = torch.view_as_real(states).flatten(-2)
        return self.output(states.to(hidden_states.dtype)), None

    def init_weights(self):
        """Draw the paces, evenly over the area of the ring, and set the scales to them."""
        smallest, largest = (modulus**2 for modulus in RING)
        squares = smallest + (largest - smallest) * torch.rand_like(self.log_decay)
        init.copy_(self.log_decay, (-0.5 * squares.log()).log())
        init.copy_(self.log_angle, (2 * math.pi * torch.rand_like(self.log_angle)).log())
        init.copy_(self.log_scale, 0.5 * (-torch.expm1(-2 * self.log_decay.exp())).log())


class LRURecPreTrainedModel(BaselinePreTrainedModel):
    config: LRURecConfig
    config_class = LRURecConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["PostNormLayer"]
    _can_record_outputs = {"hidden_states": PostNormLayer}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LinearRecurrentUnit):
            module.init_weights()


class LRURecModel(BaselineModel, LRURecPreTrainedModel):
    """Normed item embeddings and layers around linear recurrent units: token ids to a vector at each position."""

    def __init__(self, config: LRURecConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            PostNormLayer(config, LinearRecurrentUnit(config), activation_dropout=config.hidden_dropout)
            for _ in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def encode(self, input_ids: Tensor, attention_mask: Tensor, last_position_only: bool) -> Tensor:
        hidden_states = self.norm(self.dropout(self.embed_tokens(input_ids)))
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, last_position_only and i == last, attention_mask)
        return hidden_states


class LRURecForSequentialRecommendation(BaselineForSequentialRecommendation, LRURecPreTrainedModel):
    """LRURec with its scores over the catalogue, its training losses and `recommend`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    base_model_class = LRURecModel
    paper = "Yue et al. 2024"
    description = (
        "LRURec reads the history with linear recurrent units, whose state of complex numbers is computed at all "
        "positions in parallel."
    )
    citation = r"""
    @inproceedings{yue2024linear,
      title = {Linear Recurrent Units for Sequential Recommendation},
      author = {Yue, Zhenrui and Wang, Yueqi and He, Zhankui and Zeng, Huimin and McAuley, Julian and Wang, Dong},
      booktitle = {WSDM},
      pages = {930--938},
      year = {2024},
    }
    """


__all__ = ["LRURecConfig", "LRURecForSequentialRecommendation", "LRURecModel"]
