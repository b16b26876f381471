"""Token id histories of different lengths -> left-padded batches with aligned labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


# The values of `training_objective` in the models' configurations.
OBJECTIVES = ("next_item", "masked_item", "prefix")


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
    - `"prefix"`: a random prefix of the history predicts the item after it, at its last position.

    Rows with a `target`, the token id of the item to rank, are evaluation rows. Their batches hold `input_ids`,
    `attention_mask`, `target_ids` (of shape `(batch_size,)`) and `seen_ids` (the whole history, left-padded).

    The random objectives draw from PyTorch's global generator, once per batch. [`SequentialRecommendationTrainer`]
    seeds it by the epoch and the rows of the batch, so that a resumed run goes on with the same draws.

    Args:
        pad_token_id (`int`): Token id of the padding.
        mask_token_id (`int`): Token id of a masked item.
        max_length (`int`): Number of items a model sees, the most recent ones.
        objective (`str`, *optional*, defaults to `"next_item"`): One of the objectives above.
        mask_probability (`float`, *optional*, defaults to 0.2): Share of masked items, in (0, 1].

    Raises:
        `ValueError`: for an unknown objective, a `max_length` below 1, a `mask_probability` outside (0, 1], a training
        history of fewer than two items, an empty evaluation history, or a batch that mixes both kinds of rows.
    """

    pad_token_id: int
    mask_token_id: int
    max_length: int
    objective: str = "next_item"
    mask_probability: float = 0.2

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, found {self.objective!r}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1 item, found {self.max_length}")
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability must be in (0, 1], found {self.mask_probability}")

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        num_targets = sum("target" in feature for feature in features)
        if num_targets not in (0, len(features)):
            raise ValueError(f"all rows of a batch or none must have a target, found {num_targets} of {len(features)}")
        histories = [np.asarray(feature["input_ids"]) for feature in features]
        shortest = min(len(history) for history in histories)
        if num_targets:
            if shortest < 1:
                raise ValueError("an evaluation history must have at least 1 item, found an empty one")
            return self._evaluation_batch(histories, [feature["target"] for feature in features])
        if shortest < 2:
            raise ValueError(f"a training history must have at least 2 items, found one of {shortest}")
        return getattr(self, f"_{self.objective}_batch")(histories)

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

    def _prefix_batch(self, histories: list[np.ndarray]) -> dict[str, torch.Tensor]:
        ends = self._generator().integers(1, [len(history) for history in histories])  # (B,), at least one item each
        input_ids, attention_mask = self._pad_left(
            [history[max(0, end - self.max_length) : end] for history, end in zip(histories, ends, strict=True)]
        )
        labels = np.full_like(input_ids, -100)
        labels[:, -1] = [history[end] for history, end in zip(histories, ends, strict=True)]
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
        lengths = np.array([len(history) for history in histories])
        is_item = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
        tokens = np.full(is_item.shape, self.pad_token_id, dtype=np.int64)
        tokens[is_item] = np.concatenate(histories)
        return tokens, is_item

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
