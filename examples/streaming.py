#!/usr/bin/env python
"""
A recommendation service in one loop: interactions come in, recommendations go out, and each user's state is a value of
fixed size in a key-value store, whatever the length of the history.

    printf 'ada\\tsku 17\\nada\\tsku 4\\nbob\\tsku 17\\n' |
        python examples/streaming.py --model_name_or_path outputs/shop --store users.sqlite

Each line of the input is a user and an item, with a tab between them, in the order of time. For each line the service
reads the one new item on top of the user's state, stores the new state, and prints the user and the items most likely
to come next. Started again with the same store, it goes on where it stopped. The same loop works with any store of
bytes: LMDB, Redis, a table of a data warehouse.
"""

import argparse
import sqlite3
import sys

import safetensors.torch
import torch
from transformers import AutoModel, AutoTokenizer

from elastic_hf import ElasticCache


class UserStore:
    """Each user's [`ElasticCache`] and the ids of the items seen, as safetensors bytes in SQLite."""

    def __init__(self, file: str) -> None:
        self.connection = sqlite3.connect(file)
        self.connection.execute("CREATE TABLE IF NOT EXISTS users (user TEXT PRIMARY KEY, state BLOB NOT NULL)")

    def read(self, user: str) -> tuple[ElasticCache | None, torch.Tensor]:
        row = self.connection.execute("SELECT state FROM users WHERE user = ?", (user,)).fetchone()
        if row is None:
            return None, torch.empty(0, dtype=torch.long)
        tensors = safetensors.torch.load(row[0])
        seen = tensors.pop("seen")
        return ElasticCache(**tensors), seen

    def write(self, user: str, cache: ElasticCache, seen: torch.Tensor) -> None:
        state = safetensors.torch.save({**vars(cache), "seen": seen})
        with self.connection:
            self.connection.execute("INSERT OR REPLACE INTO users VALUES (?, ?)", (user, state))


@torch.inference_mode()
def append(model, store: UserStore, user: str, token_id: int, top_k: int) -> torch.Tensor:
    """Reads one new item of a user: the token ids of the `top_k` unseen items most likely to come next."""
    cache, seen = store.read(user)
    outputs = model(torch.tensor([[token_id]]), cache=cache, use_cache=True)
    seen = torch.cat([seen, torch.tensor([token_id])]).unique()
    store.write(user, outputs.cache, seen)
    scores = outputs.logits[0]
    scores[: model.config.num_special_tokens] = -torch.inf
    scores[seen] = -torch.inf
    return scores.topk(top_k).indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of a causal ELASTIC model.")
    parser.add_argument("--revision", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--store", default="users.sqlite", help="SQLite file of the users' states.")
    parser.add_argument("--top_k", type=int, default=10, help="Number of recommendations.")
    args = parser.parse_args()
    model = AutoModel.from_pretrained(args.model_name_or_path, revision=args.revision).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, revision=args.revision)
    store = UserStore(args.store)
    for number, line in enumerate(sys.stdin, start=1):
        fields = line.rstrip("\n").split("\t")
        if len(fields) != 2:
            raise ValueError(f"line {number} must be a user and an item with a tab between them, found {line!r}")
        user, item = fields
        token_id = tokenizer.convert_tokens_to_ids(item)
        if token_id in tokenizer.all_special_ids:
            raise ValueError(f"line {number}: the model does not know the item {item!r}")
        token_ids = append(model, store, user, token_id, args.top_k)
        print(user, *tokenizer.convert_ids_to_titles(token_ids), sep="\t", flush=True)


if __name__ == "__main__":
    main()
