"""Find where one model is better than another: NDCG@10 by length of the history and by popularity of the target.

python examples/benchmarks/breakdown.py --model outputs/beauty-5core-elastic-42 \
    --other_model outputs/beauty-5core-sasrec-42 --dataset_name beauty-5core \
    --train_file data/amazon-beauty-5core/interactions.parquet --timestamp_column timestamp --k_core 0

Both models rank the test items of the same users. `breakdown-<dataset>.json` holds the means of each group and the
standard error of the mean difference, user by user.
"""

import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoModel, HfArgumentParser, TrainingArguments

from elastic_hf import SequentialRecommendationTrainer
from elastic_hf.commands.arguments import DataArguments
from elastic_hf.commands.steps import describe_protocol, make_tokenizer, read_histories, tokenize
from elastic_hf.results import describe_machine, git_commit, write_json


RESULTS = Path(__file__).parent / "results"
TOP_K = 10
EDGES = (0, 5, 10, 20, 50, 100, 200, 500, 1_000)


@dataclass
class BreakdownArguments:
    """Which models to compare."""

    model: str = field(metadata={"help": "Folder of a trained model."})
    other_model: str = field(metadata={"help": "Folder of the model that it is compared with."})


def ndcg_of_users(folder: str, data_args: DataArguments) -> dict[str, np.ndarray | str]:
    """Return the NDCG@10 of each test user, the length of the history and how often the target was trained on."""
    with tempfile.TemporaryDirectory() as temporary:
        training_args = TrainingArguments(temporary, per_device_eval_batch_size=256, report_to="none")
        histories, items, _ = read_histories(data_args, training_args, folder)
        tokenizer = make_tokenizer(folder, data_args, items, histories["train"])
        splits = tokenize(tokenizer, histories, data_args, training_args)
        model = AutoModel.from_pretrained(folder)
        trainer = SequentialRecommendationTrainer(model, training_args, processing_class=tokenizer)
        prediction = trainer.predict(splits["test"])
    ranks, _ = prediction.predictions
    rank = ranks[:, 0 if model.config.exclude_seen else 1].astype(np.float64)
    trained_on = np.concatenate([row["input_ids"] for row in splits["train"]])
    return {
        "model_type": model.config.model_type,
        "protocol": describe_protocol(data_args, model.config),
        "ndcg": (rank <= TOP_K) / np.log2(rank + 1),
        "length": np.array([len(row) for row in splits["test"]["input_ids"]]),
        "popularity": np.bincount(trained_on, minlength=len(tokenizer))[prediction.label_ids],
    }


def group(values: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> list[dict[str, float]]:
    """Return, for the users with values above one edge and up to the next, the means of both and their difference."""
    rows = []
    for low, high in zip(EDGES, (*EDGES[1:], np.inf), strict=True):
        users = (values > low) & (values <= high) if low else values <= high
        if users.sum() < 2:
            continue
        difference = ours[users] - theirs[users]
        rows.append(
            {
                "above": low,
                "up_to": None if high == np.inf else high,
                "num_users": int(users.sum()),
                "ndcg@10": float(ours[users].mean()),
                "other_ndcg@10": float(theirs[users].mean()),
                "difference": float(difference.mean()),
                "standard_error": float(difference.std(ddof=1) / users.sum() ** 0.5),
            }
        )
    return rows


def main() -> None:
    args, data_args = HfArgumentParser((BreakdownArguments, DataArguments)).parse_args_into_dataclasses()
    ours, theirs = (ndcg_of_users(folder, data_args) for folder in (args.model, args.other_model))
    results = {
        "benchmark": "breakdown",
        "dataset": data_args.name,
        "protocol": ours["protocol"],
        "model_type": ours["model_type"],
        "other_model_type": theirs["model_type"],
        "git_commit": git_commit(),
        "command": f"python examples/benchmarks/breakdown.py {shlex.join(sys.argv[1:])}",
        **describe_machine(1),
        **{by: group(ours[by], ours["ndcg"], theirs["ndcg"]) for by in ("length", "popularity")},
    }
    write_json(RESULTS / f"breakdown-{data_args.name}.json", results)


if __name__ == "__main__":
    main()
