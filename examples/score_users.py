#!/usr/bin/env python
"""
Recommend for every user of a data set that is larger than memory, with a pool of models on Ray Data.

    python examples/score_users.py --input users.parquet --model outputs/shop --output scored --top_k 100

The input is a file, or a folder of files, of Parquet or CSV: histories (`user_id`, `item_ids` and, for a model that
reads times, `timestamps`, a row for each user) or interactions (user, item, timestamp), which are grouped by user on
the way. A model that reads features of events finds them in the columns of their names, lists of histories as well.
Text is read with a header and divided by commas (tabs in `.tsv`); the ids of its users stay text.

Users are divided into partitions by a hash of their ids. Each partition is scored by one worker and becomes one
file, `part-00007.parquet`, with the rows that `elastic-hf recommend` writes: `user_id`, `rank`, `item_id`, `score`. It
appears when it is whole: a worker that is killed is replaced, the same command goes on where it was stopped, and no
user is there twice.

With `--states folder` the first run reads whole histories and keeps a state of fixed size for each user; later ones
read the new events alone, which have timestamps and come after those read before, and recommend for the users who have
any what their whole histories say. States read all of a history, and not its latest `model_max_length` items alone.

The input and the output may be in an object store that PyArrow reads, `--output s3://bucket/scored`. Nothing keeps
another run out of an output there; the states are on a file system that locks files.

It needs `pip install -e ".[ray]"` in a clone. It starts Ray on this machine, or joins the cluster of `RAY_ADDRESS`,
where all paths must be on a file system that all machines share.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig, pipeline
from transformers.hf_argparser import string_to_bool

from elastic_hf.commands.recommend import recommend_for_users, recommendations_schema
from elastic_hf.models.cache_elastic import digest_weights
from elastic_hf.models.pipeline import SequentialRecommendationPipeline
from storage import Folder, absolute, is_uri
from user_histories import Source, find_source, histories_of, read_piece
from user_states import NEXT_FOLDER, SUCCESS_FILE, UserStates, begin, commit


# Names that begin with _ are none of a data set to Arrow, Spark and Ray.
SETTINGS_FILE = "_settings.json"
FILE_BYTES_PER_PARTITION = 32 * 2**20
BLOCK_BYTES = 64 * 2**20
CPUS_PER_WORKER = 0.5  # the rest is for reading and grouping, which must never wait for a worker


# 1. a worker


def load_model(settings: dict[str, Any], device: str) -> SequentialRecommendationPipeline:
    """Return the pipeline of the settings of a run."""
    names = ("model", "revision", "top_k", "exclude_seen", "unknown", "fallback")
    given = {name: settings[name] for name in names}
    return pipeline("sequential-recommendation", **given, device=device)


def digest_model(recommend: SequentialRecommendationPipeline) -> str:
    """Return a digest of all that recommendations depend on: weights, configuration, items, length and events."""
    model, tokenizer = recommend.model, recommend.tokenizer
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith(("_", "transformers"))}
    weights = digest_weights(model, model.state_dict().values())
    parts = [weights, config, tokenizer.items.to_pylist(), tokenizer.model_max_length]
    if tokenizer.event_columns:
        parts.append(tokenizer.event_columns)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Scorer:
    """A worker: it writes the file of one partition at a time. A partition whose file is there is not done again."""

    def __init__(self, settings: dict[str, Any]) -> None:
        transformers.logging.disable_progress_bar()
        self.settings, self.folders = settings, folders_of(settings)
        self.recommend = load_model(settings, "cuda" if settings["num_gpus"] else "cpu")

    def __call__(self, rows: pa.Table) -> dict[str, list[int]]:
        partition = rows["partition"][0].as_py()
        if not is_done(self.folders, partition):  # as it is where a worker was killed after its last write
            self.write(histories_of(rows, partition), part_name(partition))
        return {"partition": [partition]}

    def write(self, histories: pa.Table, name: str) -> None:
        """Write the recommendations, and before them the next states."""
        user_type = histories.schema.field("user_id").type
        schema = recommendations_schema(user_type, self.recommend)
        if self.settings["states"] is None:
            tables = self.score(histories, schema)
        else:
            states = Path(self.settings["states"])
            users = UserStates(self.recommend, self.settings, user_type)
            tables = users.score(histories, states / name, states / NEXT_FOLDER / name)
        with (
            self.folders[0].written_whole(name) as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            for table in tables:
                writer.write_table(table)

    def score(self, histories: pa.Table, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yield the recommendations for some users at a time."""
        size = self.settings["batch_size"]
        for first in range(0, len(histories), size):
            users = histories.slice(first, size)
            try:
                yield recommend_for_users(self.recommend, users, self.settings["now"], schema)
            except ValueError as error:
                raise ValueError(f"users {users['user_id'][0]} to {users['user_id'][-1]}: {error}") from error


