"""Read a table of items and their features, and turn their texts into vectors."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from .columns import ColumnRequest, check_columns
from .encoding import integers_if_written_as_such
from .files import PARQUET_SUFFIXES, TEXT_SUFFIXES, kind_of
from .text_reader import TextReader


logger = logging.getLogger(__name__)

ITEMS = ColumnRequest(roles=("item",))


def item_columns(path: str | Path) -> list[str]:
    """Return the columns of a file of items, without its rows, see [`read_item_table`].

    Raises:
        ValueError: if the file cannot be read.
    """
    return _columns_and_delimiter(Path(path))[0]


def read_item_table(path: str | Path, columns: Sequence[str] = ()) -> pa.Table:
    """Read a file with one row for each item.

    Args:
        path (`str` or `Path`):
            A Parquet file, or a text file (`.csv`, `.tsv`, `.txt`) with a header, also compressed (`.csv.gz`). The ids
            of the items are in the column `item_id`, or in the one column with another common name. Empty fields of a
            text are nulls; lists and vectors need Parquet.
        columns (`Sequence[str]`, *optional*): columns that it must have.

    Returns:
        `pyarrow.Table`: all its columns, with the ids in `item_id`.

    Raises:
        ValueError: if the file cannot be read, or lacks a column.
    """
    path = Path(path)
    names, delimiter = _columns_and_delimiter(path)
    item = ITEMS.find(names, path).item
    check_columns(names, columns, path)
    try:
        if delimiter is None:
            table = pq.read_table(path, partitioning=None)
        else:
            table = _read_text(path, delimiter, pa.csv.ConvertOptions(column_types={item: pa.string()}))
            ids = table[item].combine_chunks()
            table = table.set_column(names.index(item), item, integers_if_written_as_such(ids))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    return table.rename_columns(["item_id" if name == item else name for name in names])


def _columns_and_delimiter(path: Path) -> tuple[list[str], str | None]:
    """The columns of a file, and what stands between them in a text."""
    kind = kind_of(path) if path.is_file() else None
    if kind not in (*PARQUET_SUFFIXES, *TEXT_SUFFIXES):
        found = "another" if path.is_file() else "none"
        raise ValueError(f"items_file must be an existing .parquet, .csv or .tsv file, found {found} at {path}")
    try:
        if kind in PARQUET_SUFFIXES:
            return pq.read_schema(path).names, None
        reader = TextReader(path, ITEMS)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    if reader.is_empty or not reader.has_header:
        raise ValueError(f"{path} must have a header, found none")
    return reader.names, reader.layout.delimiter


def _read_text(path: Path, delimiter: str, options: pa.csv.ConvertOptions) -> pa.Table:
    options.strings_can_be_null, options.null_values = True, [""]
    parsing = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    return pa.csv.read_csv(path, parse_options=parsing, convert_options=options)


def add_text_vectors(table: pa.Table, text_column: str, text_model: str) -> pa.Table:
    """Add a column with the vectors of the items' texts, `<text_column>_vector`.

    Args:
        table (`pyarrow.Table`): of items.
        text_column (`str`): the column of the texts; a null has no vector.
        text_model (`str`): Hub id or folder of a model of sentence-transformers. Models that are trained on the
            vectors never need it, but new items need vectors of the same one.

    Returns:
        `pyarrow.Table`

    Raises:
        ImportError: if sentence-transformers is not installed.
        ValueError: if there is no such column of strings, or one named as the new one.
    """
    name = f"{text_column}_vector"
    check_columns(table.column_names, [text_column], "items")
    if name in table.column_names:
        raise ValueError(f"items must have no column {name!r}, in which the vectors of {text_column!r} are put")
    texts = table[text_column].combine_chunks()
    try:
        texts = texts.cast(pa.large_string())
    except pa.ArrowException as error:
        raise ValueError(f"text_column {text_column!r} must hold strings, found {texts.type}") from error
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError("text_model needs sentence-transformers: pip install sentence-transformers") from error
    logger.info(f"{text_model} reads {len(texts) - texts.null_count:,} texts of {text_column!r}")
    is_known = texts.is_valid().to_numpy(zero_copy_only=False)
    known = SentenceTransformer(text_model).encode(texts.drop_null().to_pylist(), normalize_embeddings=True)
    known = np.asarray(known, np.float32)
    vectors = np.zeros((len(texts), known.shape[1]), np.float32)
    vectors[is_known] = known
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), known.shape[1], mask=pa.array(~is_known))
    return table.append_column(name, column)


__all__ = ["add_text_vectors", "item_columns", "read_item_table"]
