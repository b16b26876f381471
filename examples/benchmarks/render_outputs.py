"""Run the code of the documents, and write what it prints into the text blocks that follow, and into the notebook.

python examples/benchmarks/render_outputs.py README.md docs/hub.md      # all documents if none is named

The blocks of a document run in order and in one process, in a folder that holds `examples`, `shop.csv` and
`titles.csv`. A comment `<!-- not run: reason -->` before a block keeps it from being run.
"""

import csv
import io
import os
import random
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient


ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md")
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
FENCE = re.compile(r"^(?:<!-- not run: (.+?) -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = ("python", "bash")
TRAINER_LOG = re.compile(r"^\{'.*('epoch'|_runtime').*\}\n", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a document."""

    reason: str  # not to run it; empty for one that is run
    language: str
    code: str
    span: tuple[int, int]  # of the code in the document


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks that name a language."""
    return [Block(match[1] or "", match[2], match[3], match.span(3)) for match in FENCE.finditer(text)]


def fill(folder: Path) -> None:
    """Make what the documents call the clone and the reader's own data: `examples`, `shop.csv` and `titles.csv`."""
    (folder / "examples").symlink_to(ROOT / "examples")
    generator = random.Random(0)
    with open(folder / "shop.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["customer", "sku", "time"])
        for customer in range(60):
            start, length = generator.randrange(24), generator.randrange(10, 20)
            for step in range(length):
                item = (start + 5 * step) % 24 + 1
                writer.writerow([f"customer {customer}", f"sku {item}", 1_700_000_000 + 3_600 * step])
    with open(folder / "titles.csv", "w", newline="") as file:
        csv.writer(file).writerows([("item_id", "title"), *((f"sku {i}", f"Product {i}") for i in range(1, 25))])


def run(text: str) -> list[str]:
    """Run the blocks of a document in the present folder: what each prints, without the trainer's log."""
    namespace, outputs = {"__name__": "__main__"}, []
    for number, block in enumerate(blocks(text)):
        if block.reason or block.language not in LANGUAGES:
            outputs.append("")
        elif block.language == "python":
            with redirect_stdout(io.StringIO()) as output:
                exec(compile(block.code, f"<block {number}>", "exec"), namespace)
            outputs.append(output.getvalue())
        else:
            command = ["bash", "-euc", block.code]
            outputs.append(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return [TRAINER_LOG.sub("", output) for output in outputs]


def render(text: str) -> str:
    """Return a document with each text block replaced by what the block before it prints, in a folder made for it."""
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        previous = os.getcwd()
        os.chdir(folder)
        try:
            outputs = run(text)
        finally:
            os.chdir(previous)
    found = blocks(text)
    for block, before, output in list(zip(found[1:], found, outputs, strict=False))[::-1]:
        if block.language == "text" and before.language in LANGUAGES and not before.reason:
            text = text[: block.span[0]] + output + text[block.span[1] :]
    return text


def execute(text: str, folder: Path) -> str:
    """Return a notebook with the outputs of its cells, run in a folder."""
    notebook = nbformat.reads(text, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress bars and warnings go to stderr
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}  # without the version
    return nbformat.writes(notebook) + "\n"


def main() -> None:
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for document in map(Path, sys.argv[1:] or (*DOCUMENTS, NOTEBOOK)):
        if document.suffix == ".ipynb":
            with tempfile.TemporaryDirectory() as folder:
                document.write_text(execute(document.read_text(), Path(folder)))
        else:
            document.write_text(render(document.read_text()))


if __name__ == "__main__":
    main()
