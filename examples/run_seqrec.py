#!/usr/bin/env python
"""
Trains a sequential recommender, evaluates it on the full catalogue and recommends.

    python examples/run_seqrec.py                                       # the synthetic dataset, minutes on a CPU
    python examples/run_seqrec.py --dataset_name ml-1m --output_dir outputs/ml-1m
    python examples/run_seqrec.py --train_file shop.csv --items_file titles.csv --output_dir outputs/shop
    python examples/run_seqrec.py examples/recipes/ml-1m-sasrec.yaml    # arguments from a YAML or JSON file,
    python examples/run_seqrec.py examples/recipes/ml-1m-sasrec.yaml --seed 43    # some of them changed
    torchrun --nproc_per_node 2 examples/run_seqrec.py

Without `--do_train`, `--do_eval` or `--do_predict` it does all three. `--help` lists all arguments.

An interrupted run goes on from its newest whole checkpoint when it is started again, and is then the same run: its
results are those of a run without interruption. A run whose results are written, but not yet its figures and its card,
makes these. A run that is finished, or still running, is refused.
"""

import io
import json
import logging
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import torch
import transformers
import yaml
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

import elastic_hf
from elastic_hf.baselines.popularity import PopularityConfig, PopularityForSequentialRecommendation
from elastic_hf.data.collator import SequentialRecommendationCollator
from elastic_hf.data.histories import Histories, load_histories
from elastic_hf.data.windows import split_into_windows
from elastic_hf.models.configuration_recommender import RecommenderConfig
from elastic_hf.models.item_tokenizer import ElasticItemTokenizer
from elastic_hf.plots import figures_of
from elastic_hf.registry import MODELS
from elastic_hf.results import CUTOFFS, git_commit, processor, write_json, written_whole
from elastic_hf.sharing.hub import publish
from elastic_hf.sharing.model_card import render_model_card
from elastic_hf.training.checkpoints import find_checkpoint
from elastic_hf.training.metrics import popularity_bias
from elastic_hf.training.output_folder import LOCK, lock_output_dir, make_folder
from elastic_hf.training.trainer import SequentialRecommendationTrainer


logger = logging.getLogger(__name__)

RESULTS_FILE = "all_results.json"
CARD_FILE = "README.md"


@dataclass
class ModelArguments:
    """Which model to train."""

    model_type: str = field(default="elastic", metadata={"help": f"One of: {', '.join(MODELS)}."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a trained model to go on from, or to evaluate."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields of the configuration, such as `hidden_size=128,training_loss=sampled_softmax`."},
    )


@dataclass
class DataArguments:
    """Which interactions to train on, and how to read them."""

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
    user_column: str | None = field(default=None, metadata={"help": "Column of the user ids."})
    item_column: str | None = field(default=None, metadata={"help": "Column of the item ids."})
    timestamp_column: str | None = field(default=None, metadata={"help": "Column of the timestamps."})
    title_column: str | None = field(default=None, metadata={"help": "Column of the items' titles."})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of all columns, in order, of a file without a header."}
    )
    in_time_order: bool = field(
        default=False, metadata={"help": "The rows have no timestamps; each user's are in the order of time."}
    )
    k_core: int = field(default=5, metadata={"help": "Fewest interactions of each user and item."})
    split: str = field(default="leave_one_out", metadata={"help": "leave_one_out or temporal."})
    validation_fraction: float = field(default=0.1, metadata={"help": "Share of interactions, temporal split only."})
    test_fraction: float = field(default=0.1, metadata={"help": "Share of interactions, temporal split only."})
    max_length: int = field(default=500, metadata={"help": "Number of most recent items that the model sees."})
    split_into_windows: bool = field(
        default=False, metadata={"help": "Train on all windows of max_length items, not on the most recent alone."}
    )
    mask_probability: float = field(default=0.2, metadata={"help": "Share of masked items (masked_item objective)."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})

    @property
    def source(self) -> str:
        """What is read: a file, a folder or the name of a dataset."""
        return self.train_file or self.dataset_name or "synthetic"

    @property
    def name(self) -> str:
        """What the results call it."""
        return self.dataset_name or self.source


