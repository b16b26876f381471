"""What a file's name says of its content, and its bytes and text, decompressed."""

import io
import mmap
from pathlib import Path

import pyarrow as pa


TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES)
# Text and JSON may be compressed; Parquet compresses its own columns.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
ENDINGS = f"{', '.join(SUFFIXES)}, where text and JSON may be followed by {', '.join(COMPRESSIONS)}"
BYTES_PER_CHUNK = 2**24


def compression_of(path: Path) -> str | None:
    """Return Arrow's name for the compression that the last suffix stands for, None where it stands for none."""
    return COMPRESSIONS.get(path.suffix.lower())


def kind_of(path: Path) -> str | None:
    """Return the suffix in lower case and without a compression's, None if files of the kind are not read."""
    compression = compression_of(path)
    suffix = (path if compression is None else path.with_suffix("")).suffix.lower()
    if suffix not in SUFFIXES or (compression is not None and suffix in PARQUET_SUFFIXES):
        return None
    return suffix


def open_bytes(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression=compression_of(path))


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a file as text; bytes that are not UTF-8 become lone surrogates, which Arrow refuses in a string."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def content_of(path: Path) -> bytes | mmap.mmap:
    """Return all bytes of a file that is not empty: mapped, or in memory where they are compressed."""
    if compression_of(path) is not None:
        with open_bytes(path) as file:
            return file.read()
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
