"""The arguments that commands share, and how they are read."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..registry import MODELS


DEFAULT_MAX_LENGTH = 500


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the defaults, and the description as it is written."""


@dataclass
class ModelArguments:
    """Which model to train."""

    _argument_group_name = "model"

    model_type: str = field(default="elastic", metadata={"help": f"One of: {', '.join(MODELS)}."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a trained model to go on from, or to evaluate."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields of the configuration, such as `hidden_size=128,training_loss=sampled_softmax`."},
    )
    use_timestamps: bool = field(
        default=False,
        metadata={"help": "Let a new model read when items came and when the next one is asked for (elastic, hstu)."},
    )
    item_features: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of --items_file, each as name or name:kind, that a new model reads of items (elastic): "
            "categories, numbers and vectors."
        },
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of --items_file whose texts a new model reads, by --text_model."}
    )
    text_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a model of sentence-transformers, which turns texts into vectors before the "
            "training."
        },
    )

    @property
    def reads_features(self) -> bool:
        """Whether a new model is to read more of items than their ids."""
        return bool(self.item_features or self.text_column)


@dataclass
class ColumnArguments:
    """What the columns of interactions mean."""

    user_column: str | None = field(default=None, metadata={"help": "Column of the user ids."})
    item_column: str | None = field(default=None, metadata={"help": "Column of the item ids."})
    timestamp_column: str | None = field(default=None, metadata={"help": "Column of the timestamps."})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of all columns, in order, of a file without a header."}
    )
    in_time_order: bool = field(
        default=False, metadata={"help": "The rows have no timestamps; each user's are in the order of time."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})

    @property
    def reading(self) -> dict[str, Any]:
        """These arguments by the names that they have in [`load_histories`]."""
        return {argument.name: getattr(self, argument.name) for argument in dataclasses.fields(ColumnArguments)}


