"""ELASTIC: interest experts compress a shallow stream of the items once, and a deep reader looks at what they hold.

    e_j = embedding of item j;    x_j = conv(norm(e))_j                                             the stream
    c_t = what each expert has compressed of x_1 .. x_t                          see dispatcher_attention.py
    h_t = sqrt(D) e_t, and for each layer:   q, g = W_qg norm(h)                  the first layer's query reads x_t
                                     h = h + W_o(silu(g) * dispatch(q, W_k c, W_v c))
                                     h = h + Memory(norm(h))                            last layer only
                                     h = h + FeedForward(norm(h))
    user embedding = norm(h_t)

With `use_timestamps`, e_j also holds the pause before the event and its time of day, week and year; an expert forgets
in the pauses, too; and h_t, the first query and the logits of all experts hold the same of the request. With
`event_features`, e_j holds those of the event as well.

Serving compresses a history once and runs the layers at its last position alone: depth, the feed-forward block and
the memory cost nothing per item of the history.

Axis letters: B batch, L history length, D hidden size, N layers, H heads, K head size (D / H), E interest experts per
head, M experts of all heads (H * E).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import capture_outputs

from .borrowed_ids import borrow_ids
from .cache_elastic import ElasticCache, digest_weights
from .catalogue import row_chunks
from .causal_convolution import causal_convolution, prepend
from .configuration_elastic import ElasticConfig
from .dispatcher_attention import (
    CHUNK_SIZE,
    CHUNK_SIZE_WITH_PAUSES,
    compressed_interests,
    dispatch,
    expert_scores,
    forgetting,
    pool_history,
    prepare_chunks,
    read_chunks,
    to_exponent,
)
from .event_features import EventFeatures, read_event_features
from .event_time import pauses_before, read_times
from .explanation_elastic import ElasticExplanation, explain
from .interest_memory import ElasticInterestMemory
from .item_features import ItemCategories, ItemFeatures, ItemNumbers
from .limits import MAX_POSITIONS, MIN_ITEMS, limit
from .modeling_recommender import (
    SequentialRecommenderMixin,
    evaluating,
    leave_out_special_tokens,
    unsharded,
    validate_histories,
    validate_outputs,
)
from .time_elastic import ElasticTime


if TYPE_CHECKING:
    from .item_tokenizer import ElasticItemTokenizer


@dataclass
class ElasticModelOutput(BaseModelOutput):
    """A [`~transformers.modeling_outputs.BaseModelOutput`], and the `cache` where `use_cache=True` asked for it."""

    cache: ElasticCache | None = None


class ElasticStream(nn.Module):
    """x = conv(norm(e)), and a feed-forward block if there is one: what the experts read. Position by position, but
    for the latest items."""

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.convolution = nn.Parameter(torch.empty(config.conv_kernel_size, config.hidden_size))
        width = config.stream_intermediate_size
        self.feed_forward = ElasticFeedForward(config, width) if width > 0 else None

    def forward(
        self, embeddings: Tensor, attention_mask: Tensor, conv_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, L) and the convolution's inputs before them, (B, kernel_size - 1, D), to (B, L, D) and the
        convolution's last inputs."""
        normed = self.norm(embeddings) * attention_mask[..., None]
        num_earlier = self.convolution.shape[0] - 1
        if conv_state is None:
            nothing = normed.new_zeros(normed.shape[0], num_earlier, normed.shape[-1])
            inputs = torch.cat([nothing, normed], dim=1)
        else:
            inputs = prepend(conv_state, normed, attention_mask)
        del normed
        stream = causal_convolution(inputs, self.convolution)
        if conv_state is not None:
            stream.mul_(attention_mask[..., None])  # what came earlier is convolved into the padding, too
        if self.feed_forward is not None:
            stream = self.feed_forward(stream) * attention_mask[..., None]
        return stream, inputs[:, inputs.shape[1] - num_earlier :].clone()  # a view would keep all inputs


