"""A user's [`ElasticCache`] and what belongs to it, as bytes of safetensors: a value for any store of bytes."""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from ..models.cache_elastic import TENSORS, ElasticCache


DIGEST = "model_digest"
OTHERS = ("latest_id", "latest_timestamp", "latest_features", "seen_ids", "event_numbers")
OPTIONAL = {"last_timestamps", "latest_features"}  # of models that read times or features of events


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
    if not names - OPTIONAL <= tensors.keys() <= names:
        raise ValueError(f"a state must hold {', '.join(sorted(names))}, found {', '.join(sorted(tensors))}")
    digest = bytes(tensors.pop(DIGEST).tolist()).hex()
    found = {name: tensors.pop(name) for name in TENSORS if name in tensors}
    return ElasticCache(**found, model_digest=digest), tensors


class EventTensors(NamedTuple):
    """
    Events of one user, oldest first.

    Attributes:
        token_ids (`torch.LongTensor` of shape `(L,)`).
        timestamps (`torch.DoubleTensor` of shape `(L,)`): Unix seconds, -1 without times.
        features (`torch.FloatTensor` of shape `(L, F)`): of a model with F features of events.
    """

    token_ids: Tensor
    timestamps: Tensor
    features: Tensor


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
        latest_features (`torch.FloatTensor` of shape `(1, F)` or `(0, F)`): its features, by default none of any.
        seen_ids (`torch.LongTensor` of shape `(num_seen,)`): token ids of all items seen, ascending.
        event_numbers (`torch.LongTensor` of shape `(num_events,)`): of all events, see [`event_number`].
    """

    cache: ElasticCache
    latest_id: Tensor = field(default_factory=_nothing)
    latest_timestamp: Tensor = field(default_factory=lambda: _nothing(torch.double))
    latest_features: Tensor | None = None
    seen_ids: Tensor = field(default_factory=_nothing)
    event_numbers: Tensor = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        if self.latest_features is None:
            self.latest_features = torch.empty(len(self.latest_id), 0)

    @property
    def latest(self) -> EventTensors:
        """The latest event, if there is one."""
        return EventTensors(self.latest_id, self.latest_timestamp, self.latest_features)

    def append(self, events: EventTensors, event_numbers: list[int]) -> EventTensors:
        """Append events to all but the cache, and return what that has to read now: the events that came before the
        latest one and are not yet in it."""
        events = EventTensors(*(torch.cat(pair) for pair in zip(self.latest, events, strict=True)))
        self.seen_ids = torch.cat([self.seen_ids, events.token_ids]).unique()
        self.event_numbers = torch.cat([self.event_numbers, torch.tensor(event_numbers)])
        self.latest_id, self.latest_timestamp, self.latest_features = (tensor[-1:].clone() for tensor in events)
        return EventTensors(*(tensor[:-1] for tensor in events))

    def to_bytes(self) -> bytes:
        """Return what a store keeps."""
        others = {name: getattr(self, name) for name in OTHERS}
        if self.latest_features.shape[1] == 0:
            del others["latest_features"]
        return pack_state(self.cache, **others)

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
