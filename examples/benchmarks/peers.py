"""Compare SASRec of this package with that of RecTools: same users, split and metrics, each library by its own code.

python -m venv peers && peers/bin/pip install torch==2.13.0 "rectools[torch]==0.19.0" "pyarrow<20"
elastic-hf train examples/recipes/ml-100k-sasrec.yaml
python examples/benchmarks/peers.py --peer_python peers/bin/python --model_name_or_path outputs/ml-100k-sasrec-42 \
    --dataset_name ml-100k --data_dir data/ml-100k

RecTools has an environment of its own: this file runs itself there, with the interactions in Parquet, trains, and
recommends ten items for each user. Both libraries' metrics then judge both libraries' recommendations, and
`peers-<dataset>.json` says what they found. With `--folder` the peer may have been trained before, on another machine
too: `--step prepare` writes its interactions there, and `--step train` needs nothing but RecTools.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


TOP_K = 10
RESULTS = Path(__file__).parent / "results"
INTERACTIONS, RECOMMENDED, METRICS = "interactions.parquet", "recommended-{}.parquet", "metrics-{}.json"
TRAINING = "peer.json"
SPLITS = ("train", "validation", "test")
SIDES = ("elastic_hf", "peer")
SETTINGS = ("dataset_name", "hidden_size", "num_attention_heads", "hidden_dropout", "learning_rate", "max_length")
SETTINGS += ("num_train_epochs", "eval_epochs", "patience", "seed")


# In the environment of RecTools


def train_peer(folder: Path, args: argparse.Namespace) -> None:
    """Train SASRec of RecTools, and recommend after the epoch that is best on the validation items."""
    import pandas as pd
    import pytorch_lightning
    import torch
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.metrics import NDCG, calc_metrics
    from rectools.models import SASRecModel

    pytorch_lightning.seed_everything(args.seed)
    interactions = pd.read_parquet(folder / INTERACTIONS)
    names = {"user_id": Columns.User, "item_id": Columns.Item, "place": Columns.Datetime}
    interactions = interactions.rename(columns=names).assign(**{Columns.Weight: 1.0})
    interactions[Columns.Datetime] = pd.to_datetime(interactions[Columns.Datetime], unit="s")
    splits = {name: interactions[interactions["split"] == name].drop(columns="split") for name in SPLITS}
    train = Dataset.construct(splits["train"])
    before_test = Dataset.construct(pd.concat([splits["train"], splits["validation"]]))
    model = SASRecModel(
        n_blocks=2,
        n_heads=args.num_attention_heads,
        n_factors=args.hidden_size,
        dropout_rate=args.hidden_dropout,
        session_max_len=args.max_length,
        lr=args.learning_rate,
        batch_size=128,
        deterministic=True,
    )
    ndcg = {"ndcg": NDCG(k=TOP_K, divide_by_achievable=True)}
    best, best_epoch = -1.0, 0
    for epoch in range(args.eval_epochs, args.num_train_epochs + 1, args.eval_epochs):
        model.fit_partial(train, min_epochs=args.eval_epochs, max_epochs=args.eval_epochs)
        users = splits["validation"][Columns.User].unique()
        recommended = model.recommend(users, train, TOP_K, filter_viewed=True)
        score = calc_metrics(ndcg, recommended, splits["validation"])["ndcg"]
        print(f"epoch {epoch}/{args.num_train_epochs}  validation NDCG@10 {score:.4f}", flush=True)
        if score > best:
            best, best_epoch = score, epoch
            users = splits["test"][Columns.User].unique()
            recommended = model.recommend(
                users, before_test, TOP_K, filter_viewed=True, on_unsupported_targets="ignore"
            )
            recommended.to_parquet(folder / RECOMMENDED.format("peer"))
        elif epoch - best_epoch >= args.patience:
            break
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    found = {"best_epoch": best_epoch, "epochs": epoch, "validation_ndcg@10": best, "hardware": hardware}
    (folder / TRAINING).write_text(json.dumps(found | settings_of_peer(args)))


def settings_of_peer(args: argparse.Namespace) -> dict:
    """Return what the peer is trained with."""
    return {name: getattr(args, name) for name in SETTINGS}


def measure_by_peer(folder: Path, args: argparse.Namespace) -> None:
    """Let RecTools' metrics judge both libraries' recommendations."""
    from importlib.metadata import version

    import pandas as pd
    from rectools.metrics import MRR, NDCG, HitRate, calc_metrics

    interactions = pd.read_parquet(folder / INTERACTIONS)
    targets = interactions[interactions["split"] == "test"]
    metrics = {
        "hr@10": HitRate(k=TOP_K),
        "ndcg@10": NDCG(k=TOP_K, divide_by_achievable=True),
        "mrr@10": MRR(k=TOP_K),
    }
    found = {
        name: calc_metrics(metrics, pd.read_parquet(folder / RECOMMENDED.format(name)), targets) for name in SIDES
    }
    versions = {name: version(name) for name in ("rectools", "torch")}
    text = json.dumps({"versions": versions, "metrics": found}, default=float)
    (folder / METRICS.format("peer")).write_text(text)


# In the environment of this package


def write_interactions(folder: Path, args: argparse.Namespace) -> None:
    """Write all interactions, each with its place in the user's history and the split that it is the target of."""
    import polars as pl

    from elastic_hf import load_histories

    histories = load_histories(
        args.train_file or args.dataset_name, data_dir=args.data_dir, timestamp_column=args.timestamp_column
    ).histories
    rows = []
    for user in histories["test"]:
        items = [*user["item_ids"], user["target"]]
        splits = ["train"] * (len(items) - 2) + ["validation", "test"]
        places = range(len(items))
        rows += [
            (user["user_id"], item, place, split) for item, place, split in zip(items, places, splits, strict=True)
        ]
    pl.DataFrame(rows, schema=["user_id", "item_id", "place", "split"], orient="row").write_parquet(
        folder / INTERACTIONS
    )


