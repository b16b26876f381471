"""Token id histories of different lengths -> left-padded batches with aligned labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


# The values of `training_objective` in the models' configurations, and that of rows which are prefixes already.
OBJECTIVES = ("next_item", "masked_item", "prefix", "last_item")


@dataclass
class SequentialRecommendationCollator:
    """
    Pad histories on the left to the longest of the batch and align the labels: `labels[t]` is what position t has to
    predict, -100 where there is nothing to predict.

    A row is a dictionary with `input_ids`, the user's history as token ids, oldest first and untruncated. Training
    rows have no `target`; what they are trained on depends on the `objective`:

    - `"next_item"`: every position predicts the item after it (causal models);
    - `"masked_item"`: each item is replaced by the mask token with probability `mask_probability` and predicted there;
      the last item is, where none was drawn;
    - `"prefix"`: a random prefix of the history predicts the item after it, at its last position;
    - `"last_item"`: the items before the last predict it, at their last position, for rows of
      [`~data.windows.split_into_prefixes`].

    Rows with a `target`, the token id of the item to rank, are evaluation rows. Their batches hold `input_ids`,
    `attention_mask`, `target_ids` (of shape `(batch_size,)`) and `seen_ids` (the whole history, left-padded).

    With `use_timestamps` a row holds `timestamps`, as many as items, and a batch `timestamps` (0 at padding) and
    `request_timestamps`: in training when the item after each position came, in evaluation when the target came, the
    row's `target_timestamp`, or -1, with `know_request=False`: a time that the model is not told.

    With `event_features` a row holds a column of each of these names, as many values as items, as the tokenizer makes
    them, and a batch `event_features`, of shape `(batch_size, length, num_features)`, 0 at padding: those of the items
    that are read, and of no label or target.

    The random objectives draw from PyTorch's global generator, once per batch. [`SequentialRecommendationTrainer`]
    seeds it by the epoch and the rows of the batch, so that a resumed run goes on with the same draws.

    Args:
        pad_token_id (`int`): Token id of the padding.
        mask_token_id (`int`): Token id of a masked item.
        max_length (`int`): Number of items a model sees, the most recent ones.
        objective (`str`, *optional*, defaults to `"next_item"`): One of the objectives above.
        mask_probability (`float`, *optional*, defaults to 0.2): Share of masked items, in (0, 1].
        use_timestamps (`bool`, *optional*, defaults to `False`): Whether the model reads times; not with
            `"masked_item"`.
        know_request (`bool`, *optional*, defaults to `True`): Whether an evaluation tells when the target came.
        event_features (`Sequence[str]`, *optional*): Those of the model's configuration, in its order; not with
            `"masked_item"`.

    Raises:
        `ValueError`: for an unknown objective, a `max_length` below 1, a `mask_probability` outside (0, 1], a training
        history of fewer than two items, an empty evaluation history, timestamps or event features that are missing
        or not as many as the items, or a batch that mixes both kinds of rows.
    """

    pad_token_id: int
    mask_token_id: int
    max_length: int
    objective: str = "next_item"
    mask_probability: float = 0.2
    use_timestamps: bool = False
    know_request: bool = True
    event_features: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, found {self.objective!r}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1 item, found {self.max_length}")
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability must be in (0, 1], found {self.mask_probability}")
        for name in ("use_timestamps", "event_features"):
            if getattr(self, name) and self.objective == "masked_item":
                raise ValueError(f"{name} needs an objective that predicts the next item, found 'masked_item'")

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        num_targets = sum("target" in feature for feature in features)
        if num_targets not in (0, len(features)):
            raise ValueError(f"all rows of a batch or none must have a target, found {num_targets} of {len(features)}")
        histories = [np.asarray(feature["input_ids"]) for feature in features]
        shortest = min(len(history) for history in histories)
        timestamps = _aligned(features, histories, "timestamps") if self.use_timestamps else None
        events = [_aligned(features, histories, name) for name in self.event_features]
        if num_targets:
            if shortest < 1:
                raise ValueError("an evaluation history must have at least 1 item, found an empty one")
            batch = self._evaluation_batch(histories, [feature["target"] for feature in features])
            if timestamps is not None:
                batch |= self._evaluation_times(timestamps, features)
            return batch | self._event_features(events, slice(-self.max_length, None))
        if shortest < 2:
            raise ValueError(f"a training history must have at least 2 items, found one of {shortest}")
        objective = self.objective
        if objective == "prefix":
            objective, ends = "last_item", self._random_ends(histories)
            histories, events = _until(ends, histories), [_until(ends, values) for values in events]
            timestamps = None if timestamps is None else _until(ends, timestamps)
        batch = getattr(self, f"_{objective}_batch")(histories)
        if timestamps is not None:
            batch |= self._next_item_times(timestamps)
        return batch | self._event_features(events, slice(-self.max_length - 1, -1))

    @staticmethod
    def _event_features(events: list[list[np.ndarray]], read: slice) -> dict[str, torch.Tensor]:
        """Return the features of the items that are read of each history, if there are any: a column of histories for
        each feature -> (B, L, F)."""
        if not events:
            return {}
        columns = [pad_left([values[read] for values in histories], 0)[0] for histories in events]
        return {"event_features": torch.from_numpy(np.stack(columns, axis=-1, dtype=np.float32))}

    def _next_item_times(self, timestamps: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """Return when the inputs of training rows, and the items after them, came."""
        times, is_item = pad_left([times[-self.max_length - 1 :] for times in timestamps], 0)
        requests = np.where(is_item[:, :-1], times[:, 1:], -1)
        return {
            "timestamps": torch.from_numpy(np.ascontiguousarray(times[:, :-1])),
            "request_timestamps": torch.from_numpy(requests),
        }

    def _evaluation_times(self, timestamps: list[np.ndarray], features: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Return when the items of evaluation rows came and, if the model is told, their targets."""
        times, _ = pad_left([times[-self.max_length :] for times in timestamps], 0)
        requests = np.full(len(times), -1, times.dtype)
        if self.know_request:
            for feature in features:
                if "target_timestamp" not in feature:
                    found = ", ".join(feature)
                    raise ValueError(f"with know_request=True a row must have a target_timestamp, found {found}")
            requests = np.array([feature["target_timestamp"] for feature in features])
        return {"timestamps": torch.from_numpy(times), "request_timestamps": torch.from_numpy(requests)}

    def _next_item_batch(self, histories: list[np.ndarray]) -> dict[str, torch.Tensor]:
        tokens, is_item = self._pad_left([history[-self.max_length - 1 :] for history in histories])  # (B, L + 1)
        input_ids, attention_mask = tokens[:, :-1], is_item[:, :-1]
        return self._to_batch(input_ids, attention_mask, np.where(attention_mask, tokens[:, 1:], -100))

    def _masked_item_batch(self, histories: list[np.ndarray]) -> dict[str, torch.Tensor]:
        tokens, is_item = self._pad_left([history[-self.max_length :] for history in histories])  # (B, L)
        is_masked = is_item & (self._generator().random(tokens.shape) < self.mask_probability)
        is_masked[~is_masked.any(1), -1] = True
        input_ids = np.where(is_masked, self.mask_token_id, tokens)
        return self._to_batch(input_ids, is_item, np.where(is_masked, tokens, -100))

    def _random_ends(self, histories: list[np.ndarray]) -> np.ndarray:
        """Return where a random prefix of each history ends, after two items or more: (B,)."""
        return 1 + self._generator().integers(1, [len(history) for history in histories])

    def _last_item_batch(self, histories: list[np.ndarray]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = self._pad_left([history[-self.max_length - 1 : -1] for history in histories])
        labels = np.full_like(input_ids, -100)
        labels[:, -1] = [history[-1] for history in histories]
        return self._to_batch(input_ids, attention_mask, labels)

    def _evaluation_batch(self, histories: list[np.ndarray], targets: list[int]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = self._pad_left([history[-self.max_length :] for history in histories])
        seen_ids, _ = self._pad_left(histories)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask.astype(np.int64)),
            "target_ids": torch.tensor([int(target) for target in targets]),
            "seen_ids": torch.from_numpy(seen_ids),
        }

    def _pad_left(self, histories: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and which of them are items, both of shape `(batch_size, longest)`."""
        return pad_left([history.astype(np.int64, copy=False) for history in histories], self.pad_token_id)

    @staticmethod
    def _to_batch(input_ids: np.ndarray, attention_mask: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.from_numpy(np.ascontiguousarray(input_ids)),
            "attention_mask": torch.from_numpy(attention_mask.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }

    @staticmethod
    def _generator() -> np.random.Generator:
        # All processes hold the same global state; without its rank each would draw the same numbers.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        return np.random.default_rng([int(torch.randint(2**62, ())), rank])


def _until(ends: np.ndarray, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Return the values of each row before its end."""
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def _aligned(features: Sequence[dict], histories: list[np.ndarray], name: str) -> list[np.ndarray]:
    """Return a column of values of the items of each history, checked for their number."""
    columns = []
    for row, (feature, history) in enumerate(zip(features, histories, strict=True)):
        if name not in feature:
            asked = "use_timestamps" if name == "timestamps" else "event_features"
            raise ValueError(f"with {asked} a row must have {name}, found {', '.join(feature)}")
        columns.append(np.asarray(feature[name]))
        if len(columns[-1]) != len(history):
            raise ValueError(
                f"{name} must be as many as the items of a history, {len(history)} in row {row}, "
                f"found {len(columns[-1])}"
            )
    return columns


def pad_left(rows: list[np.ndarray], padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of different lengths as one array, and which of its values are theirs: `(num_rows, longest)`."""
    lengths = np.array([len(row) for row in rows])
    is_value = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
    values = np.concatenate(rows)
    padded = np.full(is_value.shape, padding, values.dtype)
    padded[is_value] = values
    return padded, is_value
