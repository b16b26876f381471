"""LightSANs (Fan et al. 2021, "Lighter and Better: Low-Rank Decomposed Self-Attention Networks for Next-Item
Recommendation")."""

import math

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from .common import (
    BaselineForSequentialRecommendation,
    BaselineModel,
    BaselinePreTrainedModel,
    ItemEmbeddings,
    PostNormLayer,
    TransformerConfig,
)


@strict
class LightSANsConfig(TransformerConfig):
    r"""
    Configuration of [`LightSANsModel`] and [`LightSANsForSequentialRecommendation`]: the fields of
    [`RecommenderConfig`], with `is_causal=False` by default, and these. As published the model trains with the
    objective `"prefix"`, the default here; `"masked_item"` trains many positions in one pass.

    Args:
        num_hidden_layers (`int`, defaults to 2):
            Number of Transformer layers.
        num_attention_heads (`int`, defaults to 2):
            Attention heads; must divide `hidden_size`.
        num_latent_interests (`int`, defaults to 5):
            Number E of interests that a history is pooled into (the paper's k).
        intermediate_size (`int`, defaults to 256):
            Width of the point-wise feed-forward network.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings and of each residual branch.
        max_position_embeddings (`int`, defaults to 201):
            Number of learned absolute positions: the longest history that can be read, and one for the mask token
            that `"masked_item"` appends at inference.
        layer_norm_eps (`float`, defaults to 1e-12):
            Epsilon of the layer norms.
    """

    model_type = "lightsans"

    is_causal: bool = False
    training_objective: str = "prefix"
    num_latent_interests: int = 5

    def validate_interests(self):
        """There is an interest to pool into."""
        self._validate_at_least(1, "num_latent_interests")

    def validate_causal(self):
        """The interests of LightSANs are pooled from the whole history."""
        if self.is_causal:
            raise ValueError("is_causal must be False for lightsans, found True")


def pool_interests(states: Tensor, interests: Tensor, mask: Tensor) -> Tensor:
    """softmax(H theta^T)^T H, the softmax over the positions (the paper's item-to-interest aggregation).

    Args:
        states (`torch.Tensor` of shape `(B, L, D)`): H, keys or values of the items.
        interests (`torch.Tensor` of shape `(E, D)`): theta.
        mask (`torch.BoolTensor` of shape `(B, L)`): what may be read, at least one position of each row.

    Returns:
        `torch.Tensor` of shape `(B, E, D)`.
    """
    weights = (states @ interests.T).masked_fill(~mask[..., None], -math.inf).softmax(dim=1)  # (B, L, E)
    return weights.transpose(1, 2) @ states


def low_rank_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_interests: Tensor,
    value_interests: Tensor,
    position_query: Tensor,
    position_key: Tensor,
    mask: Tensor,
    num_heads: int,
) -> Tensor:
    """Items read the history's interests, and positions read positions. In each head, with K = D / H,

        softmax(Q K~^T / sqrt(K)) V~  +  softmax(P_Q P_K^T / sqrt(K)) V

    where K~ and V~ are keys and values pooled by [`pool_interests`] before they are cut into heads: the paper's
    item-to-interest interaction and its decoupled position encoding. The paper pads nothing; here padding is neither
    pooled nor read by position.

    Args:
        query (`torch.Tensor` of shape `(B, Q, D)`): of the positions that read.
        key, value (`torch.Tensor` of shape `(B, L, D)`).
        key_interests, value_interests (`torch.Tensor` of shape `(E, D)`).
        position_query (`torch.Tensor` of shape `(Q, D)`).
        position_key (`torch.Tensor` of shape `(L, D)`).
        mask (`torch.BoolTensor` of shape `(B, L)`): what may be read, at least one position of each row.
        num_heads (`int`): H, a divisor of D.

    Returns:
        `torch.Tensor` of shape `(B, Q, D)`.
    """

    def heads(states: Tensor) -> Tensor:
        return states.expand(len(query), -1, -1).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, L, K)

    from_items = F.scaled_dot_product_attention(
        heads(query),
        heads(pool_interests(key, key_interests, mask)),
        heads(pool_interests(value, value_interests, mask)),
    )
    from_positions = F.scaled_dot_product_attention(
        heads(position_query), heads(position_key), heads(value), attn_mask=mask[:, None, None]
    )
    return (from_items + from_positions).transpose(1, 2).flatten(2)