def recommend(folder: Path, args: argparse.Namespace) -> None:
    """Write the recommendations of this package's model for the test items, in the columns of RecTools."""
    import polars as pl
    from transformers import pipeline

    pipe = pipeline("sequential-recommendation", model=args.model_name_or_path, top_k=TOP_K)
    rows = pl.read_parquet(folder / INTERACTIONS).filter(pl.col("split") != "test")
    users = rows.group_by("user_id", maintain_order=True).agg("item_id")
    recommended = []
    for user, items in zip(users["user_id"], pipe(users["item_id"].to_list(), batch_size=64), strict=True):
        recommended += [(user, item["item"], item["score"], rank) for rank, item in enumerate(items, start=1)]
    pl.DataFrame(recommended, schema=["user_id", "item_id", "score", "rank"], orient="row").write_parquet(
        folder / RECOMMENDED.format("elastic_hf")
    )


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Let this package's metrics judge both libraries' recommendations."""
    import numpy as np
    import polars as pl

    from elastic_hf.training.metrics import ranking_metrics, standard_errors

    interactions = pl.read_parquet(folder / INTERACTIONS)
    targets = interactions.filter(pl.col("split") == "test")
    num_items = interactions["item_id"].n_unique()
    found = {}
    for name in SIDES:
        table = pl.read_parquet(folder / RECOMMENDED.format(name)).select("user_id", "item_id", "rank")
        hits = targets.join(table, on=["user_id", "item_id"], how="left")
        ranks = hits["rank"].fill_null(num_items + TOP_K).to_numpy().astype(np.int64)
        ranks = np.stack([ranks, ranks], axis=1)
        metrics = ranking_metrics(ranks, np.zeros((len(ranks), TOP_K), dtype=np.int64), num_items)
        errors = standard_errors(ranks)
        found[name] = {
            **{key: metrics[key] for key in ("hr@10", "ndcg@10", "mrr@10")},
            **{f"{key}_standard_error": errors[key] for key in ("hr@10", "ndcg@10", "mrr@10")},
        }
    return found


def is_trained(folder: Path, args: argparse.Namespace) -> bool:
    """Return whether the folder holds a peer that was trained with these arguments.

    Raises:
        ValueError: if it holds one that was trained with others.
    """
    if not (folder / TRAINING).exists():
        return False
    found = json.loads((folder / TRAINING).read_text())
    for name, value in settings_of_peer(args).items():
        if found.get(name) != value:
            raise ValueError(f"folder {folder} must hold a peer trained with {name}={value}, found {found.get(name)}")
    return True


def compare(args: argparse.Namespace) -> None:
    """Train the peer, unless that is done in this folder, let both libraries judge both, and write what they found."""
    from transformers import AutoConfig

    from elastic_hf.results import describe_machine, git_commit, write_json

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        steps = ("measure",) if is_trained(folder, args) else ("train", "measure")
        write_interactions(folder, args)
        recommend(folder, args)
        for step in steps:
            command = [args.peer_python, __file__, *sys.argv[1:], "--step", step, "--folder", str(folder)]
            subprocess.run(command, check=True)
        peer = json.loads((folder / METRICS.format("peer")).read_text())
        config = AutoConfig.from_pretrained(args.model_name_or_path)
        # Where the environment of RecTools and its folder lie is of this machine alone.
        public = {args.peer_python: "peers/bin/python", str(args.folder): "peer"}
        arguments = [public.get(part, part) for part in sys.argv[1:]]
        results = {
            "benchmark": "peers",
            "dataset": args.dataset_name,
            "git_commit": git_commit(),
            "command": f"python examples/benchmarks/peers.py {shlex.join(arguments)}",
            **describe_machine(1),
            "peer_versions": peer["versions"],
            "peer_training": json.loads((folder / TRAINING).read_text()),
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "metrics_of_elastic_hf": measure(folder),
            "metrics_of_peer": peer["metrics"],
        }
    write_json(RESULTS / f"peers-{args.dataset_name}.json", results)
    print(json.dumps({key: value for key, value in results.items() if key.startswith("metrics")}, indent=2))


STEPS = {"prepare": write_interactions, "train": train_peer, "measure": measure_by_peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", required=True, help="Python of the environment of RecTools.")
    parser.add_argument("--model_name_or_path", required=True, help="Folder of a SASRec trained on the same data.")
    parser.add_argument("--dataset_name", required=True, help="Name of the data.")
    parser.add_argument("--data_dir", help="Folder of the raw MovieLens files.")
    parser.add_argument("--train_file", help="File of interactions instead.")
    parser.add_argument("--timestamp_column", help="Column of the timestamps.")
    parser.add_argument("--hidden_size", type=int, default=64, help="Width of the peer.")
    parser.add_argument("--num_attention_heads", type=int, default=1, help="Heads of the peer.")
    parser.add_argument("--hidden_dropout", type=float, default=0.2, help="Dropout of the peer.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Learning rate of the peer.")
    parser.add_argument("--max_length", type=int, default=200, help="Items that the peer reads.")
    parser.add_argument("--num_train_epochs", type=int, default=200, help="Most epochs of the peer.")
    parser.add_argument("--eval_epochs", type=int, default=5, help="Epochs between two evaluations of the peer.")
    parser.add_argument("--patience", type=int, default=40, help="Epochs without a better one before the peer stops.")
    parser.add_argument("--seed", type=int, default=42, help="Seed of the peer.")
    parser.add_argument("--step", choices=STEPS, help="One step alone, in the folder.")
    parser.add_argument("--folder", type=Path, help="Folder that keeps the trained peer, for another comparison.")
    args = parser.parse_args()
    if args.step and not args.folder:
        parser.error("--step needs a --folder")
    if args.step:
        args.folder.mkdir(parents=True, exist_ok=True)
        STEPS[args.step](args.folder, args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
