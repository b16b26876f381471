"""What a new item takes from those that a model was trained on, while no training has seen it.

Axis letters: N new items, V known items, C size of a direction, D hidden size.
"""

import torch.nn.functional as F
from torch import Tensor

from .catalogue import row_chunks


# How many trained items a new one borrows its id embedding from.
NUM_NEAREST = 3


def borrow_ids(new: Tensor, known: Tensor, id_embeddings: Tensor, num_nearest: int = NUM_NEAREST) -> Tensor:
    """Return id embeddings for new items: the sum of those of the nearest known items, weighted by their cosines, at
    the mean length of all known ones.

    Args:
        new (`torch.Tensor` of shape `(N, C)`): directions of the new items.
        known (`torch.Tensor` of shape `(V, C)`): directions of the known items.
        id_embeddings (`torch.Tensor` of shape `(V, D)`): their id embeddings.
        num_nearest (`int`): how many known items are summed, no more than have a cosine above 0.

    Returns:
        `torch.Tensor` of shape `(N, D)`; zeros where no known item is like a new one.
    """
    sums = id_embeddings.new_empty(len(new), id_embeddings.shape[1])
    for chunk in row_chunks(len(new), len(known), new.device):
        cosines, rows = (new[chunk] @ known.T).topk(min(num_nearest, len(known)), dim=-1)
        weights = cosines.clamp(min=0).to(id_embeddings.dtype)
        sums[chunk] = (weights[..., None] * id_embeddings[rows]).sum(dim=1)
    return id_embeddings.norm(dim=-1).mean() * F.normalize(sums, dim=-1)
