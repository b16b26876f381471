"""Read text files: comma-separated values and their kin, with a header or without."""

import csv
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv

from .columns import ColumnRequest, Columns
from .encoding import TEXT_ID
from .files import BYTES_PER_CHUNK, content_of, kind_of, open_bytes, open_text
from .quotes import LINE_END, MultilineValue, check_multiline_values, find_multiline_values


logger = logging.getLogger(__name__)

DELIMITERS = (",", ";", "\t", "|")
BLOCK_SIZES = (2**20, 2**26, 2**30)  # bytes; Arrow refuses a row that is longer than two blocks
TIMESTAMP = re.compile(r"\d+(\.\d*)?|\d{4}-\d{2}-\d{2}.*")


class TextLayout(NamedTuple):
    """How a text file is divided; `names` is None where its first line is a header."""

    delimiter: str = ","
    names: Sequence[str] | None = None
    has_quotes: bool = True


class TextReader:
    """
    The rows of one text file.

    Attributes:
        names (`list[str]`): The columns.
        is_empty (`bool`): Whether the file has no line at all.
        in_time_order (`bool`): Whether the file is of a kind that carries no time and comes in time order.

    Args:
        path (`Path`): The file.
        request (`ColumnRequest`): The columns to look for: by them a header and its delimiter are recognised.
        column_names (`Sequence[str]`, *optional*): The columns, where the file has no header.
        layout (`TextLayout`, *optional*): How the file is divided, where that is known.
    """

    def __init__(
        self,
        path: Path,
        request: ColumnRequest,
        column_names: Sequence[str] | None = None,
        layout: TextLayout | None = None,
    ) -> None:
        self.path = path
        self.names, self.in_time_order = [], False
        with open_text(path) as file:
            lines = ((number, line.rstrip("\r\n")) for number, line in enumerate(file, start=1))
            self.first_line_number, self.first_line = next((line for line in lines if line[1]), (1, ""))
        if "\0" in self.first_line:
            raise ValueError(f"{path} must be text in UTF-8, found {self.first_line[:20]!r}")
        self.is_empty = not self.first_line
        if self.is_empty:
            return
        layout = layout or self._find_layout(request, column_names)
        self.has_header = layout.names is None
        self.names = self._split_first_line(layout.delimiter, strict=True) if self.has_header else list(layout.names)
        self.layout = layout._replace(has_quotes=layout.has_quotes and self._holds_quotes())

    def read(self, columns: Columns) -> pa.Table:
        """Return the columns that the file has, ids and titles as dictionaries of strings."""
        try:
            table = self._read(columns)
        except pa.ArrowInvalid as error:
            row = re.search(r"Row #(\d+): ", str(error))
            if row is None:
                raise ValueError(f"{self.path}: {error}") from error
            message = str(error).replace(row[0], "")
            raise ValueError(f"{self.path}, line {self._line_number(int(row[1]))}: {message}") from error
        if self.layout.has_quotes and self._has_multiline_values(table.num_rows):
            values = self._check_quotes(columns, table)
            logger.warning(
                f"{self.path}: {len(values):,} values hold line breaks, the first on line {values[0].first_line}"
            )
        return table

    def position(self, row: int) -> str:
        return f"line {self._line_number(row + 1 + self.has_header)}"

    def _find_layout(self, request: ColumnRequest, column_names: Sequence[str] | None) -> TextLayout:
        suffix = kind_of(self.path)
        delimiters = {".tsv": ("\t",), ".txt": ("\t", " ")}.get(suffix, ()) + DELIMITERS
        delimiters = [delimiter for delimiter in delimiters if delimiter in self.first_line] or [delimiters[0]]
        fields = {delimiter: self._split_first_line(delimiter) for delimiter in delimiters}
        headers = [delimiter for delimiter in fields if request.is_header(fields[delimiter])]
        if column_names is None and (headers or suffix != ".txt"):
            return TextLayout(headers[0] if headers else max(fields, key=lambda delimiter: len(fields[delimiter])))
        if column_names is None:  # the files of the SASRec family
            self.in_time_order = True
            return TextLayout("\t" if "\t" in self.first_line else " ", ["user_id", "item_id"], has_quotes=False)
        if headers:
            raise ValueError(
                f"{self.path}, line {self.first_line_number}: expected no header, since column_names are given, found "
                f"{self.first_line!r}"
            )
        fitting = [delimiter for delimiter in fields if len(fields[delimiter]) == len(column_names)]
        return TextLayout(fitting[0] if fitting else delimiters[0], column_names)

    def _split_first_line(self, delimiter: str, strict: bool = False) -> list[str]:
        try:
            return next(csv.reader([self.first_line], delimiter=delimiter, strict=strict))
        except csv.Error as error:
            raise ValueError(
                f"{self.path}, line {self.first_line_number}: the header cannot be read: {error}"
            ) from error

    def _holds_quotes(self) -> bool:
        with open_bytes(self.path) as file:
            return any(b'"' in chunk for chunk in iter(lambda: file.read(BYTES_PER_CHUNK), b""))

    def _has_multiline_values(self, num_rows: int) -> bool:
        """Return whether there are more lines than rows, empty lines aside, or the last one ends within a value."""
        num_lines, after_line_end, tail = 0, True, b""
        with open_bytes(self.path) as file:
            while chunk := file.read(BYTES_PER_CHUNK):
                characters = np.frombuffer(chunk, np.uint8)
                is_end = np.concatenate([[after_line_end], (characters == ord("\n")) | (characters == ord("\r"))])
                num_lines += np.count_nonzero(is_end[:-1] & ~is_end[1:])
                after_line_end = is_end[-1]
                tail = (tail + chunk)[-BYTES_PER_CHUNK:]
        last_line = LINE_END.split(tail.rstrip(b"\r\n"))[-1]
        return num_lines > num_rows + self.has_header or any(find_multiline_values(last_line, self.layout.delimiter))

    def _read(self, columns: Columns) -> pa.Table:
        for block_size in BLOCK_SIZES:
            try:
                return self._read_blocks(columns, block_size, use_threads=True)
            except pa.ArrowInvalid as error:
                if self.layout.has_quotes:
                    self._check_quotes(columns)
                if "straddling" not in str(error):
                    break
        logger.info(f"{self.path} cannot be read, reading it again serially to find the line")
        return self._read_blocks(columns, block_size, use_threads=False)  # only this counts rows

    def _read_blocks(self, columns: Columns, block_size: int, use_threads: bool) -> pa.Table:
        ids = [name for name in (columns.user, columns.item, columns.title, *columns.events) if name is not None]
        with open_bytes(self.path) as file:
            return pa.csv.read_csv(
                file,
                pa.csv.ReadOptions(column_names=self.layout.names, use_threads=use_threads, block_size=block_size),
                pa.csv.ParseOptions(
                    delimiter=self.layout.delimiter,
                    quote_char='"' if self.layout.has_quotes else False,
                    newlines_in_values=self.layout.has_quotes,
                ),
                pa.csv.ConvertOptions(
                    include_columns=[name for name in columns.wanted() if name in self.names],
                    column_types=dict.fromkeys(ids, TEXT_ID),
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )

    def _check_quotes(self, columns: Columns, table: pa.Table | None = None) -> list[MultilineValue]:
        """
        Return the values that run over several lines, unless a line within one is a row.

        A line with as many fields as there are columns is a row if its user or item is another row's, too, in `table`.
        Without that, its timestamp shows it, but for the line where the value ends, which has that of the whole row.
        """
        ids = (columns.user, columns.item)
        known = {
            (name, value)
            for name in ids
            if table is not None and name in self.names
            for value in table[name].unique().to_pylist()
        }

        def is_row(fields: list[str], is_last: bool) -> bool:
            if len(fields) != len(self.names):
                return False
            row = dict(zip(self.names, fields, strict=True))
            timestamp = row.get(columns.timestamp)
            if timestamp is not None and not TIMESTAMP.fullmatch(timestamp):
                return False
            is_known = any((name, row.get(name)) in known for name in ids)
            return is_known or (timestamp is not None and not is_last)

        return check_multiline_values(self.path, content_of(self.path), self.layout.delimiter, is_row)

    def _line_number(self, record: int) -> int:
        """Return the line, from 1, where a record begins; records count from 1, and empty lines are none."""
        continued = set()
        if self.layout.has_quotes:
            for value in find_multiline_values(content_of(self.path), self.layout.delimiter):
                continued.update(range(value.first_line + 1, value.last_line + 1))
        with open_text(self.path) as file:
            for number, line in enumerate(file, start=1):
                record -= number not in continued and bool(line.strip("\r\n"))
                if record == 0:
                    break
        return number
