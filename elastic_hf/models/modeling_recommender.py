"""What every recommender here shares: the output class, the losses' entry, scoring and `recommend`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput, can_return_tuple

from .cache_elastic import ElasticCache
from .configuration_recommender import RecommenderConfig
from .losses import bce_loss, full_softmax_loss, gbce_loss, sampled_softmax_loss


# Scores held at once while the catalogue is searched: 2**24 float32 are 64 MiB.
MAX_SCORES = 2**24


@dataclass
class SequentialRecommendationOutput(ModelOutput):
    """
    Output of a sequential recommender.

    Args:
        loss (`torch.FloatTensor` of shape `()`, returned when `labels` is given):
            Mean training loss per target, in nats.
        logits (`torch.FloatTensor` of shape `(batch_size, vocab_size)`, returned when `labels` is not given):
            Scores of every token as the item after the last position.
        user_embeddings (`torch.FloatTensor` of shape `(batch_size, hidden_size)`, returned without `labels`):
            The vectors whose dot products with the item embeddings are `logits`.
        hidden_states (`tuple(torch.FloatTensor)`, returned with `output_hidden_states=True`):
            The embeddings and the output of each layer, of shape `(batch_size, history_length, hidden_size)`; without
            `labels` the last one holds the last position only.
        cache ([`ElasticCache`], returned by ELASTIC with `use_cache=True`):
            What to go on from when the histories grow.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    user_embeddings: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cache: ElasticCache | None = None


class Recommendations(NamedTuple):
    """Token ids, best first, and their scores, both of shape `(batch_size, top_k)`."""

    token_ids: torch.LongTensor
    scores: torch.FloatTensor


