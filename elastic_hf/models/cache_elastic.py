"""What ELASTIC keeps of histories it has read: a fixed number of bytes for each user, however long the history."""

import hashlib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, replace
from os import PathLike
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .event_time import UNKNOWN
from .weight_versions import versions_of


if TYPE_CHECKING:
    from .configuration_elastic import ElasticConfig
    from .modeling_elastic import ElasticModel

TENSORS = ("recurrent_state", "conv_state", "num_items", "last_timestamps")


# The digests of models, and the versions of the weights that they are of.
_DIGESTS: WeakKeyDictionary[nn.Module, tuple[list[tuple], str]] = WeakKeyDictionary()


def digest_weights(model: nn.Module, weights: Iterable[Tensor], tables: Iterable[Tensor] = ()) -> str:
    """Return a digest of some weights of a model, which remembers it for as long as they stay the same.

    An exported graph, whose weights have no values yet, has the digest `""`.

    Args:
        model (`torch.nn.Module`).
        weights (`Iterable[torch.Tensor]`).
        tables (`Iterable[torch.Tensor]`): of shape `(V, N)`, whose last columns count as far as they hold any value.
    """
    if torch.compiler.is_exporting():
        return ""
    weights, tables = [*weights], [*tables]
    if any(weight.is_meta for weight in weights + tables):
        raise ValueError("use_cache needs weights in memory, found a model whose weights are offloaded")
    versions = versions_of(weights + tables)
    if model not in _DIGESTS or _DIGESTS[model][0] != versions:
        sha256 = hashlib.sha256()
        filled = [table[:, : int(table.any(dim=0).cumsum(dim=0).argmax()) + 1] for table in tables]
        for weight in weights + filled:
            sha256.update(str(weight.shape).encode())
            sha256.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        _DIGESTS[model] = (versions, sha256.hexdigest())
    return _DIGESTS[model][1]


@dataclass
class ElasticCache:
    r"""
    The state of ELASTIC after B histories. `model(input_ids=new_items, cache=cache, use_cache=True)` goes on from it,
    at a cost that does not depend on what was read before, and returns the next one; `cache` stays as it is.

    M interest experts (of all heads), hidden size D and a convolution of k items take
    `4 * (M * (D + 1) + (k - 1) * D) + 8` bytes for each user: 8,840 with the default configuration.

    Args:
        recurrent_state (`torch.FloatTensor` of shape `(B, M, D + 1)`):
            What each expert has compressed: the weighted sum of the stream, and the sum of the weights.
        conv_state (`torch.FloatTensor` of shape `(B, k - 1, D)`):
            The latest inputs of the convolution, oldest first.
        num_items (`torch.LongTensor` of shape `(B,)`):
            How many items have been read.
        model_digest (`str`):
            Digest of the weights that the state depends on. Another model refuses the cache.
        last_timestamps (`torch.DoubleTensor` of shape `(B,)`, *optional*):
            Of models with `use_timestamps`, 8 bytes more: when the last item came, -1 where none has come.
    """

    recurrent_state: Tensor
    conv_state: Tensor
    num_items: Tensor
    model_digest: str
    last_timestamps: Tensor | None = None

    @classmethod
    def empty(cls, model: "ElasticModel", batch_size: int) -> "ElasticCache":
        """Return the cache of `batch_size` users who have no history yet."""
        tensors = {
            name: torch.zeros(shape, dtype=dtype, device=model.device)
            for name, (shape, dtype) in _shapes(model.config, batch_size).items()
        }
        if "last_timestamps" in tensors:
            tensors["last_timestamps"].fill_(UNKNOWN)
        return cls(**tensors, model_digest=model.base_model.digest())

    def check(self, model: "ElasticModel", batch_size: int, digest: str | None = None) -> None:
        """Raise a `ValueError` unless this is a cache of `batch_size` users of this model, which has the `digest`."""
        shapes = _shapes(model.config, batch_size)
        if self.tensors.keys() != shapes.keys():
            raise ValueError(f"cache must hold {', '.join(shapes)}, found {', '.join(self.tensors)}")
        for name, (shape, dtype) in shapes.items():
            found = getattr(self, name)
            if found.shape != shape or found.is_floating_point() != dtype.is_floating_point:
                raise ValueError(
                    f"cache.{name} must be {dtype} of shape {shape}, found {found.dtype} of shape {tuple(found.shape)}"
                )
        digest = model.digest() if digest is None else digest
        if self.model_digest != digest:
            raise ValueError(
                f"cache.model_digest must be that of this model, {digest}, found {self.model_digest}: another model "
                "made this cache, or this one before its weights changed"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it holds of each user, by name."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def __len__(self) -> int:
        """Return the number of users."""
        return len(self.num_items)

    def select(self, rows: Tensor | list[int]) -> "ElasticCache":
        """Return the cache of some users, in the order of `rows`; a row may come more than once."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.num_items.device)
        return replace(self, **{name: tensor[rows] for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(caches: list["ElasticCache"]) -> "ElasticCache":
        """Return one cache of the users of all `caches`, in their order."""
        if not caches:
            raise ValueError("caches must hold at least one cache, found none")
        digests = {cache.model_digest for cache in caches}
        if len(digests) > 1:
            raise ValueError(f"caches must be of one model, found the digests {', '.join(sorted(digests))}")
        tensors = {name: torch.cat([getattr(cache, name) for cache in caches]) for name in caches[0].tensors}
        return ElasticCache(**tensors, model_digest=digests.pop())

    def to(self, device: torch.device | str) -> "ElasticCache":
        """Return the cache on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors.items()})

    def save(self, file: str | PathLike) -> None:
        """Write a safetensors file."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, file, metadata={"model_digest": self.model_digest})

    @classmethod
    def load(cls, file: str | PathLike, device: torch.device | str = "cpu") -> "ElasticCache":
        """Read a file of [`save`]."""
        with safe_open(file, framework="pt", device=str(device)) as opened:
            found = {*opened.keys(), *(opened.metadata() or {})}
            wanted = [field.name for field in fields(cls) if field.default is MISSING]
            if found - {"last_timestamps"} != {*wanted}:
                raise ValueError(f"{file} must hold {', '.join(wanted)}, found {', '.join(sorted(found))}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            return cls(**tensors, model_digest=opened.metadata()["model_digest"])


def _shapes(config: "ElasticConfig", batch_size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and the type of each tensor of a cache."""
    num_experts = config.num_attention_heads * config.num_interest_experts
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "recurrent_state": ((batch_size, num_experts, config.hidden_size + 1), torch.float32),
        "conv_state": ((batch_size, config.conv_kernel_size - 1, config.hidden_size), torch.float32),
        "num_items": ((batch_size,), torch.long),
    }
    if config.use_timestamps:
        shapes["last_timestamps"] = ((batch_size,), torch.double)
    return shapes


__all__ = ["ElasticCache"]