class ElasticInterestExperts(nn.Module):
    """The interest experts, which all layers read: what of the stream each takes, and how long it keeps it."""

    def __init__(self, config: ElasticConfig):
        super().__init__()
        sizes = (config.num_attention_heads, config.num_interest_experts)
        self.experts = nn.Parameter(torch.empty(*sizes, config.hidden_size))  # (H, E, D)
        self.log_half_life = nn.Parameter(torch.empty(sizes))  # (H, E)
        self.log_half_life_seconds = nn.Parameter(torch.empty(sizes)) if config.use_timestamps else None

    @property
    def half_lives(self) -> Tensor:
        """After how many items each expert has forgotten half of what it held: (H, E), at least 1."""
        return 1 + _float32(self.log_half_life).exp()

    @property
    def half_lives_seconds(self) -> Tensor | None:
        """After how many seconds without an item each expert has forgotten half of what it held: (H, E)."""
        return None if self.log_half_life_seconds is None else _float32(self.log_half_life_seconds).exp()

    def forward(self, stream: Tensor, pauses: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the sigmoids of the items' scores, as [`expert_scores`] does, and logs of what the experts keep of
        their states at each new item: (B, L, D) and, with timestamps, the seconds since the item before, (B, L), to
        (B, L, M) and (M,) or, with timestamps, (B, L, M)."""
        log_forget = -math.log(2) / self.half_lives.to(stream.dtype).flatten()
        if pauses is not None:
            log_forget = forgetting(
                log_forget, pauses.to(stream.dtype), self.half_lives_seconds.to(stream.dtype).flatten()
            )
        return expert_scores(stream, self.experts.to(stream.dtype).flatten(0, 1)), log_forget


class ElasticAttention(GradientCheckpointingLayer):
    """h + W_o(silu(W_g r) * read(W_q r)): r is the stream in the first layer, and norm(h) after it."""

    def __init__(self, config: ElasticConfig, is_first: bool):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.norm = None if is_first else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def query_and_gate(self, hidden_states: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) twice -> (B, H, L, K) and (B, L, D)"""
        reader = stream if self.norm is None else self.norm(hidden_states)
        reader = reader.to(hidden_states.dtype)
        return self.query(reader).unflatten(-1, (self.num_heads, -1)).transpose(1, 2), self.gate(reader)

    def forward(self, hidden_states: Tensor, stream: Tensor, read: Callable, *interests: Tensor) -> Tensor:
        """(B, L, D) twice -> (B, L, D); `read` is [`read_chunks`] or [`dispatch`], which reads the `interests`, with
        what requests add to their logits, if anything, as the last of them."""
        query, gate = self.query_and_gate(hidden_states, stream)
        with torch.autocast(query.device.type, enabled=False):
            interest = read(_float32(query), *interests)
        interest = interest.transpose(1, 2).flatten(2).to(gate.dtype)
        return hidden_states + self.dropout(self.output(interest * F.silu(gate)))


class ElasticRetrieval(GradientCheckpointingLayer):
    """h + Memory(norm(h))"""

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.memory = ElasticInterestMemory(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def retrieve(self, hidden_states: Tensor) -> Tensor:
        """Return the slots that answer: (B, D) -> (B, G, R)"""
        return self.memory.retrieve(self.norm(hidden_states), self.memory.top_k)[1]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, D) and (B, L) -> (B, L, D)"""
        return hidden_states + self.dropout(self.memory(self.norm(hidden_states), attention_mask))


class ElasticFeedForward(GradientCheckpointingLayer):
    """h + W_down act(W_up norm(h))"""

    def __init__(self, config: ElasticConfig, intermediate_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down = nn.Linear(intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)"""
        return hidden_states + self.dropout(self.down(self.activation(self.up(self.norm(hidden_states)))))


class ElasticLayer(nn.Module):
    """A layer of the reader: attention to the interests, the interest memory in the last layer, feed-forward block."""

    def __init__(self, config: ElasticConfig, index: int):
        super().__init__()
        has_memory = bool(config.num_memory_subkeys) and index == config.num_hidden_layers - 1
        self.attention = ElasticAttention(config, is_first=index == 0)
        self.retrieval = ElasticRetrieval(config) if has_memory else None
        self.feed_forward = ElasticFeedForward(config, config.intermediate_size)

    def forward(
        self, hidden_states: Tensor, stream: Tensor, attention_mask: Tensor, read: Callable, *interests: Tensor
    ) -> Tensor:
        """(B, L, D) twice and (B, L) -> (B, L, D); `read` and `interests` as in [`ElasticAttention`]."""
        hidden_states = self.attention(hidden_states, stream, read, *interests)
        if self.retrieval is not None:
            hidden_states = self.retrieval(hidden_states, attention_mask)
        return self.feed_forward(hidden_states)


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
        std = self.config.initializer_range
        if isinstance(module, ElasticStream):
            init.normal_(module.convolution, std=std)
        elif isinstance(module, ElasticInterestExperts):
            init.normal_(module.experts, std=1 / math.sqrt(self.config.hidden_size))
            # Half-lives from 2 to 1,025 items, evenly spaced in the logarithm.
            steps = torch.linspace(0, 1, self.config.num_interest_experts).expand_as(module.log_half_life)
            init.copy_(module.log_half_life, steps * math.log(1024))
            if module.log_half_life_seconds is not None:
                # From a minute to a year.
                init.copy_(module.log_half_life_seconds, math.log(60) + steps * math.log(365 * 1440))
        elif isinstance(module, ElasticInterestMemory):
            module.init_weights(std)
        elif isinstance(module, ItemCategories | ItemNumbers):
            init.zeros_(module.encoded)


class ElasticModel(ElasticPreTrainedModel):
    """Item embeddings, stream, experts, the layers of the reader and the final norm: token ids to user embeddings."""

    def __init__(self, config: ElasticConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.item_features = ItemFeatures(config) if config.item_features else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.stream = ElasticStream(config)
        self.experts = ElasticInterestExperts(config)
        self.time = ElasticTime(config) if config.use_timestamps else None
        self.event_features = EventFeatures(config) if config.event_features else None
        # Of each head, for all layers: the projections of what its experts hold, or of the items.
        head_size = config.hidden_size // config.num_attention_heads
        self.key_value = nn.ModuleList(
            nn.Linear(config.hidden_size, config.num_hidden_layers * 2 * head_size, bias=False)
            for _ in range(config.num_attention_heads)
        )
        self.layers = nn.ModuleList(ElasticLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        last_position_only: bool = False,
        cache: ElasticCache | None = None,
        use_cache: bool = False,
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        event_features: Tensor | None = None,
        **kwargs,
    ) -> ElasticModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`):
                Histories, oldest item first, padded on the left; with a `cache`, the items that came after it.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                1 for items, 0 for padding. Defaults to everything that is not `pad_token_id`.
            last_position_only (`bool`, defaults to `False`):
                Compress the history and run the layers at its last position only: `last_hidden_state` has shape
                `(batch_size, 1, hidden_size)`.
            cache ([`ElasticCache`], *optional*):
                What was read before. Needs `last_position_only=True`, as does `use_cache`.
            use_cache (`bool`, defaults to `False`):
                Return the `cache` after these items.
            timestamps (`torch.LongTensor` or `torch.DoubleTensor`, `(batch_size, history_length)`, *optional*):
                With `use_timestamps`: when the items came, in Unix seconds.
            request_timestamps (`torch.Tensor` of the same type, *optional*):
                When what comes next is asked for, after each position or, with `last_position_only`, of shape
                `(batch_size,)`; -1, as without it, is a time that is not known.
            event_features (`torch.FloatTensor`, `(batch_size, history_length, num_features)`, *optional*):
                With `event_features` in the configuration: categories, from 0 on, and standardised numbers, in the
                order of the names there, as the tokenizer makes them.
        """
        attention_mask = validate_histories(input_ids, attention_mask, self.config)
        validate_outputs(self, kwargs)
        if (cache is not None or use_cache) and not last_position_only:
            raise ValueError("cache and use_cache need last_position_only=True, found last_position_only=False")
        if cache is not None:
            cache.check(self, len(input_ids))
        last_timestamps = None if cache is None else cache.last_timestamps
        times = read_times(self, timestamps, request_timestamps, attention_mask, last_position_only, last_timestamps)
        events = self.to_events(attention_mask, last_timestamps, *times[:1])
        events |= read_event_features(self, event_features, attention_mask)
        if last_position_only:
            hidden_states, stream, *states = self.compress(input_ids, attention_mask, cache, events)
            read, interests = dispatch, self.project(states[0])
        else:
            embeddings = self.embed(input_ids, **events)
            stream, _ = self.to_stream(embeddings, attention_mask)
            hidden_states = self.scale(embeddings)
            read, interests = read_chunks, self.chunk(stream, attention_mask, events.get("pauses"))
        hidden_states, stream, bias = self.to_readers(hidden_states, stream, *times)
        readers = attention_mask[:, -hidden_states.shape[1] :]
        for layer, of_layer in zip(self.layers, interests, strict=True):
            hidden_states = layer(hidden_states, stream, readers, read, *of_layer, *bias)
        if use_cache:
            cache = self.to_cache(cache, *states, attention_mask, *times[:1])
        return ElasticModelOutput(last_hidden_state=self.norm(hidden_states), cache=cache if use_cache else None)

    def to_events(
        self, attention_mask: Tensor, last_timestamps: Tensor | None = None, timestamps: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return when the items came and how many seconds after the ones before, (B, L) both; nothing without them."""
        if timestamps is None:
            return {}
        return {"timestamps": timestamps, "pauses": pauses_before(timestamps, attention_mask, last_timestamps)}

    def embed(
        self,
        input_ids: Tensor,
        timestamps: Tensor | None = None,
        pauses: Tensor | None = None,
        event_features: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings of the items and of what is known of their events: (B, L) each and features,
        (B, L, F), -> (B, L, D)."""
        embeddings = self.embed_items(input_ids)
        if pauses is not None:
            embeddings = self.time.add_events(embeddings, timestamps, pauses)
        if event_features is not None:
            embeddings = self.event_features(embeddings, event_features)
        return self.dropout(embeddings)

    def embed_items(self, token_ids: Tensor) -> Tensor:
        """Return the vectors of items: (B, L) -> (B, L, D)."""
        if self.item_features is None:
            return self.embed_tokens(token_ids)
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.item_features.vectors(self.embed_tokens, token_ids)
        return F.embedding(token_ids, self.item_features.head(self.embed_tokens).weight)

    def scale(self, embeddings: Tensor) -> Tensor:
        """Return what the reader starts from: (B, L, D) -> (B, L, D)."""
        # Tied embeddings are small for the softmax; as inputs they are learned much sooner at unit scale.
        return math.sqrt(self.config.hidden_size) * embeddings

    def to_stream(
        self, embeddings: Tensor, attention_mask: Tensor, conv_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the stream and the convolution's state, in float32 at least: states add up thousands of items."""
        stream, conv_state = self.stream(embeddings, attention_mask, conv_state)
        return _float32(stream), _float32(conv_state)

    def to_readers(
        self,
        hidden_states: Tensor,
        stream: Tensor,
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Add the times of the requests, (B, Q), to what the reader starts from and to the stream that its first query
        reads, (B, Q, D) twice; and return what they add to the logits of the experts, (B, H, Q, E), if there are any.
        """
        if timestamps is None:
            return hidden_states, stream, ()
        request, bias = self.time.of_requests(request_timestamps, timestamps[:, -hidden_states.shape[1] :])
        request = self.scale(request)
        return hidden_states + request, stream + request, (_float32(bias),)

    def to_cache(
        self,
        cache: ElasticCache | None,
        state: Tensor,
        conv_state: Tensor,
        attention_mask: Tensor,
        timestamps: Tensor | None = None,
    ) -> ElasticCache:
        """Return the cache after histories, or after the items that follow a `cache`."""
        num_items = attention_mask.sum(dim=1) + (0 if cache is None else cache.num_items)
        digest = self.digest() if cache is None else cache.model_digest
        if timestamps is not None:
            timestamps = timestamps[:, -1].double()
            if cache is not None and cache.last_timestamps is not None:
                timestamps = torch.where(attention_mask[:, -1], timestamps, cache.last_timestamps)
        return ElasticCache(state, conv_state, num_items, digest, timestamps)

    def compress(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cache: ElasticCache | None,
        events: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read histories, or the items after a `cache`, with what [`embed`] takes of their `events`.

        Returns what the reader starts from, and the stream, at the last position, (B, 1, D), the recurrent state,
        (B, M, D + 1), and the convolution's, (B, kernel_size - 1, D).

        Where no gradient is needed, a large batch is read a few rows at a time and long histories in pieces.
        """
        num_positions = limit(MAX_POSITIONS, input_ids.device)
        batch_size, length = input_ids.shape
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or input_ids.numel() <= num_positions:
            return self._compress(input_ids, attention_mask, cache, events)
        num_rows = max(1, num_positions // min(length, MIN_ITEMS))
        rows = torch.arange(batch_size, device=input_ids.device).split(num_rows)
        read = [
            self._compress(
                input_ids[some],
                attention_mask[some],
                None if cache is None else cache.select(some),
                {name: x[some] for name, x in events.items()},
                max(MIN_ITEMS, num_positions // len(some)),
            )
            for some in rows
        ]
        return tuple(map(torch.cat, zip(*read, strict=True)))

    def _compress(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cache: ElasticCache | None,
        events: dict[str, Tensor],
        num_items: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[`compress`] as a whole, or in pieces of `num_items`."""
        state = conv_state = None
        if cache is not None:
            state, conv_state = cache.recurrent_state, cache.conv_state
        pieces = [(input_ids, attention_mask, *events.values())]
        if num_items is not None:
            pieces = zip(*(x.split(num_items, dim=1) for x in pieces[0]), strict=True)
        for ids, mask, *values in pieces:
            of_piece = dict(zip(events, values, strict=True))
            embeddings = self.embed(ids, **of_piece)
            stream, conv_state = self.to_stream(embeddings, mask, conv_state)
            last = self.scale(embeddings[:, -1:]), stream[:, -1:]
            del embeddings  # the largest tensors are gone before the next ones come
            with torch.autocast(stream.device.type, enabled=False):
                state = pool_history(stream, *self.experts(stream, of_piece.get("pauses")), mask, state)
        return *last, state, conv_state

    def project(self, state: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what [`dispatch`] reads of a state: (B, M, D + 1) -> keys and values of each layer, (B, H, E, K)."""
        interests = compressed_interests(state).to(self.dtype).chunk(len(self.key_value), dim=1)  # H of (B, E, D)
        projected = [project(interest) for project, interest in zip(self.key_value, interests, strict=True)]
        return self._of_layers(_float32(torch.stack(projected, dim=1)))

    def chunk(self, stream: Tensor, attention_mask: Tensor, pauses: Tensor | None = None) -> list[tuple[Tensor, ...]]:
        """Return what [`read_chunks`] reads of histories, for each layer: (B, L, D) and (B, L) once or twice."""
        num_heads = len(self.key_value)
        items = torch.stack([project(stream.to(self.dtype)) for project in self.key_value], dim=1)
        with torch.autocast(stream.device.type, enabled=False):
            sigmoids, log_forget = self.experts(stream, pauses)
            scores = to_exponent(sigmoids, torch.where(attention_mask, 0.0, -math.inf).to(stream.dtype)[..., None])
            scores = scores.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, L, E)
            log_forget = log_forget.unflatten(-1, (num_heads, -1))
            if pauses is None:
                chunks = prepare_chunks(_float32(items), scores, log_forget[:, None], CHUNK_SIZE)
            else:
                chunks = prepare_chunks(_float32(items), scores, log_forget.transpose(1, 2), CHUNK_SIZE_WITH_PAUSES)
        layers = zip(self._of_layers(chunks.items), self._of_layers(chunks.past), strict=True)
        return [(*item, chunks.weights, chunks.total, *past) for item, past in layers]

    def _of_layers(self, projected: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(..., N * 2 * K) -> keys and values of each layer, (..., K)"""
        keys_values = projected.split(self.config.hidden_size // self.config.num_attention_heads, dim=-1)
        return list(zip(keys_values[::2], keys_values[1::2], strict=True))

    @torch._dynamo.assume_constant_result
    def digest(self) -> str:
        """Return a digest of the weights behind a state: those of the items that were trained on, the stream and the
        experts, and of the times and features of events; and of the features that these items have."""
        of_events = () if self.time is None else (self.time.pause, self.time.phases)
        further = (module for module in (self.event_features, self.item_features) if module is not None)
        modules = (self.stream, self.experts, *of_events, *further)
        num_trained = self.config.vocab_size - self.config.num_added_items
        weights = (weight for module in modules for weight in module.parameters())
        tables = () if self.item_features is None else self.item_features.buffers()
        trained = self.embed_tokens.weight[:num_trained]
        return digest_weights(self, [trained, *weights], [table[:num_trained] for table in tables])


class ElasticForSequentialRecommendation(SequentialRecommenderMixin, ElasticPreTrainedModel):
    """ELASTIC with its scores over the catalogue, its training losses and `recommend`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    supports_cache = True
    paper = "Deng et al. 2024, in this package's own form: compressed once, read deep"
    description = (
        "ELASTIC compresses a history of any length into a fixed number of interest experts by linear dispatcher "
        "attention, once: a deep reader looks at the result, and a user's state of fixed size takes one more item at "
        "the same cost after any history. This is the package's own form and not the paper's, and independent of the "
        "paper's authors, who published no code."
    )
    citation = r"""
    @misc{deng2024elastic,
      title = {{ELASTIC}: Efficient Linear Attention for Sequential Interest Compression},
      author = {Deng, Jiaxin and Wang, Shiyao and Lu, Song and Li, Yinfeng and Luo, Xinchen and Liu, Yuanjun and
        Xu, Peixing and Zhou, Guorui},
      year = {2024},
      eprint = {2408.09380},
      archivePrefix = {arXiv},
    }
    """

    def __init__(self, config: ElasticConfig):
        super().__init__(config)
        self.model = ElasticModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_item_features(self, encoded: dict[str, Tensor]) -> None:
        """Set the features of all items, see [`~item_features.ItemFeatures.set`]."""
        if self.model.item_features is None:
            raise ValueError("set_item_features needs a configuration with item_features, found None")
        self.model.item_features.set(encoded)

    @torch.no_grad()
    def add_items(self, tokenizer: "ElasticItemTokenizer", items: Any, id_scale: float = 1.0) -> Tensor:
        """Add new items to the catalogue, by their features: nothing is trained.

        A new item borrows its id embedding from the trained items most like it, see [`~borrowed_ids.borrow_ids`].
        Items that are known keep their token ids and, bit for bit, their scores, and states of users stay valid.

        Args:
            tokenizer ([`ElasticItemTokenizer`]): of this model, which gets the items, too.
            items: a table with a row for each, see [`ElasticItemTokenizer.add_items`].
            id_scale (`float`, defaults to 1.0): factor of the new items' id embeddings. Above 1, new items are
                recommended more often, at the cost of the others; 0 leaves them to their features alone.

        Returns:
            `torch.LongTensor` of shape `(num_items,)`: the token ids of the items.

        Raises:
            ValueError: if the model has no `item_features`, since nothing else is known of a new item, if the
                tokenizer is of another model, for an `id_scale` that is not a finite number of at least 0, or as
                [`ElasticItemTokenizer.add_items`]. Nothing is changed then.
        """
        config, old_size = self.config, self.config.vocab_size
        if config.item_features is None:
            raise ValueError("add_items needs a model with item_features, by which new items are known, found None")
        if len(tokenizer) != old_size or tokenizer.item_features != config.item_features:
            raise ValueError(
                f"tokenizer must be that of the model, with {old_size} tokens and its item_features, found one with "
                f"{len(tokenizer)} tokens and {'none' if tokenizer.item_features is None else 'some'}"
            )
        if not 0 <= id_scale < math.inf:
            raise ValueError(f"id_scale must be a finite number of at least 0, found {id_scale}")
        encoded = tokenizer.add_items(items)
        PreTrainedModel.resize_token_embeddings(self, len(tokenizer), mean_resizing=False)
        features, weight = self.model.item_features, self.model.embed_tokens.weight
        features.add(encoded)
        token_ids = torch.arange(len(tokenizer), device=weight.device)
        trained = slice(config.num_special_tokens, old_size - config.num_added_items)
        chunks = row_chunks(trained.stop - trained.start, len(tokenizer) - old_size, weight.device)
        known = (features.directions(token_ids[trained][rows]) for rows in chunks)
        new = features.directions(token_ids[old_size:])
        weight[old_size:] = id_scale * borrow_ids(new, known, weight[trained])
        config.item_features = tokenizer.item_features
        config.num_added_items += len(tokenizer) - old_size
        return torch.arange(old_size, len(tokenizer))

    @torch.no_grad()
    def without_item_features(self) -> "ElasticForSequentialRecommendation":
        """Return a model whose id embeddings are the item vectors of this one: its answers are the same."""
        config = ElasticConfig(**self.config.to_dict() | {"item_features": None, "num_added_items": 0})
        model = type(self)(config).to(self.device, self.dtype).train(self.training)
        vectors = self.scoring_head().weight
        weights = {name: weight for name, weight in self.state_dict().items() if ".item_features." not in name}
        model.load_state_dict(weights | {"model.embed_tokens.weight": vectors, "lm_head.weight": vectors})
        return model

    def explain(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        top_k: int = 10,
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        event_features: Tensor | None = None,
    ) -> ElasticExplanation:
        """Explain recommendations, see [`~explanation_elastic.explain`]."""
        return explain(self, input_ids, attention_mask, top_k, timestamps, request_timestamps, event_features)

    @torch.no_grad()
    def get_retrieved_slots(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        event_features: Tensor | None = None,
    ) -> Tensor:
        """Return the slots of the interest memory that answer for each history.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`): as in `forward`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*): as in `forward`.
            timestamps, request_timestamps, event_features (`torch.Tensor`, *optional*): as in `forward`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_memory_heads, memory_top_k)`: best first, from 0 to
            `num_memory_subkeys**2 - 1`.

        Raises:
            ValueError: if the model has no interest memory.
        """
        *layers, last = self.model.layers
        if last.retrieval is None:
            raise ValueError("num_memory_subkeys must be at least 1 for a model that retrieves slots, found 0")
        mask = validate_histories(input_ids, attention_mask, self.config)
        input_ids, mask, timestamps, event_features = leave_out_special_tokens(
            input_ids, mask, self.config, timestamps, event_features
        )
        with evaluating(self), unsharded(self):
            times = read_times(self.model, timestamps, request_timestamps, mask, last_position_only=True)
            events = self.model.to_events(mask, None, *times[:1])
            events |= read_event_features(self.model, event_features, mask)
            hidden_states, stream, state, _ = self.model.compress(input_ids, mask, None, events)
            *interests, of_last = self.model.project(state)
            hidden_states, stream, bias = self.model.to_readers(hidden_states, stream, *times)
            for layer, of_layer in zip(layers, interests, strict=True):
                hidden_states = layer(hidden_states, stream, mask[:, -1:], dispatch, *of_layer, *bias)
            hidden_states = last.attention(hidden_states, stream, dispatch, *of_last, *bias)
            return last.retrieval.retrieve(hidden_states[:, 0])


def _float32(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if that is what it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["ElasticForSequentialRecommendation", "ElasticModel", "ElasticPreTrainedModel"]
