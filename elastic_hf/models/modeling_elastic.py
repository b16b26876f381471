"""ELASTIC: interest experts compress a shallow stream of the items once, and a deep reader looks at what they hold.

    e_j = embedding of item j;    x_j = conv(norm(e))_j                                             the stream
    c_t = what each expert has compressed of x_1 .. x_t                          see dispatcher_attention.py
    h_t = e_t, and for each layer:   q, g = W_qg norm(h)                  the first layer's query reads x_t
                                     h = h + W_o(silu(g) * dispatch(q, W_k c, W_v c))
                                     h = h + Memory(norm(h))                            last layer only
                                     h = h + FeedForward(norm(h))
    user embedding = norm(h_t)

Serving compresses a history once and runs the layers at its last position alone: depth, the feed-forward block and
the memory cost nothing per item of the history.

Axis letters: B batch, L history length, D hidden size, N layers, H heads, K head size (D / H), E interest experts per
head, M experts of all layers and heads (N * H * E).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

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

from .cache_elastic import ElasticCache
from .configuration_elastic import ElasticConfig
from .dispatcher_attention import (
    compressed_interests,
    dispatch,
    expert_scores,
    pool_history,
    prepare_chunks,
    read_chunks,
    to_exponent,
)
from .explanation_elastic import ElasticExplanation, explain
from .interest_memory import ElasticInterestMemory
from .limits import MAX_POSITIONS, MIN_ITEMS, limit
from .modeling_recommender import SequentialRecommenderMixin, validate_histories


@dataclass
class ElasticModelOutput(BaseModelOutput):
    """A [`~transformers.modeling_outputs.BaseModelOutput`], and the `cache` where `use_cache=True` asked for it."""

    cache: ElasticCache | None = None


def causal_convolution(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Add a depthwise convolution over the latest items to each item: `y_t = x_t + sum_i weight_i * x_(t-i)`.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, kernel_size - 1 + L, D)`): those before the first position, too.
        weight (`torch.Tensor` of shape `(kernel_size, D)`).

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.
    """
    earlier = weight.shape[0] - 1
    length = hidden_states.shape[1] - earlier
    output = hidden_states[:, earlier:] * (1 + weight[0])
    for i in range(1, weight.shape[0]):
        output.addcmul_(weight[i], hidden_states[:, earlier - i : earlier - i + length])
    return output


def prepend(earlier: Tensor, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Put what came earlier right in front of each row's first item, behind its padding.

    Args:
        earlier (`torch.Tensor` of shape `(B, P, D)`).
        hidden_states (`torch.Tensor` of shape `(B, L, D)`): zeros at padding.
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): False for padding, which is on the left.

    Returns:
        `torch.Tensor` of shape `(B, P + L, D)`.
    """
    num_earlier = earlier.shape[1]
    padding = (~attention_mask).sum(dim=1)  # (B,)
    indices = padding[:, None] + torch.arange(num_earlier, device=padding.device)  # (B, P)
    indices = indices[..., None].expand(-1, -1, hidden_states.shape[-1])
    inputs = torch.cat([torch.zeros_like(earlier, dtype=hidden_states.dtype), hidden_states], dim=1)
    return inputs.scatter_(1, indices, earlier.to(hidden_states.dtype))


class ElasticStream(nn.Module):
    """x = conv(norm(e)): what the experts read. Position by position, but for the latest items."""

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.convolution = nn.Parameter(torch.empty(config.conv_kernel_size, config.hidden_size))

    def forward(
        self, embeddings: Tensor, attention_mask: Tensor, conv_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, L) and the convolution's inputs before them, (B, kernel_size - 1, D), to (B, L, D) and the
        convolution's last inputs."""
        normed = self.norm(embeddings) * attention_mask[..., None]
        num_earlier = self.convolution.shape[0] - 1
        if conv_state is None:
            conv_state = normed.new_zeros(len(normed), num_earlier, normed.shape[-1])
            inputs = torch.cat([conv_state, normed], dim=1)
        else:
            inputs = prepend(conv_state, normed, attention_mask)
        conv_state = inputs[:, inputs.shape[1] - num_earlier :].clone()  # a view would keep all inputs
        return causal_convolution(inputs, self.convolution), conv_state


