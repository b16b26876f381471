#!/usr/bin/env python
"""
A recommendation service in one loop: interactions come in, recommendations go out, and each user's state is a value of
fixed size in a key-value store, whatever the length of the history (and 8 bytes for each item seen, not to recommend
it again).

    printf 'ada\\tsku 17\\nada\\tsku 4\\nbob\\tsku 17\\n' |
        python examples/streaming.py --model_name_or_path outputs/shop --store users.sqlite

Each line of the input is a user and an item, with a tab between them, in the order of time; for a model that reads
times, another tab and the Unix seconds of the event follow, and for one that reads features of events another tab and
the value of each, in alphabetical order of their names, empty where it is not known. For each line the service reads the one new item on top of
the user's state, stores the new state, and prints the user and the items most likely to come next. Started again with
the same store, it goes on where it stopped; several processes may share a store. A line that ends in an error leaves
the store as it was. The same loop works with any store of bytes: LMDB, Redis, a table of a data warehouse.

States are of one model: after training on, read the histories into a new store.
"""

import argparse
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import safetensors.torch
import torch
from transformers import AutoModel, AutoTokenizer

from elastic_hf import ElasticCache
from elastic_hf.models.catalogue import CatalogueQuery, validate_token_ids


class UserStore:
    """Each user's [`ElasticCache`] and the ids of the items seen, as safetensors bytes in SQLite."""

    def __init__(self, file: str) -> None:
        self.connection = sqlite3.connect(file, timeout=60, isolation_level=None)
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS users (user TEXT PRIMARY KEY, model_digest TEXT NOT NULL, state BLOB NOT NULL)"
        )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep other processes from the store until the end; an error leaves it as it was."""
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            yield

    def read(self, user: str) -> tuple[ElasticCache | None, torch.Tensor]:
        """Return the state of a user, `None` for a new one, and the token ids of the items seen, (num_seen,)."""
        query = "SELECT model_digest, state FROM users WHERE user = ?"
        row = self.connection.execute(query, (user,)).fetchone()
        if row is None:
            return None, torch.empty(0, dtype=torch.long)
        model_digest, state = row
        tensors = safetensors.torch.load(state)
        seen = tensors.pop("seen")
        return ElasticCache(**tensors, model_digest=model_digest), seen

    def write(self, user: str, cache: ElasticCache, seen: torch.Tensor) -> None:
        """Store what [`read`] returns."""
        row = (user, cache.model_digest, safetensors.torch.save({**cache.tensors, "seen": seen}))
        self.connection.execute("INSERT OR REPLACE INTO users VALUES (?, ?, ?)", row)


@torch.inference_mode()
def append(
    model,
    store: UserStore,
    user: str,
    token_id: int,
    top_k: int,
    timestamp: float | None = None,
    event_features: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read one new item of a user, which came at a `timestamp` if the model reads times, with `event_features`,
    (num_features,), if it reads any, and return the `top_k` items most likely to come next, as of that moment, best
    first, without those seen where the model leaves them out.

    Raises:
        ValueError: if `token_id` is no item, another model made the user's state, fewer than `top_k` items are left,
            the time is missing or before the user's last one, or the features are missing or not those of the model.
    """
    item = torch.tensor([[token_id]])
    events = {}
    if timestamp is not None:
        now = torch.tensor([timestamp], dtype=torch.double)
        events = {"timestamps": now[None], "request_timestamps": now}
    if event_features is not None:
        events["event_features"] = event_features[None, None]
    validate_token_ids("token_id", item, model.config.num_special_tokens, model.config)
    with store.transaction():
        cache, seen = store.read(user)
        seen = torch.cat([seen, item[0]]).unique()
        outputs = model(item, cache=cache, use_cache=True, query=CatalogueQuery(top_k, seen[None]), **events)
        (token_ids,) = outputs.token_ids
        num_left = int((token_ids >= 0).sum())
        if num_left < top_k:
            raise ValueError(f"top_k={top_k} asks for more than the {num_left} items left to recommend to {user!r}")
        store.write(user, outputs.cache, seen)
    return token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an ELASTIC model.")
    parser.add_argument("--revision", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--store", default="users.sqlite", help="SQLite file of the users' states.")
    parser.add_argument("--top_k", type=int, default=10, help="Number of recommendations.")
    args = parser.parse_args()
    model = AutoModel.from_pretrained(args.model_name_or_path, revision=args.revision).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, revision=args.revision)
    store = UserStore(args.store)
    num_times = int(model.config.use_timestamps)
    names = ["a user", "an item", *["Unix seconds"] * num_times, *model.config.event_features]
    for number, line in enumerate(sys.stdin, start=1):
        fields = line.rstrip("\n").split("\t")
        if len(fields) != len(names):
            raise ValueError(f"line {number} must be {', '.join(names)} with tabs between them, found {line!r}")
        user, item, *values = fields
        seconds, values = values[:num_times], [value or None for value in values[num_times:]]
        token_id = tokenizer.convert_tokens_to_ids(item)
        if token_id in tokenizer.all_special_ids:
            raise ValueError(f"line {number}: the model does not know the item {item!r}")
        try:
            timestamp = float(seconds[0]) if seconds else None
        except ValueError as error:
            raise ValueError(f"line {number}: Unix seconds must be a number, found {seconds[0]!r}") from error
        event_features = None
        if values:
            columns = {name: [value] for name, value in zip(model.config.event_features, values, strict=True)}
            try:
                event_features = torch.from_numpy(tokenizer.encode_events(columns)[0])
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
        token_ids = append(model, store, user, token_id, args.top_k, timestamp, event_features)
        print(user, *tokenizer.convert_ids_to_titles(token_ids), sep="\t", flush=True)


if __name__ == "__main__":
    main()
