"""The one place that scores a catalogue: the best items of each user and the ranks of given ones, from one pass.

Scores come from calling the head, a few users at a time, and no weight is read past its module: adapters, quantised
layers, offloading and sharding work.

Axis letters: B batch, D hidden size, V vocabulary, S seen items, C candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .configuration_recommender import RecommenderConfig
from .limits import limit
from .plain_linear import is_plain_linear


# Scores held at once: 4 MiB of float32 stay in a processor's cache, 64 MiB keep a GPU busy.
MAX_SCORES = {"cpu": 2**20, "cuda": 2**24}
# Rows scored at once at least: the item embeddings, which are larger than these scores, are then read once for all.
MIN_ROWS = 16
# Random vectors by which the length of an item embedding is estimated.
NUM_PROBES = 8


class CatalogueQuery(NamedTuple):
    """
    What to look up in the catalogue for each history: `model(input_ids, query=query)` answers it instead of returning
    the scores of the whole catalogue.

    Args:
        top_k (`int`, *optional*): how many items to recommend to each user.
        seen_ids (`torch.LongTensor` of shape `(batch_size, num_seen)`, *optional*):
            Token ids of the history; special tokens may fill it up.
        candidate_ids (`torch.LongTensor` of shape `(num_candidates,)`, *optional*):
            The items to choose from. Defaults to the whole catalogue.
        target_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            One item for each user, to be ranked in the whole catalogue.
        exclude_seen (`bool`, *optional*):
            Leave `seen_ids` out of what is recommended. Defaults to the model's setting. Ranks are always both, with
            the seen items left out and with them kept.
    """

    top_k: int | None = None
    seen_ids: Tensor | None = None
    candidate_ids: Tensor | None = None
    target_ids: Tensor | None = None
    exclude_seen: bool | None = None


class CatalogueAnswer(NamedTuple):
    """
    Args:
        token_ids (`torch.LongTensor` of shape `(batch_size, top_k)`, returned when `top_k` is given):
            The best items, without those seen where these are excluded, best first; -1 where there are no more.
        scores (`torch.FloatTensor` of shape `(batch_size, top_k)`, returned when `top_k` is given):
            Their scores, in float32 at least; `-inf` where there are no more.
        ranks (`torch.LongTensor` of shape `(batch_size, 2)`, returned when `target_ids` are given):
            The rank of each target, with the seen items left out of the competition, and with them kept.
    """

    token_ids: Tensor | None
    scores: Tensor | None
    ranks: Tensor | None


def validate_token_ids(name: str, token_ids: Tensor, smallest: int, config: RecommenderConfig) -> None:
    """Check that token ids are integers from `smallest` to the last of the vocabulary.

    Raises:
        ValueError: if they are not.
    """
    if not isinstance(token_ids, Tensor) or token_ids.dtype not in (torch.long, torch.int):
        found = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
        raise ValueError(f"{name} must be a tensor of token ids (torch.long or torch.int), found {found}")
    if token_ids.numel() == 0:
        return
    first, last = (int(bound) for bound in token_ids.aminmax())
    if not smallest <= first <= last < config.vocab_size:
        kind = "items" if smallest == config.num_special_tokens else "token ids"
        raise ValueError(f"{name} must be {kind}, from {smallest} to {config.vocab_size - 1}, found {first} to {last}")


@torch.compiler.disable
def validate_query(query: CatalogueQuery, batch_size: int, config: RecommenderConfig) -> None:
    """Check that a query can be answered for a batch.

    Raises:
        ValueError: if `top_k` is no integer of at least 1, a shape does not belong to the batch, a token id does not
            exist, `candidate_ids` or `target_ids` are no items, candidates are not distinct or given with targets, or
            `exclude_seen` is neither a bool nor None.
    """
    top_k, seen_ids, candidate_ids, target_ids, exclude_seen = query
    if not isinstance(exclude_seen, bool | None):
        raise ValueError(f"exclude_seen must be True, False or None, found {exclude_seen!r}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1):
        raise ValueError(f"top_k must be an integer of at least 1, found {top_k!r}")
    if seen_ids is not None:
        validate_token_ids("seen_ids", seen_ids, 0, config)
        if seen_ids.dim() != 2 or len(seen_ids) != batch_size:
            raise ValueError(f"seen_ids must have shape ({batch_size}, num_seen), found {tuple(seen_ids.shape)}")
    if candidate_ids is not None:
        validate_token_ids("candidate_ids", candidate_ids, config.num_special_tokens, config)
        if candidate_ids.dim() != 1 or candidate_ids.unique().numel() != candidate_ids.numel():
            raise ValueError(
                "candidate_ids must have shape (num_candidates,) and be distinct, "
                f"found shape {tuple(candidate_ids.shape)} and {candidate_ids.unique().numel()} distinct ids"
            )
    if target_ids is not None:
        if candidate_ids is not None:
            raise ValueError("candidate_ids must not be given with target_ids, which are ranked among all items")
        validate_token_ids("target_ids", target_ids, config.num_special_tokens, config)
        if target_ids.shape != (batch_size,):
            raise ValueError(f"target_ids must have shape ({batch_size},), found {tuple(target_ids.shape)}")


@torch.compiler.disable
@torch.no_grad()
def search_catalogue(
    lm_head: nn.Module, user_embeddings: Tensor, query: CatalogueQuery, config: RecommenderConfig
) -> CatalogueAnswer:
    """Answer a query, holding at most [`MAX_SCORES`] scores at once, or those of [`MIN_ROWS`] users.

    A rank is 1 plus the number of other items whose score is *not below* the target's, so that ties and NaN scores
    count against the model: a constant or a NaN scorer puts every target last. A target that is itself among the seen
    items cannot be recommended: with the seen items left out, its rank is the number of items. Where targets are
    ranked, scores are computed in double precision, and scores closer than their rounding error are ties. Weights of
    another precision are cast for the time of the search.

    Args:
        lm_head (`torch.nn.Module`): maps `(B, D)` user embeddings to `(B, V)` scores, linearly.
        user_embeddings (`torch.Tensor` of shape `(B, D)`).
        query ([`CatalogueQuery`]).
        config ([`RecommenderConfig`]): tells special tokens, which are never recommended nor compete, from items, and
            whether seen items are excluded where the query does not say.

    Returns:
        [`CatalogueAnswer`]

    Raises:
        ValueError: as [`validate_query`].
    """
    batch_size = len(user_embeddings)
    validate_query(query, batch_size, config)
    top_k, seen_ids, candidate_ids, target_ids, exclude_seen = query
    exclude_seen = config.exclude_seen if exclude_seen is None else exclude_seen
    first = config.num_special_tokens
    columns = slice(first, None) if candidate_ids is None else candidate_ids
    score = _Scorer(lm_head, user_embeddings, in_double=target_ids is not None)
    if target_ids is not None:
        tolerance = _rounding_error(score, user_embeddings, target_ids)

    token_ids, best_scores, ranks = [], [], []
    for chunk in row_chunks(batch_size, config.vocab_size, user_embeddings.device):
        scores = score(user_embeddings[chunk], columns)  # (chunk, V - first), or (chunk, C)
        is_seen = None
        if seen_ids is not None and (exclude_seen or target_ids is not None):
            is_seen = torch.zeros(len(scores), config.vocab_size, dtype=torch.bool, device=scores.device)
            is_seen = is_seen.scatter_(1, seen_ids[chunk].long(), True)[:, columns]
        if target_ids is not None:
            ranks.append(_rank(scores, target_ids[chunk, None].long() - first, tolerance[chunk, None], is_seen))
        if top_k is not None:
            if is_seen is not None and exclude_seen:
                scores = scores.masked_fill(is_seen, -torch.inf)
            best, indices = scores.topk(min(top_k, scores.shape[1]))
            ids = indices + first if candidate_ids is None else candidate_ids[indices]
            best_scores.append(_pad_right(best, top_k, -torch.inf))
            token_ids.append(_pad_right(ids.masked_fill(best == -torch.inf, -1), top_k, -1))
    return CatalogueAnswer(*(torch.cat(parts) if parts else None for parts in (token_ids, best_scores, ranks)))


def row_chunks(num_rows: int, num_scores: int, device: torch.device, min_rows: int | None = None) -> Iterator[slice]:
    """Yield the rows whose scores are held at once, where each row has `num_scores`: at least `min_rows`, by default
    [`MIN_ROWS`]."""
    size = max(MIN_ROWS if min_rows is None else min_rows, limit(MAX_SCORES, device) // num_scores)
    return (slice(start, start + size) for start in range(0, num_rows, size))


def first_read(token_ids: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """Return the index at which a row of `token_ids` holds an item for the first time, in memory linear in its length.

    Args:
        token_ids (`torch.LongTensor` of shape `(B, S)`).
        rows (`torch.LongTensor`): rows of `token_ids`, of a shape that broadcasts with `items`.
        items (`torch.LongTensor`): token ids.

    Returns:
        `torch.LongTensor` of the broadcast shape, S where the row does not hold the item.
    """
    batch_size, length = token_ids.shape
    if length == 0:
        return torch.zeros_like(rows + items)
    num_ids = 1 + max(int(ids.max()) if ids.numel() else 0 for ids in (token_ids, items))
    keys = token_ids + num_ids * torch.arange(batch_size, device=token_ids.device)[:, None]
    keys, order = keys.flatten().sort(stable=True)
    wanted = items + num_ids * rows
    indices = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[indices] == wanted, order[indices] % length, length)


def score_items(lm_head: nn.Module, user_embeddings: Tensor, token_ids: Tensor) -> Tensor:
    """Return the scores of some items, in float32 at least: (B, D) user embeddings and (N,) token ids to (B, N)."""
    return _Scorer(lm_head, user_embeddings, in_double=False)(user_embeddings, token_ids)


def item_embeddings(lm_head: nn.Module, reader: str) -> Tensor:
    """Return `lm_head.weight`, of shape `(V, D)`, to a reader that needs single rows of it.

    Raises:
        ValueError: if the rows of the weight are not what the head scores with.
    """
    if not is_plain_linear(lm_head):
        weight = getattr(lm_head, "weight", None)
        of_weight = f" with a weight {type(weight).__name__} on {weight.device}" if isinstance(weight, Tensor) else ""
        raise ValueError(
            f"lm_head must be a plain torch.nn.Linear without bias, hooks, adapter, quantisation or offloading for "
            f"{reader}, which reads rows of its weight, found {type(lm_head).__module__}.{type(lm_head).__name__}"
            f"{of_weight}"
        )
    return lm_head.weight


class _Scorer:
    """Scores of users by a head, in float32 at least or in double precision, whatever the type of its weights."""

    def __init__(self, lm_head: nn.Module, user_embeddings: Tensor, in_double: bool):
        self.lm_head = lm_head
        weights = list(lm_head.parameters())
        # Quantised weights have types or classes of their own: the head computes as they want. DTensors are plain.
        self.is_quantised = not weights or not all(
            weight.is_floating_point() and (type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "placements"))
            for weight in weights
        )
        self.dtype = torch.promote_types(user_embeddings.dtype, torch.float32)
        if not self.is_quantised:
            self.dtype = reduce(torch.promote_types, (weight.dtype for weight in weights), self.dtype)
            self.dtype = torch.float64 if in_double else self.dtype
        self.precision = _Precision(self.dtype, weights)

    def __call__(self, users: Tensor, columns: slice | Tensor) -> Tensor:
        """(chunk, D) -> (chunk, columns)"""
        with torch.autocast(users.device.type, enabled=False):
            if self.is_quantised:
                return self.lm_head(users)[:, columns].to(self.dtype)
            if isinstance(columns, Tensor) and is_plain_linear(self.lm_head):
                return users.to(self.dtype) @ self.lm_head.weight[columns].to(self.dtype).T
            with self.precision:
                return self.lm_head(users.to(self.dtype))[:, columns]


class _Precision(TorchFunctionMode):
    """Compute in one floating-point type, in this thread: every plain tensor that goes into an operation is cast, and
    those of a list once."""

    def __init__(self, dtype: torch.dtype, weights: Sequence[Tensor]):
        super().__init__()
        self.dtype = dtype
        self.weights = {id(weight): weight for weight in weights}
        self.casts = {}

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        return function(*tree_map(self._cast, args), **tree_map(self._cast, kwargs or {}))

    def _cast(self, value: Any) -> Any:
        if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point() or value.dtype == self.dtype:
            return value
        if self.weights.get(id(value)) is not value:
            return value.to(self.dtype)
        if id(value) not in self.casts:
            self.casts[id(value)] = value.to(self.dtype)
        return self.casts[id(value)]


def _rounding_error(score: _Scorer, user_embeddings: Tensor, target_ids: Tensor) -> Tensor:
    """Estimate the worst-case error of the product of each user and target, `eps * D * |user| * |target|`: (B,).

    Equal items need not have equal scores, since the columns of a matrix product do not round alike. The length of a
    vector is the root mean square of its products with random signs.
    """
    size = user_embeddings.shape[1]
    signs = 2 * torch.randint(2, (NUM_PROBES, size), generator=torch.Generator().manual_seed(0)) - 1
    lengths = score(signs.to(user_embeddings), target_ids).square().mean(dim=0).sqrt()
    return torch.finfo(score.dtype).eps * size * user_embeddings.to(score.dtype).norm(dim=-1) * lengths


def _rank(scores: Tensor, targets: Tensor, tolerance: Tensor, is_seen: Tensor | None) -> Tensor:
    """(chunk, V) scores of items, (chunk, 1) columns of targets -> (chunk, 2) ranks, without and with seen items."""
    thresholds = scores.gather(1, targets) - tolerance
    competes = ~(scores < thresholds)  # a comparison with NaN is false
    competes.scatter_(1, targets, False)
    kept = 1 + competes.sum(dim=1, dtype=torch.int32).long()  # faster than a sum in int64
    if is_seen is None:
        return torch.stack([kept, kept], dim=1)
    excluded = 1 + competes.masked_fill_(is_seen, False).sum(dim=1, dtype=torch.int32).long()
    excluded[is_seen.gather(1, targets)[:, 0]] = scores.shape[1]
    return torch.stack([excluded, kept], dim=1)


def _pad_right(rows: Tensor, length: int, value: float) -> Tensor:
    return nn.functional.pad(rows, (0, length - rows.shape[1]), value=value)
