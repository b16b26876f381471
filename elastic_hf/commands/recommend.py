"""`elastic-hf recommend`: recommend for one history, or for all users of a file of interactions.

    elastic-hf recommend --model_name_or_path outputs/shop --history "sku 17" "sku 4"
    elastic-hf recommend --model_name_or_path outputs/shop --input_file shop.csv --output_file recommended.parquet

A history is given as item ids or titles, oldest first; for a model that reads times, `--timestamps` say when each
came, in Unix seconds, and `--now` for which moment to recommend; for a model that reads features of events,
`--event_features '{"rating": [5, 3]}'` holds their values. The recommendations for a file are a Parquet file
with one row for each user and place: `user_id`, `rank` (from 1), `item_id` and `score` (larger is better, comparable
for one user only).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import pipeline

from ..data.histories import load_histories
from ..models.item_tokenizer import NUM_SPECIAL_TOKENS
from ..models.pipeline import SequentialRecommendationPipeline
from ..results import written_whole
from ..training.output_folder import make_folder
from .arguments import ColumnArguments, parse_arguments


@dataclass
class RecommendationArguments(ColumnArguments):
    """Which model recommends, for whom, and what."""

    _argument_group_name = "recommendation"

    model_name_or_path: str = field(kw_only=True, metadata={"help": "Folder or Hub id of a trained model."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the Hub id."})
    history: list[str] | None = field(default=None, metadata={"help": "Item ids or titles, oldest first."})
    timestamps: list[float] | None = field(
        default=None, metadata={"help": "When the items came, in Unix seconds, for a model that reads times."}
    )
    now: float | None = field(
        default=None, metadata={"help": "For which moment to recommend, in Unix seconds; by default the present one."}
    )
    event_features: str | None = field(
        default=None,
        metadata={"help": 'Features of the events, for a model that reads them: JSON such as {"rating": [5, 3]}.'},
    )
    input_file: str | None = field(default=None, metadata={"help": "File or folder of interactions instead."})
    output_file: str | None = field(default=None, metadata={"help": "Parquet file of the recommendations for a file."})
    top_k: int = field(default=10, metadata={"help": "Number of items for each history."})
    exclude_seen: bool | None = field(
        default=None,
        metadata={"help": "Leave out the items of the history; if not given, as the model's own setting."},
    )
    unknown: str = field(
        default="error", metadata={"help": "What becomes of items that the model does not know: error or ignore."}
    )
    fallback: str = field(
        default="error", metadata={"help": "What becomes of a history without known items: error or popularity."}
    )
    batch_size: int = field(default=256, metadata={"help": "Histories that are read at once."})


def main(argv: Sequence[str]) -> None:
    """Print the recommendations for one history, or write those for all users of a file."""
    (args,) = parse_arguments("recommend", __doc__, argv, RecommendationArguments)
    if (args.history is None) == (args.input_file is None):
        raise ValueError("set history or input_file, one of them")
    if (args.input_file is None) != (args.output_file is None):
        raise ValueError("input_file and output_file belong together, found one of them")
    for name in ("timestamps", "event_features"):
        if args.history is None and getattr(args, name) is not None:
            raise ValueError(f"{name} belong to a history, those of an input_file stand in it")
    if args.output_file is not None:
        make_folder(Path(args.output_file).parent, "the folder of output_file")
    recommend = pipeline(
        "sequential-recommendation",
        model=args.model_name_or_path,
        revision=args.revision,
        top_k=args.top_k,
        exclude_seen=args.exclude_seen,
        unknown=args.unknown,
        fallback=args.fallback,
    )
    uses_timestamps = recommend.model.config.use_timestamps
    if not uses_timestamps and (args.timestamps is not None or args.now is not None):
        raise ValueError("timestamps and now must be left out for a model that reads no times, found one of them")
    if args.history is None:
        recommend_for_file(recommend, args)
        return
    history = {**read_event_features(args.event_features), "history": args.history}
    if uses_timestamps:
        history |= {"timestamps": args.timestamps, "now": args.now}
    for rank, item in enumerate(recommend(history), start=1):
        print(f"{rank:4}  {item['item']}  {item['title'] or ''}".rstrip())


def read_event_features(text: str | None) -> dict[str, list]:
    """Return the lists of values that the command line gives as JSON."""
    try:
        features = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"event_features must be JSON, found {text!r}: {error}") from error
    if not isinstance(features, dict):
        raise ValueError(f"event_features must be a JSON object of lists, found {text!r}")
    return features


def recommend_for_file(recommend: SequentialRecommendationPipeline, args: RecommendationArguments) -> None:
    """Write the recommendations for all users of the input file, or leave an older output file as it was."""
    event_columns = [*recommend.model.config.event_features]
    loaded = load_histories(args.input_file, **args.reading, event_columns=event_columns, k_core=0, split="none")
    users = loaded.histories["train"]
    schema = recommendations_schema(users.features.arrow_schema.field("user_id").type, recommend)
    with written_whole(Path(args.output_file)) as stream, pq.ParquetWriter(stream, schema) as writer:
        for batch in users.with_format("arrow").iter(args.batch_size):
            writer.write_table(recommend_for_users(recommend, batch, args.now, schema))
    print(f"{args.output_file}: {args.top_k:,} items for each of {len(users):,} users")


def recommendations_schema(user_type: pa.DataType, recommend: SequentialRecommendationPipeline) -> pa.Schema:
    """Return the columns of a file of recommendations for users whose ids have the type `user_type`."""
    item_type = recommend.tokenizer.items["item_id"].type
    return pa.schema({"user_id": user_type, "rank": pa.int32(), "item_id": item_type, "score": pa.float64()})


def recommend_for_users(
    recommend: SequentialRecommendationPipeline, users: pa.Table, now: float | None, schema: pa.Schema
) -> pa.Table:
    """
    Recommend for users at once.

    Args:
        recommend ([`SequentialRecommendationPipeline`]): With its parameters.
        users (`pyarrow.Table`): As the histories of [`load_histories`]: `user_id`, `item_ids`, maybe `timestamps`, and
            the features of events that the model reads.
        now (`float`, *optional*): For which moment, in Unix seconds, to recommend with a model that reads times.
        schema (`pyarrow.Schema`): As [`recommendations_schema`] returns it.

    Returns:
        `pyarrow.Table`: A row for each user and place, best first.

    Raises:
        ValueError: as the pipeline.
    """
    input_ids = plain_histories(recommend, users)
    if input_ids is not None:
        outputs = recommend.forward({"input_ids": input_ids}, **recommend._forward_params)
        return to_rows(recommend, users["user_id"], outputs["token_ids"], outputs["scores"], schema)
    histories = whole_histories(recommend, users, now)
    recommended = recommend(histories, batch_size=len(histories))
    return pa.Table.from_pylist([*rows_of(users["user_id"].to_pylist(), recommended)], schema)


def whole_histories(
    recommend: SequentialRecommendationPipeline, users: pa.Table, now: float | None
) -> list[dict[str, Any]]:
    """Return the histories of users, see [`recommend_for_users`], with all that the pipeline's model reads of them."""
    config = recommend.model.config
    columns = {"history": users["item_ids"].to_pylist()}
    columns |= {name: users[name].to_pylist() for name in config.event_features}
    if config.use_timestamps:
        has_times = "timestamps" in users.column_names
        columns["timestamps"] = users["timestamps"].to_pylist() if has_times else [None] * len(users)
        columns["now"] = [now] * len(users)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def plain_histories(recommend: SequentialRecommendationPipeline, users: pa.Table) -> torch.Tensor | None:
    """
    Return the token ids of histories about which the pipeline has nothing to say, or None: without times and features,
    with known items alone, and so short that more items are left than it is asked for. It is faster.

    Returns:
        `torch.LongTensor` of shape `(num_users, longest)`, padded on the left.
    """
    config = recommend.model.config
    if config.use_timestamps or config.event_features:
        return None
    histories = recommend.tokenizer.encode_histories(users["item_ids"])
    token_ids, lengths = histories.flatten().to_numpy(), histories.value_lengths().to_numpy()
    num_items = len(recommend.tokenizer) - NUM_SPECIAL_TOKENS
    top_k = recommend._forward_params.get("top_k", 10)
    has_unknown = token_ids.size == 0 or token_ids.min() < NUM_SPECIAL_TOKENS
    longest = lengths.max()
    has_plenty = longest + top_k <= num_items
    if has_unknown or lengths.min() == 0 or not has_plenty:
        return None
    padded = np.full((len(lengths), longest), recommend.tokenizer.pad_token_id)
    padded[np.arange(longest) >= longest - lengths[:, None]] = token_ids
    return torch.from_numpy(padded)


def to_rows(
    recommend: SequentialRecommendationPipeline,
    user_ids: pa.ChunkedArray,
    token_ids: torch.Tensor,
    scores: torch.Tensor,
    schema: pa.Schema,
) -> pa.Table:
    """Return recommendations, both of shape `(num_users, top_k)`, as a row for each user and place."""
    num_users, top_k = token_ids.shape
    columns = {
        "user_id": user_ids.take(pa.array(np.repeat(np.arange(num_users), top_k))),
        "rank": np.tile(np.arange(1, top_k + 1), num_users),
        "item_id": recommend.tokenizer.items["item_id"].take(token_ids.flatten().numpy() - NUM_SPECIAL_TOKENS),
        "score": scores.double().flatten().numpy(),
    }
    return pa.table(columns).cast(schema)


def rows_of(user_ids: list, recommended: list[list[dict]]) -> Iterator[dict]:
    """Yield a row for each user and place."""
    for user_id, items in zip(user_ids, recommended, strict=True):
        for rank, item in enumerate(items, start=1):
            yield {"user_id": user_id, "rank": rank, "item_id": item["item"], "score": item["score"]}