class ElasticInterestExperts(nn.Module):
    """The interest experts of all layers: what of the stream each takes, how long it keeps it, and what it shows."""

    def __init__(self, config: ElasticConfig):
        super().__init__()
        sizes = (config.num_hidden_layers, config.num_attention_heads, config.num_interest_experts)
        self.num_layers = config.num_hidden_layers
        num_sets = 1 if config.share_experts else config.num_hidden_layers
        self.rotate_keys = config.rotate_keys
        head_size = config.hidden_size // config.num_attention_heads
        self.experts = nn.Parameter(torch.empty(num_sets, *sizes[1:], config.hidden_size))  # (N, H, E, D)
        self.log_half_life = nn.Parameter(torch.empty(num_sets, *sizes[1:]))  # (N, H, E)
        self.key_value = nn.Parameter(torch.empty(sizes[0], 2, sizes[1], head_size, config.hidden_size))

    @property
    def half_lives(self) -> Tensor:
        """After how many items each expert has forgotten half of what it held: (N, H, E), at least 1."""
        return 1 + _float32(self.log_half_life).exp()

    def log_forget(self) -> Tensor:
        """Return the log of what each expert keeps of its state at each new item: (N, H, E)."""
        return -math.log(2) / self.half_lives

    def sigmoids(self, stream: Tensor) -> Tensor:
        """Return the sigmoids of the items' scores by each expert, see [`expert_scores`]: (B, L, D) -> (B, L, M)."""
        return expert_scores(stream, self.experts.to(stream.dtype).flatten(0, 2))

    def pool(self, stream: Tensor, attention_mask: Tensor, state: Tensor | None = None) -> Tensor:
        """Compress a history, or the items after one: (B, L, D), (B, L) and (B, M, D + 1) -> (B, M, D + 1)."""
        log_forget = self.log_forget().to(stream.dtype).flatten()
        return pool_history(stream, self.sigmoids(stream), log_forget, attention_mask, state)

    def project(self, state: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return what [`dispatch`] reads of a state: (B, M, D + 1) -> keys and values of each layer, (B, H, E, K)."""
        interests = compressed_interests(state).unflatten(1, self.log_half_life.shape)  # (B, N, H, E, D)
        projected = torch.einsum("bnhed,nshkd->nsbhek", interests, self.key_value.to(state.dtype))
        return tuple(of_layer.unbind() for of_layer in projected.unbind())

    def forward(self, streams, attention_mask):
        """streams: one (B, L, D) for all layers, or one a layer"""
        chunks = []
        for n in range(self.num_layers):
            stream = streams[n % len(streams)]
            m = n % len(self.experts)
            unread = torch.where(attention_mask, 0.0, -math.inf).to(stream.dtype)[..., None]
            sigmoids = expert_scores(stream, self.experts[m].to(stream.dtype).flatten(0, 1))
            scores = to_exponent(sigmoids, unread).unflatten(-1, self.experts.shape[1:3]).permute(0, 2, 1, 3)
            kv = F.linear(stream, self.key_value[n].to(stream.dtype).flatten(0, 2))
            kv = kv.unflatten(-1, self.key_value.shape[1:4]).permute(2, 0, 3, 1, 4).contiguous()
            key, value = kv.unbind()
            if self.rotate_keys:
                key = rotate(key, attention_mask)
            log_forget = self.log_forget()[m].to(stream.dtype)[None, :, None]
            chunks.append(prepare_chunks(key, value, scores, log_forget))
        return chunks


def rotate(states, attention_mask):
    """(B, H, L, K)"""
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    pairs = torch.arange(0, states.shape[-1], 2)
    angles = positions[:, None, :, None] / 10000 ** (pairs / states.shape[-1])
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class ElasticAttention(GradientCheckpointingLayer):
    """h + W_o(silu(g) * read(q)) with q, g = W_qg r: r is the stream in the first layer, and norm(h) after it."""

    def __init__(self, config: ElasticConfig, is_first: bool):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.rotate_keys = config.rotate_keys
        self.norm = None if is_first else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query_gate = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def query_and_gate(self, hidden_states: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) twice -> (B, H, L, K) and (B, L, D)"""
        reader = stream if self.norm is None else self.norm(hidden_states)
        query, gate = self.query_gate(reader.to(hidden_states.dtype)).chunk(2, dim=-1)
        return query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2), gate

    def forward(self, hidden_states: Tensor, stream: Tensor, read: Callable, *interests: Tensor) -> Tensor:
        """(B, L, D) twice -> (B, L, D); `read` is [`read_chunks`] or [`dispatch`], which reads the `interests`."""
        query, gate = self.query_and_gate(hidden_states, stream)
        if self.rotate_keys:
            query = rotate(query, self.mask)
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

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, D) and (B, L) -> (B, L, D)"""
        return hidden_states + self.dropout(self.memory(self.norm(hidden_states), attention_mask))


class ElasticFeedForward(GradientCheckpointingLayer):
    """h + W_down act(W_up norm(h))"""

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)"""
        return hidden_states + self.dropout(self.down(self.activation(self.up(self.norm(hidden_states)))))


