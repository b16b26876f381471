"""What a new item borrows from those that a model was trained on, until the next training has seen it.

Axis letters: N new items, V known items, C size of a direction, D hidden size.
"""

import torch
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
        num_nearest (`int`, defaults to 3): how many known items are summed; those with a cosine below 0 are left out.

    Returns:
        `torch.Tensor` of shape `(N, D)`, in float32 at least; zeros where no known item is like a new one.
    """
    dtype = torch.promote_types(id_embeddings.dtype, torch.float32)  # where `normalize` leaves zeros as they are
    sums = id_embeddings.new_empty(len(new), id_embeddings.shape[1], dtype=dtype)
    for chunk in row_chunks(len(new), len(known), new.device):
        cosines, rows = (new[chunk] @ known.T).topk(min(num_nearest, len(known)), dim=-1)
        sums[chunk] = (cosines.clamp(min=0)[..., None] * id_embeddings[rows].to(dtype)).sum(dim=1)
    return torch.linalg.vector_norm(id_embeddings, dim=-1, dtype=dtype).mean() * F.normalize(sums, dim=-1)
