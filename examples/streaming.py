#!/usr/bin/env python
"""
A recommendation service in one loop: interactions come in, recommendations go out, and each user's state is a value of
fixed size in a key-value store, whatever the length of the history (and 8 bytes for each item seen, not to recommend
it again). `serve.py` does the same over HTTP.

    printf 'ada\\tsku 17\\nada\\tsku 4\\nbob\\tsku 17\\n' |
        python examples/streaming.py --model_name_or_path outputs/shop --store users.sqlite

Each line of the input is a user and an item, with a tab between them, in the order of time; for a model that reads
times, another tab and the Unix seconds of the event follow, and for one that reads features of events another tab and
the value of each, in alphabetical order of their names, empty where it is not known. For each line the service reads
the one new item on top of the user's state, stores the new state, and prints the user and the items most likely to
come next. Started again with the same store, it goes on where it stopped; several processes may share a store. The
same loop works with any store of bytes: LMDB, Redis, a table of a data warehouse.

With `--event_ids` a last field names each event among those of its user, for 8 bytes each: one that is sent again,
since the service was killed before it answered, is answered again and counts once.

A line that ends in an error leaves the store as it was and is reported on standard error; the stream goes on, and the
exit status is 1 at its end.

States are of one model: after training on, read the histories into a new store.
"""

import argparse
import sys

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from elastic_hf import ElasticCache
from elastic_hf.models.catalogue import CatalogueQuery, search_catalogue, validate_token_ids
from elastic_hf.serving.stores import SQLiteStore
from elastic_hf.serving.user_state import event_number, pack_state, unpack_state


class UserStore:
    """Each user's [`ElasticCache`], the ids of the items seen, what the model made of the whole and the numbers of the
    events, as safetensors bytes in SQLite."""

    def __init__(self, file: str) -> None:
        self.values = SQLiteStore(file)

    def read(self, user: str) -> tuple[ElasticCache | None, Tensor]:
        """Return the state of a user, `None` for a new one, and the token ids of the items seen, (num_seen,)."""
        cache, others = unpack(self.values.read([user]).get(user))
        return cache, others["seen"]


def unpack(state: bytes | None) -> tuple[ElasticCache | None, dict[str, Tensor]]:
    """Return the cache of a user, and what else is stored; `None` and empty tensors for a new one."""
    if state is None:
        nothing = torch.empty(0, dtype=torch.long)
        return None, {"seen": nothing, "event_numbers": nothing}
    return unpack_state(state, "seen", "event_numbers", "user_embedding")


@torch.inference_mode()
def append(
    model,
    store: UserStore,
    user: str,
    token_id: int,
    top_k: int,
    timestamp: float | None = None,
    event_id: str | None = None,
    event_features: Tensor | None = None,
) -> Tensor:
    """Read one new item of a user, which came at a `timestamp` if the model reads times, with `event_features`,
    (num_features,), if it reads any, and return the `top_k` items most likely to come next, as of that moment, best
    first, without those seen where the model leaves them out.

    An event whose `event_id` is stored already is not read again, and the answer is that to the user's latest event.

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
    number = torch.tensor([] if event_id is None else [event_number(event_id)], dtype=torch.long)
    recommended = []

    def change(stored: dict[str, bytes]) -> dict[str, bytes]:
        cache, others = unpack(stored.get(user))
        is_known = cache is not None and bool(torch.isin(number, others["event_numbers"]).any())
        changed = {}
        if is_known:
            cache.check(model.base_model, 1)
        else:
            outputs = model(item, cache=cache, use_cache=True, query=CatalogueQuery(), **events)
            others = {
                "seen": torch.cat([others["seen"], item[0]]).unique(),
                "event_numbers": torch.cat([others["event_numbers"], number]),
                "user_embedding": outputs.user_embeddings,
            }
            changed[user] = pack_state(outputs.cache, **others)
        query = CatalogueQuery(top_k, others["seen"][None])
        (token_ids,) = search_catalogue(model.scoring_head(), others["user_embedding"], query, model.config).token_ids
        num_left = int((token_ids >= 0).sum())
        if num_left < top_k:
            raise ValueError(f"top_k={top_k} asks for more than the {num_left} items left to recommend to {user!r}")
        recommended.append(token_ids)
        return changed

    store.values.update([user], change)
    return recommended[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an ELASTIC model.")
    parser.add_argument("--revision", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--store", default="users.sqlite", help="SQLite file of the users' states.")
    parser.add_argument("--top_k", type=int, default=10, help="Number of recommendations.")
    parser.add_argument("--event_ids", action="store_true", help="The last field of a line names the event.")
    args = parser.parse_args()
    model = AutoModel.from_pretrained(args.model_name_or_path, revision=args.revision).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, revision=args.revision)
    store = UserStore(args.store)
    features = [*model.config.event_features]
    names = ["a user", "an item", *["Unix seconds"] * model.config.use_timestamps, *features]
    names += ["an event id"] * args.event_ids
    status = 0
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            fields = line.decode().rstrip("\n").split("\t")
            if len(fields) != len(names):
                raise ValueError(f"a line must be {', '.join(names)} with tabs between them, found {line!r}")
            user, item, *others = fields
            token_id = tokenizer.convert_tokens_to_ids(item)
            if token_id in tokenizer.all_special_ids:
                raise ValueError(f"the model does not know the item {item!r}")
            event_id = others.pop() if args.event_ids else None
            timestamp = to_seconds(others.pop(0)) if model.config.use_timestamps else None
            event_features = None
            if features:
                columns = {name: [value or None] for name, value in zip(features, others, strict=True)}
                event_features = torch.from_numpy(tokenizer.encode_events(columns)[0])
            token_ids = append(model, store, user, token_id, args.top_k, timestamp, event_id, event_features)
        except ValueError as error:
            print(f"line {number}: {error}", file=sys.stderr, flush=True)
            status = 1
            continue
        print(user, *tokenizer.convert_ids_to_titles(token_ids), sep="\t", flush=True)
    return status


def to_seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"Unix seconds must be a number, found {text!r}") from error


if __name__ == "__main__":
    sys.exit(main())