@dataclass
class SeqRecTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with the defaults of this script. Without evaluations, `eval_strategy no`, there is no best
    checkpoint to load and no early stopping.
    """

    output_dir: str = field(
        default="",
        metadata={"help": "Folder of the model and its checkpoints; outputs/<dataset>-<model>-<seed>[-<variant>]."},
    )
    num_train_epochs: float = 16
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 256
    learning_rate: float = 4e-3
    train_sampling_strategy: str = "group_by_length"
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "ndcg@10"
    greater_is_better: bool | None = True
    ddp_find_unused_parameters: bool | None = False
    dataloader_pin_memory: bool = torch.cuda.is_available()
    use_cpu: bool = not torch.accelerator.is_available()  # for bf16 on a processor, too
    early_stopping_patience: int = field(
        default=10, metadata={"help": "Evaluations without a better validation metric before stopping; 0: never."}
    )
    results_dir: str | None = field(
        default=None,
        metadata={"help": "Where to copy all_results.json to: <dataset>-<model>-<seed>[-<variant>].json."},
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
        do_eval = self.do_eval
        super().__post_init__()
        # The evaluation after training is asked for by name; the stock arguments infer it from eval_strategy.
        self.do_eval = do_eval


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


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, SeqRecTrainingArguments]:
    """Return the arguments, checked as far as that needs no data."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SeqRecTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(read_arguments(argv))
    if model_args.model_type not in MODELS:
        raise ValueError(f"model_type must be one of {', '.join(MODELS)}, found {model_args.model_type!r}")
    if not training_args.do_train and model_args.model_name_or_path is None:
        raise ValueError("without do_train there is no model to evaluate: set model_name_or_path")
    if training_args.hub_token is not None:
        raise ValueError("hub_token would be written into the results: set HF_TOKEN, or log in with `hf auth login`")
    return model_args, data_args, training_args


def make_run_name(model_args: ModelArguments, data_args: DataArguments, training_args: SeqRecTrainingArguments) -> str:
    """Return `<dataset>-<model>-<seed>[-<variant>]`."""
    parts = [Path(data_args.name).stem, model_args.model_type, str(training_args.seed)]
    if training_args.variant is not None:
        parts.append(training_args.variant)
    return "-".join(parts)


def refuse_foreign_model(args: SeqRecTrainingArguments) -> None:
    """Refuse an output folder with a model that is not of a run of this script: a training would overwrite it."""
    output_dir = Path(args.output_dir)
    is_new = args.do_train and args.resume_from_checkpoint is None
    is_of_a_run = (output_dir / LOCK).exists() or (output_dir / RESULTS_FILE).exists()
    if is_new and (output_dir / "model.safetensors").exists() and not is_of_a_run:
        raise ValueError(f"output_dir {output_dir} must hold no model of another origin: choose another one")


