"""What all recommenders share: the output, what histories may be, and the head with its losses and `recommend`."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, logging

from .catalogue import CatalogueAnswer, CatalogueQuery, item_embeddings, search_catalogue, validate_query
from .configuration_recommender import RecommenderConfig
from .event_features import check_shape, given_event_features
from .event_time import given_times
from .losses import SeenItems, bce_loss, full_softmax_loss, gbce_loss, rows_of, sampled_softmax_loss


logger = logging.get_logger(__name__)


@dataclass
class SequentialRecommendationOutput(ModelOutput):
    """
    Output of a sequential recommender.

    Args:
        loss (`torch.FloatTensor` of shape `()`, returned when `labels` is given):
            Mean training loss per target, in nats.
        logits (`torch.FloatTensor` of shape `(batch_size, vocab_size)`, returned without `query`):
            Scores of every token as the item after the last position. With `labels`, those of the last label, and not
            in training mode.
        user_embeddings (`torch.FloatTensor` of shape `(batch_size, hidden_size)`, returned without `labels`):
            The vectors that the head turns into scores.
        token_ids (`torch.LongTensor` of shape `(batch_size, top_k)`, returned with a `query` for the `top_k`):
            The best items, without those seen where these are excluded, best first; -1 where there are no more.
        scores (`torch.FloatTensor` of shape `(batch_size, top_k)`, returned with a `query` for the `top_k`):
            Their scores, in float32 at least; `-inf` where there are no more.
        ranks (`torch.LongTensor` of shape `(batch_size, 2)`, returned with a `query` for `target_ids`):
            The ranks of the targets, with the seen items left out of the competition, and with them kept.
        hidden_states (`tuple(torch.FloatTensor)`, returned with `output_hidden_states=True`):
            The embeddings and the output of each layer, of shape `(batch_size, history_length, hidden_size)`, or the
            last position of them, where the model computes no other: without `labels`, and on prefixes.
        attentions (`tuple(torch.FloatTensor)`, returned with `output_attentions=True`):
            The attention weights of each layer.
        cache (`Any`, returned with `use_cache=True`):
            What to go on from when the histories grow, by models with `supports_cache`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    user_embeddings: Tensor | None = None
    token_ids: Tensor | None = None
    scores: Tensor | None = None
    ranks: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cache: Any = None


class Recommendations(NamedTuple):
    """Token ids, best first, and their scores, both of shape `(batch_size, top_k)`."""

    token_ids: Tensor
    scores: Tensor


