"""From a table of items' features to tensors: vocabularies, means and whitening, learned once from a catalogue.

| kind | columns | encoded, for V items |
| --- | --- | --- |
| `categories` | strings, booleans, lists of strings or integers | indices from 1, (V, length), 0 fills up |
| `number` | integers and floats | in standard deviations from the mean, (V, 1) |
| `vector` | lists of floats, of one size | whitened by its principal components, (V, size) |

What is null is not known: it is encoded as zeros, which add nothing to an item.
"""

import json
import logging
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configuration_recommender import ITEM_FEATURE_SIZES


logger = logging.getLogger(__name__)

KINDS = tuple(ITEM_FEATURE_SIZES)
# The most principal components of a vector that are kept.
MAX_COMPONENTS = 128
# Components with a smaller share of the largest variance are rounding errors.
SMALLEST_VARIANCE = 1e-6


class ItemEncoder:
    """
    What a catalogue has taught about the features of items: enough to encode items that come later alike.

    Args:
        features (`dict[str, dict]`):
            The `item_features` of a configuration: for each column its `kind` and `size` (the number of categories, 1,
            or the components of a vector) and, of categories, the `length`: the most that an item has.
        vocabularies (`dict[str, list[str]]`): the categories of each such column, in the order of their indices.
        tensors (`dict[str, torch.Tensor]`):
            `<column>.mean` and `<column>.scale` of numbers, shape `(1,)`; `<column>.mean`, `(D,)`, and
            `<column>.whitening`, `(D, size)`, of vectors of D numbers.
    """

    def __init__(self, features: dict[str, dict], vocabularies: dict[str, list[str]], tensors: dict[str, Tensor]):
        self.features, self.vocabularies, self.tensors = features, vocabularies, tensors

    @classmethod
    def learn(cls, table: pa.Table, columns: Sequence[str]) -> "ItemEncoder":
        """Learn from the items of a table.

        Args:
            table (`pyarrow.Table`): as [`check_features`] returns it, of the items of the catalogue alone.
            columns (`Sequence[str]`): the columns with the features, each as `name` or `name:kind`.

        Raises:
            ValueError: if a column says nothing about the items, since all of them have the same in it.
        """
        encoder = cls({}, {}, {})
        for name, kind in parse_columns(columns, table).items():
            column = table[name].combine_chunks()
            learn = {"categories": encoder._learn_categories, "number": encoder._learn_number}
            learn.get(kind, encoder._learn_vector)(name, column)
        return encoder

    def _learn_categories(self, name: str, column: pa.Array) -> None:
        vocabulary = pc.unique(column.flatten()).sort()
        if len(vocabulary) == 0:
            raise ValueError(f"item feature {name!r} must have a category, found none in {len(column):,} items")
        length = pc.max(pc.list_value_length(column)).as_py()
        self.vocabularies[name] = vocabulary.to_pylist()
        self.features[name] = {"kind": "categories", "size": len(vocabulary), "length": length}

    def _learn_number(self, name: str, column: pa.Array) -> None:
        numbers = column.drop_null().to_numpy()
        if len(numbers) == 0 or numbers.std() == 0:
            raise ValueError(f"item feature {name!r} must have different numbers, found {len({*numbers})}")
        self.tensors[f"{name}.mean"] = torch.tensor([numbers.mean()], dtype=torch.double)
        self.tensors[f"{name}.scale"] = torch.tensor([numbers.std()], dtype=torch.double)
        self.features[name] = {"kind": "number", "size": 1}

    def _learn_vector(self, name: str, column: pa.Array) -> None:
        vectors = _matrix(column.drop_null()).astype(np.float64)
        mean = vectors.mean(axis=0) if len(vectors) else np.zeros(column.type.list_size)
        variances, directions = np.linalg.eigh((vectors - mean).T @ (vectors - mean) / max(1, len(vectors)))
        kept = np.flatnonzero(variances > SMALLEST_VARIANCE * variances[-1])[::-1][:MAX_COMPONENTS]
        if len(kept) == 0:
            raise ValueError(f"item feature {name!r} must have different vectors, found the same in all items")
        # Of length 1 on average, so that its map is learned at the pace of an embedding.
        whitening = directions[:, kept] / np.sqrt(variances[kept] * len(kept))
        self.tensors[f"{name}.mean"] = torch.from_numpy(mean)
        self.tensors[f"{name}.whitening"] = torch.from_numpy(np.ascontiguousarray(whitening))
        self.features[name] = {"kind": "vector", "size": len(kept)}

    def check(self, table: pa.Table) -> pa.Table:
        """Return the features of a table, as [`check_features`] does, and vectors of the size that was learned."""
        columns = [f"{name}:{feature['kind']}" for name, feature in self.features.items()]
        return check_features(table, columns, {name: self._size(name) for name in self.features})

    def _size(self, name: str) -> int | None:
        """How many numbers the vectors of a column have."""
        return len(self.tensors[f"{name}.mean"]) if self.features[name]["kind"] == "vector" else None

    def encode(self, table: pa.Table) -> dict[str, Tensor]:
        """Encode items.

        Categories that are not in a vocabulary are not known to any model: they are left out, with a warning.

        Args:
            table (`pyarrow.Table`): as [`check`] returns it.

        Returns:
            `dict[str, torch.Tensor]`: for each column int32 of shape `(V, length)`, where `length` is larger than
            that of the catalogue if an item has more categories, or float32 of shape `(V, size)`.
        """
        encode = {"categories": self._encode_categories, "number": self._encode_number, "vector": self._encode_vector}
        return {
            name: encode[feature["kind"]](name, table[name].combine_chunks())
            for name, feature in self.features.items()
        }

    def _encode_categories(self, name: str, column: pa.Array) -> Tensor:
        values = column.flatten()
        codes = pc.index_in(values, value_set=pa.array(self.vocabularies[name], pa.large_string()))
        known = codes.is_valid().to_numpy(zero_copy_only=False)
        if not known.all():
            unknown = pc.unique(values.filter(pa.array(~known))).to_pylist()
            logger.warning(
                f"item feature {name!r}: {len(unknown):,} categories are not in the vocabulary and left out, such as "
                f"{unknown[0]!r}"
            )
        rows = pc.list_parent_indices(column).to_numpy()[known]
        counts = np.bincount(rows, minlength=len(column))
        positions = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        length = max(self.features[name]["length"], int(counts.max(initial=0)))
        encoded = np.zeros((len(column), length), np.int32)
        encoded[rows, positions] = codes.drop_null().to_numpy() + 1
        return torch.from_numpy(encoded)

    def _encode_number(self, name: str, column: pa.Array) -> Tensor:
        numbers = torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())[:, None]
        encoded = (numbers - self.tensors[f"{name}.mean"]) / self.tensors[f"{name}.scale"]
        return encoded.nan_to_num(0.0).float()  # nulls

    def _encode_vector(self, name: str, column: pa.Array) -> Tensor:
        known = torch.from_numpy(column.is_valid().to_numpy(zero_copy_only=False).copy())
        vectors = torch.from_numpy(_matrix(column.drop_null()).astype(np.float64)) - self.tensors[f"{name}.mean"]
        encoded = torch.zeros(len(column), self.features[name]["size"])
        encoded[known] = (vectors @ self.tensors[f"{name}.whitening"]).float()
        return encoded

    def lengthened(self, encoded: dict[str, Tensor]) -> "ItemEncoder":
        """Return this encoder for tables as wide as those of `encoded` items."""
        features = {name: {**feature} for name, feature in self.features.items()}
        for name, feature in features.items():
            if feature["kind"] == "categories":
                feature["length"] = encoded[name].shape[1]
        return ItemEncoder(features, self.vocabularies, self.tensors)

    def save(self, file: str | PathLike) -> None:
        """Write a safetensors file."""
        metadata = {"item_features": json.dumps(self.features), "vocabularies": json.dumps(self.vocabularies)}
        save_file(self.tensors, file, metadata=metadata)

    @classmethod
    def load(cls, file: str | PathLike) -> "ItemEncoder":
        """Read a file of [`save`]."""
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.keys() != {"item_features", "vocabularies"}:
                raise ValueError(f"{file} must hold item_features and vocabularies, found {', '.join(metadata)}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        return cls(json.loads(metadata["item_features"]), json.loads(metadata["vocabularies"]), tensors)


def parse_columns(columns: Sequence[str], table: pa.Table) -> dict[str, str]:
    """Return the kind of each column, given as `name` or `name:kind`, where it is not given by the column's type.

    Raises:
        ValueError: if a column is missing, given twice, or of a type of no kind.
    """
    kinds = {}
    for column in columns:
        name, _, kind = (
            column.rpartition(":") if column.endswith(tuple(f":{kind}" for kind in KINDS)) else (column, "", "")
        )
        if name not in table.column_names or name == "item_id":
            found = ", ".join(other for other in table.column_names if other != "item_id")
            raise ValueError(
                f"item features must be columns of the items, {found or 'of which there are none'}, found {name!r}"
            )
        if name in kinds:
            raise ValueError(f"item features must be named once, found {name!r} twice")
        kinds[name] = kind or _infer_kind(name, table[name].type)
    return kinds


def _infer_kind(name: str, dtype: pa.DataType) -> str:
    types = pa.types
    if types.is_dictionary(dtype):
        return _infer_kind(name, dtype.value_type)
    if types.is_integer(dtype) or types.is_floating(dtype) or types.is_decimal(dtype):
        return "number"
    if _is_list(dtype):
        return "vector" if types.is_floating(dtype.value_type) else "categories"
    if (
        types.is_string(dtype)
        or types.is_large_string(dtype)
        or types.is_string_view(dtype)
        or types.is_boolean(dtype)
    ):
        return "categories"
    raise ValueError(f"item feature {name!r} must be categories, numbers or vectors, found the type {dtype}")


def _is_list(dtype: pa.DataType) -> bool:
    return pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype)


