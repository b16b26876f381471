"""A user's [`ElasticCache`] and what belongs to it, as bytes of safetensors: a value for any store of bytes."""

import hashlib
from dataclasses import dataclass, field

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from ..models.cache_elastic import TENSORS, ElasticCache


DIGEST = "model_digest"
OTHERS = ("latest_id", "latest_timestamp", "seen_ids", "event_numbers")


def pack_state(cache: ElasticCache, **others: Tensor) -> bytes:
    """Return the bytes of a cache, which name the model that made it, and of other tensors, by name."""
    digest = torch.tensor(list(bytes.fromhex(cache.model_digest)), dtype=torch.uint8)
    tensors = {**cache.tensors, **others, DIGEST: digest}
    return safetensors.numpy.save({name: tensor.cpu().contiguous().numpy() for name, tensor in tensors.items()})


def unpack_state(state: bytes, *others: str) -> tuple[ElasticCache, dict[str, Tensor]]:
    """Return what [`pack_state`] was given.

    Args:
        state (`bytes`): what it returned.
        others (`str`): the names of the other tensors.

    Raises:
        ValueError: if these are no such bytes.
    """
    try:
        tensors = safetensors.torch.load(state)
    except safetensors.SafetensorError as error:
        raise ValueError(f"a state must be bytes of safetensors, found others: {error}") from error
    names = {DIGEST, *TENSORS, *others}
    if tensors.keys() | {"last_timestamps"} != names:
        raise ValueError(f"a state must hold {', '.join(sorted(names))}, found {', '.join(sorted(tensors))}")
    digest = bytes(tensors.pop(DIGEST).tolist()).hex()
    found = {name: tensors.pop(name) for name in TENSORS if name in tensors}
    return ElasticCache(**found, model_digest=digest), tensors


def _nothing(dtype: torch.dtype = torch.long) -> Tensor:
    return torch.empty(0, dtype=dtype)


@dataclass
class UserState:
    """
    What a service keeps of a user: the cache lacks the latest event, which is read for each request anew.

    Args:
        cache ([`ElasticCache`]): of one user, after all events but the latest.
        latest_id (`torch.LongTensor` of shape `(1,)`, or `(0,)` before any event): token id of the latest event.
        latest_timestamp (`torch.DoubleTensor` of the same shape): its Unix seconds, -1 without times.
        seen_ids (`torch.LongTensor` of shape `(num_seen,)`): token ids of all items seen, ascending.
        event_numbers (`torch.LongTensor` of shape `(num_events,)`): of all events, see [`event_number`].
    """

    cache: ElasticCache
    latest_id: Tensor = field(default_factory=_nothing)
    latest_timestamp: Tensor = field(default_factory=lambda: _nothing(torch.double))
    seen_ids: Tensor = field(default_factory=_nothing)
    event_numbers: Tensor = field(default_factory=_nothing)

    def append(self, token_ids: list[int], seconds: list[float], event_numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Append events to all but the cache, and return what that has to read now: the token ids and the Unix
        seconds, (num_unread,) both, of what came before the latest event and is not yet in it."""
        ids = torch.cat([self.latest_id, torch.tensor(token_ids)])
        timestamps = torch.cat([self.latest_timestamp, torch.tensor(seconds, dtype=torch.double)])
        self.seen_ids = torch.cat([self.seen_ids, ids]).unique()
        self.event_numbers = torch.cat([self.event_numbers, torch.tensor(event_numbers)])
        self.latest_id, self.latest_timestamp = ids[-1:].clone(), timestamps[-1:].clone()
        return ids[:-1], timestamps[:-1]

    def to_bytes(self) -> bytes:
        """Return what a store keeps."""
        return pack_state(self.cache, **{name: getattr(self, name) for name in OTHERS})

    @classmethod
    def from_bytes(cls, state: bytes) -> "UserState":
        """Return the state that [`to_bytes`] was called of.

        Raises:
            ValueError: as [`unpack_state`].
        """
        cache, others = unpack_state(state, *OTHERS)
        return cls(cache, **others)


def event_number(event_id: str) -> int:
    """Return the 64-bit number that stands for the id of an event in a state."""
    return int.from_bytes(hashlib.blake2b(event_id.encode(), digest_size=8).digest(), "big", signed=True)
