"""`pipeline("sequential-recommendation")`: item ids or titles in, the items most likely to come next out."""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from functools import cached_property
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_recommender import HISTORY_KEYS
from .item_tokenizer import NUM_SPECIAL_TOKENS, ElasticItemTokenizer
from .request import check_request


logger = logging.getLogger(__name__)

MAX_NAMES = 10  # items that one error or warning names
BATCH_SIZE = 64  # histories of a request that the model reads at once


class SequentialRecommendationPipeline(Pipeline):
    """
    Recommend from histories, with any model of this package.

    A history is a list of item ids (integers or strings) or titles, oldest first, bare or as `{"history": [...]}`. For
    a model with `use_timestamps` it is `{"history": [...], "timestamps": [...], "now": ...}`: when each item came, in
    Unix seconds, and for which moment to recommend, by default the present one. For a model with `event_features` it
    also holds a list for each of them, such as `"rating": [5, 3, None]`: the values of that event column, as many as
    items, `None` where nothing is known, as which a category that was not trained on counts, too. The pipeline takes
    one history, a list of them, or a column of a `datasets.Dataset`; for a generator or a PyTorch dataset of histories
    it returns an iterator, as every pipeline does. A flat list is one history, an empty list an empty one. A title
    stands for its item where no item id equals it.

    The model reads the most recent `model_max_length` items of the tokenizer, as it does in the evaluation of
    [`SequentialRecommendationTrainer`]; older ones are still seen, and left out of the recommendations where
    these are without seen items.
    ELASTIC, which has no longest history, reads more after `pipe.tokenizer.model_max_length = 4_000`.

    The parameters can be given to `pipeline`, and to each call of what it returns:

    Args:
        top_k (`int`, defaults to 10): How many items for each history.
        exclude_seen (`bool`, *optional*): Leave out the items of the history. Defaults to the model's setting.
        candidates (`list`, *optional*): Item ids or titles to choose from. Defaults to the whole catalogue.
        unknown (`str`, defaults to `"error"`): What becomes of items, in a history or among the candidates, that the
            model does not know: `"error"` raises an error that names them, `"ignore"` leaves them out with a warning
            that names them.
        fallback (`str`, defaults to `"error"`): What becomes of a history without any known item: `"error"` raises an
            error, `"popularity"` recommends what occurs most often in the training histories (the column `count` of
            the tokenizer's items). The scores are then the counts; equal ones are in the order of the candidates.

    Returns:
        For one history `top_k` dictionaries, best first: `item` (the item id in its own type), `title` (`None` where
        it has none) and `score` (larger is better, comparable within one history only). For many, a list of those.

    Raises:
        ValueError: if an input or a parameter is not as described, a title belongs to several items, or fewer than
            `top_k` items are left to recommend. Of many histories, the message names the first bad one, from 0.

    Example:

    ```python
    >>> pipe = pipeline("sequential-recommendation", model="outputs/shop", top_k=3)
    >>> pipe = pipeline(model="org/shop", trust_remote_code=True, top_k=3)  # with the code in the repository
    >>> pipe(["sku 17", "sku 4"])
    >>> pipe([["sku 17", "sku 4"], ["sku 9"]], candidates=["sku 1", "sku 2", "sku 3"], batch_size=2)
    ```
    """

    parameter_names = ("top_k", "exclude_seen", "candidates", "unknown", "fallback")

    tokenizer: ElasticItemTokenizer
    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs) -> None:
        # Told by what they offer and not by class: Transformers loads a repository's files several times, each time as
        # other modules.
        if not hasattr(model, "recommend"):
            raise ValueError(f"model must be a sequential recommender of elastic_hf, found {type(model).__name__}")
        if not hasattr(tokenizer, "items"):
            raise ValueError(f"tokenizer must be an ElasticItemTokenizer, found {type(tokenizer).__name__}")
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"tokenizer must have the model's {model.config.vocab_size} tokens, found {len(tokenizer)}"
            )
        if tokenizer.event_features != model.config.event_features:
            raise ValueError(
                f"tokenizer must have the model's event_features, {model.config.event_features}, found "
                f"{tokenizer.event_features}"
            )
        super().__init__(model=model.eval(), tokenizer=tokenizer, **kwargs)

    def __call__(self, inputs: Any, **kwargs) -> list[dict] | list[list[dict]] | Iterator[list[dict]]:
        if hasattr(inputs, "tolist"):
            inputs = inputs.tolist()
        is_flat = isinstance(inputs, list | tuple) and not any(_is_history(element) for element in inputs)
        if is_flat or isinstance(inputs, str | dict) or not isinstance(inputs, Iterable | TorchDataset):
            return super().__call__((None, inputs), **kwargs)
        recommendations = super().__call__(_numbered(inputs), **kwargs)
        is_sized = isinstance(inputs, Sized) and not isinstance(inputs, TorchDataset)
        return list(recommendations) if is_sized else recommendations

    def answer(self, request: dict[str, Any]) -> list[dict] | list[list[dict]]:
        """Return what a request asks for, whose `inputs`, `parameters` and bounds are described in `request.py`.

        Raises:
            ValueError: if the request is not as described or too large, and as a call.
        """
        parameters = check_request(request, self.parameter_names)
        answer: Any = self(request["inputs"], batch_size=BATCH_SIZE, **parameters)  # of JSON, no iterator
        return answer

    def _sanitize_parameters(self, **parameters) -> tuple[dict, dict, dict]:
        for name in parameters:
            if name not in self.parameter_names:
                raise ValueError(f"parameters must be among {', '.join(self.parameter_names)}, found {name!r}")
        checked = {name: value for name, value in parameters.items() if name != "candidates"}
        top_k, exclude_seen = parameters.get("top_k", 10), parameters.get("exclude_seen")
        if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1:
            raise ValueError(f"top_k must be an integer of at least 1, found {top_k!r}")
        if not isinstance(exclude_seen, bool | None):
            raise ValueError(f"exclude_seen must be True, False or None, found {exclude_seen!r}")
        for name, choices in (("unknown", ("error", "ignore")), ("fallback", ("error", "popularity"))):
            if name in parameters and parameters[name] not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, found {parameters[name]!r}")
        if parameters.get("fallback") == "popularity" and "count" not in self.tokenizer.items.column_names:
            raise ValueError(
                "fallback='popularity' needs the items' counts in the training histories, found a tokenizer without "
                "them: make it with `from_items` from a table with the column 'count', such as load_histories returns"
            )
        if "candidates" in parameters:
            unknown = {**getattr(self, "_preprocess_params", {}), **parameters}.get("unknown", "error")
            checked["candidate_ids"] = self._candidate_ids(parameters["candidates"], unknown)
        forward_names = ("top_k", "exclude_seen", "candidate_ids")
        return checked, {name: checked[name] for name in forward_names if name in checked}, {}

    def preprocess(
        self,
        numbered_history: tuple[int | None, Any],
        top_k: int = 10,
        exclude_seen: bool | None = None,
        candidate_ids: dict[int, None] | None = None,
        unknown: str = "error",
        fallback: str = "error",
    ) -> dict[str, Tensor]:
        """The number of a history (`None` for a single one) and the history -> its token ids, (1, L)."""
        number, history = numbered_history
        name = "the history" if number is None else f"history {number}"
        config, given = self.model.config, {}
        if isinstance(history, dict):
            keys = [*(HISTORY_KEYS if config.use_timestamps else HISTORY_KEYS[:1]), *config.event_features]
            if "history" not in history or not {*history} <= {*keys}:
                raise ValueError(
                    f"{name} must be a list, or a dictionary with {' and '.join(map(repr, keys))} alone, found the "
                    f"keys {list(history)} (of a dataset, give one column: dataset['item_ids'])"
                )
            history, given = history["history"], history
        tokens = self._token_ids(history, name, unknown)
        token_ids = [token_id for token_id in tokens if token_id is not None]
        inputs = {"input_ids": torch.tensor([token_ids or [self.tokenizer.pad_token_id]])}
        if config.use_timestamps:
            inputs |= self._times(tokens, given, name)
        if config.event_features:
            inputs["event_features"] = self._event_features(tokens, given, name)
        if not token_ids and fallback == "error":
            raise ValueError(
                f"{name} must have at least one item that the model knows, found none (fallback='popularity' "
                "recommends what is popular)"
            )
        all_items = range(NUM_SPECIAL_TOKENS, len(self.tokenizer))
        candidates = all_items if candidate_ids is None else candidate_ids
        if exclude_seen is None:
            exclude_seen = self.model.config.exclude_seen
        seen = set(token_ids) if exclude_seen else set()
        num_left = len(candidates) - sum(token_id in candidates for token_id in seen)
        if top_k > num_left:
            raise ValueError(
                f"{name}: top_k must be at most the {num_left} items left to recommend "
                f"(exclude_seen={exclude_seen}), found {top_k}"
            )
        return inputs

    def _forward(
        self,
        model_inputs: dict[str, Tensor],
        top_k: int = 10,
        exclude_seen: bool | None = None,
        candidate_ids: dict[int, None] | None = None,
    ) -> dict[str, Tensor]:
        input_ids = model_inputs["input_ids"]  # (B, L), whole histories
        candidates = None if candidate_ids is None else torch.tensor(list(candidate_ids))
        token_ids = torch.empty(len(input_ids), top_k, dtype=torch.long)
        scores = torch.empty(len(input_ids), top_k, dtype=torch.double)
        has_items = (input_ids[:, -1] != self.tokenizer.pad_token_id).cpu()  # (B,)
        if has_items.any():
            whole = input_ids[has_items]
            events = {
                name: model_inputs[name][has_items, -self.tokenizer.model_max_length :]
                for name in ("timestamps", "event_features")
                if name in model_inputs
            }
            if "now" in model_inputs:
                events["request_timestamps"] = model_inputs["now"][has_items]
            recommended = self.model.recommend(
                whole[:, -self.tokenizer.model_max_length :],
                top_k=top_k,
                exclude_seen=exclude_seen,
                candidate_ids=candidates,
                seen_ids=whole,
                **events,
            )
            token_ids[has_items], scores[has_items] = recommended.token_ids.cpu(), recommended.scores.cpu().double()
        if not has_items.all():
            token_ids[~has_items], scores[~has_items] = self._most_popular(top_k, candidates)
        return {"token_ids": token_ids, "scores": scores}

    def postprocess(self, model_outputs: dict[str, Tensor]) -> list[dict]:
        token_ids, scores = model_outputs["token_ids"][0], model_outputs["scores"][0]  # (top_k,)
        rows = self.tokenizer.items.take(token_ids.numpy() - NUM_SPECIAL_TOKENS).to_pylist()
        return [
            {"item": row["item_id"], "title": row["title"], "score": score}
            for row, score in zip(rows, scores.tolist(), strict=True)
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Save the model and the tokenizer: all that `pipeline` needs where `elastic_hf` is imported. The stock method
        adds a copy of this file, and with it the need for `trust_remote_code=True`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory, **kwargs)

    @cached_property
    def _title_token_ids(self) -> dict[str, list[int]]:
        """The token ids of the items with each title."""
        token_ids = {}
        for token_id, title in enumerate(self.tokenizer.items["title"].to_pylist(), NUM_SPECIAL_TOKENS):
            if title is not None:
                token_ids.setdefault(title, []).append(token_id)
        return token_ids

    def _times(self, tokens: list[int | None], given: dict, name: str) -> dict[str, Tensor]:
        """When the items of a history that are known came, (1, L), and for which moment to recommend, (1,)."""
        expected = f"{name} must have as many timestamps as items, {len(tokens)}, for a model with use_timestamps=True"
        timestamps = _one_for_each(given.get("timestamps"), len(tokens), expected)
        now = time.time() if given.get("now") is None else given["now"]
        for field, seconds in (("now", now), *(("timestamps", value) for value in timestamps)):
            if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 <= seconds < math.inf:
                raise ValueError(f"{name}: {field} must be finite Unix seconds of at least 0, found {seconds!r}")
        for earlier, later in pairwise([*timestamps, now]):
            if later < earlier:
                raise ValueError(
                    f"{name} must have timestamps from the oldest to the latest, and now after them, found {later} "
                    f"after {earlier}"
                )
        known = [seconds for seconds, token_id in zip(timestamps, tokens, strict=True) if token_id is not None]
        return {
            "timestamps": torch.tensor([known or [0.0]], dtype=torch.double),
            "now": torch.tensor([now], dtype=torch.double),
        }

    def _event_features(self, tokens: list[int | None], given: dict, name: str) -> Tensor:
        """The features of the events of a history whose items are known, (1, L, F)."""
        columns = {}
        for column in self.model.config.event_features:
            expected = f"{name} must have as many values of {column!r} as items, {len(tokens)}"
            columns[column] = _one_for_each(given.get(column), len(tokens), expected)
        try:
            encoded = torch.from_numpy(self.tokenizer.encode_events(columns))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        known = encoded[[token_id is not None for token_id in tokens]]
        return (known if len(known) else torch.zeros(1, len(columns)))[None]

    def _token_ids(self, items: Any, name: str, unknown: str) -> list[int | None]:
        """Token ids of item ids and titles, None where there is none; `name` is what the errors and the warning call
        the list."""
        if hasattr(items, "tolist"):
            items = items.tolist()
        if not isinstance(items, list | tuple):
            raise ValueError(f"{name} must be a list of item ids or titles, found {items!r}")
        for item in items:
            if isinstance(item, bool) or not isinstance(item, str | Integral):
                raise ValueError(f"{name} must hold item ids (integers or strings) or titles, found {item!r}")
        tokens, unknown_items = [], {}
        for item, token_id in zip(items, self.tokenizer.convert_tokens_to_ids(list(items)), strict=True):
            token_ids = [token_id] if token_id >= NUM_SPECIAL_TOKENS else self._title_token_ids.get(item, [])
            if len(token_ids) > 1:
                raise ValueError(
                    f"{name} must name items uniquely, found the title {item!r} of several: {self._names(token_ids)}"
                )
            if not token_ids:
                unknown_items[item] = None
            tokens += token_ids or [None]
        if unknown_items and unknown == "error":
            raise ValueError(
                f"{name} must hold items that the model knows, found {_listed(unknown_items)} "
                "(unknown='ignore' leaves them out)"
            )
        if unknown_items:
            logger.warning(f"{name}: left out what the model does not know: {_listed(unknown_items)}")
        return tokens

    def _candidate_ids(self, candidates: Any, unknown: str) -> dict[int, None] | None:
        """The token ids of the candidates, in their order."""
        if candidates is None:
            return None
        tokens = self._token_ids(candidates, "candidates", unknown)
        token_ids = [token_id for token_id in tokens if token_id is not None]
        if not token_ids:
            raise ValueError("candidates must hold at least one item that the model knows, found none")
        repeated = [token_id for token_id, count in Counter(token_ids).items() if count > 1]
        if repeated:
            raise ValueError(f"candidates must be distinct, found more than once: {self._names(repeated)}")
        return dict.fromkeys(token_ids)

    def _names(self, token_ids: list[int]) -> str:
        rows = [token_id - NUM_SPECIAL_TOKENS for token_id in token_ids]
        return _listed(self.tokenizer.items["item_id"].take(rows).to_pylist())

    def _most_popular(self, top_k: int, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
        """The token ids and the counts of the candidates that occur most often in the training histories: (top_k,)."""
        if candidates is None:
            candidates = torch.arange(NUM_SPECIAL_TOKENS, len(self.tokenizer))
        counts = torch.tensor(self.tokenizer.items["count"].to_numpy())[candidates - NUM_SPECIAL_TOKENS]
        counts, order = counts.sort(descending=True, stable=True)
        return candidates[order[:top_k]], counts[:top_k].double()


def _is_history(element: Any) -> bool:
    return isinstance(element, list | tuple | dict) or getattr(element, "ndim", 0) > 0


def _numbered(histories: Iterable | TorchDataset) -> Iterator[tuple[int, Any]]:
    """A generator, which every pipeline reads item by item."""
    if isinstance(histories, Iterable):
        yield from enumerate(histories)
    else:
        yield from ((number, histories[number]) for number in range(len(histories)))


def _one_for_each(values: Any, num_items: int, expected: str) -> list | tuple:
    """Return the values, one for each item of a history; else fail with what was `expected` and found."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple) or len(values) != num_items:
        found = f"{len(values)}" if isinstance(values, list | tuple) else repr(values)
        raise ValueError(f"{expected}, found {found}")
    return values


def _listed(items: Iterable) -> str:
    names = [repr(item) for item in items]
    rest = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest


__all__ = ["SequentialRecommendationPipeline"]