def check_features(table: pa.Table, columns: Sequence[str], sizes: dict[str, int | None] | None = None) -> pa.Table:
    """Check the features of items, and bring each kind into one form.

    Args:
        table (`pyarrow.Table`): with the column `item_id`, and those of the features.
        columns (`Sequence[str]`): each as `name` or `name:kind`.
        sizes (`dict[str, int | None]`, *optional*): the size that the vectors of a column must have.

    Returns:
        `pyarrow.Table`: `item_id`, and for each feature lists of strings without nulls, float64, or lists of float32
        of fixed size.

    Raises:
        ValueError: if a column is missing or of no such kind, a list holds a null, a number is not finite, or a vector
            is of another size than the others. The message names the column, the row, from 1, and the item.
    """
    ids = table["item_id"]
    checked = {"item_id": ids}
    for name, kind in parse_columns(columns, table).items():

        def fail(row: int, expected: str, found: Any, name: str = name) -> ValueError:
            where = f"row {row + 1} (item {ids[row].as_py()!r})"
            return ValueError(f"item feature {name!r} must {expected}, found {found} in {where}")

        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        if kind == "categories":
            checked[name] = _as_categories(name, column, fail)
        elif kind == "number":
            checked[name] = _as_numbers(name, column, fail)
        else:
            checked[name] = _as_vectors(name, column, fail, (sizes or {}).get(name))
    return pa.table(checked)


