"""A visitor's history: what is recommended after each item, how long that took, and why."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from transformers import AutoModel, AutoTokenizer

from elastic_hf import ElasticCache
from elastic_hf.models.catalogue import CatalogueQuery
from elastic_hf.models.explanation_elastic import ElasticExplanation


TOP_K = 10


@dataclass(frozen=True)
class Visit:
    """What is known of a visitor: the items, oldest first, the state that they were read into, and what comes next."""

    token_ids: list[int] = field(default_factory=list)
    cache: ElasticCache | None = None
    recommended: list[int] = field(default_factory=list)
    seconds: float = 0.0  # of reading the latest item and ranking the catalogue


class TitledModel:
    """
    An ELASTIC model, with the titles of its items.

    Args:
        model_name_or_path (`str`): Folder or Hub id of the model.
        titles_file (`str`, *optional*):
            Titles of the items, for a model that has none: MovieLens' `movies.dat`, or whatever `items_file` of
            `load_histories` reads.

    Raises:
        ValueError: if the model is no ELASTIC, or reads times or features of events, or if `titles_file` names none of
            its items.
    """

    def __init__(self, model_name_or_path: str, titles_file: str | None = None) -> None:
        self.model = AutoModel.from_pretrained(model_name_or_path).eval()
        config = self.model.config
        if not hasattr(self.model, "explain") or config.use_timestamps or config.event_features:
            raise ValueError(
                "model_name_or_path must be an ELASTIC model that reads items alone, found "
                f"model_type={config.model_type!r}, use_timestamps={config.use_timestamps}, "
                f"event_features={config.event_features}"
            )
        self.tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
        items = self.tokenizer.items
        token_ids = range(config.num_special_tokens, len(self.tokenizer))
        titles = (
            read_titles_file(titles_file, items) if titles_file else self.tokenizer.convert_ids_to_titles(token_ids)
        )
        self.titles = dict(zip(token_ids, map(str, titles), strict=True))
        counts = items["count"].to_pylist() if "count" in items.column_names else [0] * len(items)
        popular = sorted(zip(token_ids, counts, strict=True), key=lambda item: -item[1])
        self.searched = {token_id: self.titles[token_id].casefold() for token_id, _ in popular}
        self.read(Visit(), [popular[0][0]])  # the first call of a process is slow

    def search(self, words: str) -> list[int]:
        """Return the most frequent items whose titles hold all of the words, at most `TOP_K`."""
        wanted = words.casefold().split()
        found = (item for item, title in self.searched.items() if all(word in title for word in wanted))
        return [item for item, _ in zip(found, range(TOP_K), strict=False)]

    @torch.inference_mode()
    def read(self, visit: Visit, token_ids: list[int]) -> Visit:
        """Return the visit after some more items, which are read on top of its state."""
        start = time.perf_counter()
        known = [*visit.token_ids, *token_ids]
        query = CatalogueQuery(TOP_K, torch.tensor([known]))
        outputs = self.model(torch.tensor([token_ids]), cache=visit.cache, use_cache=True, query=query)
        recommended = [item for item in outputs.token_ids[0].tolist() if item >= 0]
        return Visit(known, outputs.cache, recommended, time.perf_counter() - start)

    def without_latest(self, visit: Visit) -> Visit:
        """Return the visit before its latest item: the others are read again."""
        return self.read(Visit(), visit.token_ids[:-1]) if len(visit.token_ids) > 1 else Visit()

    def explain(self, visit: Visit, place: int) -> tuple[ElasticExplanation, float]:
        """Explain the recommendations of a visit down to a place, from 0, and return the seconds that it took."""
        start = time.perf_counter()
        explanation = self.model.explain(torch.tensor([visit.token_ids]), top_k=place + 1)
        return explanation, time.perf_counter() - start


def read_titles_file(titles_file: str, items: pa.Table) -> list:
    """Return a title for each of the tokenizer's items, from a file; the item id where the file has none."""
    from elastic_hf.data.sources import read_titles

    table = read_titles(Path(titles_file))
    titles = dict(zip(map(str, table["item"].to_pylist()), table["title"].to_pylist(), strict=True))
    item_ids = items["item_id"].to_pylist()
    if titles.keys().isdisjoint(map(str, item_ids)):
        raise ValueError(
            f"titles_file must name items of the model, such as {item_ids[0]!r}, found none in {titles_file}"
        )
    return [titles.get(str(item_id)) or item_id for item_id in item_ids]
