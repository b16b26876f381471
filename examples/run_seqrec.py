#!/usr/bin/env python
"""
Trains a sequential recommender, evaluates it on the full catalogue and recommends.

    python examples/run_seqrec.py                                       # the synthetic dataset, minutes on a CPU
    python examples/run_seqrec.py --dataset_name ml-1m --output_dir outputs/ml-1m
    python examples/run_seqrec.py --train_file shop.csv --items_file titles.csv --output_dir outputs/shop
    python examples/run_seqrec.py examples/recipes/ml-1m-sasrec.yaml    # arguments from a YAML or JSON file,
    python examples/run_seqrec.py examples/recipes/ml-1m-sasrec.yaml --seed 43    # some of them changed
    torchrun --nproc_per_node 2 examples/run_seqrec.py

Without `--do_train`, `--do_eval` or `--do_predict` it does all three. An interrupted run goes on from its last
checkpoint when it is started again. `--help` lists all arguments.
"""

import json
import logging
import math
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import transformers
import yaml
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    EarlyStoppingCallback,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import elastic_hf
from elastic_hf.baselines.popularity import PopularityConfig, PopularityForSequentialRecommendation
from elastic_hf.data.collator import SequentialRecommendationCollator
from elastic_hf.data.histories import load_histories
from elastic_hf.data.windows import split_into_windows
from elastic_hf.models.configuration_recommender import RecommenderConfig
from elastic_hf.models.item_tokenizer import ElasticItemTokenizer
from elastic_hf.plots import plot_expert_horizons, plot_training_curve
from elastic_hf.results import git_commit, processor, write_json
from elastic_hf.sharing.hub import publish
from elastic_hf.training.metrics import popularity_bias
from elastic_hf.training.trainer import SequentialRecommendationTrainer


logger = logging.getLogger(__name__)

MODEL_TYPES = ("elastic", "elastic_paper", "sasrec", "bert4rec", "gru4rec", "linrec", "lightsans", "popularity")


@dataclass
class ModelArguments:
    """Which model to train."""

    model_type: str = field(default="elastic", metadata={"help": f"One of: {', '.join(MODEL_TYPES)}."})
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
    k_core: int = field(default=5, metadata={"help": "Fewest interactions of each user and item; 0 filters nothing."})
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


@dataclass
class SeqRecTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with the defaults of this script."""

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
        do_eval = self.do_eval
        super().__post_init__()
        # The evaluation after training is asked for by name; the stock arguments infer it from eval_strategy.
        self.do_eval = do_eval


def read_arguments(argv: list[str]) -> list[str]:
    """The arguments of a YAML or JSON file, if `argv` begins with one, then those after it."""
    if not argv or not argv[0].endswith((".json", ".yaml", ".yml")):
        return argv
    arguments = []
    for name, value in yaml.safe_load(Path(argv[0]).read_text()).items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(part if isinstance(part, str) else json.dumps(part) for part in values)]
    return arguments + argv[1:]


def hardware() -> str:
    """The accelerators, or the processor with the number of threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{processor()}, {torch.get_num_threads()} threads per process"


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


