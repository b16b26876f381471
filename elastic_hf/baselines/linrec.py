"""LinRec (Liu et al. 2023, "LinRec: Linear Attention Mechanism for Long-term Sequential Recommender Systems").

A post-norm Transformer whose attention has no softmax, so that keys and values can be multiplied first:

    A'(Q, K, V) = rho_1(elu(Q)) (rho_2(elu(K))^T V)                                                     (1)

rho_1 gives each row of elu(Q), one position, length 1; rho_2 gives each column of elu(K), one feature over all
positions, length 1. Written for one reader and one feature f, with n_f = sqrt(sum_j elu(K)_jf^2),

    y_t = 1/sqrt(K) sum_f  elu(Q)_tf / (|elu(Q)_t| n_f)  sum_j elu(K)_jf V_j                            (2)

The causal form lets both sums over j, the one in n_f too, end at t: position t sees what (2) gives for the history up
to t. As n_f divides whichever factor has the index f, running norms go into the query, and the keys stay as they are.

The factor 1/sqrt(K) is the authors' code's. That code gives each item's key length 1, which is rho_1; here rho_2 is
the paper's, by columns.

Axis letters: B batch, H heads, L history length, D hidden size, K head size, Q readers, N chunks, C chunk size.
"""

import math

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from .common import (
    BaselineForSequentialRecommendation,
    BaselineModel,
    BaselinePreTrainedModel,
    ItemEmbeddings,
    PostNormLayer,
    TransformerConfig,
)


CHUNK_SIZE = 64
# Shorter vectors than 1e-6 are divided by 1e-6: nothing divides by zero, in the gradient neither.
SMALLEST_SQUARE = 1e-12


