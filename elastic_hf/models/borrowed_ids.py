"""What a new item borrows from those that a model was trained on, until the next training has seen it.

Axis letters: N new items, V known items, C size of a direction, D hidden size.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


# How many trained items a new one borrows its id embedding from.
NUM_NEAREST = 3


def borrow_ids(new: Tensor, known: Iterable[Tensor], id_embeddings: Tensor, num_nearest: int = NUM_NEAREST) -> Tensor:
    """Return id embeddings for new items: the sum of those of the nearest known items, weighted by their cosines, at
    the mean length of all known ones.

    Args:
        new (`torch.Tensor` of shape `(N, C)`): directions of the new items.
        known (`Iterable[torch.Tensor]`): directions of the known items, some rows after the others: `(V, C)` together.
        id_embeddings (`torch.Tensor` of shape `(V, D)`): the id embeddings of the known items.
        num_nearest (`int`, defaults to 3): how many known items are summed; those with a cosine below 0 are left out.

    Returns:
        `torch.Tensor` of shape `(N, D)`, in float32 at least; zeros where no known item is like a new one.
    """
    cosines, start = new.new_empty(len(new), 0), 0
    nearest = new.new_empty(len(new), 0, dtype=torch.long)
    for directions in known:
        of_rows = new @ directions.T
        rows = torch.arange(start, start + len(directions), device=new.device).expand_as(of_rows)
        cosines, nearest = torch.cat([cosines, of_rows], dim=1), torch.cat([nearest, rows], dim=1)
        cosines, columns = cosines.topk(min(num_nearest, cosines.shape[1]), dim=1)
        nearest = nearest.gather(1, columns)
        start += len(directions)
    dtype = torch.promote_types(id_embeddings.dtype, torch.float32)  # where `normalize` leaves zeros as they are
    sums = (cosines.clamp(min=0).to(dtype)[..., None] * id_embeddings[nearest].to(dtype)).sum(dim=1)
    return torch.linalg.vector_norm(id_embeddings, dim=-1, dtype=dtype).mean() * F.normalize(sums, dim=-1)
