"""What ELASTIC keeps of histories it has read: a fixed number of bytes for each user, however long the history."""

from dataclasses import dataclass, fields
from os import PathLike

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .configuration_elastic import ElasticConfig


@dataclass
class ElasticCache:
    r"""
    The state of causal ELASTIC after B histories. `model(input_ids=new_items, cache=cache, use_cache=True)` goes on
    from it, at a cost that does not depend on what was read before, and returns the next one; `cache` stays as it is.

    N layers, H heads of size K, E interest experts, D = H * K and a convolution of k items take
    `4 * N * (H * E * (2 * K + 1) + (k - 1) * D) + 8` bytes for each user: 17,672 with the default configuration.

    Args:
        states (`torch.FloatTensor` of shape `(B, N, H, E, 2K + 1)`):
            What each expert has compressed: weighted sums of keys and of values, and the sum of their weights.
        convolution (`torch.FloatTensor` of shape `(B, N, k - 1, D)`):
            The latest inputs of each layer's convolution, oldest first; `k - 1` is 0 without a convolution.
        num_items (`torch.LongTensor` of shape `(B,)`):
            How many items have been read.
    """

    states: Tensor
    convolution: Tensor
    num_items: Tensor

    @classmethod
    def empty(cls, config: ElasticConfig, batch_size: int, device: torch.device | str | None = None) -> "ElasticCache":
        """The cache of `batch_size` users who have no history yet."""
        heads, head_size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        sizes = (batch_size, config.num_hidden_layers)
        latest = max(config.conv_kernel_size - 1, 0)
        return cls(
            torch.zeros(*sizes, heads, config.num_interest_experts, 2 * head_size + 1, device=device),
            torch.zeros(*sizes, latest, config.hidden_size, device=device),
            torch.zeros(batch_size, dtype=torch.long, device=device),
        )

    def check(self, config: ElasticConfig, batch_size: int) -> None:
        """Raises a `ValueError` if this is no cache of `batch_size` users of such a model."""
        expected = ElasticCache.empty(config, batch_size, "meta")
        for field in fields(self):
            found, wanted = getattr(self, field.name), getattr(expected, field.name)
            if found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise ValueError(
                    f"cache.{field.name} must be {wanted.dtype} of shape {tuple(wanted.shape)}, "
                    f"found {found.dtype} of shape {tuple(found.shape)}"
                )

    def __len__(self) -> int:
        """The number of users."""
        return len(self.num_items)

    def select(self, rows: Tensor | list[int]) -> "ElasticCache":
        """The cache of some users, in the order of `rows`; a row may come more than once."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.num_items.device)
        return ElasticCache(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def cat(caches: list["ElasticCache"]) -> "ElasticCache":
        """One cache of the users of all `caches`, in their order."""
        if not caches:
            raise ValueError("caches must hold at least one cache, found none")
        return ElasticCache(
            *(torch.cat([getattr(cache, field.name) for cache in caches]) for field in fields(ElasticCache))
        )

    def to(self, device: torch.device | str) -> "ElasticCache":
        """The cache on another device."""
        return ElasticCache(*(getattr(self, field.name).to(device) for field in fields(self)))

    def save(self, file: str | PathLike) -> None:
        """Writes a safetensors file."""
        save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, file)

    @classmethod
    def load(cls, file: str | PathLike, device: torch.device | str = "cpu") -> "ElasticCache":
        """Reads a file of [`save`]."""
        tensors = load_file(file, device=str(device))
        names = [field.name for field in fields(cls)]
        if sorted(tensors) != sorted(names):
            raise ValueError(f"{file} must hold the tensors {', '.join(names)}, found {', '.join(sorted(tensors))}")
        return cls(**tensors)


__all__ = ["ElasticCache"]