class ElasticLayer(nn.Module):
    """A layer of the reader: attention to the interests, the interest memory in the last layer, feed-forward block."""

    def __init__(self, config: ElasticConfig, index: int):
        super().__init__()
        has_memory = config.num_memory_subkeys > 0 and index == config.num_hidden_layers - 1
        self.attention = ElasticAttention(config, is_first=index == 0)
        self.retrieval = ElasticRetrieval(config) if has_memory else None
        self.feed_forward = ElasticFeedForward(config)

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
            init.normal_(module.key_value, std=std)
            # Half-lives from 2 to 1,025 items, evenly spaced in the logarithm.
            steps = torch.linspace(0, 1, self.config.num_interest_experts).expand_as(module.log_half_life)
            init.copy_(module.log_half_life, steps * math.log(1024))
        elif isinstance(module, ElasticInterestMemory):
            module.init_weights(std)


class ElasticModel(ElasticPreTrainedModel):
    """Item embeddings, stream, experts, the layers of the reader and the final norm: token ids to user embeddings."""

    def __init__(self, config: ElasticConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.stream = nn.ModuleList(ElasticStream(config) for _ in range(config.num_hidden_layers if config.stream_per_layer else 1))
        self.stream_feed_forward = None
        if config.stream_feed_forward:
            wide = type(config)(**{**config.to_dict(), "intermediate_size": config.stream_feed_forward, "stream_feed_forward": 0})
            self.stream_feed_forward = ElasticFeedForward(wide)
        self.experts = ElasticInterestExperts(config)
        self.layers = nn.ModuleList(ElasticLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        """
        attention_mask = validate_histories(input_ids, attention_mask, self.config)
        if (cache is not None or use_cache) and not last_position_only:
            raise ValueError("cache and use_cache need last_position_only=True, found last_position_only=False")
        if cache is not None:
            cache.check(self, len(input_ids))
        hidden_states = self.embed(input_ids, attention_mask)
        streams = [_float32(stream(hidden_states, attention_mask)[0]) for stream in self.stream]
        if self.stream_feed_forward is not None:
            streams = [_float32(self.stream_feed_forward(stream)) * attention_mask[..., None] for stream in streams]
        with torch.autocast(hidden_states.device.type, enabled=False):
            read, interests = read_chunks, self.experts(streams, attention_mask)
        for layer, of_layer in zip(self.layers, interests, strict=True):
            layer.attention.mask = attention_mask
            hidden_states = layer(hidden_states, streams[0], attention_mask, read, *of_layer)
        if last_position_only:
            hidden_states = hidden_states[:, -1:]
        if use_cache:
            num_items = attention_mask.sum(dim=1) + (0 if cache is None else cache.num_items)
            cache = ElasticCache(*states, num_items, self.digest())
        return ElasticModelOutput(last_hidden_state=self.norm(hidden_states), cache=cache if use_cache else None)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the item embeddings, zeros at padding: (B, L) -> (B, L, D)."""
        # Tied embeddings are small for the softmax; as inputs they are learned much sooner at unit scale.
        embeddings = self.embed_tokens(input_ids)
        scale = math.sqrt(self.config.hidden_size) * attention_mask[..., None].to(embeddings.dtype)
        return self.dropout(embeddings * scale)

    def to_stream(
        self, embeddings: Tensor, attention_mask: Tensor, conv_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the stream, in float32 at least, since states add up thousands of items, and the convolution's state."""
        stream, conv_state = self.stream(embeddings, attention_mask, conv_state)
        return _float32(stream), _float32(conv_state)

    def compress(
        self, input_ids: Tensor, attention_mask: Tensor, cache: ElasticCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read histories, or the items after a `cache`: embeddings and stream of the last position, (B, 1, D), then the
        recurrent state, (B, M, D + 1), and the convolution's, (B, kernel_size - 1, D).

        Where no gradient is needed, a large batch is read a few rows at a time and long histories in pieces.
        """
        num_positions = limit(MAX_POSITIONS, input_ids.device)
        batch_size, length = input_ids.shape
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or input_ids.numel() <= num_positions:
            return self._compress(input_ids, attention_mask, cache, length)
        num_rows = max(1, num_positions // min(length, MIN_ITEMS))
        rows = torch.arange(batch_size, device=input_ids.device).split(num_rows)
        read = [
            self._compress(
                input_ids[some],
                attention_mask[some],
                None if cache is None else cache.select(some),
                max(MIN_ITEMS, num_positions // len(some)),
            )
            for some in rows
        ]
        return tuple(map(torch.cat, zip(*read, strict=True)))

    def _compress(
        self, input_ids: Tensor, attention_mask: Tensor, cache: ElasticCache | None, num_items: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[`compress`] in pieces of `num_items`."""
        state = conv_state = None
        if cache is not None:
            state, conv_state = cache.recurrent_state, cache.conv_state
        for ids, mask in zip(input_ids.split(num_items, dim=1), attention_mask.split(num_items, dim=1), strict=True):
            embeddings = self.embed(ids, mask)
            stream, conv_state = self.to_stream(embeddings, mask, conv_state)
            with torch.autocast(stream.device.type, enabled=False):
                state = self.experts.pool(stream, mask, state)
        return embeddings[:, -1:], stream[:, -1:], state, conv_state

    @torch._dynamo.assume_constant_result
    def digest(self) -> str:
        """Return a digest of the weights that a state depends on: those of the embeddings, the stream and the experts."""
        modules = (self.embed_tokens, self.stream, self.experts)
        weights = [weight for module in modules for weight in module.parameters()]
        versions = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if getattr(self, "_digest", (None,))[0] != versions:
            sha256 = hashlib.sha256()
            for weight in weights:
                sha256.update(str(weight.shape).encode())
                sha256.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
            self._digest = (versions, sha256.hexdigest())
        return self._digest[1]


class ElasticForSequentialRecommendation(SequentialRecommenderMixin, ElasticPreTrainedModel):
    """ELASTIC with its scores over the catalogue, its training losses and `recommend`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    supports_cache = True

    def __init__(self, config: ElasticConfig):
        super().__init__(config)
        self.model = ElasticModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def explain(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None, top_k: int = 10
    ) -> ElasticExplanation:
        """Explain recommendations, see [`~explanation_elastic.explain`]."""
        return explain(self, input_ids, attention_mask, top_k)

    @torch.no_grad()
    def get_retrieved_slots(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None
    ) -> torch.LongTensor:
        """Return the slots of the interest memory that answer for each history.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`): as in `forward`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*): as in `forward`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_memory_heads, memory_top_k)`: best first, from 0 to
            `num_memory_subkeys**2 - 1`.

        Raises:
            ValueError: if the model has no interest memory.
        """
        slots = []
        memory = self.model.layers[-1].retrieval.memory
        handle = memory.query_norm.register_forward_hook(lambda module, inputs, output: slots.append(output))
        self.model(input_ids, attention_mask)
        handle.remove()
        from .interest_memory import retrieve_slots
        query = slots[0][:, -1].unflatten(-1, (2, -1))
        return retrieve_slots(query, memory.sub_keys, memory.bias, memory.top_k)[1]
        *layers, last = self.model.layers
        if last.retrieval is None:
            raise ValueError("num_memory_subkeys must be at least 1 for a model that retrieves slots, found 0")
        attention_mask = validate_histories(input_ids, attention_mask, self.config)
        hidden_states, stream, state, _ = self.model.compress(input_ids, attention_mask)
        *interests, of_last = self.model.experts.project(state)
        for layer, of_layer in zip(layers, interests, strict=True):
            hidden_states = layer(hidden_states, stream, attention_mask[:, -1:], dispatch, *of_layer)
        hidden_states = last.attention(hidden_states, stream, dispatch, *of_last)
        retrieval = last.retrieval
        return retrieval.memory.retrieve(retrieval.norm(hidden_states[:, 0]), retrieval.memory.top_k)[1]


def _float32(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if that is what it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["ElasticForSequentialRecommendation", "ElasticModel", "ElasticPreTrainedModel"]
