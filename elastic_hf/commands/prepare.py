"""`elastic-hf prepare`: prepare interactions that do not fit into memory, for `elastic-hf train`.

    elastic-hf prepare --train_file logs --output_dir prepared
    elastic-hf train --train_file prepared

Writes the histories of all users, sorted by time, filtered and split, as Parquet shards. The options that filter and
split are then those of the training, too, which refuses others.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.preparation import prepare_histories
from ..training.output_folder import make_folder
from .arguments import ColumnArguments, parse_arguments


@dataclass
class PreparationArguments(ColumnArguments):
    """What to prepare, and where to."""

    _argument_group_name = "preparation"

    train_file: list[str] = field(kw_only=True, metadata={"help": "Files or folders of interactions, or patterns."})
    output_dir: str = field(kw_only=True, metadata={"help": "Empty or new folder of the prepared histories."})
    event_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of what a model may read of each event, such as a rating."}
    )
    items_file: str | None = field(default=None, metadata={"help": "File with the items' titles."})
    k_core: int = field(default=5, metadata={"help": "Fewest interactions of each user and item."})
    split: str = field(default="leave_one_out", metadata={"help": "leave_one_out, or none: nothing is held out."})
    validation_users: int | None = field(
        default=None,
        metadata={
            "help": "Number of users, drawn at random, who have a validation item (all, if not set); the others train "
            "on it."
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where rows are kept while they are sorted; by default beside output_dir."}
    )


def main(argv: Sequence[str]) -> None:
    """Prepare the histories, and print what became of the rows."""
    (args,) = parse_arguments("prepare", __doc__, argv, PreparationArguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    make_folder(Path(args.output_dir).absolute().parent, "the folder of output_dir")
    if args.cache_dir is not None:
        make_folder(args.cache_dir, "cache_dir")
    counts = prepare_histories(
        args.train_file,
        args.output_dir,
        **args.reading,
        event_columns=args.event_columns or (),
        items_file=args.items_file,
        k_core=args.k_core,
        split=args.split,
        validation_users=args.validation_users,
    )
    print(", ".join(f"{key}: {value:,}" for key, value in counts.items()))