def _cast(name: str, values: pa.Array, dtype: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    try:
        return values.cast(dtype)
    except pa.ArrowException as error:
        raise ValueError(
            f"item feature {name!r} must hold values like {dtype}, found {values.type}: {error}"
        ) from error


def _as_categories(name: str, column: pa.Array, fail: Callable) -> pa.Array:
    """Categories, or lists of them -> lists of strings, empty where null."""
    if _is_list(column.type):
        values = pc.list_flatten(column)
        if values.null_count:
            row = pc.list_parent_indices(column).filter(values.is_null())[0].as_py()
            raise fail(row, "hold no null in a list", "one")
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    else:
        values = _cast(name, column, pa.large_string()).drop_null()
        lengths = column.is_valid().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(offsets, _cast(name, values, pa.large_string()))


def _as_numbers(name: str, column: pa.Array, fail: Callable) -> pa.Array:
    numbers = _cast(name, column, pa.float64())
    is_broken = pc.invert(pc.fill_null(pc.is_finite(numbers), True))
    if pc.any(is_broken).as_py():
        row = pc.index(is_broken, True).as_py()
        raise fail(row, "be finite (null where it is not known)", numbers[row])
    return numbers


def _as_vectors(name: str, column: pa.Array, fail: Callable, size: int | None) -> pa.Array:
    if not _is_list(column.type):
        raise ValueError(f"item feature {name!r} must hold lists of numbers, found the type {column.type}")
    is_known = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if size is None:
        size = int(lengths[is_known][0]) if is_known.any() else 0
    if size == 0:
        raise ValueError(f"item feature {name!r} must hold a vector, found none in {len(column):,} items")
    is_other = is_known & (lengths != size)
    if is_other.any():
        row = int(np.argmax(is_other))
        raise fail(row, f"hold vectors of {size} numbers", f"one of {lengths[row]}")
    values = _cast(name, pc.list_flatten(column), pa.float32()).to_numpy(zero_copy_only=False)  # nulls become NaN
    known = values.reshape(-1, size)
    is_broken = ~np.isfinite(known).all(axis=1)
    if is_broken.any():
        row = int(np.flatnonzero(is_known)[np.argmax(is_broken)])
        raise fail(row, "hold finite numbers (a null instead of the vector where it is not known)", "others")
    vectors = np.zeros((len(column), size), np.float32)
    vectors[is_known] = known
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), size, mask=pa.array(~is_known))


def _matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    """Vectors, none of them null -> (V, D)"""
    return column.flatten().to_numpy().reshape(-1, column.type.list_size)


__all__ = ["ItemEncoder"]
