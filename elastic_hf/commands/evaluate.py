"""`elastic-hf evaluate`: rank what users went on to in the full catalogue, beside popularity."""

import math
import tempfile
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from ..baselines.popularity import PopularityConfig, PopularityForSequentialRecommendation
from ..models.item_tokenizer import ElasticItemTokenizer
from ..results import CUTOFFS, RunResults
from ..sharing.tables import describe_metric, rankings
from ..training.metrics import popularity_bias, standard_errors
from ..training.output_folder import make_folder
from ..training.trainer import READ, SequentialRecommendationTrainer
from .arguments import DataArguments, parse_arguments
from .steps import describe_protocol, make_tokenizer, read_histories, set_up_process, settings_of, tokenize


@dataclass
class EvaluationArguments:
    """Which model to evaluate."""

    _argument_group_name = "evaluation"

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a trained model."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the metrics."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Users in a batch, on each device."})
    use_cpu: bool = field(default=False, metadata={"help": "Evaluate on the processor, even where there is a GPU."})


def validate(trainer: SequentialRecommendationTrainer, users: Dataset, results: RunResults) -> None:
    """Add the metrics on the validation items."""
    prediction = trainer.predict(users, metric_key_prefix="validation")
    results.metrics |= with_errors(prediction, "validation")


def test(trainer: SequentialRecommendationTrainer, users: Dataset, histories: Dataset, results: RunResults) -> None:
    """Add the metrics on the test items, beside those of the popularity in the training `histories`."""
    prediction = trainer.predict(users)
    model_config = trainer.model.config
    if model_config.use_timestamps:
        told = trainer.data_collator
        trainer.data_collator = replace(told, know_request=False)
        results.metrics |= with_errors(trainer.predict(users, metric_key_prefix="untimed"), "untimed")
        trainer.data_collator = told
    config = PopularityConfig(vocab_size=model_config.vocab_size, exclude_seen=model_config.exclude_seen)
    popularity = PopularityForSequentialRecommendation(config)
    popularity.count_items(histories)
    collator = replace(trainer.data_collator, use_timestamps=False, event_features=())
    unreported = copy(trainer.args)  # popularity is no run of its own
    unreported.report_to = []
    counter = SequentialRecommendationTrainer(popularity, unreported, collator, eval_dataset=users)
    results.metrics |= with_errors(prediction, "test")
    results.metrics |= with_errors(counter.predict(users, metric_key_prefix="popularity"), "popularity")

    _, top_ids = prediction.predictions
    item_counts = popularity.get_output_embeddings().weight[:, 0].detach().cpu().numpy()
    bias = popularity_bias(top_ids, prediction.label_ids, item_counts, config.num_special_tokens)
    results.metrics |= {f"test_{key}": value for key, value in bias.items()}
    if getattr(model_config, "num_memory_subkeys", 0):
        describe_memory(trainer, users, results)
    results.sample = describe_first_user(trainer.processing_class, users, top_ids)


def with_errors(prediction: PredictionOutput, prefix: str) -> dict[str, float]:
    """Return the metrics of a prediction, and the standard errors of those that are means over users."""
    ranks, _ = prediction.predictions
    metrics = {key: value for key, value in prediction.metrics.items() if "@" in key}
    errors = standard_errors(ranks)
    return metrics | {f"{prefix}_{name}_standard_error": error for name, error in errors.items()}


def describe_memory(trainer: SequentialRecommendationTrainer, users: Dataset, results: RunResults) -> None:
    """Add the slots of the interest memory, the share retrieved for these users, and how even the retrievals are."""
    model = trainer.model.eval()
    counts = torch.zeros(model.config.num_memory_subkeys**2, device=model.device)
    batches = trainer.get_test_dataloader(users)
    is_silent = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    for batch in tqdm(batches, desc="Retrieved slots", disable=is_silent):
        inputs = {name: batch[name].to(model.device) for name in READ if name in batch}
        counts += torch.bincount(model.get_retrieved_slots(**inputs).flatten(), minlength=len(counts))
    counts = trainer.accelerator.reduce(counts)
    entropy = torch.distributions.Categorical(probs=counts).entropy()
    results.memory_slots = len(counts)
    results.memory_share_retrieved = (counts > 0).float().mean().item()
    results.memory_entropy = (entropy / math.log(len(counts))).item()


