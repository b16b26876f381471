"""Which columns of a source hold its users, items, timestamps and titles, and what else its events carry."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


logger = logging.getLogger(__name__)

DEFAULT_NAMES = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "title": "title"}
# Names that are understood where the default is missing, in lower case and without `_` and the like: `userId`,
# `User ID` and `USER_ID` are one.
COMMON_NAMES = {
    "user": "userid user uid username customerid customer clientid client visitorid visitor memberid member "
    "accountid account reviewerid reviewer profileid",
    "item": "itemid item iid movieid movie filmid productid product articleid article asin sku isbn bookid book "
    "songid song trackid track videoid video newsid gameid game businessid venueid poiid contentid",
    "timestamp": "timestamp time ts datetime date unixtime unixtimestamp unixreviewtime eventtime eventtimestamp "
    "createdat",
    "title": "title name itemtitle itemname movietitle producttitle productname",
}
# What an event column is called where it stands beside the roles.
EVENT_PREFIX = "event: "
# Columns of histories, which are therefore no names of event columns.
RESERVED_NAMES = ("user_id", "item_ids", "input_ids", "timestamps", "target", "target_timestamp", "history", "now")
# Columns that tell interactions apart, which a history of items does not.
WEIGHT_NAMES = set(
    "rating ratings rate stars star score overall action actiontype event eventtype eventname behavior behaviour "
    "behaviortype behaviourtype interaction interactiontype feedback label weight".split()
)
HINTS = {
    "user": ": name it with user_column",
    "item": ": name it with item_column",
    "timestamp": ": name it with timestamp_column or, if there is none and rows come in time order, set in_time_order",
}
NO_HEADER_HINT = " (or all columns with column_names, if that is no header)"


class Columns(NamedTuple):
    """The source's names of the columns; None for what it has not, or what nobody asked for."""

    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    title: str | None = None
    events: tuple[str, ...] = ()

    @property
    def roles(self) -> dict[str, str]:
        """The columns that the source has of the first four, by their role."""
        return {role: name for role, name in zip(DEFAULT_NAMES, self, strict=False) if name is not None}

    def wanted(self) -> list[str]:
        return list(dict.fromkeys([*self.roles.values(), *self.events]))


@dataclass
class ColumnRequest:
    """
    The columns to look for.

    Attributes:
        names (`dict[str, str]`): Those whose names the caller gives, by their role.
        roles (`tuple[str]`): Those that a source must have; without `timestamp` its rows come in time order.
        events (`tuple[str]`): Those of features of events.
    """

    names: dict[str, str] = field(default_factory=dict)
    roles: tuple[str, ...] = ("user", "item", "timestamp")
    events: tuple[str, ...] = ()

    def find(
        self, found: Sequence[str], source: str | Path, keys: Sequence[str] = (), is_first_line: bool = False
    ) -> Columns:
        """
        Return the columns of a source.

        Args:
            found (`Sequence[str]`): The source's columns.
            source (`str` or `Path`): The source's name in messages.
            keys (`Sequence[str]`, *optional*): Further columns, for what `found` does not hold.
            is_first_line (`bool`, defaults to `False`): Whether `found` is that of a text, and may be no header.

        Raises:
            ValueError: if a column is missing, there twice, or could be one of several.
        """
        names = dict(self.names)
        for role in self.roles:
            if role not in names:
                name = _recognise(role, found, source) or _recognise(role, keys, source)
                if name is None:
                    hint = ""
                    if "user" in self.roles:
                        hint = HINTS[role] + (NO_HEADER_HINT if is_first_line and role != "timestamp" else "")
                    raise ValueError(
                        f"{source}: column {DEFAULT_NAMES[role]!r} is missing, found {shorten([*found, *keys])}{hint}"
                    )
                names[role] = name
        columns = Columns(**names, events=self.events)
        check_columns([*found, *(key for key in keys if key not in found)], columns.wanted(), source)
        if columns.user == columns.item:
            raise ValueError(f"{source}: users and items must be two columns, found {columns.user!r} for both")
        return columns

    def is_header(self, fields: Sequence[str]) -> bool:
        """Return whether the first line of a text file names the columns."""
        if any(name in fields for name in self.names.values()):
            return True
        try:
            return bool(self.find(fields, ""))
        except ValueError:
            return False

    def report(self, columns: Columns, found: Sequence[str], source: str | Path) -> None:
        """Log the columns that were recognised by a common name, and those that would tell interactions apart."""
        recognised = [
            f"{name!r} as {role}"
            for role, name in columns.roles.items()
            if role not in self.names and name != DEFAULT_NAMES[role]
        ]
        if recognised:
            logger.warning(f"{source}: reading {', '.join(recognised)}")
        telling = WEIGHT_NAMES | set(() if columns.timestamp else COMMON_NAMES["timestamp"].split())
        unused = [name for name in found if _plain(name) in telling and name not in columns.wanted()]
        if unused and "user" in self.roles:
            logger.warning(
                f"{source}: not using {', '.join(map(repr, unused))} to order, weigh or filter the interactions"
            )


def check_columns(found: Sequence[str], wanted: Sequence[str], source: str | Path) -> None:
    """Check that each wanted column is there once."""
    counts = Counter(found)
    for name in wanted:
        if counts[name] > 1:
            raise ValueError(f"{source}: column {name!r} appears more than once among {shorten(found)}")
        if not counts[name]:
            raise ValueError(f"{source}: column {name!r} is missing, found {shorten(found)}")


def shorten(names: Sequence[str], most: int = 20) -> str:
    """Return the list as a message shows it."""
    shown = ", ".join(map(repr, names[:most]))
    return f"[{shown}, ... of {len(names):,}]" if len(names) > most else f"[{shown}]"


def _plain(name: str) -> str:
    return re.sub(r"[ _.-]", "", name.lower())


def _recognise(role: str, found: Sequence[str], source: str | Path) -> str | None:
    """Return the column of a role by its default name or, if that is missing, by the one common name there is."""
    if DEFAULT_NAMES[role] in found:
        return DEFAULT_NAMES[role]
    names = [name for name in found if _plain(name) in COMMON_NAMES[role].split()]
    if len(names) > 1:
        raise ValueError(
            f"{source}: any of the columns {shorten(names)} may be the {role} column: name one with {role}_column"
        )
    return names[0] if names else None
