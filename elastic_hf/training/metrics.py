"""The metrics of top-k recommendation that follow from ranks over the full catalogue and recommended items."""

from collections.abc import Iterator

import numpy as np

from ..results import CUTOFFS, SUFFIXES


def ranking_metrics(ranks: np.ndarray, top_ids: np.ndarray, num_items: int) -> dict[str, float]:
    """
    Turn ranks into the usual metrics of top-k recommendation, averaged over the users.

    Args:
        ranks (`np.ndarray` of shape `(num_users, 2)`):
            Ranks from [`~catalogue.search_catalogue`]: seen items excluded, seen items kept.
        top_ids (`np.ndarray` of shape `(num_users, top_k)`):
            The recommended token ids, best first; -1 where there was nothing left to recommend.
        num_items (`int`):
            Number of items in the catalogue.

    Returns:
        `dict[str, float]`: `hr@k`, `ndcg@k` and `mrr@k` for k = 1, 5, 10, 20 with seen items excluded, the same with
        the suffix `_seen_kept`, and `coverage@10`, the share of the catalogue in anyone's first ten.

    Raises:
        `ValueError`: if there is no user, a rank is below 1, or the shapes do not belong together.
    """
    if ranks.ndim != 2 or ranks.shape[0] == 0 or ranks.shape[1] != 2:
        raise ValueError(f"ranks must have shape (num_users, 2) with at least one user, found {ranks.shape}")
    if ranks.min() < 1:
        raise ValueError(f"ranks must start at 1, found {ranks.min()}")
    if top_ids.ndim != 2 or len(top_ids) != len(ranks):
        raise ValueError(f"top_ids must have shape ({len(ranks)}, top_k), found {top_ids.shape}")

    metrics = {name: float(values.mean()) for name, values in _metrics_of_users(ranks)}
    recommended = np.unique(top_ids[:, :10])
    metrics["coverage@10"] = float((recommended >= 0).sum() / num_items)
    return metrics


def standard_errors(ranks: np.ndarray) -> dict[str, float]:
    """
    Return the standard error of each mean over users in [`ranking_metrics`]: by how much it varies from one sample of
    as many users to another.

    Args:
        ranks (`np.ndarray` of shape `(num_users, 2)`): As in [`ranking_metrics`].

    Returns:
        `dict[str, float]`: By the names of the metrics; empty for one user, of whom it is not known.
    """
    num_users = len(ranks)
    if num_users < 2:
        return {}
    return {name: float(values.std(ddof=1) / num_users**0.5) for name, values in _metrics_of_users(ranks)}


def _metrics_of_users(ranks: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names of the metrics and their values for all users, (num_users,)."""
    for column, suffix in enumerate(SUFFIXES.values()):
        rank = ranks[:, column].astype(np.float64)
        for k in CUTOFFS:
            hit = rank <= k
            yield f"hr@{k}{suffix}", hit
            yield f"ndcg@{k}{suffix}", hit / np.log2(rank + 1)
            yield f"mrr@{k}{suffix}", hit / rank


def popularity_bias(
    top_ids: np.ndarray, target_ids: np.ndarray, counts: np.ndarray, num_special_tokens: int = 3
) -> dict[str, float]:
    """
    Return how popular the recommended items are, and the items that the users went on to.

    The popularity percentile of an item is the share of the catalogue that occurs less often than it, plus half the
    share that occurs equally often, itself included. Over the catalogue its mean is 0.5, whatever the ties. The head
    of the catalogue are the items above percentile 0.9: the most popular tenth, where no counts are equal.

    Args:
        top_ids (`np.ndarray` of shape `(num_users, top_k)`):
            The recommended token ids, best first; -1 where there was nothing left to recommend.
        target_ids (`np.ndarray` of shape `(num_users,)`):
            Token id of the item that each user went on to.
        counts (`np.ndarray` of shape `(vocab_size,)`):
            How often each token occurs in the training histories. The first `num_special_tokens` are no items.
        num_special_tokens (`int`, *optional*, defaults to 3):
            Number of tokens before the first item.

    Returns:
        `dict[str, float]`: `popularity_percentile@10`, the mean over all users' first ten recommendations, and
        `popularity_percentile_target`, the mean over the targets; `head_share@10` and `head_share_target`, the shares
        of them that lie in the head.

    Raises:
        `ValueError`: if the shapes do not belong together, a token id is not an item, or nobody is recommended any.
    """
    num_users, vocab_size = len(target_ids), len(counts)
    if top_ids.ndim != 2 or target_ids.ndim != 1 or len(top_ids) != num_users:
        raise ValueError(
            "top_ids and target_ids must have shapes (num_users, top_k) and (num_users,), "
            f"found {top_ids.shape} and {target_ids.shape}"
        )
    item_counts = counts[num_special_tokens:]
    in_order = np.sort(item_counts)
    num_fewer, num_not_more = (np.searchsorted(in_order, item_counts, side) for side in ("left", "right"))
    percentiles = (num_fewer + num_not_more) / (2 * len(item_counts))

    bias = {}
    recommended = top_ids[:, :10]
    for name, ids in (("@10", recommended[recommended != -1]), ("_target", target_ids)):
        if not ids.size or ids.min() < num_special_tokens or ids.max() >= vocab_size:
            found = f"values from {ids.min()} to {ids.max()}" if ids.size else "none"
            field = "top_ids" if name == "@10" else "target_ids"
            raise ValueError(f"{field} must be items, in [{num_special_tokens}, {vocab_size}), found {found}")
        bias[f"popularity_percentile{name}"] = float(percentiles[ids - num_special_tokens].mean())
        bias[f"head_share{name}"] = float((percentiles[ids - num_special_tokens] > 0.9).mean())
    return bias
