"""Griffe extension: read docstrings in Transformers' style, [`Name`] for a link and `name (type).` for an argument."""

import re
from pathlib import Path

import griffe


PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
DOCUMENTED = re.findall(r"^::: (\S+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
REFERENCE = re.compile(r"\[`~?(?:[\w.]+\.)?(\w+)`\]")
TYPE = re.compile(r"^( +[\w, ]+ )\((.+?)\)(?::|\.$)")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns):$")
ENTRY = {
    "Args": re.compile(r"[\w, ]+( \(|:)"),
    "Attributes": re.compile(r"[\w, ]+( \(|:)"),
    "Raises": re.compile(r"\[?`?\w+`?(\]|\]\[[\w.]+\])?:"),
}


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs) -> None:
        if obj.docstring:
            text = REFERENCE.sub(lambda match: link(obj, match[1]), obj.docstring.value)
            obj.docstring.value = "\n".join(entries(text.splitlines()))


def link(obj: griffe.Object, name: str) -> str:
    """Return a link to what a name means in the scope of an object, or its name where the page does not have it."""
    try:
        path = obj.resolve(name)
    except griffe.NameResolutionError:
        path = ""
    is_documented = any(path == entry or path.startswith(f"{entry}.") for entry in DOCUMENTED)
    return f"[`{name}`][{path}]" if is_documented else f"`{name}`"


def plain(text: str) -> str:
    """Return Markdown without its marks."""
    return re.sub("[`*]", "", re.sub(r"\[([^]]+)\]\[[^]]*\]", r"\1", text))


def entries(lines: list[str]) -> list[str]:
    """Return the lines with plain types and a colon in each entry of a section, and its further lines indented."""
    section, rewritten = None, []
    for line in lines:
        if heading := SECTION.match(line):
            section = heading[1]
        elif line and not line.startswith(" "):
            section = None
        elif section in ENTRY and re.match(r" {4}\S", line):
            if not ENTRY[section].match(line[4:]):
                line = f"    {line}"
            elif section != "Raises":
                line = TYPE.sub(lambda match: f"{match[1]}({plain(match[2])}):", line)
        rewritten.append(line)
    return rewritten