def part_name(partition: int) -> str:
    return f"part-{partition:05}.parquet"


def folders_of(settings: dict[str, Any]) -> list[Folder]:
    """Return the output, and the folder of the next states if there are any: each holds a file of each partition."""
    folders = [Folder(settings["output"], "output")]
    if settings["states"] is not None:
        folders.append(Folder(f"{settings['states']}/{NEXT_FOLDER}", "states"))
    return folders


def is_done(folders: list[Folder], partition: int) -> bool:
    """Return whether all files of a partition are there."""
    return all(folder.has(part_name(partition)) for folder in folders)


def done_partitions(settings: dict[str, Any]) -> list[int]:
    """Return the partitions of which all files are there."""
    folders = folders_of(settings)
    return [partition for partition in range(settings["num_partitions"]) if is_done(folders, partition)]


# 2. the run


def settle(folder: Folder, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the settings into a folder that is empty, or check that they are those of an earlier run.

    Raises:
        ValueError: if the folder holds something else; the message names what differs.
    """
    if not folder.has(SETTINGS_FILE):
        others = [name for name in folder.names() if name[0] != "."]
        if others:
            raise ValueError(
                f"{folder.field} {folder.place} must be empty or of an earlier run, found {', '.join(others[:10])}"
            )
        folder.write_json(SETTINGS_FILE, settings)
    found = folder.read_json(SETTINGS_FILE)
    for name in sorted({*found, *settings}):
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"{folder.field} {folder.place} is of a run with another {name}: {name} must be {found.get(name)!r}, "
                f"found {settings.get(name)!r}; choose another folder"
            )
    return found


def prepare(args: argparse.Namespace, source: Source, output: Folder, states: Folder | None) -> dict[str, Any]:
    """Return the settings of a run, checked, of which its folders keep what the recommendations depend on.

    Raises:
        ValueError: if an argument is not as described, or a folder is of a run with other settings.
    """
    for name in ("num_workers", "num_partitions", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    names = ("model", "revision", "top_k", "exclude_seen", "unknown", "fallback", "batch_size", "num_gpus")
    settings = {name: getattr(args, name) for name in names}
    if Path(args.model).exists():  # workers may have another working directory
        settings["model"] = absolute(args.model)
    recommend = load_model(settings, "cpu")
    earlier = output.read_json(SETTINGS_FILE) if output.has(SETTINGS_FILE) else {}
    settings |= {"output": output.place, "states": None, "now": _moment(args.now, earlier, recommend, source)}
    digest = digest_model(recommend)
    num_partitions = args.num_partitions or math.ceil(source.num_bytes / FILE_BYTES_PER_PARTITION)
    if states is not None:
        if not recommend.model.supports_cache or not source.has_timestamps:
            raise ValueError("states need a model that keeps them and an input with timestamps, found one without")
        if args.num_partitions is None and states.has(SETTINGS_FILE):
            num_partitions = states.read_json(SETTINGS_FILE).get("num_partitions")
        settle(states, {"model": digest, "num_partitions": num_partitions})
        settings["states"] = states.place
    settings["num_partitions"] = num_partitions
    kept = ("top_k", "exclude_seen", "unknown", "fallback", "now", "states", "num_partitions")
    described = {name: settings[name] for name in kept}
    settle(output, {"model": digest, "input": source.describe(), **described})
    return settings


def _moment(
    now: float | None, earlier: dict[str, Any], recommend: SequentialRecommendationPipeline, source: Source
) -> float | None:
    """For which moment to recommend, in Unix seconds: a run that goes on keeps that of its start."""
    if not recommend.model.config.use_timestamps:
        if now is not None:
            raise ValueError(f"now must be left out for a model that reads no times, found {now}")
        return None
    if not source.has_timestamps:
        raise ValueError("input must have timestamps for a model that reads times, found none")
    return earlier.get("now", time.time()) if now is None else now


@contextmanager
def ray_cluster(num_workers: int, object_store_memory: int) -> Iterator[None]:
    """Join the cluster that this process, or `RAY_ADDRESS`, is already in, or start one on this machine.

    Raises:
        ImportError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError('score_users.py needs Ray: pip install -e ".[ray]"') from error
    if ray.is_initialized():
        yield
        return
    options = {}
    if "RAY_ADDRESS" not in os.environ:
        # A task of its own must always find a processor: Ray has none of less than two.
        options = {"num_cpus": max(2, num_workers), "object_store_memory": object_store_memory}
    ray.init(include_dashboard=False, logging_level="ERROR", **options)
    try:
        yield
    finally:
        ray.shutdown()


def score_users(source: Source, settings: dict[str, Any], num_workers: int) -> None:
    """Write the files of all partitions that are not there yet.

    Raises:
        ValueError: if the input does not hold what is expected; the message names the place.
    """
    import ray.data

    num_partitions = settings["num_partitions"]
    done = done_partitions(settings)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = context.shuffle_input_batch_bytes = BLOCK_BYTES
    pieces = source.pieces()
    rows = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
        read_piece, batch_size=1, batch_format="pyarrow", fn_args=(source, num_partitions, done)
    )
    scored = rows.groupby("partition", num_partitions=num_partitions).map_groups(
        Scorer,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        fn_constructor_args=(settings,),
        num_cpus=CPUS_PER_WORKER,
        num_gpus=settings["num_gpus"],
    )
    with tqdm(total=num_partitions, initial=len(done), desc="partitions", unit="partition") as progress:
        try:
            for _ in scored.iter_rows():
                progress.update()
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="Path or URI of a file or folder of histories or interactions.")
    parser.add_argument("--user_column", help="Column of the user ids.")
    parser.add_argument("--item_column", help="Column of the item ids, of interactions.")
    parser.add_argument("--timestamp_column", help="Column of the timestamps, of interactions.")
    parser.add_argument("--model", required=True, help="Folder or Hub id of a trained model.")
    parser.add_argument("--revision", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--output", required=True, help="Path or URI of the folder of the recommendations.")
    parser.add_argument("--states", help="Folder of the users' states: read new events alone, and keep the states.")
    parser.add_argument("--top_k", type=int, default=10, help="Number of items for each user.")
    parser.add_argument("--now", type=float, help="For which moment to recommend, in Unix seconds; the present one.")
    parser.add_argument(
        "--exclude_seen",
        type=string_to_bool,
        help="Leave out the items of the history, True or False; the model's own setting.",
    )
    parser.add_argument("--unknown", default="error", help="What becomes of unknown items: error or ignore.")
    parser.add_argument("--fallback", default="error", help="Of users without known items: error or popularity.")
    parser.add_argument("--batch_size", type=int, default=256, help="Histories that a worker reads at once.")
    parser.add_argument("--num_workers", type=int, default=2, help="Workers, each with a model of its own.")
    parser.add_argument("--num_gpus", type=float, default=0, help="GPUs of each worker, or a share of one.")
    parser.add_argument("--num_partitions", type=int, help="Files of the output; one for each 32 MB of the input.")
    parser.add_argument(
        "--object_store_memory", type=int, default=2**30, help="Bytes that Ray shares; the rest spills."
    )
    args = parser.parse_args()
    roles = {"user": args.user_column, "item": args.item_column, "timestamp": args.timestamp_column}
    config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    names = {role: name for role, name in roles.items() if name is not None}
    source = find_source(args.input, names, tuple(config.event_features))
    if args.states is not None and is_uri(args.states):
        raise ValueError("states must be a folder whose files can be locked, found a URI")
    output = Folder(args.output, "output")
    states = None if args.states is None else Folder(args.states, "states")
    with ExitStack() as locks:
        for folder in (output,) if states is None else (output, states):
            folder.make()
            locks.enter_context(folder.lock())
        settings = prepare(args, source, output, states)
        if source.is_histories and settings["now"] is None and states is None:
            source.has_timestamps = False  # they are not read
        if states is not None:
            begin(Path(states.place), output.place)
        if not output.has(SUCCESS_FILE):
            with ray_cluster(args.num_workers, args.object_store_memory):
                score_users(source, settings, args.num_workers)
            if states is not None:
                commit(Path(states.place))
            output.touch(SUCCESS_FILE)
    parts = [f"{output.path}/{name}" for name in output.names() if name.startswith("part-")]
    num_rows = sum(pq.read_metadata(part, filesystem=output.filesystem).num_rows for part in parts)
    print(f"{output.place}: {args.top_k:,} items for each of {num_rows // args.top_k:,} users")


if __name__ == "__main__":
    main()
