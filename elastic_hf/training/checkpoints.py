"""Checkpoints that are whole or absent: renamed when they are whole, and before they are removed."""

import json
import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from ..results import write_json


logger = logging.getLogger(__name__)

# The folder, beside the checkpoints, of those that are being written or removed.
INCOMPLETE = "incomplete"
RECORD = "checkpoint.json"


@dataclass
class RunTotals:
    """
    What a training has taken from its first step on, over all parts of a resumed run.

    Attributes:
        seconds (`float`): Time until here.
        logged_loss (`float`): Sum of the losses of all steps up to `last_logged_step`.
        unlogged_loss (`float`): Sum of the losses of the steps since then.
        last_logged_step (`int`): The last step whose loss was logged.
    """

    seconds: float
    logged_loss: float
    unlogged_loss: float
    last_logged_step: int


@dataclass
class CheckpointRecord:
    """
    What a checkpoint says of itself, in the file that is written last.

    Attributes:
        files (`dict[str, int]`): The other files of the checkpoint, and their sizes in bytes.
        totals ([`RunTotals`], *optional*): Of the training; unknown after resuming from a checkpoint without a record.
    """

    files: dict[str, int]
    totals: RunTotals | None


def write_record(checkpoint: Path, totals: RunTotals | None) -> None:
    """Write the record of a checkpoint that has all other files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_json(checkpoint / RECORD, asdict(CheckpointRecord(sizes, totals)))


def read_record(checkpoint: str | os.PathLike) -> CheckpointRecord | None:
    """Return the record of a checkpoint, or `None` where there is none, as in those of the stock [`Trainer`]."""
    file = Path(checkpoint, RECORD)
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    totals = record["totals"]
    return CheckpointRecord(record["files"], None if totals is None else RunTotals(**totals))


def find_damage(checkpoint: str | os.PathLike) -> str | None:
    """Return what is wrong with the files of a checkpoint, or `None` if it is whole.

    Each file must have the size that the record states. A checkpoint without a record must have the trainer's state,
    which the stock [`Trainer`] writes last.
    """
    try:
        record = read_record(checkpoint)
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    for name, size in record.files.items() if record else ():
        file = Path(checkpoint, name)
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} must have {size:,} bytes, found {file.stat().st_size:,}"
    return None


def find_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest whole checkpoint of a folder, if there is one, and name in a warning those that are not."""
    newest = None
    for checkpoint in sort_checkpoints(output_dir):
        damage = find_damage(checkpoint)
        if damage is None:
            newest = checkpoint
        else:
            logger.warning(f"{checkpoint} is not whole and is not used: {damage}")
    for remains in sorted(Path(output_dir, INCOMPLETE).glob("*")):
        logger.warning(f"{remains} is not whole and is not used: the run ended while it was written or removed")
    return newest


def choose_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """Return the checkpoint to go on from: the given one, or for `True` the newest whole one of `output_dir`.

    Raises:
        ValueError: If it is not whole, or `True` finds none.
    """
    if resume_from_checkpoint is True:
        if (newest := find_checkpoint(output_dir)) is None:
            raise ValueError(f"resume_from_checkpoint must find a whole checkpoint in {output_dir}, found none")
        return newest
    checkpoint = resume_from_checkpoint or None
    if checkpoint is not None and (damage := find_damage(checkpoint)) is not None:
        raise ValueError(f"resume_from_checkpoint must be a whole checkpoint, found {checkpoint}: {damage}")
    return checkpoint


def put_in_place(checkpoint: Path) -> None:
    """Rename a checkpoint in the folder `incomplete` that is whole, in exchange for an older one of the same name."""
    final = checkpoint.parents[1] / checkpoint.name
    if final.exists():
        os.replace(final, checkpoint.with_name(f"older-{checkpoint.name}"))
    os.replace(checkpoint, final)
    shutil.rmtree(checkpoint.parent)


def remove_old_checkpoints(output_dir: Path, limit: int, keep: Collection[Path]) -> None:
    """Remove the oldest checkpoints, so that `limit` of them remain, but none of those to `keep`."""
    checkpoints = [Path(checkpoint) for checkpoint in sort_checkpoints(output_dir)]
    removable = [checkpoint for checkpoint in checkpoints if checkpoint not in keep]
    surplus = len(checkpoints) - max(limit, len(checkpoints) - len(removable))
    for checkpoint in removable[: max(0, surplus)]:
        (output_dir / INCOMPLETE).mkdir(exist_ok=True)
        os.replace(checkpoint, output_dir / INCOMPLETE / checkpoint.name)
        shutil.rmtree(output_dir / INCOMPLETE)