def validate_histories(input_ids: Tensor, attention_mask: Tensor | None, config: RecommenderConfig) -> Tensor:
    """Check what a base model is given to read, and return which positions hold items.

    What depends on the values is not checked while a program is traced, compiled or exported.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`):
            Histories, oldest item first, padded on the left.
        attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
            1 for items, 0 for padding. Defaults to everything that is not `pad_token_id`.
        config ([`RecommenderConfig`]): names the token ids.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, history_length)`: `True` for items, `False` for padding.

    Raises:
        ValueError: if `input_ids` are no such histories or no token ids, or if `attention_mask` has another shape, is
            no mask of zeros and ones, or marks padding after an item.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.long, torch.int):
        found = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be a tensor of token ids (torch.long or torch.int), found {found}")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must have shape (batch_size, history_length >= 1), found {tuple(input_ids.shape)}"
        )
    if attention_mask is None:
        mask = input_ids != config.pad_token_id
    else:
        validate_shape("attention_mask", attention_mask, input_ids)
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise ValueError(f"attention_mask must be of bool or an integer type, found {attention_mask.dtype}")
        mask = attention_mask.bool()
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or input_ids.is_meta or input_ids.numel() == 0:
        return mask
    has_holes = (mask[:, :-1] & ~mask[:, 1:]).any()
    bounds = [*input_ids.aminmax(), has_holes]
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        bounds += attention_mask.aminmax()
    # One transfer from the device for all of them.
    smallest, largest, has_holes, *mask_bounds = torch.stack([bound.long() for bound in bounds]).tolist()
    if smallest < 0 or largest >= config.vocab_size:
        raise ValueError(
            f"input_ids must be between 0 and vocab_size - 1 ({config.vocab_size - 1}), found {smallest} to {largest}"
        )
    if mask_bounds and not 0 <= mask_bounds[0] <= mask_bounds[1] <= 1:
        raise ValueError(f"attention_mask must be 0 or 1, found {mask_bounds[0]} to {mask_bounds[1]}")
    if has_holes:
        row = int((mask[:, :-1] & ~mask[:, 1:]).any(dim=1).nonzero()[0])
        name = "input_ids" if attention_mask is None else "attention_mask"
        raise ValueError(
            f"{name} must be padded on the left (padding, then items up to the last position), "
            f"found padding after an item in row {row}"
        )
    return mask


def predicts_last_alone(labels: Tensor, config: RecommenderConfig) -> bool:
    """Return whether a model that trains on prefixes is given labels, (B, L), at their last positions alone."""
    if config.training_objective != "prefix" or torch.compiler.is_compiling() or labels.is_meta:
        return False
    return not bool((labels[:, :-1] >= config.num_special_tokens).any())


def validate_shape(name: str, tensor: Tensor, input_ids: Tensor) -> None:
    """Check that a tensor has one value for each position of the histories.

    Raises:
        ValueError: if it is no tensor of the shape of `input_ids`.
    """
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    if shape != tuple(input_ids.shape):
        raise ValueError(f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, found {shape}")


def validate_outputs(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Check that a base model has the hidden states and attentions that it is asked for.

    Args:
        model (`PreTrainedModel`): a base model, whose `_can_record_outputs` names what it has.
        kwargs (`dict`): of its `forward`.

    Returns:
        `bool`: whether it is asked for any.

    Raises:
        ValueError: if the model has none to return, or if its attention implementation holds no weights.
    """
    is_asked = False
    for name in ("hidden_states", "attentions"):
        if not kwargs.get(f"output_{name}", getattr(model.config, f"output_{name}")):
            continue
        is_asked = True
        if name not in (model._can_record_outputs or {}):
            raise ValueError(
                f"output_{name} must be False for {model.config.model_type}, which has none to return, found True"
            )
        implementation = model.config._attn_implementation
        if name == "attentions" and implementation != "eager":
            raise ValueError(
                "output_attentions needs attn_implementation='eager', which holds the weights of all attentions, "
                f"found {implementation!r}"
            )
    return is_asked


