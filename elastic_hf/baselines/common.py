"""What the baselines share: the configuration, item embeddings, softmax self-attention and the post-norm layer."""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..models.configuration_recommender import RecommenderConfig
from ..models.event_features import EventFeatures, read_event_features
from ..models.event_time import read_times
from ..models.modeling_recommender import SequentialRecommenderMixin, validate_histories, validate_outputs


# Positions of a batch that are encoded at once where no gradient is needed, so that memory does not grow with the
# batch.
MAX_POSITIONS = 2**17


@strict
class TransformerConfig(RecommenderConfig):
    """The fields of [`RecommenderConfig`] and those of every Transformer; each model documents its own defaults."""

    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 256
    hidden_dropout: float | int = 0.2
    max_position_embeddings: int = 201
    layer_norm_eps: float = 1e-12

    def validate_sizes(self):
        """Every size is positive."""
        self._validate_at_least(
            1, "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"
        )
        self._validate_fractions("hidden_dropout")
        self._validate_heads()


class BaselinePreTrainedModel(PreTrainedModel):
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True


class BaselineModel(BaselinePreTrainedModel):
    """Token ids to a vector at each position, by the `encode` of each model."""

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        last_position_only: bool = False,
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        event_features: Tensor | None = None,
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
            timestamps, request_timestamps, event_features (`torch.Tensor`, *optional*):
                With `use_timestamps` and `event_features`, as [`ElasticModel`] takes them.
        """
        attention_mask = validate_histories(input_ids, attention_mask, self.config)
        times = read_times(self, timestamps, request_timestamps, attention_mask, last_position_only)
        events = dict(zip(("timestamps", "request_timestamps"), times, strict=False))
        events |= read_event_features(self, event_features, attention_mask)
        is_recorded = validate_outputs(self, kwargs)
        if is_recorded or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return BaseModelOutput(self.encode(input_ids, attention_mask, last_position_only, **events))
        num_rows = max(1, MAX_POSITIONS // input_ids.shape[1])
        batches = zip(*(x.split(num_rows) for x in (input_ids, attention_mask, *events.values())), strict=True)
        encoded = [
            self.encode(ids, mask, last_position_only, **dict(zip(events, of_batch, strict=True)))
            for ids, mask, *of_batch in batches
        ]
        return BaseModelOutput(torch.cat(encoded))

    def encode(self, input_ids: Tensor, attention_mask: Tensor, last_position_only: bool) -> Tensor:
        """(B, L) and a mask (B, L) -> (B, L, D), or (B, 1, D) with `last_position_only`."""
        raise NotImplementedError


class BaselineForSequentialRecommendation(SequentialRecommenderMixin, BaselinePreTrainedModel):
    """A baseline's base model, its `base_model_class`, under the head that all models here share."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.embed_tokens.weight"}
    base_model_class: type[BaselineModel]

    def __init__(self, config: RecommenderConfig):
        super().__init__(config)
        self.model = self.base_model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ItemEmbeddings(nn.Module):
    """Item embeddings and learned absolute positions: the latest item always has the last position."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.max_position_embeddings = config.max_position_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.event_features = EventFeatures(config) if config.event_features else None

    def positions(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of the positions of all histories: (B, L) -> (L, D)."""
        length, longest = input_ids.shape[1], self.max_position_embeddings
        if length > longest:
            raise ValueError(f"input_ids must not be longer than max_position_embeddings ({longest}), found {length}")
        return self.embed_positions(torch.arange(longest - length, longest, device=input_ids.device))

    def forward(self, input_ids: Tensor, scale: float = 1.0, event_features: Tensor | None = None) -> Tensor:
        """scale * e + p, with the features of its event in e: (B, L) and, of models that read them, (B, L, F) ->
        (B, L, D)"""
        embeddings = self.embed_tokens(input_ids)
        if event_features is not None:
            embeddings = self.event_features(embeddings, event_features)
        return embeddings * scale + self.positions(input_ids)


class SelfAttention(nn.Module):
    """Softmax self-attention by the implementation that the configuration names, `"sdpa"` or `"eager"`."""

    def __init__(self, config: TransformerConfig, has_output_projection: bool):
        super().__init__()
        self.config = config
        self.is_causal = config.is_causal
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size) if has_output_projection else nn.Identity()

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None, last_position_only: bool
    ) -> tuple[Tensor, Tensor | None]:
        """
        (B, L, D) -> (B, L, D), or (B, 1, D) with `last_position_only`, and the weights, (B, H, Q, L), where the
        implementation holds them. `mask` is as `create_causal_mask` makes it.
        """
        readers = hidden_states
        if last_position_only:
            readers = hidden_states[:, -1:]
            mask = None if mask is None else mask[:, :, -1:]
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection, states in ((self.query, readers), (self.key, hidden_states), (self.value, hidden_states))
        )  # (B, H, L, K)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(self, query, key, value, mask, dropout=0.0, scaling=self.head_size**-0.5)
        return self.output(output.flatten(2)), weights  # from (B, Q, H, K)


# What a model whose layers hold one `SelfAttention` each can record, beside its hidden states.
SELF_ATTENTIONS = OutputRecorder(SelfAttention, index=1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Softmax attention that holds all (B, H, L, L) weights: (B, H, L, K) -> (B, L, H, K), and the weights."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class PostNormLayer(GradientCheckpointingLayer):
    """
    h = norm(h + dropout(A(h)));   h = norm(h + dropout(FFN(h))), around any attention A.

    The feed-forward network's activation is GELU, then a dropout with the probability `activation_dropout`.
    """

    def __init__(self, config: RecommenderConfig, attention: nn.Module, activation_dropout: float = 0.0):
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.Sequential(nn.GELU(), nn.Dropout(activation_dropout)),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, last_position_only: bool, *attention_args) -> Tensor:
        """(B, L, D) -> (B, L, D), or (B, 1, D) with `last_position_only`.

        `attention_args` go to the attention, between the hidden states and `last_position_only`.
        """
        attended, _ = self.attention(hidden_states, *attention_args, last_position_only)
        if last_position_only:
            hidden_states = hidden_states[:, -1:]
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
        return self.feed_forward_norm(hidden_states + self.dropout(self.feed_forward(hidden_states)))
