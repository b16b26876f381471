"""Values of a text file that run over several lines, and the rows that a stray quote swallows in such a value.

A quote opens a value if it is the first character of it, and closes it if no quote follows; two quotes in a row stand
for one. This is how Arrow reads text files, too, for which a quote that is never closed is no error.
"""

import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


LINE_END = re.compile(rb"\r\n|\r|\n")


class MultilineValue(NamedTuple):
    """
    A quoted value that runs over several lines.

    Attributes:
        text (`bytes`): The value with its quotes, and the rest of the line in which it ends.
        first_line, last_line (`int`): The lines, from 1, of the opening and the closing quote.
        after (`bytes`): The character that follows the closing quote; empty at the end of the file.
        is_closed (`bool`): False if the file ends within the value.
    """

    text: bytes
    first_line: int
    last_line: int
    after: bytes
    is_closed: bool


def find_multiline_values(content: bytes | mmap.mmap, delimiter: str) -> Iterator[MultilineValue]:
    """Yield the values that run over several lines, and a last one that is never closed, in their order."""
    separator = re.escape(delimiter.encode())
    quoted = re.compile(rb'(?<![^%b\r\n])"[^"]*+(?:""[^"]*+)*+("?)' % separator)
    line, position = 1, 0
    for match in quoted.finditer(content):
        num_lines = len(LINE_END.findall(match[0]))
        is_closed = bool(match[1])
        if num_lines or not is_closed:
            line += len(LINE_END.findall(content, position, match.start()))
            end = LINE_END.search(content, match.end())
            yield MultilineValue(
                text=content[match.start() : end.start() if end else len(content)],
                first_line=line,
                last_line=line + num_lines,
                after=content[match.end() : match.end() + 1],
                is_closed=is_closed,
            )
            line, position = line + num_lines, match.end()


def check_multiline_values(
    path: Path, content: bytes | mmap.mmap, delimiter: str, is_row: Callable[[list[str], bool], bool]
) -> list[MultilineValue]:
    """
    Return the values that run over several lines, if all of them are meant to.

    Args:
        is_row (`Callable[[list[str], bool], bool]`):
            Whether the fields of a line within such a value look like a row, and whether the value ends in that line.

    Raises:
        ValueError: if a value is never closed, goes on after its closing quote, or holds a line that is a row.
    """
    values = []
    for value in find_multiline_values(content, delimiter):
        opens = f"{path}, line {value.first_line}: a quote opens a value"
        if not value.is_closed:
            raise ValueError(f"{opens} and is never closed")
        if value.after not in (b"", b"\r", b"\n", delimiter.encode()):
            raise ValueError(f"{opens}, and the next one, on line {value.last_line}, does not close it: text follows")
        for line, text in enumerate(value.text.splitlines()[1:], value.first_line + 1):
            fields = text.decode("utf-8", errors="replace").split(delimiter)
            if is_row(fields, line == value.last_line):
                raise ValueError(
                    f"{opens} that ends on line {value.last_line} only, and line {line} within it is a row of its own"
                )
        values.append(value)
    return values