def read_results(args: SeqRecTrainingArguments, run_name: str) -> dict[str, Any] | None:
    """Return the results of a run that ended before all that is made from them was made, if there are such.

    Raises:
        ValueError: If the output folder holds a finished run.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint is not None or not (output_dir / RESULTS_FILE).exists():
        return None
    try:
        results = json.loads((output_dir / RESULTS_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning(f"{output_dir / RESULTS_FILE} is not whole and is made anew: {error}")
        return None
    files = [*derived_files(args, run_name, results), *([output_dir / CARD_FILE] if args.do_train else [])]
    if not all(file.exists() for file in files):
        return results
    raise ValueError(
        f"output_dir {output_dir} already holds a finished run: choose another one, or set "
        "resume_from_checkpoint to train that run further"
    )


def set_up_process(training_args: SeqRecTrainingArguments) -> None:
    """Let the first process alone log, and set the seed."""
    is_main_process = training_args.process_index == 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # titles, where the locale lacks their letters
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main_process else logging.ERROR)
    if not is_main_process:
        datasets.disable_progress_bars()
    has_bfloat16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if training_args.bf16 and training_args.device.type == "cpu" and not has_bfloat16:
        logger.warning("bf16 is many times slower than float32 on this processor, which has no instructions for it")
    set_seed(training_args.seed)


def read_histories(data_args: DataArguments, training_args: SeqRecTrainingArguments) -> Histories:
    """Return the histories of all splits, the items and the counts."""
    with training_args.main_process_first(local=False, desc="loading the interactions"):
        loaded = load_histories(
            data_args.source,
            data_dir=data_args.data_dir,
            user_column=data_args.user_column,
            item_column=data_args.item_column,
            timestamp_column=data_args.timestamp_column,
            title_column=data_args.title_column,
            column_names=data_args.column_names,
            in_time_order=data_args.in_time_order,
            items_file=data_args.items_file,
            dataset_config_name=data_args.dataset_config_name,
            dataset_split=data_args.dataset_split,
            k_core=data_args.k_core,
            split=data_args.split,
            validation_fraction=data_args.validation_fraction,
            test_fraction=data_args.test_fraction,
            cache_dir=data_args.cache_dir,
        )
    logger.info(", ".join(f"{key}: {value:,}" for key, value in loaded.counts.items()))
    return loaded


def make_tokenizer(model_args: ModelArguments, data_args: DataArguments, items: Dataset) -> ElasticItemTokenizer:
    """Return the tokenizer of the catalogue, or that of the trained model, which must know the catalogue."""
    if model_args.model_name_or_path is None:
        return ElasticItemTokenizer.from_items(items, model_max_length=data_args.max_length)
    tokenizer = ElasticItemTokenizer.from_pretrained(model_args.model_name_or_path)
    token_ids = np.array(tokenizer.convert_tokens_to_ids(items["item_id"][:]))
    num_unknown = int((token_ids == tokenizer.unk_token_id).sum())
    if num_unknown:
        raise ValueError(
            f"the tokenizer of {model_args.model_name_or_path} does not know {num_unknown:,} of the {len(items):,} "
            f"items of {data_args.source}"
        )
    return tokenizer


def make_config(
    model_args: ModelArguments, data_args: DataArguments, tokenizer: ElasticItemTokenizer
) -> RecommenderConfig:
    """Return the configuration with the overrides."""
    is_new = model_args.model_name_or_path is None
    if is_new:
        config = AutoConfig.for_model(model_args.model_type, vocab_size=len(tokenizer))
    else:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    try:
        overrides = model_args.config_overrides or ""
        if overrides:
            config.update_from_string(overrides)
        if is_new and hasattr(config, "max_position_embeddings") and "max_position_embeddings" not in overrides:
            # The mask that is appended to histories at inference takes a position, too.
            config.max_position_embeddings = data_args.max_length + (config.training_objective == "masked_item")
        config.validate()
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"config_overrides={model_args.config_overrides!r}: {error}") from error
    if config.vocab_size != len(tokenizer):
        raise ValueError(f"vocab_size must be the tokenizer's, {len(tokenizer)}, found {config.vocab_size}")
    return config


def fields_of(config: RecommenderConfig) -> list[str]:
    """Return the names of the fields that this package's configurations add to those of Transformers."""
    classes = [base for base in type(config).__mro__ if issubclass(base, RecommenderConfig)]
    return sorted({name for base in classes for name in base.__annotations__})


def check_checkpoint(checkpoint: str, config: RecommenderConfig, tokenizer: ElasticItemTokenizer) -> None:
    """Refuse to go on from a checkpoint of another model or another catalogue."""
    trained_config = AutoConfig.from_pretrained(checkpoint)
    trained_items = ElasticItemTokenizer.from_pretrained(checkpoint).items
    changed = [name for name in fields_of(config) if getattr(config, name) != getattr(trained_config, name)]
    if not trained_items["item_id"].equals(tokenizer.items["item_id"]):
        changed.append("catalogue")
    if changed:
        raise ValueError(f"{checkpoint} was trained with another {', '.join(changed)}: choose another output_dir")


def make_model(model_args: ModelArguments, config: RecommenderConfig) -> PreTrainedModel:
    """Return a new model, or the trained one."""
    if model_args.model_name_or_path is None:
        model = AutoModel.from_config(config)
    else:
        model = AutoModel.from_pretrained(model_args.model_name_or_path, config=config)
    logger.info(f"{config.model_type} with {model.num_parameters():,} parameters")
    return model