def linear_attention(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
    """Every reader reads the whole history, equation (2) in O((L + Q) K^2).

    Args:
        query (`torch.Tensor` of shape `(B, H, Q, K)`): the readers.
        key, value (`torch.Tensor` of shape `(B, H, L, K)`): what is read.
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): False for padding.

    Returns:
        `torch.Tensor` of shape `(B, H, Q, K)`; zeros where the whole history is padding.
    """
    key = _activate_keys(key, attention_mask)
    squares = (key**2).sum(dim=-2, keepdim=True)  # (B, H, 1, K)
    return _weigh_features(query, squares) @ (key.transpose(-1, -2) @ value)


def causal_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """Position t reads the history up to t, equation (2) in O(L (C + K) K) and with N = L / C states of K x K.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, H, L, K)`).
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): False for padding.
        chunk_size (`int`): C, the number of positions that are read item by item; sums stand for all before them.

    Returns:
        `torch.Tensor` of shape `(B, H, L, K)`; zeros where nothing but padding has been read.
    """
    length = key.shape[-2]
    key = _activate_keys(key, attention_mask)
    query = _weigh_features(query, (key**2).cumsum(dim=-2))

    chunk_size = min(chunk_size, length)
    padding = -length % chunk_size
    query, key, value = (
        F.pad(x, (0, 0, 0, padding)).unflatten(-2, (-1, chunk_size)) for x in (query, key, value)
    )  # (B, H, N, C, K)
    states = (key.transpose(-1, -2) @ value).cumsum(dim=-3)  # (B, H, N, K, K)
    earlier = F.pad(states[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
    output = query @ earlier + (query @ key.transpose(-1, -2)).tril() @ value
    return output.flatten(-3, -2)[..., :length, :]


def _activate_keys(key: Tensor, attention_mask: Tensor) -> Tensor:
    """elu(K), zeros for padding: (B, H, L, K) -> (B, H, L, K)."""
    return F.elu(key).masked_fill(~attention_mask[:, None, :, None], 0.0)


def _weigh_features(query: Tensor, key_squares: Tensor) -> Tensor:
    """What multiplies the sums over items in (2), from `key_squares`, n_f^2 at each reader: (B, H, Q, K)."""
    query = F.elu(query)
    squares = (query**2).sum(dim=-1, keepdim=True)
    lengths = squares.clamp(min=SMALLEST_SQUARE).sqrt() * key_squares.clamp(min=SMALLEST_SQUARE).sqrt()
    return query / lengths / math.sqrt(query.shape[-1])


@strict
class LinRecConfig(TransformerConfig):
    r"""
    Configuration of [`LinRecModel`] and [`LinRecForSequentialRecommendation`]: the fields of [`RecommenderConfig`] and
    these. `is_causal=False` is the paper's attention.

    Args:
        num_hidden_layers (`int`, defaults to 2):
            Number of Transformer layers.
        num_attention_heads (`int`, defaults to 2):
            Attention heads; must divide `hidden_size`.
        intermediate_size (`int`, defaults to 256):
            Width of the point-wise feed-forward network.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings and of each residual branch.
        max_position_embeddings (`int`, defaults to 201):
            Number of learned absolute positions: the longest history that can be read, with its mask token.
        layer_norm_eps (`float`, defaults to 1e-12):
            Epsilon of the layer norms.
    """

    model_type = "linrec"


class LinRecAttention(nn.Module):
    """Linear attention between projections, causal or over the whole history as the configuration says."""

    def __init__(self, config: LinRecConfig):
        super().__init__()
        self.is_causal = config.is_causal
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, last_position_only: bool) -> tuple[Tensor, None]:
        """
        (B, L, D) and a mask (B, L) -> (B, L, D), or (B, 1, D) with `last_position_only`, and no weights: none are ever
        held.
        """
        readers = hidden_states[:, -1:] if last_position_only else hidden_states
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection, states in ((self.query, readers), (self.key, hidden_states), (self.value, hidden_states))
        )  # (B, H, L, K)
        # The last position has the whole history behind it, in both forms.
        attend = causal_linear_attention if self.is_causal and not last_position_only else linear_attention
        # States add up thousands of items: float32 at least, whatever autocast says.
        with torch.autocast(hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(query.dtype, torch.float32)
            output = attend(query.to(dtype), key.to(dtype), value.to(dtype), attention_mask)
        return self.output(output.transpose(1, 2).flatten(2).to(hidden_states.dtype)), None


class LinRecPreTrainedModel(BaselinePreTrainedModel):
    config: LinRecConfig
    config_class = LinRecConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["PostNormLayer"]
    _can_record_outputs = {"hidden_states": PostNormLayer}


class LinRecModel(BaselineModel, LinRecPreTrainedModel):
    """Normed item embeddings with positions and Transformer layers: token ids to a vector at each position."""

    def __init__(self, config: LinRecConfig):
        super().__init__(config)
        self.embeddings = ItemEmbeddings(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            PostNormLayer(config, LinRecAttention(config)) for _ in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def encode(self, input_ids: Tensor, attention_mask: Tensor, last_position_only: bool) -> Tensor:
        hidden_states = self.dropout(self.norm(self.embeddings(input_ids)))
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, last_position_only and i == last, attention_mask)
        return hidden_states


class LinRecForSequentialRecommendation(BaselineForSequentialRecommendation, LinRecPreTrainedModel):
    """LinRec with its scores over the catalogue, its training losses and `recommend`."""

    base_model_class = LinRecModel
    paper = "Liu et al. 2023; `is_causal=False` is the paper's attention, the default its causal form"
    description = (
        "LinRec replaces the softmax of self-attention by normalised features, so that its cost is linear in "
        "the length of the history."
    )
    citation = r"""
    @inproceedings{liu2023linrec,
      title = {{LinRec}: Linear Attention Mechanism for Long-term Sequential Recommender Systems},
      author = {Liu, Langming and Cai, Liu and Zhang, Chi and Zhao, Xiangyu and Gao, Jingtong and Wang, Wanyu and
        Lv, Yifu and Fan, Wenqi and Wang, Yiqi and He, Ming and Liu, Zitao and Li, Qing},
      booktitle = {SIGIR},
      year = {2023},
      doi = {10.1145/3539618.3591717},
    }
    """


__all__ = ["LinRecConfig", "LinRecForSequentialRecommendation", "LinRecModel"]