def top_k_items(
    user_embeddings: Tensor,
    item_embeddings: Tensor,
    top_k: int,
    seen_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    num_special_tokens: int = 3,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The best items for each user, holding `batch_size * (chunk_size + 2 * top_k)` scores at most.

    Args:
        user_embeddings (`torch.Tensor` of shape `(B, D)`).
        item_embeddings (`torch.Tensor` of shape `(V, D)`): one row per token id.
        top_k (`int`): how many.
        seen_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): token ids not to return; padding may fill it up.
        candidate_ids (`torch.LongTensor` of shape `(C,)`, *optional*): the only token ids to return, each once.
            Defaults to all items.
        num_special_tokens (`int`): the first token ids, which are never returned.
        chunk_size (`int`, *optional*): items scored at once. Defaults to as many as [`MAX_SCORES`] allows.

    Returns:
        Scores and token ids, each of shape `(B, top_k)`. Where a user has fewer unseen candidates than `top_k`, the
        rest has score `-inf` and id -1.
    """
    batch_size, vocab_size = user_embeddings.shape[0], item_embeddings.shape[0]
    if candidate_ids is None:
        candidate_ids = torch.arange(num_special_tokens, vocab_size, device=item_embeddings.device)
    num_candidates = candidate_ids.shape[0]
    if top_k > num_candidates:
        raise ValueError(f"top_k must be at most the number of candidate items ({num_candidates}), found {top_k}")
    if chunk_size is None:
        chunk_size = max(1, MAX_SCORES // batch_size)
    if seen_ids is not None:
        places = torch.full((vocab_size,), num_candidates, device=candidate_ids.device)
        places[candidate_ids] = torch.arange(num_candidates, device=candidate_ids.device)
        seen_places = places[seen_ids]  # (B, S), num_candidates for what is no candidate

    best_scores = user_embeddings.new_empty((batch_size, 0))
    best_ids = candidate_ids.new_empty((batch_size, 0))
    for start in range(0, num_candidates, chunk_size):
        ids = candidate_ids[start : start + chunk_size]
        scores = user_embeddings @ item_embeddings[ids].T  # (B, chunk)
        if seen_ids is not None:
            scores = scores.masked_fill(marked(seen_places - start, ids.shape[0]), -math.inf)
        scores, order = scores.topk(min(top_k, ids.shape[0]))
        best_scores = torch.cat([best_scores, scores], dim=-1)
        best_ids = torch.cat([best_ids, ids[order]], dim=-1)
        best_scores, order = best_scores.topk(min(top_k, best_scores.shape[-1]))
        best_ids = best_ids.gather(-1, order)
    return best_scores, best_ids.masked_fill(best_scores == -math.inf, -1)


def marked(places: Tensor, size: int) -> Tensor:
    """A table that is True at the given places of each row: (B, S) -> (B, size). Places outside it are skipped."""
    outside = (places < 0) | (places >= size)
    table = torch.zeros(places.shape[0], size + 1, dtype=torch.bool, device=places.device)
    return table.scatter_(1, places.masked_fill(outside, size), True)[:, :size]


def _check_histories(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must have shape (batch_size, history_length >= 1), found {tuple(input_ids.shape)}"
        )


def _check_shape(name: str, tensor: Tensor, input_ids: Tensor) -> None:
    if tensor.shape != input_ids.shape:
        raise ValueError(
            f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, found {tuple(tensor.shape)}"
        )


def _check_token_ids(name: str, token_ids: Tensor, vocab_size: int) -> None:
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size:
        raise ValueError(
            f"{name} must be between 0 and vocab_size - 1 ({vocab_size - 1}), "
            f"found {int(token_ids.min())} to {int(token_ids.max())}"
        )


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


def validate_shape(name: str, tensor: Tensor, input_ids: Tensor) -> None:
    """Check that a tensor has one value for each position of the histories.

    Raises:
        ValueError: if it is no tensor of the shape of `input_ids`.
    """
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    if shape != tuple(input_ids.shape):
        raise ValueError(f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, found {shape}")


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


class SequentialRecommenderMixin:
    """The head: `self.model` turns histories into vectors, the rows of `self.lm_head.weight` are the items."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequentialRecommendationOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`):
                Histories, oldest item first, padded on the left.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                1 for items, 0 for padding. Defaults to everything that is not `pad_token_id`.
            labels (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                `labels[:, t]` is the item to be predicted at position t (nothing is shifted). Special tokens and -100
                are not predicted.
            num_items_in_batch (`int`, *optional*):
                What to divide the summed loss by; defaults to the number of targets in this batch.
        """
        _check_histories(input_ids)
        if attention_mask is not None:
            _check_shape("attention_mask", attention_mask, input_ids)
        if labels is None:
            outputs = self._read_histories(input_ids, attention_mask, **kwargs)
            user_embeddings = outputs.last_hidden_state[:, -1]
            return SequentialRecommendationOutput(
                logits=self.lm_head(user_embeddings),
                user_embeddings=user_embeddings,
                hidden_states=outputs.hidden_states,
                cache=outputs.get("cache"),
            )
        _check_shape("labels", labels, input_ids)
        outputs = self.model(input_ids, attention_mask, **kwargs)
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, self.config.pad_token_id)
        return SequentialRecommendationOutput(
            loss=self.loss(outputs.last_hidden_state, input_ids, labels, num_items_in_batch),
            hidden_states=outputs.hidden_states,
        )

    def loss(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Tensor:
        """The training loss in nats per target, from `(B, L, D)` hidden states, `(B, L)` input ids and labels."""
        config = self.config
        is_target = labels >= config.num_special_tokens
        users = hidden_states[is_target]  # (T, D)
        items = self.lm_head.weight[config.num_special_tokens :]
        targets = labels[is_target] - config.num_special_tokens
        if config.training_loss == "full_softmax":
            seen = self._seen(input_ids, is_target) if config.exclude_seen else None
            total = full_softmax_loss(users, items, targets, seen)
        elif config.training_loss == "sampled_softmax":
            # Token ids and the whole table: the gradient of a slice of it would be one more of its size.
            shape = (config.num_negatives,)
            negatives = torch.randint(config.num_special_tokens, config.vocab_size, shape, device=labels.device)
            log_q = torch.full_like(negatives, math.log(config.num_negatives / items.shape[0]), dtype=torch.float32)
            # Tied embeddings have a dense gradient from the histories, too.
            is_tied = bool(self._tied_weights_keys) and config.tie_word_embeddings
            total = sampled_softmax_loss(users, self.lm_head.weight, labels[is_target], negatives, log_q, is_tied)
        else:
            negatives = torch.randint(items.shape[0], (targets.shape[0], config.num_negatives), device=targets.device)
            if config.training_loss == "bce":
                total = bce_loss(users, items, targets, negatives)
            else:
                total = gbce_loss(users, items, targets, negatives, config.gbce_calibration)
        return total / (is_target.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    def _seen(self, input_ids: Tensor, is_target: Tensor) -> Tensor:
        """What each target's position has read: (T, L) rows of the catalogue, its size where there is no item."""
        config = self.config
        rows, places = is_target.nonzero(as_tuple=True)
        seen = input_ids[rows] - config.num_special_tokens
        unread = seen < 0
        if config.is_causal:
            unread |= torch.arange(seen.shape[1], device=seen.device) > places[:, None]
        return seen.masked_fill(unread, config.vocab_size - config.num_special_tokens)

    def _read_histories(self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs) -> ModelOutput:
        if self.config.training_objective == "masked_item":
            if attention_mask is None:
                attention_mask = (input_ids != self.config.pad_token_id).long()
            input_ids = F.pad(input_ids, (0, 1), value=self.config.mask_token_id)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        return self.model(input_ids, attention_mask, last_position_only=True, **kwargs)

    @torch.no_grad()
    def get_user_embeddings(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None
    ) -> Tensor:
        """What the histories say about the next item, without scoring the catalogue.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`): as in `forward`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*): as in `forward`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, hidden_size)`.
        """
        return self._read_histories(input_ids, attention_mask).last_hidden_state[:, -1]

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        top_k: int = 10,
        exclude_seen: bool = True,
        candidate_ids: torch.LongTensor | None = None,
        index=None,
        seen_ids: torch.LongTensor | None = None,
    ) -> Recommendations:
        """The items most likely to come next. At most `2**24 + 2 * batch_size * top_k` scores are held at once.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`):
                Histories, oldest item first, padded on the left.
            attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*):
                1 for items, 0 for padding. Defaults to everything that is not `pad_token_id`.
            top_k (`int`, defaults to 10): how many items for each history.
            exclude_seen (`bool`, defaults to `True`): leave out what `seen_ids` holds.
            candidate_ids (`torch.LongTensor` of shape `(num_candidates,)`, *optional*):
                The token ids to choose from. Defaults to the whole catalogue.
            index ([`~elastic_hf.ItemIndex`], *optional*):
                Search this index of the items instead of scoring all of them: approximate, for large catalogues.
            seen_ids (`torch.LongTensor` of shape `(batch_size, num_seen)`, *optional*):
                The whole histories, where the model reads a part of them; padding may fill them up. Defaults to
                `input_ids`.

        Returns:
            [`Recommendations`]: `token_ids` and `scores`, each of shape `(batch_size, top_k)`, best first.

        Raises:
            ValueError: if a history is empty or not padded on the left, `candidate_ids` are no distinct items or given
                with an `index`, `seen_ids` are no token ids of as many histories, fewer than `top_k` items are left to
                recommend (or were found), or a score is NaN.
        """
        config = self.config
        _check_histories(input_ids)
        if input_ids.shape[0] == 0:
            raise ValueError("input_ids must hold at least one history, found none")
        _check_token_ids("input_ids", input_ids, config.vocab_size)
        if attention_mask is None:
            attention_mask = (input_ids != config.pad_token_id).long()
        _check_shape("attention_mask", attention_mask, input_ids)
        if not bool((attention_mask[:, -1] == 1).all()):
            row = int((attention_mask[:, -1] != 1).nonzero()[0])
            raise ValueError(f"input_ids must hold items up to the last position (left padding), row {row} does not")
        if not bool((attention_mask.diff(dim=-1) >= 0).all()):
            raise ValueError("attention_mask must be zeros, then ones (left padding)")
        if candidate_ids is not None:
            candidate_ids = torch.as_tensor(candidate_ids, dtype=torch.long, device=input_ids.device)
            if candidate_ids.dim() != 1 or candidate_ids.unique().numel() != candidate_ids.numel():
                raise ValueError("candidate_ids must be one list of distinct token ids")
            if candidate_ids.numel() and not (
                config.num_special_tokens <= int(candidate_ids.min()) <= int(candidate_ids.max()) < config.vocab_size
            ):
                raise ValueError(
                    f"candidate_ids must be items, from {config.num_special_tokens} to {config.vocab_size - 1}, "
                    f"found {int(candidate_ids.min())} to {int(candidate_ids.max())}"
                )
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {top_k}")
        if seen_ids is None:
            seen_ids = input_ids.masked_fill(attention_mask == 0, config.pad_token_id)
        if seen_ids.dim() != 2 or seen_ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"seen_ids must have shape ({input_ids.shape[0]}, num_seen), found {tuple(seen_ids.shape)}"
            )
        _check_token_ids("seen_ids", seen_ids, config.vocab_size)

        user_embeddings = self.get_user_embeddings(input_ids, attention_mask)
        if index is not None:
            if candidate_ids is not None:
                raise ValueError("candidate_ids must not be given with an index, which searches all items")
            scores, token_ids = index.search(user_embeddings, top_k, seen_ids if exclude_seen else None)
        else:
            scores, token_ids = top_k_items(
                user_embeddings,
                self.lm_head.weight,
                top_k,
                seen_ids=seen_ids if exclude_seen else None,
                candidate_ids=candidate_ids,
                num_special_tokens=config.num_special_tokens,
            )
        if bool(scores.isnan().any()):
            raise ValueError("the model's scores contain NaN: its weights or its input are broken")
        if bool((token_ids < 0).any()):
            row = int((token_ids < 0).any(dim=-1).nonzero()[0])
            raise ValueError(
                f"top_k={top_k} asks for more than the {int((token_ids[row] >= 0).sum())} items left to recommend in "
                f"row {row} (exclude_seen={exclude_seen})"
            )
        return Recommendations(token_ids, scores)