def make_trainer(
    model: PreTrainedModel,
    tokenizer: ElasticItemTokenizer,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    data_args: DataArguments,
    training_args: SeqRecTrainingArguments,
) -> SequentialRecommendationTrainer:
    """Return the trainer, which stops early where that is asked for."""
    collator = SequentialRecommendationCollator(
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        max_length=data_args.max_length,
        objective=model.config.training_objective,
        mask_probability=data_args.mask_probability,
    )
    patience = training_args.early_stopping_patience
    return SequentialRecommendationTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(patience)] if patience > 0 else [],
    )


def describe_run(
    trainer: SequentialRecommendationTrainer, counts: dict[str, int], data_args: DataArguments
) -> dict[str, Any]:
    """Return what the results say about the run before anything is measured."""
    config, args = trainer.model.config, trainer.args
    source = data_args.source
    launcher = "python" if args.world_size == 1 else f"torchrun --nproc_per_node {args.world_size}"
    return {
        "dataset": data_args.name,
        "hub_dataset": source if "/" in source and not Path(source).exists() else None,
        "model_type": config.model_type,
        "seed": args.seed,
        "variant": args.variant,
        "main_row": args.variant is None,
        "git_commit": git_commit(),
        "command": f"{launcher} {shlex.join(sys.argv)}",
        "protocol": f"{data_args.split}, full ranking",
        "k_core": data_args.k_core,
        **counts,
        "num_parameters": trainer.model.num_parameters(),
        "max_length": data_args.max_length,
        "split_into_windows": data_args.split_into_windows,
        "config": {name: getattr(config, name) for name in fields_of(config)},
        "training": trainer.training_settings(),
    }


def train(trainer: SequentialRecommendationTrainer, histories: Dataset, checkpoint: str | None) -> dict[str, Any]:
    """Train the model, or count the items of the training `histories`, and return what the results say about it."""
    if trainer.model.config.model_type == "popularity":
        trainer.model.count_items(histories)
        save_model(trainer)
        return {}
    train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    save_model(trainer)
    state = trainer.state
    return {
        "epochs": state.epoch,
        "steps": state.global_step,
        "best_epoch": trainer.best_epoch(),
        "stopped_early": state.global_step < state.max_steps,
        "resumed_from_checkpoint": checkpoint,
        "train_seconds": train_metrics.get("train_runtime"),
        "train_loss": train_metrics.get("train_loss"),
        "log_history": [
            {key: log[key] for key in ("epoch", "step", "loss", "eval_ndcg@10") if key in log}
            for log in state.log_history
            if "loss" in log or "eval_ndcg@10" in log
        ],
    }


def save_model(trainer: SequentialRecommendationTrainer) -> None:
    """Save the model, and remove what is known of an older one: results without their model are worse than none."""
    output_dir = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        (output_dir / CARD_FILE).unlink(missing_ok=True)
        (output_dir / RESULTS_FILE).unlink(missing_ok=True)
    trainer.save_model()
    if trainer.is_world_process_zero():
        # The model folder holds no pickle; the checkpoints keep theirs.
        (output_dir / "training_args.bin").unlink(missing_ok=True)


def validate(trainer: SequentialRecommendationTrainer) -> dict[str, float]:
    """Return the metrics on the validation items."""
    metrics = trainer.evaluate()
    return {key.replace("eval_", "validation_"): metrics[key] for key in metrics if "@" in key}


def test(trainer: SequentialRecommendationTrainer, users: Dataset, histories: Dataset) -> dict[str, Any]:
    """Return the metrics on the test items, beside those of the popularity in the training `histories`."""
    prediction = trainer.predict(users)
    config = PopularityConfig(vocab_size=trainer.model.config.vocab_size)
    popularity = PopularityForSequentialRecommendation(config)
    popularity.count_items(histories)
    counter = SequentialRecommendationTrainer(popularity, trainer.args, trainer.data_collator, eval_dataset=users)
    results = {}
    for metrics in (prediction.metrics, counter.evaluate(metric_key_prefix="popularity")):
        results |= {key: value for key, value in metrics.items() if "@" in key}

    ranks, top_ids = prediction.predictions
    item_counts = popularity.get_output_embeddings().weight[:, 0].detach().cpu().numpy()
    bias = popularity_bias(top_ids, prediction.label_ids, item_counts, config.num_special_tokens)
    results |= {f"test_{key}": value for key, value in bias.items()}
    if getattr(trainer.model.config, "num_memory_subkeys", 0):
        results |= memory_usage(trainer, users)
    return results | {"sample": describe_first_user(trainer.processing_class, users, top_ids)}


