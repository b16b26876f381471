"""What every results file holds: metrics at these cutoffs, and where they were measured; and how it is written."""

import json
import os
import platform
import subprocess
from pathlib import Path


CUTOFFS = (1, 5, 10, 20)


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


def write_json(file: Path, results: dict) -> None:
    """Write the whole file, or leave an older one as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, file)
