"""Recommend items that no training has seen: a tenth of Beauty 5-core's items is held out, and added afterwards.

    python examples/benchmarks/new_items.py                    # on a GPU where there is one
    python examples/benchmarks/new_items.py --seed 43 --output examples/benchmarks/results/new-items-43.json

Every interaction with the items held out is taken from the training and validation data. ELASTIC is trained with the
attributes and the vectors of the titles of the other items, and once more with ids alone. The new items are added to
the model with features, which then ranks the test targets in the whole catalogue, once for each `id_scale` of
`add_items`. Further arguments are those of `elastic-hf train`, and change what the recipe says.

The recipe's data are read beside `items.parquet` (item_id, attributes, title) and `title_vectors.parquet` (item_id,
vector), in the folder of its `train_file`.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict
from transformers import set_seed

from elastic_hf import ElasticItemTokenizer
from elastic_hf.commands.arguments import SeqRecTrainingArguments
from elastic_hf.commands.steps import read_histories, set_up_process, settings_of, tokenize
from elastic_hf.commands.train import make_config, make_model, make_trainer, read_command_line, training_rows
from elastic_hf.results import describe_machine, git_commit, write_json
from elastic_hf.training.trainer import SequentialRecommendationTrainer


HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "beauty-5core-elastic.yaml"
FEATURES = ["attributes", "vector"]
SHARE_HELD_OUT = 0.1
TOP_K = 10


class Data(NamedTuple):
    """The items, those held out, and histories: `train` and `validation` without these, `test` with all."""

    known: pa.Table
    new: pa.Table
    histories: DatasetDict
    counts: dict[str, int]


def read_data(data_args: Any, training_args: SeqRecTrainingArguments) -> Data:
    """Return the items with their features, and the histories."""
    folder = Path(data_args.train_file).parent
    histories, items, counts = read_histories(data_args, training_args)
    items = items.with_format("arrow")[:]
    for file in ("items.parquet", "title_vectors.parquet"):
        table = pq.read_table(folder / file)
        rows = table.take(pc.index_in(items["item_id"], value_set=table["item_id"].combine_chunks()))
        for name in {*FEATURES} & {*rows.column_names}:
            items = items.append_column(name, rows[name])
    is_new = np.random.default_rng(training_args.seed).permutation(items.num_rows) < SHARE_HELD_OUT * items.num_rows
    new = items.filter(pa.array(is_new))
    new_ids = {*new["item_id"].to_pylist()}

    def leave_out(row: dict) -> dict:
        return {"item_ids": [item for item in row["item_ids"] if item not in new_ids]}

    histories = DatasetDict({name: split.select_columns(columns_of(split)) for name, split in histories.items()})
    for name in ("train", "validation"):
        histories[name] = histories[name].map(leave_out)
    histories["train"] = histories["train"].filter(lambda row: len(row["item_ids"]) >= 2)
    histories["validation"] = histories["validation"].filter(
        lambda row: row["item_ids"] and row["target"] not in new_ids
    )
    return Data(items.filter(pa.array(~is_new)), new, histories, counts)


def columns_of(split: Dataset) -> list[str]:
    """Return the columns that are read of a split: no times, which this model does not read."""
    return [name for name in ("user_id", "item_ids", "target") if name in split.column_names]


def train(data: Data, with_features: bool, model_args: Any, data_args: Any, training_args: SeqRecTrainingArguments):
    """Return the trainer of a model of the known items, after training."""
    set_seed(training_args.seed)
    tokenizer = ElasticItemTokenizer.from_items(data.known, model_max_length=data_args.max_length)
    if with_features:
        tokenizer.learn_item_features(data.known, FEATURES)
    splits = DatasetDict({name: data.histories[name] for name in ("train", "validation")})
    splits = tokenize(tokenizer, splits, data_args, training_args)
    config = make_config(model_args, tokenizer, data.counts, training_args)
    train_dataset = training_rows(splits["train"], tokenizer, config, training_args)
    training_args.metric_for_best_model = "ndcg@10"
    item_features = tokenizer.encode_item_features(data.known) if with_features else None
    model = make_model(model_args, config, item_features)
    trainer = make_trainer(model, tokenizer, train_dataset, splits["validation"], training_args)
    trainer.train()
    return trainer


def hits(trainer: SequentialRecommendationTrainer, test: Dataset, data_args: Any) -> np.ndarray:
    """Return whether each test target is among the best ten of all items but those seen: (num_users,)"""
    splits = tokenize(trainer.processing_class, DatasetDict({"test": test}), data_args, trainer.args)
    ranks, _ = trainer.predict(splits["test"]).predictions
    return ranks[:, 0] <= TOP_K


def nearest_hits(data: Data) -> np.ndarray:
    """Return the same of the items nearest to the last one, by the cosine of the vectors of their titles."""
    items = pa.concat_tables([data.known, data.new]).combine_chunks()
    vectors = np.array(items["vector"].to_pylist(), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    row_of = {item: row for row, item in enumerate(items["item_id"].to_pylist())}
    found = []
    for batch in data.histories["test"].iter(1000):
        scores = vectors[[row_of[items[-1]] for items in batch["item_ids"]]] @ vectors.T
        for row, (history, target) in enumerate(zip(batch["item_ids"], batch["target"], strict=True)):
            of_target = scores[row, row_of[target]]
            scores[row, [row_of[item] for item in [*history, target]]] = -np.inf
            found.append(target not in history and np.count_nonzero(scores[row] >= of_target) < TOP_K)
    return np.array(found)


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """Return a hit rate and its standard error over the users."""
    return {"hr@10": float(values.mean()), "hr@10_standard_error": float(values.std(ddof=1) / np.sqrt(len(values)))}


def read_command(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments of this script, and those of a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(RECIPE), help="YAML file of `elastic-hf train`.")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "new-items.json", help="JSON file.")
    parser.add_argument(
        "--id_scales",
        type=float,
        nargs="+",
        default=[0.0, 1.0, 1.25, 1.5, 2.0],
        help="Factors of the id embeddings that new items borrow; 0 leaves them to their features alone.",
    )
    args, others = parser.parse_known_args(argv)
    return args, [args.recipe, *others]


def main(argv: list[str]) -> None:
    """Train, add the new items, and write the results."""
    args, training_argv = read_command(argv)
    with tempfile.TemporaryDirectory() as folder:
        model_args, data_args, training_args = read_command_line([*training_argv, "--output_dir", folder])
        set_up_process(training_args)
        data = read_data(data_args, training_args)
        test = data.histories["test"]
        is_new = np.isin(test["target"], data.new["item_id"].to_numpy())
        print(f"{data.new.num_rows:,} of {data.new.num_rows + data.known.num_rows:,} items are held out")
        results = {"nearest titles": {"all": nearest_hits(data)}}
        ids = train(data, False, model_args, data_args, training_args)
        known_targets = test.select(np.flatnonzero(~is_new))
        results["ids, trained items"] = {"trained": hits(ids, known_targets, data_args)}
        features = train(data, True, model_args, data_args, training_args)
        results["features, trained items"] = {"trained": hits(features, known_targets, data_args)}
        config = settings_of(features.model.config)
        token_ids = features.model.add_items(features.processing_class, data.new)
        id_embeddings = features.model.get_input_embeddings().weight
        borrowed = id_embeddings[token_ids].detach()
        for scale in args.id_scales:
            with torch.no_grad():
                id_embeddings[token_ids] = scale * borrowed
            results[f"features, all items, id_scale {scale:g}"] = {"all": hits(features, test, data_args)}
    for found in results.values():
        if "all" in found:
            every = found.pop("all")
            found |= {"new": every[is_new], "trained": every[~is_new]}
    output = {
        "num_items": data.known.num_rows,
        "num_new_items": data.new.num_rows,
        "num_new_targets": int(is_new.sum()),
        "num_trained_targets": int((~is_new).sum()),
        "results": {
            name: {targets: mean_and_error(of_targets) for targets, of_targets in found.items()}
            for name, found in results.items()
        },
        "config": config,
        "training": features.training_settings(),
        "seed": training_args.seed,
        "git_commit": git_commit(),
        "command": f"python examples/benchmarks/new_items.py {shlex.join(argv)}".strip(),
        **describe_machine(training_args.world_size),
    }
    write_json(args.output, output)
    print(json.dumps(output["results"], indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