def memory_usage(trainer: SequentialRecommendationTrainer, users: Dataset) -> dict[str, float]:
    """Return the share of the slots retrieved for at least one user, and the normalised entropy of the retrievals."""
    model = trainer.model.eval()
    counts = torch.zeros(model.config.num_memory_subkeys**2, device=model.device)
    for batch in trainer.get_test_dataloader(users):
        inputs = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        counts += torch.bincount(model.get_retrieved_slots(*inputs).flatten(), minlength=len(counts))
    counts = trainer.accelerator.reduce(counts)
    entropy = torch.distributions.Categorical(probs=counts).entropy()
    return {
        "memory_slots": len(counts),
        "memory_share_retrieved": (counts > 0).float().mean().item(),
        "memory_entropy": (entropy / math.log(len(counts))).item(),
    }


def describe_first_user(tokenizer: ElasticItemTokenizer, users: Dataset, top_ids: np.ndarray) -> dict[str, Any]:
    """Return what the first user had last, was recommended and went on to, in titles."""
    user, recommended = users.with_format(None)[0], top_ids[0, :10]
    return {
        "user_id": user["user_id"],
        "history": tokenizer.convert_ids_to_titles(user["input_ids"][-10:]),
        "recommended": tokenizer.convert_ids_to_titles(recommended[recommended >= 0]),
        "target": tokenizer.convert_ids_to_titles(user["target"]),
    }


def expert_half_lives(model: PreTrainedModel) -> list[list[float]]:
    """Return the half-lives of the experts, in items: (num_attention_heads, num_interest_experts)."""
    return model.model.experts.half_lives.detach().cpu().numpy().round(2).tolist()


def describe_machine(num_processes: int) -> dict[str, Any]:
    """Return the hardware and the versions of the software."""
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{processor()}, {torch.get_num_threads()} threads per process"
    return {
        "hardware": hardware,
        "num_processes": num_processes,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "elastic_hf_version": elastic_hf.__version__,
    }


def derived_files(
    args: SeqRecTrainingArguments, run_name: str, results: dict[str, Any]
) -> dict[Path, Callable[[BinaryIO], None]]:
    """Return the files beside the card that are made from the results, and what writes each."""
    output_dir = Path(args.output_dir)
    files = {}
    if args.results_dir:
        whole = (output_dir / RESULTS_FILE).read_bytes
        files[Path(args.results_dir, f"{run_name}.json")] = lambda stream: stream.write(whole())
    if args.do_train:
        files |= {output_dir / f"{name}.png": draw for name, draw in figures_of(results).items()}
    return files


def write_card(output_dir: str, repo_id: str) -> None:
    """Write the card of a folder that has results."""
    with written_whole(Path(output_dir, CARD_FILE)) as stream:
        stream.write(str(render_model_card(output_dir, repo_id)).encode())


def finish_run(
    args: SeqRecTrainingArguments, run_name: str, results: dict[str, Any], write_card: Callable[[], None], repo_id: str
) -> None:
    """Make what is made from the results, the card last, publish it where that is asked for, and print the results."""
    output_dir = Path(args.output_dir)
    for file, write in derived_files(args, run_name, results).items():
        with written_whole(file) as stream:
            write(stream)
    if args.do_train:
        write_card()
    if args.push_to_hub:
        publish(output_dir, repo_id, revision=args.hub_revision)
    if args.do_predict:
        print_test(results)
    print(f"\nResults: {output_dir / RESULTS_FILE}")
    if args.do_train and not args.push_to_hub:
        script = os.path.relpath(Path(__file__).with_name("publish.py"))
        print(f"Publish: python {script} {shlex.quote(args.output_dir)} <namespace>/{shlex.quote(run_name)}")