def main() -> None:
    start_time = time.time()

    # 1. Arguments
    parser = HfArgumentParser((ModelArguments, DataArguments, SeqRecTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(read_arguments(sys.argv[1:]))
    if model_args.model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, found {model_args.model_type!r}")
    if not training_args.do_train and model_args.model_name_or_path is None:
        raise ValueError("without do_train there is no model to evaluate: set model_name_or_path")
    if training_args.hub_token is not None:
        raise ValueError("hub_token would be written into the results: set HF_TOKEN, or log in with `hf auth login`")

    source = data_args.train_file or data_args.dataset_name or "synthetic"
    dataset_name = data_args.dataset_name or source
    run_name = f"{Path(dataset_name).stem}-{model_args.model_type}-{training_args.seed}"
    if training_args.variant is not None:
        run_name += f"-{training_args.variant}"
    if not training_args.output_dir:
        training_args.output_dir = f"outputs/{run_name}"
    output_dir = Path(training_args.output_dir)
    results_file = output_dir / "all_results.json"
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None and output_dir.is_dir():
        if training_args.do_train:
            checkpoint = get_last_checkpoint(output_dir)
        holds_model = training_args.do_train and checkpoint is None and (output_dir / "model.safetensors").exists()
        if holds_model or results_file.exists():
            raise ValueError(
                f"output_dir {output_dir} already holds a finished run: choose another one, or set "
                "resume_from_checkpoint to train that run further"
            )

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"output_dir {output_dir} must be a folder that can be written to: {error}") from error

    is_main_process = training_args.process_index == 0
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main_process else logging.ERROR)
    if not is_main_process:
        datasets.disable_progress_bars()
    if checkpoint is not None:
        logger.info(f"Resuming from {checkpoint}")
    has_bfloat16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if training_args.bf16 and training_args.device.type == "cpu" and not has_bfloat16:
        logger.warning("bf16 is many times slower than float32 on this processor, which has no instructions for it")
    set_seed(training_args.seed)

    # 2. Interactions -> histories
    with training_args.main_process_first(local=False, desc="loading the interactions"):
        histories, items, counts = load_histories(
            source,
            data_dir=data_args.data_dir,
            user_column=data_args.user_column,
            item_column=data_args.item_column,
            timestamp_column=data_args.timestamp_column,
            title_column=data_args.title_column,
            items_file=data_args.items_file,
            dataset_config_name=data_args.dataset_config_name,
            dataset_split=data_args.dataset_split,
            k_core=data_args.k_core,
            split=data_args.split,
            validation_fraction=data_args.validation_fraction,
            test_fraction=data_args.test_fraction,
            cache_dir=data_args.cache_dir,
        )
    logger.info(", ".join(f"{key}: {value:,}" for key, value in counts.items()))

    # 3. Histories -> token ids
    if model_args.model_name_or_path is None:
        tokenizer = ElasticItemTokenizer.from_items(items, model_max_length=data_args.max_length)
    else:
        tokenizer = ElasticItemTokenizer.from_pretrained(model_args.model_name_or_path)
    item_token_ids = np.array(tokenizer.convert_tokens_to_ids(items["item_id"][:]))
    num_unknown = int((item_token_ids == tokenizer.unk_token_id).sum())
    if num_unknown:
        raise ValueError(
            f"the tokenizer of {model_args.model_name_or_path} does not know {num_unknown:,} of the {len(items):,} "
            f"items of {source}"
        )
    with training_args.main_process_first(local=False, desc="tokenizing the histories"):
        splits = tokenizer.tokenize_histories(histories, num_proc=data_args.preprocessing_num_workers)
    splits = splits.with_format("numpy")
    train_lengths = pc.list_value_length(splits["train"].with_format("arrow")[:]["input_ids"]).to_numpy()
    whole_histories = splits["train"]
    (trainable,) = np.nonzero(train_lengths >= 2)
    if len(trainable) < len(train_lengths):
        logger.info(f"{len(train_lengths) - len(trainable):,} users have one item to train on, nothing to predict")
        splits["train"] = splits["train"].select(trainable)
    if data_args.split_into_windows:
        splits["train"] = split_into_windows(splits["train"], data_args.max_length)

    # 4. Model
    if model_args.model_name_or_path is None:
        config = AutoConfig.for_model(model_args.model_type, vocab_size=len(tokenizer))
    else:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    try:
        overrides = model_args.config_overrides or ""
        if overrides:
            config.update_from_string(overrides)
        has_positions = hasattr(config, "max_position_embeddings")
        if model_args.model_name_or_path is None and has_positions and "max_position_embeddings" not in overrides:
            # The mask that is appended to histories at inference takes a position, too.
            config.max_position_embeddings = data_args.max_length + (config.training_objective == "masked_item")
        config.validate()
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"config_overrides={model_args.config_overrides!r}: {error}") from error
    if config.vocab_size != len(tokenizer):
        raise ValueError(f"vocab_size must be the tokenizer's, {len(tokenizer)}, found {config.vocab_size}")
    classes = [base for base in type(config).__mro__ if issubclass(base, RecommenderConfig)]
    fields = sorted({name for base in classes for name in base.__annotations__})
    if checkpoint is not None:
        trained_config = AutoConfig.from_pretrained(checkpoint)
        trained_items = ElasticItemTokenizer.from_pretrained(checkpoint).items
        changed = [name for name in fields if getattr(config, name) != getattr(trained_config, name)]
        if not trained_items["item_id"].equals(tokenizer.items["item_id"]):
            changed.append("catalogue")
        if changed:
            raise ValueError(f"{checkpoint} was trained with another {', '.join(changed)}: choose another output_dir")
    if model_args.model_name_or_path is None:
        model = AutoModel.from_config(config)
    else:
        model = AutoModel.from_pretrained(model_args.model_name_or_path, config=config)
    logger.info(f"{config.model_type} with {model.num_parameters():,} parameters")

    # 5. Trainer
    collator = SequentialRecommendationCollator(
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        max_length=data_args.max_length,
        objective=config.training_objective,
        mask_probability=data_args.mask_probability,
    )
    callbacks = []
    if training_args.early_stopping_patience > 0:
        callbacks.append(EarlyStoppingCallback(training_args.early_stopping_patience))
    trainer = SequentialRecommendationTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    world_size = training_args.world_size
    launcher = "python" if world_size == 1 else f"torchrun --nproc_per_node {world_size}"
    results = {
        "dataset": dataset_name,
        "hub_dataset": source if "/" in source and not Path(source).exists() else None,
        "model_type": config.model_type,
        "seed": training_args.seed,
        "variant": training_args.variant,
        "main_row": training_args.variant is None,
        "git_commit": git_commit(),
        "command": f"{launcher} {shlex.join(sys.argv)}",
        "protocol": f"{data_args.split}, full ranking",
        "k_core": data_args.k_core,
        **counts,
        "num_parameters": model.num_parameters(),
        "max_length": data_args.max_length,
        "split_into_windows": data_args.split_into_windows,
        "config": {name: getattr(config, name) for name in fields},
        "training": trainer.training_settings(),
    }

    # 6. Training
    if training_args.do_train and config.model_type == "popularity":
        model.count_items(whole_histories)
        trainer.save_model()
    elif training_args.do_train:
        train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        state = trainer.state
        results |= {
            "epochs": state.epoch,
            "best_epoch": trainer.best_epoch(),
            "stopped_early": state.global_step < state.max_steps,
            "resumed_from_checkpoint": checkpoint,
            "train_seconds": train_metrics["train_runtime"],
            "train_loss": train_metrics["train_loss"],
            "log_history": [
                {key: log[key] for key in ("epoch", "loss", "eval_ndcg@10") if key in log}
                for log in state.log_history
                if "loss" in log or "eval_ndcg@10" in log
            ],
        }
        trainer.save_model()

    # 7. Evaluation
    if training_args.do_eval:
        metrics = trainer.evaluate()
        results |= {key.replace("eval_", "validation_"): metrics[key] for key in metrics if "@" in key}
    if training_args.do_predict:
        prediction = trainer.predict(splits["test"])
        popularity = PopularityForSequentialRecommendation(PopularityConfig(vocab_size=len(tokenizer)))
        popularity.count_items(whole_histories)
        counter = SequentialRecommendationTrainer(popularity, training_args, collator, eval_dataset=splits["test"])
        for metrics in (prediction.metrics, counter.evaluate(metric_key_prefix="popularity")):
            results |= {key: value for key, value in metrics.items() if "@" in key}
        item_counts = popularity.get_output_embeddings().weight[:, 0].detach().cpu().numpy()
        bias = popularity_bias(prediction.predictions[1], prediction.label_ids, item_counts, config.num_special_tokens)
        results |= {f"test_{key}": value for key, value in bias.items()}

        if getattr(config, "num_memory_subkeys", 0):
            results |= memory_usage(trainer, splits["test"])

    if config.model_type == "elastic":
        half_lives = trainer.model.model.experts.half_lives  # (num_attention_heads, num_interest_experts)
        results["expert_half_lives"] = half_lives.detach().cpu().numpy().round(2).tolist()

    # 8. Results, pictures and model card
    if is_main_process:
        if training_args.do_predict:
            user, recommended = splits["test"].with_format(None)[0], prediction.predictions[1][0, :10]
            results["sample"] = {
                "user_id": user["user_id"],
                "history": tokenizer.convert_ids_to_titles(user["input_ids"][-10:]),
                "recommended": tokenizer.convert_ids_to_titles(recommended[recommended >= 0]),
                "target": tokenizer.convert_ids_to_titles(user["target"]),
            }
        results |= {
            "total_seconds": round(time.time() - start_time, 1),
            "hardware": hardware(),
            "num_processes": world_size,
            "python_version": platform.python_version(),
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
            "elastic_hf_version": elastic_hf.__version__,
        }
        write_json(results_file, results)
        if training_args.results_dir:
            write_json(Path(training_args.results_dir) / f"{run_name}.json", results)

        if training_args.do_train:
            # The model folder holds no pickle; the checkpoints keep theirs.
            (output_dir / "training_args.bin").unlink(missing_ok=True)
            if results.get("log_history"):
                plot_training_curve(results["log_history"], output_dir / "training_curve.png")
            if "expert_half_lives" in results:
                plot_expert_horizons(results["expert_half_lives"], output_dir / "expert_horizons.png")
            trainer.create_model_card()
        if training_args.push_to_hub:
            publish(output_dir, trainer.hub_model_id, revision=training_args.hub_revision)

        # 9. Metrics beside the baseline, and recommendations for the first test user
        if training_args.do_predict:
            print(f"\n{'test, seen items':24}{'excluded':>12}{'popularity':>12}{'kept':>12}{'popularity':>12}")
            for name in ("hr", "ndcg", "mrr"):
                for k in (1, 5, 10, 20):
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
        print(f"\nResults: {results_file}")

    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main()
