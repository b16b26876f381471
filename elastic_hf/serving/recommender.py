"""Reads events into the states of users and recommends from them, many users in one pass of the model.

A state holds what the model has compressed of all events but the latest, and the latest event. That one is read for
each request: a model that reads times is told how long ago it was.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.cache_elastic import ElasticCache
from ..models.catalogue import CatalogueQuery
from ..models.event_time import UNKNOWN
from ..models.pipeline import SequentialRecommendationPipeline
from .stores import RedisStore, SQLiteStore
from .user_state import EventTensors, UserState, event_number


MAX_EVENTS_OF_USER = 100_000
MAX_SECONDS_AHEAD = 86_400  # of this clock: clocks differ by less, and milliseconds by more
APPENDED, DUPLICATE = "appended", "duplicate"


class UnknownUser(LookupError):
    """No event of this user is stored."""


class StateError(ValueError):
    """What is stored of a user is not a state of this model."""


@dataclass(frozen=True)
class Event:
    """
    A user and an item.

    Args:
        user (`str`).
        item (`str` or `int`): an item id.
        event_id (`str`): names the event among those of its user. Sent again, it counts once.
        timestamp (`float`, *optional*): Unix seconds, for a model with `use_timestamps`, and for no other.
        features (`dict[str, Any]`, *optional*):
            For a model with `event_features` the value of each of these event columns, None where it is not known.
    """

    user: str
    item: str | int
    event_id: str
    timestamp: float | None = None
    features: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """
    A user to recommend to.

    Args:
        user (`str`).
        top_k (`int`, defaults to 10): how many items.
        now (`float`, *optional*):
            For which moment, in Unix seconds, for a model with `use_timestamps`, and for no other. Defaults to the
            present one, or to that of the latest event where a clock ahead of this one says so.
    """

    user: str
    top_k: int = 10
    now: float | None = None


class Recommender:
    """
    Recommends to users whose events come one by one.

    Args:
        pipeline ([`SequentialRecommendationPipeline`]): of a model that keeps states.
        store ([`SQLiteStore`] or [`RedisStore`]): where the states are.

    Raises:
        ValueError: if the model keeps no states.
    """

    def __init__(self, pipeline: SequentialRecommendationPipeline, store: SQLiteStore | RedisStore) -> None:
        self.model = pipeline.model
        if not self.model.supports_cache:
            raise ValueError(f"model must keep states of users, found {type(self.model).__name__}, which keeps none")
        self.pipeline = pipeline
        self.store = store
        self.uses_timestamps = self.model.config.use_timestamps
        self.feature_names = [*self.model.config.event_features]

    @torch.inference_mode()
    def append(self, events: list[Event]) -> list[str | ValueError]:
        """Read events into the states of their users, in their order, and return what became of each.

        All that is appended is stored when this returns, and nothing of it if it raises. An event that is refused
        leaves the others as they are.

        Args:
            events (`list[Event]`).

        Returns:
            `list`: for each event `"appended"`; `"duplicate"`, where the user has an event of this id already, which
            then stays as it is; or the `ValueError` that says why it was refused.

        Raises:
            StoreUnavailable: if the store cannot be used.
        """
        token_ids = self.pipeline.tokenizer.convert_tokens_to_ids([event.item for event in events])
        features = self._encode_features(events)
        by_user: dict[str, list[int]] = {}
        for index, event in enumerate(events):
            by_user.setdefault(event.user, []).append(index)
        outcomes: dict[int, str | ValueError] = {}
        digest = self.model.base_model.digest()

        def change(stored: dict[str, bytes]) -> dict[str, bytes]:
            states, unread = {}, []
            for user, indices in by_user.items():
                try:
                    state = self._state(user, stored.get(user), digest)
                except StateError as error:
                    outcomes.update(dict.fromkeys(indices, error))
                    continue
                checked = self._check(state, [(events[i], token_ids[i], features[i]) for i in indices])
                outcomes.update(zip(indices, checked, strict=True))
                appended = [i for i, outcome in zip(indices, checked, strict=True) if outcome == APPENDED]
                if appended:
                    times = [events[i].timestamp for i in appended]
                    tensors = EventTensors(
                        torch.tensor([token_ids[i] for i in appended]),
                        torch.tensor([UNKNOWN if time is None else time for time in times], dtype=torch.double),
                        torch.stack([features[i] for i in appended]),
                    )
                    states[user] = state
                    unread.append(state.append(tensors, [event_number(events[i].event_id) for i in appended]))
            self._read([*states.values()], unread)
            return {user: state.to_bytes() for user, state in states.items()}

        self.store.update([*by_user], change)
        return [outcomes[index] for index in range(len(events))]

    @torch.inference_mode()
    def recommend(self, requests: list[Request]) -> list[list[dict] | Exception]:
        """Return the items most likely to come next for each user, best first.

        Args:
            requests (`list[Request]`): a user may come more than once.

        Returns:
            `list`: for each request what the pipeline returns for a history, `top_k` dictionaries of `item`, `title`
            and `score`; or the error that says why there is no answer: an `UnknownUser`, a `StateError`, or a
            `ValueError` if `top_k` or `now` is not as described or fewer than `top_k` items are left.

        Raises:
            StoreUnavailable: if the store cannot be used.
        """
        stored = self.store.read([*{request.user: None for request in requests}])
        digest = self.model.base_model.digest()
        answers: list[list[dict] | Exception] = []
        answered, states, moments = [], [], []
        for index, request in enumerate(requests):
            try:
                if request.user not in stored:
                    raise UnknownUser(f"no event of the user {request.user!r} is stored")
                state = self._state(request.user, stored[request.user], digest)
                moments.append(self._moment(request, state))
            except (UnknownUser, ValueError) as error:
                answers.append(error)
                continue
            states.append(state)
            answered.append(index)
            answers.append([])
        if states:
            found = self._search(states, moments, [requests[index] for index in answered])
            for index, answer in zip(answered, found, strict=True):
                answers[index] = answer
        return answers

    def _state(self, user: str, stored: bytes | None, digest: str) -> UserState:
        """Return the state of a user from the bytes that are stored, if any; `digest` is the model's."""
        if stored is None:
            nothing = torch.empty(0, len(self.feature_names))
            return UserState(ElasticCache.empty(self.model, 1).to("cpu"), latest_features=nothing)
        try:
            state = UserState.from_bytes(stored)
            state.cache.check(self.model.base_model, 1, digest)
        except ValueError as error:
            raise StateError(f"the state of the user {user!r} must be one of this model: {error}") from error
        return state

    def _encode_features(self, events: list[Event]) -> list[Tensor | ValueError]:
        """Return the features of each event, (F,), or why they cannot be read."""
        names = self.feature_names
        try:
            for event in events:
                if event.features.keys() != {*names}:
                    raise ValueError(f"features must be those of the model, {names}, found {[*event.features]}")
            if not names:
                return [torch.empty(0)] * len(events)
            columns = {name: [event.features[name] for event in events] for name in names}
            return [*torch.from_numpy(self.pipeline.tokenizer.encode_events(columns))]
        except ValueError as error:
            half = len(events) // 2
            halves = (events[:half], events[half:])
            return [row for some in halves for row in self._encode_features(some)] if half else [error]

    def _check(self, state: UserState, events: list[tuple[Event, int, Tensor | ValueError]]) -> list[str | ValueError]:
        """Return what is to become of events of one user, which come with their token ids and features."""
        outcomes: list[str | ValueError] = []
        numbers = [event_number(event.event_id) for event, *_ in events]
        are_stored = torch.isin(torch.tensor(numbers), state.event_numbers).tolist()
        new: set[int] = set()
        latest = max(state.latest_timestamp.tolist(), default=UNKNOWN)
        for (event, token_id, features), number, is_stored in zip(events, numbers, are_stored, strict=True):
            if is_stored or number in new:
                outcomes.append(DUPLICATE)
                continue
            try:
                self._check_event(event, token_id, latest, len(state.event_numbers) + len(new))
                if isinstance(features, ValueError):
                    raise features
            except ValueError as error:
                outcomes.append(error)
                continue
            outcomes.append(APPENDED)
            new.add(number)
            latest = UNKNOWN if event.timestamp is None else event.timestamp
        return outcomes

    def _check_event(self, event: Event, token_id: int, latest: float, num_events: int) -> None:
        """Refuse an event that cannot come after `num_events`, the last of them at `latest`."""
        if token_id < self.model.config.num_special_tokens:
            raise ValueError(f"item must be one that the model knows, found {event.item!r}")
        if num_events >= MAX_EVENTS_OF_USER:
            raise ValueError(f"a user must have at most {MAX_EVENTS_OF_USER:,} events, found one more")
        if (event.timestamp is not None) != self.uses_timestamps:
            wanted = "Unix seconds" if self.uses_timestamps else "None"
            raise ValueError(
                f"timestamp must be {wanted} for a model with use_timestamps={self.uses_timestamps}, "
                f"found {event.timestamp!r}"
            )
        if event.timestamp is not None:
            first, last = max(0, latest), time.time() + MAX_SECONDS_AHEAD
            if not first <= event.timestamp <= last:
                raise ValueError(
                    "timestamp must be Unix seconds, not before the user's latest event and at most a day ahead, from "
                    f"{first} to {last:.0f}, found {event.timestamp}"
                )

    def _inputs(self, users: list[EventTensors]) -> dict[str, Tensor]:
        """Return what the model reads of the events of each user, padded on the left."""
        token_ids, timestamps, features = zip(*users, strict=True)
        pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
        inputs = {
            "input_ids": pad_left(token_ids, padding_value=self.model.config.pad_token_id),
            "attention_mask": pad_left([torch.ones_like(ids, dtype=torch.bool) for ids in token_ids]),
        }
        if self.uses_timestamps:
            inputs["timestamps"] = pad_left(timestamps, padding_value=UNKNOWN)
        if self.feature_names:
            inputs["event_features"] = pad_left(features)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _read(self, states: list[UserState], unread: list[EventTensors]) -> None:
        """Read events into the cache of each state, all in one pass."""
        rows = [row for row, events in enumerate(unread) if len(events.token_ids)]
        if not rows:
            return
        cache = ElasticCache.cat([states[row].cache for row in rows]).to(self.model.device)
        inputs = self._inputs([unread[row] for row in rows])
        cache = self.model(**inputs, cache=cache, use_cache=True, query=CatalogueQuery()).cache.to("cpu")
        for i, row in enumerate(rows):
            states[row].cache = cache.select([i])

    def _moment(self, request: Request, state: UserState) -> float:
        """Return for which moment to recommend, -1 for a model that reads no times."""
        if not isinstance(request.top_k, int) or request.top_k < 1:
            raise ValueError(f"top_k must be an integer of at least 1, found {request.top_k!r}")
        if not self.uses_timestamps:
            if request.now is not None:
                raise ValueError(f"now must be None for a model with use_timestamps=False, found {request.now!r}")
            return UNKNOWN
        latest = state.latest_timestamp.item()
        if request.now is None:
            return max(time.time(), latest)
        if not latest <= request.now < math.inf:
            raise ValueError(
                f"now must be Unix seconds of at least those of the latest event, {latest}, found {request.now}"
            )
        return request.now

    def _search(
        self, states: list[UserState], moments: list[float], requests: list[Request]
    ) -> Iterable[list[dict] | ValueError]:
        """Read the latest event of each user, in one pass, and yield what to recommend."""
        device = self.model.device
        seen_ids = pad_sequence(
            [state.seen_ids for state in states], batch_first=True, padding_value=self.model.config.pad_token_id
        )
        inputs = self._inputs([state.latest for state in states])
        if self.uses_timestamps:
            inputs["request_timestamps"] = torch.tensor(moments, dtype=torch.double, device=device)
        outputs = self.model(
            **inputs,
            cache=ElasticCache.cat([state.cache for state in states]).to(device),
            query=CatalogueQuery(max(request.top_k for request in requests), seen_ids.to(device)),
        )
        token_ids, scores = outputs.token_ids.cpu(), outputs.scores.cpu().double()
        kept = torch.arange(token_ids.shape[1]) < torch.tensor([[request.top_k] for request in requests])
        kept &= token_ids >= 0
        if not scores[kept].isfinite().all():
            raise RuntimeError("the model's scores are not finite: its weights or a state are broken")
        rows = iter(self.pipeline.postprocess({"token_ids": token_ids[kept][None], "scores": scores[kept][None]}))
        for request, num_left in zip(requests, kept.sum(dim=1).tolist(), strict=True):
            answer = [*islice(rows, num_left)]
            if num_left < request.top_k:
                answer = ValueError(
                    f"top_k={request.top_k} asks for more than the {num_left} items left to recommend to "
                    f"{request.user!r}"
                )
            yield answer
