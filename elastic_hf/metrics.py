"""Ranks of the target items over the full catalogue, and the metrics that follow from them."""

import numpy as np
import torch


CUTOFFS = (1, 5, 10, 20)


@torch.no_grad()
def rank_targets(
    user_embeddings: torch.Tensor,
    item_embeddings: torch.Tensor,
    target_ids: torch.Tensor,
    seen_ids: torch.Tensor,
    num_special_tokens: int = 3,
    chunk_size: int = 8192,
) -> torch.Tensor:
    """
    Ranks each user's target among all items of the catalogue, scored by the inner product of the embeddings.

    A rank is 1 plus the number of other items whose score is *not below* the target's, so that ties and NaN scores
    count against the model: a constant or a NaN scorer puts every target last. Scores are compared in double
    precision, and scores closer than its rounding error are ties.

    Args:
        user_embeddings (`torch.Tensor` of shape `(batch_size, hidden_size)`):
            One embedding per user.
        item_embeddings (`torch.Tensor` of shape `(vocab_size, hidden_size)`):
            One embedding per token. The first `num_special_tokens` rows are no items and are never scored.
        target_ids (`torch.LongTensor` of shape `(batch_size,)`):
            Token id of the item to be ranked.
        seen_ids (`torch.LongTensor` of shape `(batch_size, num_seen)`):
            Token ids of the user's whole history, in any order, padded with special tokens.
        num_special_tokens (`int`, *optional*, defaults to 3):
            Number of tokens before the first item.
        chunk_size (`int`, *optional*, defaults to 8192):
            Number of items scored at once: no more than `batch_size * chunk_size` scores are held.

    Returns:
        `torch.LongTensor` of shape `(batch_size, 2)`: the rank with the seen items left out of the competition, and
        the rank with them kept. A target that is itself among the seen items cannot be recommended: its first rank is
        the number of items.

    Raises:
        `ValueError`: if the shapes do not belong together or a target is not an item.
    """
    batch_size, vocab_size = user_embeddings.shape[0], item_embeddings.shape[0]
    if user_embeddings.shape[1:] != item_embeddings.shape[1:]:
        raise ValueError(
            "user_embeddings and item_embeddings must have the same hidden_size, found shapes "
            f"{tuple(user_embeddings.shape)} and {tuple(item_embeddings.shape)}"
        )
    if target_ids.shape != (batch_size,):
        raise ValueError(f"target_ids must have shape ({batch_size},), found {tuple(target_ids.shape)}")
    if seen_ids.dim() != 2 or seen_ids.shape[0] != batch_size:
        raise ValueError(f"seen_ids must have shape ({batch_size}, num_seen), found {tuple(seen_ids.shape)}")
    if ((target_ids < num_special_tokens) | (target_ids >= vocab_size)).any():
        raise ValueError(
            f"target_ids must be items, in [{num_special_tokens}, {vocab_size}), found values from "
            f"{target_ids.min().item()} to {target_ids.max().item()}"
        )

    user_embeddings = user_embeddings.double()
    target_embeddings = item_embeddings[target_ids].double()
    target_scores = (user_embeddings * target_embeddings).sum(-1)  # (B,)
    # The columns of a matrix product need not round alike, so equal scores are equal only up to the worst-case error.
    rounding = torch.finfo(torch.float64).eps * user_embeddings.shape[1]
    tolerance = rounding * user_embeddings.norm(dim=-1) * target_embeddings.norm(dim=-1)
    thresholds = (target_scores - tolerance)[:, None]

    rows = torch.arange(batch_size, device=target_ids.device)
    num_not_below = torch.zeros(batch_size, 2, dtype=torch.long, device=target_ids.device)
    for start in range(num_special_tokens, vocab_size, chunk_size):
        chunk = item_embeddings[start : start + chunk_size].double()
        competes = ~(user_embeddings @ chunk.T < thresholds)  # (B, C); a comparison with NaN is false
        in_chunk = (target_ids >= start) & (target_ids < start + len(chunk))
        competes[rows[in_chunk], target_ids[in_chunk] - start] = False
        num_not_below[:, 1] += competes.sum(-1)
        seen_rows, seen_columns = ((seen_ids >= start) & (seen_ids < start + len(chunk))).nonzero(as_tuple=True)
        competes[seen_rows, seen_ids[seen_rows, seen_columns] - start] = False
        num_not_below[:, 0] += competes.sum(-1)

    ranks = 1 + num_not_below
    target_is_seen = (seen_ids == target_ids[:, None]).any(-1)
    ranks[target_is_seen, 0] = vocab_size - num_special_tokens
    return ranks


def ranking_metrics(ranks: np.ndarray, top_ids: np.ndarray, num_items: int) -> dict[str, float]:
    """
    Turns ranks into the usual metrics of top-k recommendation, averaged over the users.

    Args:
        ranks (`np.ndarray` of shape `(num_users, 2)`):
            Ranks from [`rank_targets`]: seen items excluded, seen items kept.
        top_ids (`np.ndarray` of shape `(num_users, top_k)`):
            The recommended token ids, best first, seen items excluded; -1 where there was nothing left to recommend.
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

    metrics = {}
    for column, suffix in enumerate(("", "_seen_kept")):
        rank = ranks[:, column].astype(np.float64)
        for k in CUTOFFS:
            hit = rank <= k
            metrics[f"hr@{k}{suffix}"] = float(hit.mean())
            metrics[f"ndcg@{k}{suffix}"] = float((hit / np.log2(rank + 1)).mean())
            metrics[f"mrr@{k}{suffix}"] = float((hit / rank).mean())
    recommended = np.unique(top_ids[:, :10])
    metrics["coverage@10"] = float((recommended >= 0).sum() / num_items)
    return metrics


def popularity_bias(
    top_ids: np.ndarray, target_ids: np.ndarray, counts: np.ndarray, num_special_tokens: int = 3
) -> dict[str, float]:
    """
    How popular the recommended items are, beside the items that the users went on to.

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