def leave_out_special_tokens(
    input_ids: Tensor,
    attention_mask: Tensor,
    config: RecommenderConfig,
    timestamps: Tensor | None = None,
    event_features: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Leave out what is no item of a history, such as unknown items: nothing was learned of them.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`).
        attention_mask (`torch.BoolTensor` of shape `(batch_size, history_length)`): `True` for all but padding.
        config ([`RecommenderConfig`]): says how many token ids are special, and which features events have.
        timestamps (`torch.Tensor` of shape `(batch_size, history_length)`, *optional*): of the items.
        event_features (`torch.Tensor` of shape `(batch_size, history_length, num_features)`, *optional*): of their
            events.

    Returns:
        The histories of items alone, in their order, padded on the left, their mask, timestamps and event features,
        all of the same shape as before.
    """
    is_item = attention_mask & (input_ids >= config.num_special_tokens)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or input_ids.is_meta or is_item.equal(attention_mask):
        return input_ids, attention_mask, timestamps, event_features
    logger.warning_once("input_ids hold special tokens, such as unknown items, among the items: they are left out")
    order = is_item.int().argsort(dim=1, stable=True)
    if timestamps is not None:
        validate_shape("timestamps", timestamps, input_ids)
        timestamps = timestamps.gather(1, order)
    check_shape(event_features, input_ids.shape, config)
    if event_features is not None:
        event_features = event_features.take_along_dim(order[..., None], dim=1)
    return input_ids.gather(1, order), is_item.gather(1, order), timestamps, event_features


def as_token_ids(name: str, token_ids: Any, device: torch.device) -> Tensor:
    """Return token ids, given as a tensor, an array or lists, as a tensor on a device.

    Raises:
        ValueError: if they are no integers, or lists of different lengths.
    """
    if isinstance(token_ids, Mapping):
        raise ValueError(
            f"{name} must be token ids, found a {type(token_ids).__name__} with {', '.join(map(str, token_ids))}: "
            "give its entries as arguments, as in recommend(**batch)"
        )
    try:
        tensor = torch.as_tensor(token_ids, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be integers in a tensor, an array or lists of one length (padded on the left), "
            f"found a {type(token_ids).__name__}: {error}"
        ) from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must be integers, found {tensor.dtype}")
    return tensor.long()


# Models that are being evaluated: in how many calls at once, and which of their modules were in training mode.
_EVALUATED: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_EVALUATED_LOCK = Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own mode when the last thread leaves."""
    with _EVALUATED_LOCK:
        num_calls, trained = _EVALUATED.get(model, (0, []))
        in_training = [module for module in model.modules() if module.training]
        _EVALUATED[model] = (num_calls + 1, trained + in_training)
        for module in in_training:
            module.training = False
    try:
        yield
    finally:
        with _EVALUATED_LOCK:
            num_calls, trained = _EVALUATED.pop(model)
            if num_calls > 1:
                _EVALUATED[model] = (num_calls - 1, trained)
            else:
                for module in trained:
                    module.training = True


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 shards, by what it adds to them: some builds of PyTorch come without it."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Give each process all weights of a model that FSDP2 shards, for what reads them other than by `forward`."""
    sharded = sharded_modules(model)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


class SequentialRecommenderMixin:
    """
    The head: `self.model` turns histories into vectors, and `self.lm_head` turns these into scores of the items.

    A subclass says what documents and model cards state: the `paper` as a reader looks for it, a `description` of the
    model in a sentence or two, and the paper's BibTeX as the `citation`, empty where there is none.
    """

    paper: str
    description: str
    citation: str = ""
    supports_cache = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a model, as [`~transformers.PreTrainedModel.from_pretrained`] does.

        Raises:
            ValueError: if the file lacks a tensor of the model, which would then be random, unless
                `output_loading_info=True` asks to be told instead.
        """
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if output_loading_info:
            return model, loading_info
        missing = sorted(loading_info["missing_keys"])
        if missing and pretrained_model_name_or_path is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} must hold every tensor of {cls.__name__}, found no "
                f"{', '.join(missing)} (with output_loading_info=True they are initialised and returned by name)"
            )
        return model

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Add token ids for new items, or take some off the end, as
        [`~transformers.PreTrainedModel.resize_token_embeddings`] does.

        Raises:
            ValueError: if `pad_to_multiple_of` is given: every token id after the special ones is an item, and padding
                would be recommended. Or if no item would be left.
        """
        if self.config.item_features is not None:
            raise ValueError("resize_token_embeddings must not be called with item_features: call add_items")
        if pad_to_multiple_of is not None:
            raise ValueError(
                "pad_to_multiple_of must be None, since every token id after the special ones is an item that can be "
                f"recommended, found {pad_to_multiple_of}"
            )
        if new_num_tokens is not None and new_num_tokens <= self.config.num_special_tokens:
            raise ValueError(
                f"new_num_tokens must exceed num_special_tokens ({self.config.num_special_tokens}), "
                f"found {new_num_tokens}"
            )
        return super().resize_token_embeddings(new_num_tokens, mean_resizing=mean_resizing)

    def scoring_head(self) -> nn.Module:
        """Return the linear map from user embeddings to scores: `lm_head` or, with item features, that by the item
        vectors, which passes gradients on where they are enabled."""
        if self.config.item_features is None:
            return self.lm_head
        return self.model.item_features.head(self.get_input_embeddings())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Any = None,
        use_cache: bool = False,
        query: CatalogueQuery | None = None,
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        event_features: Tensor | None = None,
        **kwargs,
    ) -> SequentialRecommendationOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`):
                Histories, oldest item first, padded on the left; with a `cache`, the items that came after it. Without
                `labels`, special tokens such as unknown items are left out: the answer is that of the items alone
                (but not in a compiled or exported graph, which reads what it is given).
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                1 for items, 0 for padding. Defaults to everything that is not `pad_token_id`.
            labels (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                `labels[:, t]` is the item to be predicted at position t (nothing is shifted). Special tokens and -100
                are not predicted.
            num_items_in_batch (`int`, *optional*):
                What to divide the summed loss by; defaults to the number of targets in this batch.
            cache (*optional*):
                What was read before, by a model with `supports_cache`. The answer is that for the whole histories,
                each of which must go on.
            use_cache (`bool`, defaults to `False`):
                Return the `cache` that holds these items, too.
            query ([`CatalogueQuery`], *optional*):
                Return its answer (`token_ids`, `scores` and `ranks`) instead of the `logits` of all tokens.
            timestamps (`torch.LongTensor` or `torch.DoubleTensor`, `(batch_size, history_length)`, *optional*):
                When the items came, in Unix seconds, for a model with `use_timestamps`, and for no other.
            request_timestamps (`torch.LongTensor` or `torch.DoubleTensor`, *optional*):
                When the next item comes or is asked for: of shape `(batch_size, history_length)` with `labels`, of
                which prefixes take the last one, and else `(batch_size,)`. -1, as without it, is a time that is not
                known.
            event_features (`torch.FloatTensor`, `(batch_size, history_length, num_features)`, *optional*):
                What the events carry beside their items and times, as the tokenizer makes it of event columns, for a
                model with `event_features`, and for no other: categories, 0 where unknown, and standardised numbers,
                in the order of the configuration.
        """
        config = self.config
        if (cache is not None or use_cache) and not self.supports_cache:
            raise ValueError(f"cache and use_cache must not be given to {type(self).__name__}, which keeps no state")
        if labels is not None and (cache is not None or use_cache or query is not None):
            raise ValueError("labels must not be given with cache, use_cache or query: training reads whole histories")
        mask = validate_histories(input_ids, attention_mask, config)
        if config.use_timestamps or timestamps is not None or request_timestamps is not None:
            kwargs |= {"timestamps": timestamps, "request_timestamps": request_timestamps}
        if config.event_features or event_features is not None:
            kwargs["event_features"] = event_features
        if labels is not None:
            validate_shape("labels", labels, input_ids)
            last_only = predicts_last_alone(labels, config)
            if last_only and request_timestamps is not None:
                validate_shape("request_timestamps", request_timestamps, input_ids)
                kwargs["request_timestamps"] = request_timestamps[:, -1]
            outputs = self.model(input_ids, mask, last_position_only=last_only, return_dict=True, **kwargs)
            read_ids = input_ids.masked_fill(~mask, config.pad_token_id)
            return SequentialRecommendationOutput(
                loss=self.loss(outputs.last_hidden_state, read_ids, labels, num_items_in_batch),
                logits=None if self.training else self.scoring_head()(outputs.last_hidden_state[:, -1]),
                hidden_states=outputs.get("hidden_states"),
                attentions=outputs.get("attentions"),
            )
        if query is not None:
            validate_query(query, len(input_ids), config)
        given = mask
        input_ids, mask, timestamps, event_features = leave_out_special_tokens(
            input_ids, mask, config, timestamps, event_features
        )
        if timestamps is not None:
            kwargs["timestamps"] = timestamps
        if event_features is not None:
            kwargs["event_features"] = event_features
        if cache is not None and mask is not given and (given[:, -1] & ~mask[:, -1]).any():
            row = int((given[:, -1] & ~mask[:, -1]).nonzero()[0])
            raise ValueError(
                "input_ids must hold an item in each row that goes on from the cache, "
                f"found special tokens alone in row {row}"
            )
        if cache is not None or use_cache:
            kwargs |= {"cache": cache, "use_cache": use_cache}
        if config.training_objective == "masked_item":
            input_ids = F.pad(input_ids, (0, 1), value=config.mask_token_id)
            mask = F.pad(mask, (0, 1), value=True)
        outputs = self.model(input_ids, mask, last_position_only=True, return_dict=True, **kwargs)
        user_embeddings = outputs.last_hidden_state[:, -1]
        logits, answer = None, CatalogueAnswer(None, None, None)
        if query is None:
            logits = self.scoring_head()(user_embeddings)
        elif query.top_k is not None or query.target_ids is not None:
            with torch.no_grad():
                answer = search_catalogue(self.scoring_head(), user_embeddings, query, config)
        return SequentialRecommendationOutput(
            logits=logits,
            user_embeddings=user_embeddings,
            **answer._asdict(),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            cache=outputs.get("cache"),
        )

    @torch.compiler.disable
    def loss(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Tensor:
        """Return the training loss in nats per target.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, Q, D)`): the vectors of the last Q positions, which all labels
                belong to.
            input_ids (`torch.LongTensor` of shape `(B, L)`): what was read, with padding where nothing was.
            labels (`torch.LongTensor` of shape `(B, L)`): as in `forward`.
            num_items_in_batch (`int`, *optional*): as in `forward`.

        Returns:
            `torch.Tensor` of shape `()`.

        Raises:
            ValueError: if a label is beyond the vocabulary, or the `training_loss` cannot be computed by the head.
        """
        config = self.config
        first = config.num_special_tokens
        rows, positions = (labels >= first).nonzero(as_tuple=True)
        # Several times as fast as hidden_states[rows, positions] on a processor.
        num_read = hidden_states.shape[1]
        indices = rows * num_read + positions - (labels.shape[1] - num_read)
        users = hidden_states.flatten(0, 1).index_select(0, indices)  # (T, D)
        targets = labels[rows, positions]  # (T,)
        if targets.numel() and int(targets.max()) >= config.vocab_size:
            raise ValueError(f"labels must be below vocab_size ({config.vocab_size}), found {int(targets.max())}")
        seen = None
        if config.masks_seen:
            last_read = positions if config.is_causal else torch.full_like(positions, labels.shape[1] - 1)
            seen = SeenItems(input_ids.long(), rows, last_read)
        if config.training_loss == "full_softmax":
            total = full_softmax_loss(users, self.scoring_head(), targets, first, config.vocab_size, seen)
        else:
            total = self._sampled_loss(users, targets, seen)
        return total / (max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch)

    def _sampled_loss(self, users: Tensor, targets: Tensor, seen: SeenItems | None) -> Tensor:
        """The sum of a loss over targets and uniform negatives."""
        config = self.config
        first, num_negatives = config.num_special_tokens, config.num_negatives
        num_items = config.vocab_size - first
        is_shared = config.training_loss == "sampled_softmax"
        shape = (num_negatives,) if is_shared else (len(targets), num_negatives)
        negatives = torch.randint(first, config.vocab_size, shape, device=targets.device)
        if config.item_features is None:
            table = item_embeddings(self.lm_head, f"training_loss={config.training_loss!r}")
        else:
            # A catalogue of the sampled items alone, in which token ids are rows.
            items = torch.cat([targets, negatives.flatten()]).unique()
            table = self.model.item_features.vectors(self.get_input_embeddings(), items)
            targets, negatives, first = rows_of(items, targets), rows_of(items, negatives), 0
            seen = None if seen is None else seen._replace(token_ids=rows_of(items, seen.token_ids))
        if is_shared:
            log_expected = math.log(num_negatives / num_items)
            log_q = torch.full_like(negatives, log_expected, dtype=torch.float32)
            # Token ids and the whole table: the gradient of a slice of it would be one more of its size. Tied
            # embeddings have a dense gradient from the histories, too.
            is_tied = bool(self._tied_weights_keys) and config.tie_word_embeddings and config.item_features is None
            return sampled_softmax_loss(users, table, targets, negatives, log_q, is_tied, seen)
        is_seen = None if seen is None else seen.contain(negatives)
        arguments = (users, table[first:], targets - first, negatives - first)
        if config.training_loss == "bce":
            return bce_loss(*arguments, is_seen, num_items)
        return gbce_loss(*arguments, config.gbce_calibration, is_seen, num_items)

    @torch.no_grad()
    def get_user_embeddings(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        event_features: Tensor | None = None,
    ) -> Tensor:
        """Return what the histories say about the next item, without scoring the catalogue, in evaluation mode.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`): as in `forward`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*): as in `forward`.
            timestamps, request_timestamps, event_features (`torch.Tensor`, *optional*): as in `forward`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, hidden_size)`.

        Raises:
            ValueError: as [`validate_histories`].
        """
        with evaluating(self):
            return self(
                input_ids,
                attention_mask,
                query=CatalogueQuery(),
                timestamps=timestamps,
                request_timestamps=request_timestamps,
                event_features=event_features,
                return_dict=True,
            ).user_embeddings

    @torch.no_grad()
    def recommend(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        top_k: int = 10,
        exclude_seen: bool | None = None,
        candidate_ids: Tensor | None = None,
        index=None,
        seen_ids: Tensor | None = None,
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        event_features: Tensor | None = None,
    ) -> Recommendations:
        """Recommend the items most likely to come next, in evaluation mode.

        Token ids may be tensors, NumPy arrays or lists. Special tokens in a history, such as unknown items, are left
        out: the answer is that of the items alone.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`):
                Histories, oldest item first, padded on the left.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                1 for items, 0 for padding. Defaults to everything that is not `pad_token_id`.
            top_k (`int`, defaults to 10): how many items for each history.
            exclude_seen (`bool`, *optional*):
                Leave out what `seen_ids` holds. Defaults to the configuration's `exclude_seen`.
            candidate_ids (`torch.LongTensor` of shape `(num_candidates,)`, *optional*):
                The token ids to choose from. Defaults to the whole catalogue.
            index ([`~elastic_hf.ItemIndex`], *optional*):
                Search this index of the items instead of scoring all of them: approximate, for large catalogues.
            seen_ids (`torch.LongTensor` of shape `(batch_size, num_seen)`, *optional*):
                The whole histories, where the model reads a part of them; padding may fill them up. Defaults to
                `input_ids`.
            timestamps (`torch.LongTensor` or `torch.DoubleTensor`, `(batch_size, history_length)`, *optional*):
                When the items came, in Unix seconds, for a model with `use_timestamps`, and for no other.
            request_timestamps (`torch.LongTensor` or `torch.DoubleTensor` of shape `(batch_size,)`, *optional*):
                For which moment to recommend; -1 is no particular one. Defaults to now.
            event_features (`torch.FloatTensor`, `(batch_size, history_length, num_features)`, *optional*):
                As in `forward`.

        Returns:
            [`Recommendations`]: `token_ids` and `scores`, each of shape `(batch_size, top_k)`, best first. Scores are
            float32 at least, whatever the type of the model.

        Raises:
            ValueError: if a history holds no item or is not padded on the left, `candidate_ids` are no distinct items
                or given with an `index`, `seen_ids` are no token ids of as many histories, the `index` is of another
                model, fewer than `top_k` items are left to recommend (or were found), or a score is NaN.
        """
        config = self.config
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        if isinstance(input_ids, Tensor):
            device = input_ids.device
        input_ids = as_token_ids("input_ids", input_ids, device)
        if attention_mask is not None:
            attention_mask = torch.as_tensor(attention_mask, device=device)
        mask = validate_histories(input_ids, attention_mask, config)
        if len(input_ids) == 0:
            raise ValueError("input_ids must hold at least one history, found none")
        is_empty = ~(mask & (input_ids >= config.num_special_tokens)).any(dim=1)
        if is_empty.any():
            raise ValueError(
                f"input_ids must hold an item in each row, found none in row {int(is_empty.nonzero()[0])}"
            )
        if seen_ids is None:
            seen_ids = input_ids.masked_fill(~mask, config.pad_token_id)
        seen_ids = as_token_ids("seen_ids", seen_ids, device)
        if candidate_ids is not None:
            if index is not None:
                raise ValueError("candidate_ids must not be given with an index, which searches all items")
            candidate_ids = as_token_ids("candidate_ids", candidate_ids, device)
        if exclude_seen is None:
            exclude_seen = config.exclude_seen
        timestamps, request_timestamps = given_times(self, timestamps, request_timestamps, len(input_ids), device)
        events = {"timestamps": timestamps, "request_timestamps": request_timestamps}
        events["event_features"] = given_event_features(event_features, device)
        query = CatalogueQuery(top_k, seen_ids, candidate_ids, exclude_seen=exclude_seen)
        validate_query(query, len(input_ids), config)
        num_candidates = config.vocab_size - config.num_special_tokens
        if candidate_ids is not None:
            num_candidates = len(candidate_ids)
        if top_k > num_candidates:
            raise ValueError(f"top_k must be at most the number of candidate items ({num_candidates}), found {top_k}")

        if index is None:
            with evaluating(self):
                output = self(input_ids, mask, query=query, **events, return_dict=True)
            token_ids, scores = output.token_ids, output.scores
        else:
            index.validate_model(self)
            left_out = seen_ids if exclude_seen else None
            scores, token_ids = index.search(self.get_user_embeddings(input_ids, mask, **events), top_k, left_out)
        if bool(scores.isnan().any()):
            raise ValueError("the model's scores contain NaN: its weights or its input are broken")
        if bool((token_ids < 0).any()):
            row = int((token_ids < 0).any(dim=-1).nonzero()[0])
            raise ValueError(
                f"top_k={top_k} asks for more than the {int((token_ids[row] >= 0).sum())} items left to recommend in "
                f"row {row} (exclude_seen={exclude_seen})"
            )
        return Recommendations(token_ids, scores)
