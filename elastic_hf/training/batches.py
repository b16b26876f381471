"""Which rows make a batch and what is drawn for it, from the seed and the epoch alone: also in a resumed training."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroupedEpochSampler(LengthGroupedSampler):
    """
    A [`LengthGroupedSampler`] with two differences:

    - The order depends on the seed and the epoch alone. The stock one draws from the global generator, which processes
      consume at different rates and which a run resumed within an epoch has moved on.
    - The batches of an epoch are shuffled. The stock order is that of falling lengths, so that the model has just
      learned from the shortest histories whenever it is evaluated. The first batch still holds the longest history, so
      that memory runs out at once or not at all; the last one is the one that may not be full.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        first, *batches = torch.tensor(list(super().__iter__())).split(self.batch_size)
        last = batches[-1:]
        order = torch.randperm(len(batches[:-1]), generator=self.generator)
        return iter(torch.cat([first, *(batches[number] for number in order), *last]).tolist())


class SeededCollator:
    """
    A collator whose draws from PyTorch's generator depend on the seed, the epoch and the rows of the batch alone. A
    loader collates ahead of the steps, so that the global generator is elsewhere when a run resumes within an epoch.

    Args:
        collator (`Callable`): Makes a batch of rows with `input_ids`.
        seed (`int`): The seed.
        epoch (`torch.LongTensor` of shape `()`): The epoch, in shared memory, where worker processes see it change.
    """

    def __init__(self, collator: Callable, seed: int, epoch: torch.Tensor) -> None:
        self.collator = collator
        self.seed = seed
        self.epoch = epoch

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        rows = zlib.crc32(np.concatenate([np.asarray(feature["input_ids"]) for feature in features]).tobytes())
        (seed,) = np.random.SeedSequence([self.seed, int(self.epoch), rows]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            return self.collator(features)
