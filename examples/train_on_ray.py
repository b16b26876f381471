#!/usr/bin/env python
"""
Train on the workers of a Ray cluster: Transformers' Trainer in each of them, as under `torchrun`, and Ray Train around
them, which starts the workers and keeps their metrics and checkpoints.

    python examples/train_on_ray.py --train_file shop.csv --output_dir outputs/ray --num_workers 2

It needs `pip install -e ".[ray]"` in a clone. All machines must see the same files.
"""

import argparse
from pathlib import Path
from typing import Any

import ray.train
from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer
from transformers import TrainingArguments, set_seed

from elastic_hf import (
    ElasticConfig,
    ElasticForSequentialRecommendation,
    ElasticItemTokenizer,
    SequentialRecommendationTrainer,
    load_histories,
)


def train_worker(config: dict[str, Any]) -> None:
    """Train as one process of the group that Ray has made; the first of them saves the model."""
    set_seed(42)
    histories, items, _ = load_histories(config["train_file"])
    tokenizer = ElasticItemTokenizer.from_items(items, model_max_length=200)
    data = tokenizer.tokenize_histories(histories)
    model = ElasticForSequentialRecommendation(ElasticConfig(vocab_size=len(tokenizer)))
    args = TrainingArguments(
        config["output_dir"],
        num_train_epochs=config["num_train_epochs"],
        per_device_train_batch_size=8,
        learning_rate=4e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        ddp_find_unused_parameters=False,
        report_to="none",
        use_cpu=not config["use_gpu"],
    )
    trainer = SequentialRecommendationTrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        callbacks=[RayTrainReportCallback()],
    )
    prepare_trainer(trainer).train()
    trainer.save_model()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", default="synthetic", help="Interactions, or the name of a built-in dataset.")
    parser.add_argument("--output_dir", default="outputs/ray", help="Folder of the model and of Ray's checkpoints.")
    parser.add_argument("--num_workers", type=int, default=2, help="Processes that train.")
    parser.add_argument("--num_train_epochs", type=float, default=2)
    parser.add_argument("--use_gpu", action="store_true", help="Give each process a GPU.")
    args = parser.parse_args()
    folder = Path(args.output_dir).absolute()
    config = {**vars(args), "output_dir": str(folder)}
    if Path(args.train_file).exists():
        config["train_file"] = str(Path(args.train_file).absolute())
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=args.num_workers, use_gpu=args.use_gpu),
        run_config=ray.train.RunConfig(name="ray_train", storage_path=str(folder)),
    )
    metrics = trainer.fit().metrics
    print({name: round(value, 4) for name, value in metrics.items() if name.endswith("@10")})


if __name__ == "__main__":
    main()
