"""`elastic-hf train`: train a sequential recommender, evaluate it on the full catalogue and recommend.

    elastic-hf train                                       # the synthetic dataset, minutes on a CPU
    elastic-hf train --dataset_name ml-1m --output_dir outputs/ml-1m
    elastic-hf train --train_file shop.csv --items_file titles.csv --output_dir outputs/shop
    elastic-hf train examples/recipes/ml-1m-sasrec.yaml    # arguments from a YAML or JSON file,
    elastic-hf train examples/recipes/ml-1m-sasrec.yaml --seed 43    # some of them changed
    torchrun --nproc_per_node 2 -m elastic_hf train

Without `--do_train`, `--do_eval` or `--do_predict` it does all three.

An interrupted run goes on from its newest whole checkpoint when it is started again, and is then the same run: its
results are those of a run without interruption. A run whose results are written, but not yet its figures and its card,
makes these. A run that is finished, or still running, is refused.
"""

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, EarlyStoppingCallback, PreTrainedModel

from ..data.collator import SequentialRecommendationCollator
from ..data.windows import split_into_prefixes, split_into_windows
from ..models.configuration_recommender import RecommenderConfig
from ..models.item_tokenizer import ElasticItemTokenizer
from ..models.modeling_recommender import unsharded
from ..plots import figures_of
from ..registry import MODELS
from ..results import RESULTS_FILE, SUFFIXES, RunResults, describe_machine, git_commit, written_whole
from ..sharing.hub import publish
from ..sharing.model_card import render_model_card
from ..sharing.trial import load_pipeline, recommend_example
from ..training.checkpoints import choose_checkpoint, find_checkpoint
from ..training.output_folder import LOCK, lock_output_dir, make_folder
from ..training.trainer import SequentialRecommendationTrainer
from .arguments import DataArguments, ModelArguments, SeqRecTrainingArguments, parse_arguments
from .evaluate import print_test, test, validate
from .steps import (
    describe_protocol,
    learn_item_features,
    make_tokenizer,
    read_histories,
    set_up_process,
    settings_of,
    tokenize,
)


logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
# Where so many of the validation targets were seen before, coming back to items is part of what is to be predicted: no
# hit rate without seen items can exceed one less that share. Films are rated once (MovieLens, no target was seen);
# places are visited again (Foursquare, four in five were).
MIN_SHARE_SEEN = 0.2


def read_command_line(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, SeqRecTrainingArguments]:
    """Return the arguments, checked as far as that needs no data."""
    model_args, data_args, training_args = parse_arguments(
        "train", __doc__, argv, ModelArguments, DataArguments, SeqRecTrainingArguments
    )
    if model_args.model_type not in MODELS:
        raise ValueError(f"model_type must be one of {', '.join(MODELS)}, found {model_args.model_type!r}")
    if not training_args.do_train and model_args.model_name_or_path is None:
        raise ValueError("without do_train there is no model to evaluate: set model_name_or_path")
    if (model_args.text_column is None) != (model_args.text_model is None):
        raise ValueError("text_column and text_model must be given together, found only one of them")
    if model_args.reads_features:
        if model_args.model_name_or_path is not None:
            raise ValueError("item_features and text_column are for a new model, found model_name_or_path, too")
        if data_args.items_file is None:
            raise ValueError("item_features and text_column need items_file, the table that has them, found none")
    if training_args.split_into_windows and training_args.split_into_prefixes:
        raise ValueError("split_into_windows and split_into_prefixes cut in different places, found both")
    objective = named_overrides(model_args).get("training_objective", "prefix")
    if training_args.split_into_prefixes and objective != "prefix":
        raise ValueError(
            "split_into_prefixes needs training_objective='prefix', which need not be named, found "
            f"{objective!r} in config_overrides"
        )
    if training_args.hub_token is not None:
        raise ValueError("hub_token would be written into the results: set HF_TOKEN, or log in with `hf auth login`")
    return model_args, data_args, training_args


def named_overrides(model_args: ModelArguments) -> dict[str, str]:
    """Return the fields that the overrides of the configuration name, with their values as they are written."""
    overrides = (override.partition("=") for override in (model_args.config_overrides or "").split(","))
    return {name: value for name, _, value in overrides}


