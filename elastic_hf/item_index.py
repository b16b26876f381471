"""An approximate index of the items, for catalogues so large that scoring all of them takes too long."""

import hashlib
import math
import weakref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .models.catalogue import first_read, item_embeddings


class ItemIndex:
    """
    The items of a model in clusters, of which each search visits those nearest to the user embedding (FAISS
    `IndexIVFFlat`; `pip install faiss-cpu`).

    Scores are exact; a best item is missed where its cluster is not visited. The index holds a copy of the item
    embeddings, on the processor: `recommend` refuses it after training on, and with any other model.

    Args:
        model: a recommender of this package, with a plain linear layer as `lm_head`, or with item features.
        num_clusters (`int`, *optional*): defaults to 4 times the square root of the number of items.
        num_probes (`int`, defaults to 16): clusters visited by each search. More of them find more, and take longer.

    Raises:
        ImportError: if FAISS is not installed.
        ValueError: if there are not at least as many items as clusters, and as clusters as probes, or if `lm_head` is
            no plain linear layer.
    """

    def __init__(self, model: PreTrainedModel, num_clusters: int | None = None, num_probes: int = 16) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("ItemIndex needs FAISS: pip install faiss-cpu") from error
        self.first = model.config.num_special_tokens
        weight = _item_vectors(model)
        self.digest = _digest(weight)
        self._remember(weight)
        items = weight.detach()[self.first :].float().cpu().numpy()
        if num_clusters is None:
            num_clusters = max(1, min(round(4 * math.sqrt(len(items))), len(items)))
            num_probes = min(num_probes, num_clusters)
        if not 1 <= num_probes <= num_clusters <= len(items):
            raise ValueError(
                f"num_probes and num_clusters must be 1 <= num_probes <= num_clusters <= {len(items)} (the items), "
                f"found {num_probes} and {num_clusters}"
            )
        self.index = faiss.index_factory(items.shape[1], f"IVF{num_clusters},Flat", faiss.METRIC_INNER_PRODUCT)
        self.index.train(items)
        self.index.add(items)
        self.index.nprobe = num_probes

    def add_items(self, model: PreTrainedModel) -> None:
        """Add the items by which a model has grown, by its `add_items`, since this index was built. They go into the
        clusters that there are: build the index again when many have come.

        Raises:
            ValueError: if the other items are no longer those of the index.
        """
        weight = _item_vectors(model)
        size = self.first + self.index.ntotal
        if len(weight) < size or _digest(weight[:size]) != self.digest:
            raise ValueError(
                f"index must hold the first {size - self.first} items of this model, found others: build it again "
                "with ItemIndex(model)"
            )
        self.index.add(weight[size:].float().cpu().numpy())
        self.digest = _digest(weight)
        self._remember(weight)

    def validate_model(self, model: PreTrainedModel) -> None:
        """Check that this is an index of the items of a model, as they are now.

        Raises:
            ValueError: if it is not.
        """
        weight = _item_vectors(model)
        if self._weight() is weight and self._version == _version(weight):
            return
        if _digest(weight) != self.digest:
            raise ValueError(
                f"index must hold the item embeddings of this model, of shape {tuple(weight.shape)}, found those of "
                "another model, or of this one before they changed: build it again with ItemIndex(model)"
            )
        self._remember(weight)

    def _remember(self, weight: Tensor) -> None:
        """Not to compute the digest of the same weight again."""
        self._weight, self._version = weakref.ref(weight), _version(weight)

    def search(self, user_embeddings: Tensor, top_k: int, seen_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the best items found.

        Args:
            user_embeddings (`torch.Tensor` of shape `(B, D)`).
            top_k (`int`): how many.
            seen_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): token ids not to return.

        Returns:
            Scores and token ids, each of shape `(B, top_k)`, best first; where fewer are found, `-inf` and -1.

        Raises:
            ValueError: if `top_k` is more than the number of items.
        """
        if top_k > self.index.ntotal:
            raise ValueError(f"top_k must be at most the number of items ({self.index.ntotal}), found {top_k}")
        num_seen = 0 if seen_ids is None else seen_ids.shape[1]
        num_found = min(top_k + num_seen, self.index.ntotal)
        scores, rows = self.index.search(user_embeddings.float().cpu().numpy(), num_found)
        scores, token_ids = torch.from_numpy(scores), torch.from_numpy(rows) + self.first
        is_left_out = token_ids < self.first  # FAISS marks what it did not find with -1
        if seen_ids is not None:
            of_users = torch.arange(len(seen_ids))[:, None]
            is_left_out |= first_read(seen_ids.cpu(), of_users, token_ids) < num_seen
        scores, order = scores.masked_fill(is_left_out, -torch.inf).topk(top_k)
        token_ids = token_ids.gather(-1, order).masked_fill(scores == -torch.inf, -1)
        return scores.to(user_embeddings.device), token_ids.to(user_embeddings.device)


@torch.no_grad()
def _item_vectors(model: PreTrainedModel) -> Tensor:
    return item_embeddings(model.scoring_head(), "ItemIndex")


def _digest(weight: Tensor) -> str:
    sha256 = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    sha256.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha256.hexdigest()


def _version(weight: Tensor) -> tuple[int, int]:
    """What changes when a weight is assigned or changed in place."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


__all__ = ["ItemIndex"]
