"""What every results file holds: metrics at these cutoffs, and where they were measured; and how it is written."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


CUTOFFS = (1, 5, 10, 20)
FEW_USERS = 500  # metrics of fewer are mostly chance


def processor() -> str:
    """Return the processor's model name and PyTorch's widest instructions on it, such as `AMD EPYC (AVX512)`."""
    import torch

    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def git_commit() -> str | None:
    """Return the commit of this package, `-dirty` if a file was changed since; None outside its repository."""

    def git(*arguments: str) -> str:
        command, folder = ["git", *arguments], Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie in another repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def written_whole(file: Path) -> Iterator[BinaryIO]:
    """Open a file to write to that takes the place of `file` when it is whole, and leaves it as it was otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    with open(temporary, "wb") as stream:
        yield stream
    os.replace(temporary, file)


def write_json(file: Path, results: dict) -> None:
    """Write the whole file, or leave an older one as it was.

    Raises:
        ValueError: If a number is not finite, which JSON has no word for.
    """
    try:
        text = json.dumps(results, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{file} must hold finite numbers: {error}") from error
    with written_whole(file) as stream:
        stream.write(f"{text}\n".encode())