class LightSANsAttention(nn.Module):
    """[`low_rank_attention`] between its projections; the positions are normed first, as in the authors' code."""

    def __init__(self, config: LightSANsConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_interests = nn.Parameter(torch.empty(config.num_latent_interests, config.hidden_size))
        self.value_interests = nn.Parameter(torch.empty(config.num_latent_interests, config.hidden_size))
        self.position_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.position_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.position_key = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, positions: Tensor, mask: Tensor, last_position_only: bool
    ) -> tuple[Tensor, None]:
        """
        (B, L, D), positions (L, D) and a mask (B, L) -> (B, L, D), or (B, 1, D) with `last_position_only`, and no
        weights: items do not read items.
        """
        positions = self.position_norm(positions)
        first = -1 if last_position_only else 0
        output = low_rank_attention(
            self.query(hidden_states[:, first:]),
            self.key(hidden_states),
            self.value(hidden_states),
            self.key_interests,
            self.value_interests,
            self.position_query(positions[first:]),
            self.position_key(positions),
            mask,
            self.num_heads,
        )
        return self.output(output), None


class LightSANsPreTrainedModel(BaselinePreTrainedModel):
    config: LightSANsConfig
    config_class = LightSANsConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["PostNormLayer"]
    _can_record_outputs = {"hidden_states": PostNormLayer}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LightSANsAttention):
            # The authors' scale: with initializer_range all interests would begin as the mean of the history.
            init.normal_(module.key_interests)
            init.normal_(module.value_interests)


class LightSANsModel(BaselineModel, LightSANsPreTrainedModel):
    """
    Item embeddings and Transformer layers that get the positions apart: token ids to a vector at each position.

    The item embeddings are normed, as in the authors' code; no position is added to them.
    """

    def __init__(self, config: LightSANsConfig):
        super().__init__(config)
        self.embeddings = ItemEmbeddings(config)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            PostNormLayer(config, LightSANsAttention(config)) for _ in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def encode(self, input_ids: Tensor, attention_mask: Tensor, last_position_only: bool) -> Tensor:
        # A softmax needs a position: a row of padding alone reads itself.
        mask = attention_mask | ~attention_mask.any(dim=1, keepdim=True)
        positions = self.embeddings.positions(input_ids)
        hidden_states = self.dropout(self.embedding_norm(self.embeddings.embed_tokens(input_ids)))
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, last_position_only and i == last, positions, mask)
        return hidden_states


class LightSANsForSequentialRecommendation(BaselineForSequentialRecommendation, LightSANsPreTrainedModel):
    """LightSANs with its scores over the catalogue, its training losses and `recommend`."""

    base_model_class = LightSANsModel
    paper = "Fan et al. 2021, with padding kept out of its pooling"
    description = "LightSANs lets items attend to a few latent interests of the history instead of to each other."
    citation = r"""
    @inproceedings{fan2021lighter,
      title = {Lighter and Better: Low-Rank Decomposed Self-Attention Networks for Next-Item Recommendation},
      author = {Fan, Xinyan and Liu, Zheng and Lian, Jianxun and Zhao, Wayne Xin and Xie, Xing and Wen, Ji-Rong},
      booktitle = {SIGIR},
      year = {2021},
      doi = {10.1145/3404835.3462978},
    }
    """


__all__ = ["LightSANsConfig", "LightSANsForSequentialRecommendation", "LightSANsModel"]