def describe_first_user(tokenizer: ElasticItemTokenizer, users: Dataset, top_ids: np.ndarray) -> dict[str, Any]:
    """Return what the first user had last, was recommended and went on to, in titles."""
    user, recommended = users.with_format(None)[0], top_ids[0, :10]
    return {
        "user_id": user["user_id"],
        "history": tokenizer.convert_ids_to_titles(user["input_ids"][-10:]),
        "recommended": tokenizer.convert_ids_to_titles(recommended[recommended >= 0]),
        "target": tokenizer.convert_ids_to_titles(user["target"]),
    }


def print_test(results: RunResults) -> None:
    """Print the metrics beside those of popularity, and the recommendations for the first test user.

    The metrics that count come first: with seen items excluded or kept, as the model recommends.
    """
    metrics, sample = results.metrics, results.sample
    print(f"\n{f'{results.num_test_users:,} test users':16}", end="")
    for _, words in rankings(results):
        print(f"{f'seen items {words}':>20}{'popularity':>12}", end="")
    print()
    for name in ("hr", "ndcg", "mrr"):
        for k in CUTOFFS:
            print(f"{f'{name.upper()}@{k}':16}", end="")
            for suffix, _ in rankings(results):
                key = f"{name}@{k}{suffix}"
                print(f"{describe_metric(metrics, f'test_{key}'):>20}{metrics[f'popularity_{key}']:12.4f}", end="")
            print()
    print(f"{'Coverage@10':16}{metrics['test_coverage@10']:11.4f}{metrics['popularity_coverage@10']:21.4f}")
    print("After ± stands the standard error over the users.")
    untimed = f"untimed_ndcg@10{results.suffix}"
    if untimed in metrics:
        print(
            f"The model was told when the targets came; without, its NDCG@10 is {describe_metric(metrics, untimed)}."
        )

    print(f"\nThe last items of user {sample['user_id']}:")
    for title in sample["history"]:
        print(f"    {title}")
    print("Recommended:")
    for rank, title in enumerate(sample["recommended"], start=1):
        print(f"{rank:4}  {title}")
    print(f"What came next: {sample['target']}")


def main(argv: Sequence[str]) -> None:
    """Evaluate a trained model on the validation and test items of some interactions."""
    args, data_args = parse_arguments("evaluate", __doc__, argv, EvaluationArguments, DataArguments)
    if args.output_file is not None:
        make_folder(Path(args.output_file).parent, "the folder of output_file")
    with tempfile.TemporaryDirectory() as folder:
        training_args = TrainingArguments(
            folder,
            per_device_eval_batch_size=args.per_device_eval_batch_size,
            use_cpu=args.use_cpu,
            report_to="none",
        )
        set_up_process(training_args)
        histories, items, counts = read_histories(data_args, training_args, args.model_name_or_path)
        tokenizer = make_tokenizer(args.model_name_or_path, data_args, items, histories["train"])
        splits = tokenize(tokenizer, histories, data_args, training_args)
        model = AutoModel.from_pretrained(args.model_name_or_path)
        trainer = SequentialRecommendationTrainer(model, training_args, processing_class=tokenizer)
        results = RunResults(
            model.config.model_type,
            **counts,
            protocol=describe_protocol(data_args, model.config),
            config=settings_of(model.config),
        )
        validate(trainer, splits["validation"], results)
        test(trainer, splits["test"], splits["train"], results)
        if trainer.is_world_process_zero():
            print_test(results)
            if args.output_file is not None:
                results.write(Path(args.output_file))
