"""What every results file says about where it was measured, and how it is written."""

import json
import os
import platform
import subprocess
from pathlib import Path


def processor() -> str:
    """The processor's model name and the widest instructions that PyTorch uses on it, such as `AMD EPYC (AVX512)`."""
    import torch

    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def git_commit() -> str | None:
    """The commit of this package, `-dirty` if a file was changed since; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def write_json(file: Path, results: dict) -> None:
    """Writes the whole file, or leaves an older one as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, file)