def print_test(results: dict[str, Any]) -> None:
    """Print the metrics beside those of popularity, and the recommendations for the first test user."""
    print(f"\n{'test, seen items':24}{'excluded':>12}{'popularity':>12}{'kept':>12}{'popularity':>12}")
    for name in ("hr", "ndcg", "mrr"):
        for k in CUTOFFS:
            keys = (f"{name}@{k}", f"{name}@{k}_seen_kept")
            values = [results[f"{prefix}_{key}"] for key in keys for prefix in ("test", "popularity")]
            print(f"{f'{name.upper()}@{k}':24}" + "".join(f"{value:12.4f}" for value in values))
    print(f"{'Coverage@10':24}{results['test_coverage@10']:12.4f}{results['popularity_coverage@10']:12.4f}")

    sample = results["sample"]
    print(f"\nThe last items of user {sample['user_id']}:")
    for title in sample["history"]:
        print(f"    {title}")
    print("Recommended:")
    for rank, title in enumerate(sample["recommended"], start=1):
        print(f"{rank:4}  {title}")
    print(f"What came next: {sample['target']}")


def run(
    model_args: ModelArguments, data_args: DataArguments, training_args: SeqRecTrainingArguments, run_name: str
) -> None:
    """Train, evaluate, and write the results, from the newest whole checkpoint on if there is one."""
    start_time = time.time()
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None and training_args.do_train:
        checkpoint = find_checkpoint(training_args.output_dir)
    if checkpoint is not None:
        logger.info(f"Resuming from {checkpoint}")

    # 1. Interactions -> histories -> token ids
    histories, items, counts = read_histories(data_args, training_args)
    tokenizer = make_tokenizer(model_args, data_args, items)
    with training_args.main_process_first(local=False, desc="tokenizing the histories"):
        splits = tokenizer.tokenize_histories(histories, num_proc=data_args.preprocessing_num_workers)
    splits = splits.with_format("numpy")
    train_dataset = splits["train"]
    if data_args.split_into_windows:
        train_dataset = split_into_windows(train_dataset, data_args.max_length)

    # 2. Model and trainer
    config = make_config(model_args, data_args, tokenizer)
    if checkpoint is not None:
        check_checkpoint(checkpoint, config, tokenizer)
    model = make_model(model_args, config)
    trainer = make_trainer(model, tokenizer, train_dataset, splits["validation"], data_args, training_args)
    results = describe_run(trainer, counts, data_args)

    # 3. Training and evaluation
    if training_args.do_train:
        results |= train(trainer, splits["train"], checkpoint)
    if training_args.do_eval:
        results |= validate(trainer)
    if training_args.do_predict:
        results |= test(trainer, splits["test"], splits["train"])
    if config.model_type == "elastic":
        results["expert_half_lives"] = expert_half_lives(trainer.model)

    # 4. Results, figures and model card
    if trainer.is_world_process_zero():
        before = trainer.seconds_before
        results["total_seconds"] = None if before is None else round(before + time.time() - start_time, 1)
        results |= describe_machine(training_args.world_size)
        write_json(Path(training_args.output_dir, RESULTS_FILE), results)
        finish_run(training_args, run_name, results, trainer.create_model_card, trainer.hub_model_id)

    trainer.accelerator.wait_for_everyone()
    trainer.end()


def main() -> None:
    model_args, data_args, training_args = parse_arguments(sys.argv[1:])
    run_name = make_run_name(model_args, data_args, training_args)
    output_dir = training_args.output_dir = training_args.output_dir or f"outputs/{run_name}"
    is_main_process = training_args.process_index == 0
    refuse_foreign_model(training_args)
    make_folder(output_dir, "output_dir")
    if training_args.results_dir:
        make_folder(training_args.results_dir, "results_dir")
    set_up_process(training_args)
    with lock_output_dir(output_dir) if is_main_process else nullcontext():
        results = read_results(training_args, run_name) if is_main_process else None
        (results,) = broadcast_object_list([results])
        if results is None:
            run(model_args, data_args, training_args, run_name)
        elif is_main_process:
            logger.info(f"{output_dir} holds results: what is made from them is made again")
            repo_id = training_args.hub_model_id or output_dir
            finish_run(training_args, run_name, results, partial(write_card, output_dir, repo_id), repo_id)


if __name__ == "__main__":
    main()