@dataclass
class DataArguments(ColumnArguments):
    """Which interactions to train on, and how to read them."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "synthetic (default), ml-100k, ml-1m, ml-20m, ml-25m, ml-latest-small, or a Hub dataset. "
            "With --train_file: what the results call that file."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub dataset."})
    train_file: str | None = field(default=None, metadata={"help": "File or folder of interactions instead."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the raw MovieLens files: no download."})
    items_file: str | None = field(default=None, metadata={"help": "File with the items' titles."})
    title_column: str | None = field(default=None, metadata={"help": "Column of the items' titles."})
    event_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of what a new model reads of each event, such as a rating (elastic, sasrec, hstu)."
        },
    )
    k_core: int = field(default=5, metadata={"help": "Fewest interactions of each user and item."})
    split: str = field(default="leave_one_out", metadata={"help": "leave_one_out or temporal."})
    validation_fraction: float = field(default=0.1, metadata={"help": "Share of interactions, temporal split only."})
    test_fraction: float = field(default=0.1, metadata={"help": "Share of interactions, temporal split only."})
    validation_users: int | None = field(
        default=None,
        metadata={
            "help": "Number of users, drawn at random, who have a validation item (all, if not set); the others train "
            "on it. leave_one_out only."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": f"Number of most recent items that the model sees: {DEFAULT_MAX_LENGTH}, or as many as a trained "
            "model has seen."
        },
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    @property
    def source(self) -> str:
        """What is read: a file, a folder or the name of a dataset."""
        return self.train_file or self.dataset_name or "synthetic"

    @property
    def name(self) -> str:
        """What the results call it."""
        return self.dataset_name or self.source

    @property
    def regime(self) -> str | None:
        """What tells the split from the usual one, leave-one-out with all users validated, in the name of a run."""
        if self.split != "leave_one_out":
            return self.split
        return None if self.validation_users is None else "sampled"

    @property
    def protocol(self) -> str:
        """How the results say that the data were split and the catalogue ranked."""
        sampled = "" if self.validation_users is None else "sampled validation, "
        return f"{self.split}, {sampled}full ranking"


def _stock(name: str, default: Any) -> Any:
    """Return an argument of [`TrainingArguments`] with another default."""
    (stock,) = [argument for argument in dataclasses.fields(TrainingArguments) if argument.name == name]
    return field(default=default, metadata=stock.metadata)


@dataclass
class SeqRecTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with the defaults of `elastic-hf train`. Without evaluations, `eval_strategy no`, there is no
    best checkpoint to load and no early stopping.
    """

    _argument_group_name = "training"

    output_dir: str = field(
        default="",
        metadata={
            "help": "Folder of the model and its checkpoints; "
            "outputs/<dataset>-<model>-<seed>[-temporal or -sampled][-timed][-features]"
            "[-with-<event columns>][-<variant>]."
        },
    )
    num_train_epochs: float = _stock("num_train_epochs", 16)
    per_device_train_batch_size: int = _stock("per_device_train_batch_size", 8)
    per_device_eval_batch_size: int = _stock("per_device_eval_batch_size", 256)
    learning_rate: float = _stock("learning_rate", 4e-3)
    train_sampling_strategy: str = _stock("train_sampling_strategy", "group_by_length")
    eval_strategy: str = _stock("eval_strategy", "epoch")
    save_strategy: str = _stock("save_strategy", "epoch")
    logging_strategy: str = _stock("logging_strategy", "epoch")
    save_total_limit: int | None = _stock("save_total_limit", 2)
    load_best_model_at_end: bool = _stock("load_best_model_at_end", True)
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Metric that the checkpoint is chosen by: ndcg@10 or, where the model recommends seen items, too, "
            "ndcg@10_seen_kept."
        },
    )
    greater_is_better: bool | None = _stock("greater_is_better", True)
    ddp_find_unused_parameters: bool | None = _stock("ddp_find_unused_parameters", False)
    use_cpu: bool = _stock("use_cpu", not torch.accelerator.is_available())  # for bf16 on a processor, too
    split_into_windows: bool = field(
        default=False, metadata={"help": "Train on all windows of max_length items, not on the most recent alone."}
    )
    split_into_prefixes: bool = field(
        default=False,
        metadata={
            "help": "Train on all prefixes of each history, each of which predicts the item after it, and not on one "
            "at random: training_objective=prefix, which need not be set."
        },
    )
    mask_probability: float = field(default=0.2, metadata={"help": "Share of masked items (masked_item objective)."})
    early_stopping_patience: int = field(
        default=10, metadata={"help": "Evaluations without a better validation metric before stopping; 0: never."}
    )
    results_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where to copy all_results.json to: "
            "<dataset>-<model>-<seed>[-temporal or -sampled][-timed][-features]"
            "[-with-<event columns>][-<variant>].json."
        },
    )
    variant: str | None = field(
        default=None,
        metadata={"help": "Name of an ablation, a screening trial or another length: no row of the main table."},
    )

    def __post_init__(self) -> None:
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = self.do_eval = self.do_predict = True
        if self.eval_strategy == "no":
            self.load_best_model_at_end, self.early_stopping_patience = False, 0
        do_eval, metric = self.do_eval, self.metric_for_best_model
        super().__post_init__()
        # The evaluation after training is asked for by name; the stock arguments infer it from eval_strategy. A metric
        # that is not named is chosen when the model is there; the stock arguments take the loss.
        self.do_eval, self.metric_for_best_model = do_eval, metric


def parse_arguments(command: str, description: str, argv: Sequence[str], *dataclass_types: type) -> tuple:
    """Return an instance of each of the dataclasses, from what the command line, or a file that it names, says."""
    parser = HfArgumentParser(
        dataclass_types,
        prog=f"elastic-hf {command}",
        usage="%(prog)s [file.yaml] [--argument value ...]",
        description=description,
        formatter_class=HelpFormatter,
    )
    divide_training_arguments(parser)
    return parser.parse_args_into_dataclasses(read_arguments(list(argv)))


def divide_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Show the arguments of training that this package adds or has other defaults for before the hundred others."""
    own = SeqRecTrainingArguments.__annotations__
    name = SeqRecTrainingArguments._argument_group_name
    for training in [group for group in parser._action_groups if group.title == name]:
        others = parser.add_argument_group(f"{name}, as Transformers has it")
        others._group_actions = [action for action in training._group_actions if action.dest not in own]
        training._group_actions = [action for action in training._group_actions if action.dest in own]


def read_arguments(argv: list[str]) -> list[str]:
    """Return the arguments of a YAML or JSON file, if `argv` begins with one, then those after it.

    What is null in the file is not set.
    """
    if not argv or not argv[0].endswith((".json", ".yaml", ".yml")):
        return argv
    recipe = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8-sig"))
    if not isinstance(recipe, dict | None):
        raise ValueError(f"{argv[0]} must hold arguments as `name: value`, found a {type(recipe).__name__}")
    arguments = []
    for name, value in (recipe or {}).items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            arguments += [f"--{name}", *(part if isinstance(part, str) else json.dumps(part) for part in values)]
    return arguments + argv[1:]
