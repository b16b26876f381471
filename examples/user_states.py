"""
The states of many users in Parquet files, one for each partition of them, and what new events change.

A run writes the next states beside those that it reads, and they take their place all at once when it has ended: a run
that is stopped, or given up, leaves the states as they were.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.nn.utils.rnn import pad_sequence

from elastic_hf import ElasticCache
from elastic_hf.commands.recommend import recommend_for_users, recommendations_schema, to_rows, whole_histories
from elastic_hf.models.catalogue import CatalogueQuery
from elastic_hf.models.item_tokenizer import NUM_SPECIAL_TOKENS
from elastic_hf.models.pipeline import SequentialRecommendationPipeline
from elastic_hf.results import read_json, write_json, written_whole
from storage import Folder


SUCCESS_FILE = "_SUCCESS"
NEXT_FOLDER, RUN_FILE, COMMIT_FILE = "_next", "_run.json", "_COMMIT"
STATES_PER_BATCH = 4_096
SEEN_TYPE = pa.list_(pa.field("element", pa.int32()))  # named as Parquet names it


def begin(states: Path, output: str) -> Path:
    """Return the folder of the next states of the run with this output; those of a run that was given up are gone."""
    roll_forward(states)
    folder = states / NEXT_FOLDER
    run = folder / RUN_FILE
    if folder.exists() and not (run.exists() and read_json(run)["output"] == output):
        shutil.rmtree(folder)
    if not folder.exists():
        folder.mkdir()
        write_json(run, {"output": output})
    return folder


def commit(states: Path) -> None:
    """Let the next states take the place of the states, whatever happens from now on."""
    (states / NEXT_FOLDER / COMMIT_FILE).touch()
    roll_forward(states)


def roll_forward(states: Path) -> None:
    """End what [`commit`] has begun, and mark the output of the run as whole."""
    folder = states / NEXT_FOLDER
    if not (folder / COMMIT_FILE).exists():
        return
    for file in sorted(folder.glob("part-*.parquet")):
        os.replace(file, states / file.name)
    output = Folder(read_json(folder / RUN_FILE)["output"], "output")
    if output.names():
        output.touch(SUCCESS_FILE)
    (folder / COMMIT_FILE).unlink()
    shutil.rmtree(folder)


class UserStates:
    """
    The states of users as a table: `user_id`, the tensors of an [`ElasticCache`] as bytes, `seen` (token ids) and
    `last_event` (Unix seconds).
    """

    def __init__(
        self, recommend: SequentialRecommendationPipeline, settings: dict[str, Any], user_type: pa.DataType
    ) -> None:
        self.recommend, self.settings, self.model = recommend, settings, recommend.model
        self.digest = self.model.base_model.digest()
        self.shapes = ElasticCache.empty(self.model, 1).to("cpu").tensors
        fields = {"user_id": user_type}
        fields |= {name: pa.binary(tensor.nbytes) for name, tensor in self.shapes.items()}
        fields |= {"seen": SEEN_TYPE, "last_event": pa.float64()}
        self.rows_schema = recommendations_schema(user_type, recommend)
        self.schema = pa.schema(fields, metadata={"model_digest": self.digest})

    def score(self, events: pa.Table, file: Path, next_file: Path) -> Iterator[pa.Table]:
        """Write a file of next states, of the users of `file` and of `events`, and yield the recommendations for those
        of `events`, some at a time."""
        size = self.settings["batch_size"]
        known = np.zeros(len(events), dtype=bool)
        users = events["user_id"].combine_chunks()
        with written_whole(next_file) as stream, pq.ParquetWriter(stream, self.schema, compression="none") as writer:
            for old in self.read(file):
                rows = pc.index_in(old["user_id"], users)
                writer.write_table(old.filter(rows.is_null()))
                old, rows = old.filter(rows.is_valid()), rows.drop_null().combine_chunks()
                known[rows.to_numpy()] = True
                for first in range(0, len(rows), size):
                    some = events.take(rows[first : first + size])
                    yield from self.advance(old.slice(first, size), some, writer)
            new = events.filter(pa.array(~known))
            for first in range(0, len(new), size):
                some = new.slice(first, size)
                yield from self.advance(self.empty(some["user_id"]), some, writer)

    def read(self, file: Path) -> Iterator[pa.Table]:
        """Yield the states of a file, if there is one, some users at a time.

        Raises:
            ValueError: if they are of another model, or of users with ids of another type.
        """
        if not file.exists():
            return
        with pq.ParquetFile(file, pre_buffer=False) as opened:
            found = opened.schema_arrow
            if found.metadata[b"model_digest"].decode() != self.digest:
                raise ValueError(f"states must be of this model, {self.digest}, found {found.metadata} in {file}")
            user_type, wanted = (schema.field("user_id").type for schema in (found, self.schema))
            if user_type != wanted:
                raise ValueError(f"states must be of users with ids as in the input, {wanted}, found {user_type}")
            for batch in opened.iter_batches(STATES_PER_BATCH):
                yield pa.Table.from_batches([batch])

    def empty(self, users: pa.ChunkedArray) -> pa.Table:
        """Return the states of users who have no history yet."""
        num_users = len(users)
        seen = pa.array([[]] * num_users, SEEN_TYPE)
        cache = ElasticCache.empty(self.model, num_users)
        return self._to_table(users, cache, seen, np.full(num_users, -np.inf))

    def advance(self, states: pa.Table, events: pa.Table, writer: pq.ParquetWriter) -> Iterator[pa.Table]:
        """
        Read new events, write the states after them and yield what is recommended then.

        A user of whose events the model knows no item stays as he was: with a state, what was recommended before still
        holds; without one, the pipeline's `fallback` says what becomes of him.

        Args:
            states (`pyarrow.Table`): Of n users.
            events (`pyarrow.Table`): Of the same users, in the same order: `user_id`, `item_ids`, `timestamps` and
                the features of events that the model reads.
            writer (`pyarrow.parquet.ParquetWriter`): Of the next states.

        Raises:
            ValueError: if events are not in the order of time and after those read before, and as the pipeline.
        """
        self._check_times(states, events)
        inputs = self._to_inputs(events)
        has_items = np.array([bool((row["input_ids"] >= NUM_SPECIAL_TOKENS).any()) for row in inputs])
        is_new = np.isneginf(states["last_event"].to_numpy())
        if (~has_items & is_new).any():
            some = events.filter(pa.array(~has_items & is_new))
            yield recommend_for_users(self.recommend, some, self.settings["now"], self.rows_schema)
        writer.write_table(states.filter(pa.array(~has_items & ~is_new)))
        if has_items.any():
            inputs = [row for row, is_read in zip(inputs, has_items, strict=True) if is_read]
            some = pa.array(has_items)
            next_states, table = self._read(states.filter(some), events.filter(some), inputs)
            writer.write_table(next_states)
            yield table

    @torch.inference_mode()
    def _read(
        self, states: pa.Table, events: pa.Table, inputs: list[dict[str, torch.Tensor]]
    ) -> tuple[pa.Table, pa.Table]:
        """The states after the events and the recommendations."""
        users, device, top_k = states["user_id"], self.model.device, self.settings["top_k"]
        token_ids = [row["input_ids"][0] for row in inputs]
        seen = [
            np.union1d(old, new).astype(np.int32)
            for old, new in zip(states["seen"].to_pylist(), token_ids, strict=True)
        ]
        seen_ids = _pad([torch.as_tensor(row, dtype=torch.long) for row in seen]).to(device)
        given = {
            name: _pad([row[name][0] for row in inputs]).to(device)
            for name in ("timestamps", "event_features")
            if name in inputs[0]
        }
        if "now" in inputs[0]:
            given["request_timestamps"] = torch.cat([row["now"] for row in inputs]).to(device)
        outputs = self.model(
            _pad(token_ids).to(device),
            cache=self._to_cache(states).to(device),
            use_cache=True,
            query=CatalogueQuery(top_k, seen_ids, exclude_seen=self.settings["exclude_seen"]),
            **given,
        )
        num_left = (outputs.token_ids >= 0).sum(dim=1).cpu()
        if num_left.min() < top_k:
            row = int(num_left.argmin())
            raise ValueError(f"top_k={top_k} asks for more than the {num_left[row]} items left for {users[row]}")
        last_events = [times[-1] for times in events["timestamps"].to_pylist()]
        next_states = self._to_table(users, outputs.cache, pa.array(seen, SEEN_TYPE), last_events)
        token_ids, scores = outputs.token_ids.cpu(), outputs.scores.cpu()
        return next_states, to_rows(self.recommend, users, token_ids, scores, self.rows_schema)

    def _check_times(self, states: pa.Table, events: pa.Table) -> None:
        last = states["last_event"].to_pylist()
        columns = (events[name].to_pylist() for name in ("user_id", "item_ids", "timestamps"))
        for user, items, times, earlier in zip(*columns, last, strict=True):
            if len(items) != len(times):
                raise ValueError(
                    f"user {user!r} must have as many timestamps as items, {len(items)}, found {len(times)}"
                )
            if np.any(np.diff(times) < 0) or (times and times[0] <= earlier):
                raise ValueError(
                    f"events of user {user!r} must be in the order of time and after the last one of the states, "
                    f"{earlier}, found {times[0]} to {times[-1]}"
                )

    def _to_inputs(self, events: pa.Table) -> list[dict[str, torch.Tensor]]:
        """The pipeline's inputs of each user: whatever is left to recommend is known only with the state."""
        histories = whole_histories(self.recommend, events, self.settings["now"])
        unknown = self.settings["unknown"]
        return [
            self.recommend.preprocess(numbered, 1, exclude_seen=False, unknown=unknown, fallback="popularity")
            for numbered in enumerate(histories)
        ]

    def _to_cache(self, states: pa.Table) -> ElasticCache:
        tensors = {}
        for name, shape in self.shapes.items():
            values = b"".join(states[name].to_pylist())
            tensors[name] = torch.frombuffer(bytearray(values), dtype=shape.dtype).view(-1, *shape.shape[1:])
        return ElasticCache(**tensors, model_digest=self.digest)

    def _to_table(self, users: pa.ChunkedArray, cache: ElasticCache, seen: pa.Array, last_events: Any) -> pa.Table:
        columns = []
        for name, tensor in cache.to("cpu").tensors.items():
            type_ = self.schema.field(name).type
            columns.append(pa.Array.from_buffers(type_, len(users), [None, pa.py_buffer(tensor.contiguous().numpy())]))
        return pa.table([users, *columns, seen, pa.array(last_events, pa.float64())], schema=self.schema)


def _pad(rows: list[torch.Tensor]) -> torch.Tensor:
    """n tensors of shape (L,) each -> (n, longest L), filled up with zeros on the left."""
    return pad_sequence(rows, batch_first=True, padding_side="left")