def make_run_name(model_args: ModelArguments, data_args: DataArguments, training_args: SeqRecTrainingArguments) -> str:
    """Return `<dataset>-<model>-<seed>[-<regime>][-timed][-features][-with-<event columns>][-<variant>]`."""
    timed = "timed" if model_args.use_timestamps else None
    featured = "features" if model_args.reads_features else None
    events = "-".join(["with", *sorted(data_args.event_columns)]) if data_args.event_columns else None
    parts = [Path(data_args.name).stem, model_args.model_type, str(training_args.seed)]
    further = (data_args.regime, timed, featured, events, training_args.variant)
    parts += [part for part in further if part is not None]
    return "-".join(parts)


def refuse_foreign_model(args: SeqRecTrainingArguments) -> None:
    """Refuse an output folder with a model that is not of a run of this command: a training would overwrite it."""
    output_dir = Path(args.output_dir)
    is_new = args.do_train and args.resume_from_checkpoint is None
    is_of_a_run = (output_dir / LOCK).exists() or (output_dir / RESULTS_FILE).exists()
    if is_new and (output_dir / "model.safetensors").exists() and not is_of_a_run:
        raise ValueError(f"output_dir {output_dir} must hold no model of another origin: choose another one")


def read_results(args: SeqRecTrainingArguments, run_name: str) -> RunResults | None:
    """Return the results of a run that ended before all that is made from them was made, if there are such.

    Raises:
        ValueError: If the output folder holds a finished run.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint is not None or not (output_dir / RESULTS_FILE).exists():
        return None
    try:
        results = RunResults.read(output_dir / RESULTS_FILE)
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


def infer_exclude_seen(counts: dict[str, int]) -> bool:
    """Return whether seen items are to be left out of the recommendations, judging by the validation targets."""
    share = counts["num_seen_targets"] / counts["num_validation_users"]
    exclude_seen = share < MIN_SHARE_SEEN
    logger.info(
        f"exclude_seen={exclude_seen}: {share:.1%} of the validation targets were seen before; seen items are kept "
        f"from {MIN_SHARE_SEEN:.0%} on (--config_overrides exclude_seen={not exclude_seen} sets it otherwise)"
    )
    return exclude_seen


def read_data(
    model_args: ModelArguments, data_args: DataArguments, training_args: SeqRecTrainingArguments
) -> tuple[ElasticItemTokenizer, dict[str, torch.Tensor] | None, DatasetDict, dict[str, int]]:
    """Return the tokenizer, the encoded features of the items that a new model reads, the token ids and the counts."""
    trained = model_args.model_name_or_path
    histories, items, counts = read_histories(data_args, training_args, trained, model_args.reads_features)
    tokenizer = make_tokenizer(trained, data_args, items, histories["train"])
    item_features = learn_item_features(tokenizer, model_args, data_args, training_args)
    return tokenizer, item_features, tokenize(tokenizer, histories, data_args, training_args), counts


def training_rows(
    histories: Dataset,
    tokenizer: ElasticItemTokenizer,
    config: RecommenderConfig,
    training_args: SeqRecTrainingArguments,
) -> Dataset:
    """Return the histories that are trained on, or the windows or prefixes of them."""
    if training_args.split_into_windows:
        return split_into_windows(histories, tokenizer.model_max_length, [*tokenizer.event_columns])
    if training_args.split_into_prefixes:
        columns = [*(["timestamps"] if config.use_timestamps else []), *config.event_features]
        return split_into_prefixes(histories, tokenizer.model_max_length, columns)
    return histories


def make_config(
    model_args: ModelArguments,
    tokenizer: ElasticItemTokenizer,
    counts: dict[str, int],
    training_args: SeqRecTrainingArguments,
) -> RecommenderConfig:
    """Return the configuration with the overrides.

    Whether a new model leaves out seen items is inferred. A model that is trained on all prefixes gets their
    objective, whether it is new or was trained by another one before.
    """
    is_new = model_args.model_name_or_path is None
    if is_new:
        config = AutoConfig.for_model(model_args.model_type, vocab_size=len(tokenizer))
    else:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    config.use_timestamps = config.use_timestamps or model_args.use_timestamps
    config.item_features = tokenizer.item_features
    config.event_features = tokenizer.event_features
    if training_args.do_train and training_args.split_into_prefixes:
        config.training_objective = "prefix"
    try:
        overrides = named_overrides(model_args)
        if is_new and "exclude_seen" not in overrides:
            config.exclude_seen = infer_exclude_seen(counts)
        if "mask_seen_in_loss" in overrides:
            config.mask_seen_in_loss = config.masks_seen  # Transformers updates no field that is None
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
        if is_new and hasattr(config, "max_position_embeddings") and "max_position_embeddings" not in overrides:
            # The mask that is appended to histories at inference takes a position, too.
            has_mask = config.training_objective == "masked_item"
            config.max_position_embeddings = tokenizer.model_max_length + has_mask
        config.validate()
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"config_overrides={model_args.config_overrides!r}: {error}") from error
    if config.vocab_size != len(tokenizer):
        raise ValueError(f"vocab_size must be the tokenizer's, {len(tokenizer)}, found {config.vocab_size}")
    return config


def check_checkpoint(checkpoint: str, config: RecommenderConfig, tokenizer: ElasticItemTokenizer) -> None:
    """Refuse to go on from a checkpoint of another model or another catalogue."""
    trained = settings_of(AutoConfig.from_pretrained(checkpoint))
    trained_items = ElasticItemTokenizer.from_pretrained(checkpoint).items
    changed = [name for name, value in settings_of(config).items() if value != trained.get(name)]
    if not trained_items["item_id"].equals(tokenizer.items["item_id"]):
        changed.append("catalogue")
    if changed:
        raise ValueError(f"{checkpoint} was trained with another {', '.join(changed)}: choose another output_dir")


def make_model(
    model_args: ModelArguments, config: RecommenderConfig, item_features: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """Return a new model, with the features of its items if it reads any, or the trained one."""
    if model_args.model_name_or_path is None:
        model = AutoModel.from_config(config)
    else:
        model = AutoModel.from_pretrained(model_args.model_name_or_path, config=config)
    if item_features is not None:
        model.set_item_features(item_features)
    logger.info(f"{config.model_type} with {model.num_parameters():,} parameters")
    return model


def make_trainer(
    model: PreTrainedModel,
    tokenizer: ElasticItemTokenizer,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    training_args: SeqRecTrainingArguments,
) -> SequentialRecommendationTrainer:
    """Return the trainer, which stops early where that is asked for."""
    collator = SequentialRecommendationCollator(
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        max_length=tokenizer.model_max_length,
        objective="last_item" if training_args.split_into_prefixes else model.config.training_objective,
        use_timestamps=model.config.use_timestamps,
        event_features=[*model.config.event_features],
        mask_probability=training_args.mask_probability,
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
    trainer: SequentialRecommendationTrainer, counts: dict[str, int], data_args: DataArguments, argv: Sequence[str]
) -> RunResults:
    """Return what is known of the run before anything is measured."""
    config, args = trainer.model.config, trainer.args
    source = data_args.source
    launcher = "elastic-hf train"
    if args.world_size > 1:
        launcher = f"torchrun --nproc_per_node {args.world_size} -m elastic_hf train"
    if trainer.is_fsdp_enabled and args.fsdp is None:
        argv = [*argv, "--fsdp"]
    return RunResults(
        model_type=config.model_type,
        seed=args.seed,
        variant=args.variant,
        main_row=args.variant is None,
        dataset=data_args.name,
        hub_dataset=source if "/" in source and not Path(source).exists() else None,
        protocol=describe_protocol(data_args, config),
        k_core=data_args.k_core,
        **counts,
        num_parameters=trainer.model.num_parameters(),
        max_length=trainer.data_collator.max_length,
        split_into_windows=args.split_into_windows,
        split_into_prefixes=args.split_into_prefixes,
        config=settings_of(config),
        training=trainer.training_settings(),
        git_commit=git_commit(),
        command=f"{launcher} {shlex.join(argv)}".strip(),
        **describe_machine(args.world_size),
    )


def train(
    trainer: SequentialRecommendationTrainer, histories: Dataset, checkpoint: str | None, results: RunResults
) -> None:
    """Train the model, or count the items of the training `histories`, and say in the results how it went."""
    if trainer.model.config.model_type == "popularity":
        trainer.model.count_items(histories)
        save_model(trainer)
        return
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    save_model(trainer)
    state = trainer.state
    results.epochs, results.steps = state.epoch, state.global_step
    results.best_epoch = trainer.best_epoch()
    results.stopped_early = state.global_step < state.max_steps
    results.resumed_from_checkpoint = checkpoint
    results.train_seconds, results.train_loss = metrics.get("train_runtime"), metrics.get("train_loss")
    metric = f"eval_ndcg@10{results.suffix}"
    results.log_history = [
        {key: log[key] for key in ("epoch", "step", "loss", metric) if key in log}
        for log in state.log_history
        if "loss" in log or metric in log
    ]


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


def describe_experts(model: PreTrainedModel, results: RunResults) -> None:
    """Add the half-lives of the experts, (num_attention_heads, num_interest_experts), in items and in seconds."""
    experts = model.model.experts
    with unsharded(model), torch.no_grad():
        results.expert_half_lives = experts.half_lives.cpu().numpy().round(2).tolist()
        if experts.half_lives_seconds is not None:
            results.expert_half_lives_seconds = experts.half_lives_seconds.cpu().numpy().round(2).tolist()


def derived_files(
    args: SeqRecTrainingArguments, run_name: str, results: RunResults
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


def repo_id_of(args: SeqRecTrainingArguments) -> str:
    """Return where the model will be loaded from, as the trainer says it: its repository on the Hub, or its folder."""
    if not args.push_to_hub:
        return args.hub_model_id or args.output_dir
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    return HfApi().create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


def write_card(args: SeqRecTrainingArguments, repo_id: str, has_code: bool) -> None:
    """Write the card of a folder that has results, as the trainer does."""
    with written_whole(Path(args.output_dir, CARD_FILE)) as stream:
        stream.write(str(render_model_card(args.output_dir, repo_id, has_code=has_code)).encode())


def finish_run(
    args: SeqRecTrainingArguments, run_name: str, results: RunResults, write_card: Callable[[], None], repo_id: str
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
    if args.do_train:
        folder = shlex.quote(args.output_dir)
        print(f"Recommend: elastic-hf recommend --model_name_or_path {folder} --history <item> <item> ...")
        if not args.push_to_hub:
            print(f"Publish: elastic-hf publish {folder} <namespace>/{shlex.quote(run_name)}")


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: SeqRecTrainingArguments,
    run_name: str,
    argv: Sequence[str],
) -> None:
    """Train, evaluate, and write the results, from the newest whole checkpoint on if there is one."""
    start_time = time.time()
    checkpoint = choose_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    if checkpoint is None and training_args.do_train:
        checkpoint = find_checkpoint(training_args.output_dir)
    if checkpoint is not None:
        logger.info(f"Resuming from {checkpoint}")

    # 1. Interactions -> histories -> token ids
    tokenizer, item_features, splits, counts = read_data(model_args, data_args, training_args)

    # 2. Model and trainer
    config = make_config(model_args, tokenizer, counts, training_args)
    training_args.metric_for_best_model = (
        training_args.metric_for_best_model or f"ndcg@10{SUFFIXES[config.exclude_seen]}"
    )
    if checkpoint is not None:
        check_checkpoint(checkpoint, config, tokenizer)
    model = make_model(model_args, config, item_features)
    train_dataset = training_rows(splits["train"], tokenizer, config, training_args)
    trainer = make_trainer(model, tokenizer, train_dataset, splits["validation"], training_args)
    results = describe_run(trainer, counts, data_args, argv)

    # 3. Training and evaluation
    if training_args.do_train:
        train(trainer, splits["train"], checkpoint, results)
    if training_args.do_eval:
        validate(trainer, splits["validation"], results)
    if training_args.do_predict:
        test(trainer, splits["test"], splits["train"], results)
    if config.model_type == "elastic":
        describe_experts(trainer.model, results)

    # 4. Results, figures and model card
    if trainer.is_world_process_zero():
        before = trainer.seconds_before
        if training_args.do_train:
            results.example = recommend_example(load_pipeline(training_args.output_dir))
        results.total_seconds = None if before is None else round(before + time.time() - start_time, 1)
        results.write(Path(training_args.output_dir, RESULTS_FILE))
        finish_run(training_args, run_name, results, trainer.create_model_card, trainer.hub_model_id)

    trainer.accelerator.wait_for_everyone()
    trainer.end()


def main(argv: Sequence[str]) -> None:
    """Run the command with these arguments."""
    model_args, data_args, training_args = read_command_line(argv)
    run_name = make_run_name(model_args, data_args, training_args)
    output_dir = training_args.output_dir = training_args.output_dir or f"outputs/{run_name}"
    training_args.run_name = training_args.run_name or run_name  # what is reported after training is of the same run
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
            run(model_args, data_args, training_args, run_name, argv)
        elif is_main_process:
            logger.info(f"{output_dir} holds results: what is made from them is made again")
            repo_id = repo_id_of(training_args)
            has_code = training_args.push_to_hub and results.model_type == "elastic"
            write = partial(write_card, training_args, repo_id, has_code)
            finish_run(training_args, run_name, results, write, repo_id)
