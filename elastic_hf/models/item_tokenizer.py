"""Item tokenizer: item ids <-> token ids, one item = one token.

The vocabulary is a WordLevel `tokenizer.json`, so that plain `AutoTokenizer.from_pretrained` gives the same token ids
where this package is not installed. `items.parquet` lies beside it and keeps what a vocabulary of strings cannot: the
original type of the item ids, the titles, and how often the items occur in the training histories. What is known of
event columns, such as their categories, stands in `tokenizer_config.json`.

Token ids: `[PAD]` 0, `[UNK]` 1, `[MASK]` 2, then the items from 3 on, in the order they were given.
"""

import os
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import TokenizersBackend
from transformers.utils import to_py_obj

from .event_columns import encode_event_column, encode_event_lists, learn_event_column
from .item_encoder import ItemEncoder, check_features


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[MASK]")
PAD_TOKEN, UNK_TOKEN, MASK_TOKEN = SPECIAL_TOKENS
NUM_SPECIAL_TOKENS = len(SPECIAL_TOKENS)
ITEMS_FILE = "items.parquet"
ITEM_FEATURES_FILE = "item_features.safetensors"
# Every batch hashes the catalogue once: batches are large so that this is little beside the histories.
HISTORIES_PER_BATCH = 10_000
# Columns of histories that stay as they are.
UNCHANGED = ("timestamps", "target_timestamp")
# Columns of histories that are not those of features of events.
NO_FEATURES = ("user_id", "item_ids", "target", *UNCHANGED)


class ElasticItemTokenizer(TokenizersBackend):
    """Turns item ids into token ids and back; pads and truncates on the left, so that the most recent items stay.

    A history is a list of item ids, given with `is_split_into_words=True`. Integer item ids stand in the vocabulary as
    their decimal strings; wherever this class takes item ids, it takes them as integers or as strings. Unknown items
    become `[UNK]`.

    Example:

    ```python
    >>> tokenizer = ElasticItemTokenizer.from_items(["id one", "é2"], model_max_length=200)
    >>> tokenizer([["é2"], ["id one", "é2"]], is_split_into_words=True, padding=True)["input_ids"]
    [[0, 4], [3, 4]]
    ```
    """

    # No `__init__`: a tokenizer with its own constructor is rebuilt from its vocabulary, not read from its file.
    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        "items_file": ITEMS_FILE,
        "item_features_file": ITEM_FEATURES_FILE,
    }
    _items: pa.Table | None = None
    item_encoder: ItemEncoder | None = None

    @classmethod
    def from_items(cls, items: Any, model_max_length: int, events: Any = None) -> "ElasticItemTokenizer":
        """Builds the tokenizer of a catalogue.

        Args:
            items (`datasets.Dataset`, `pyarrow.Table`, `polars.DataFrame` or iterable of `int` or `str`):
                The catalogue in token order: a table with the column `item_id` (integers or strings) and, optionally,
                `title` (strings, null where unknown) and `count` (integers, the interactions in the training
                histories), such as the `items` of [`load_histories`]; or the item ids alone.
            model_max_length (`int`): Longest history, in items, that `truncation=True` keeps.
            events (`datasets.Dataset`, *optional*):
                The training histories, such as those of [`load_histories`] with `event_columns`: their further columns
                of lists are features of events. Their categories, or the mean and the standard deviation of their
                numbers, are learned here and nowhere else.

        Raises:
            ValueError: If an item id is null, empty, given twice or contains a special token, if the ids are neither
                integers nor strings, if there are none, or if a count is no integer of at least 0; or if an event
                column holds no lists of strings, booleans or finite numbers.
        """
        if isinstance(model_max_length, bool) or not isinstance(model_max_length, Integral) or model_max_length < 1:
            raise ValueError(f"model_max_length must be an integer of at least 1, found {model_max_length!r}")
        table = _as_item_table(items)
        event_columns = {} if events is None else _learn_event_columns(events)
        backend = Tokenizer(_word_level(table))  # no pre-tokenizer: an item id with spaces stays whole
        tokenizer = cls(
            tokenizer_object=backend,
            pad_token=PAD_TOKEN,
            unk_token=UNK_TOKEN,
            mask_token=MASK_TOKEN,
            padding_side="left",
            truncation_side="left",
            model_max_length=int(model_max_length),
            model_input_names=["input_ids", "attention_mask"],
            **({"event_columns": event_columns} if event_columns else {}),
        )
        tokenizer._items = table
        return tokenizer

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "ElasticItemTokenizer":
        """Load a tokenizer as `PreTrainedTokenizerBase.from_pretrained` does, with its `items.parquet`.

        Raises:
            ValueError: If `items.parquet` is missing or damaged, or lists other items than the vocabulary.
        """
        tokenizer = super().from_pretrained(*args, **kwargs)
        items_file = tokenizer.init_kwargs.pop("items_file", None)
        features_file = tokenizer.init_kwargs.pop("item_features_file", None)
        if items_file is None:
            raise ValueError(
                f"{tokenizer.name_or_path} must hold {ITEMS_FILE} beside tokenizer.json, found none: without it the "
                "item ids lose their type, and the titles and counts are gone. Download or copy the folder again, or "
                "make the tokenizer of its items anew with from_items"
            )
        try:
            table = _as_item_table(pq.read_table(items_file))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{items_file} cannot be read: {error}") from error
        vocabulary = [*SPECIAL_TOKENS, *table["item_id"].cast(pa.string()).to_pylist()]
        token_ids = tokenizer.convert_tokens_to_ids(vocabulary)
        if len(tokenizer) != len(vocabulary) or token_ids != list(range(len(vocabulary))):
            raise ValueError(
                f"{items_file} must list the items of tokenizer.json in token order, found other items: "
                "the two files come from different tokenizers"
            )
        tokenizer._items = table
        if features_file is not None:
            tokenizer.item_encoder = ItemEncoder.load(features_file)
        return tokenizer

    @property
    def items(self) -> pa.Table:
        """`pyarrow.Table`: the catalogue in token order: `item_id` (int64 or string), `title` (string, nullable) and,
        where the training histories were counted, `count` (int64)."""
        if self._items is None:
            vocabulary = sorted(self.get_vocab().items(), key=lambda token_and_id: token_and_id[1])
            self._items = _as_item_table([token for token, _ in vocabulary[NUM_SPECIAL_TOKENS:]])
        return self._items

    @property
    def item_features(self) -> dict[str, dict] | None:
        """`dict` or `None`: the features of the items that were learned, for the configuration of a model."""
        return None if self.item_encoder is None else self.item_encoder.features

    def learn_item_features(self, table: Any, columns: list[str]) -> dict[str, dict]:
        """Learn how the features of items are encoded, from those of this catalogue.

        Args:
            table (`datasets.Dataset`, `pyarrow.Table` or `polars.DataFrame`):
                With a row for each item, and maybe for others: `item_id` and the `columns`. What is null in them is
                not known of an item.
            columns (`list[str]`):
                The features: columns of strings, booleans, or lists of strings or integers are categories, integers
                and floats are numbers, and lists of floats are vectors. `name:categories` makes categories of
                integers.

        Returns:
            `dict[str, dict]`: the `item_features` for the configuration of a model.

        Raises:
            ValueError: If an item has no row or two of them, or as [`~item_encoder.check_features`].
        """
        checked = check_features(_as_table(table), columns)
        self.item_encoder = ItemEncoder.learn(_rows_of(checked, self.items["item_id"]), columns)
        return self.item_encoder.features

    def encode_item_features(self, table: Any) -> dict[str, Tensor]:
        """Encode the features of this catalogue, as `model.set_item_features` takes them.

        Args:
            table: As in [`learn_item_features`].

        Raises:
            ValueError: As [`learn_item_features`], and if nothing was learned.
        """
        return self._encoder().encode(_rows_of(self._encoder().check(_as_table(table)), self.items["item_id"]))

    def add_items(self, items: Any) -> dict[str, Tensor]:
        """Add new items after those of the catalogue. `model.add_items` calls this, and grows the model alike.

        Args:
            items (`datasets.Dataset`, `pyarrow.Table` or `polars.DataFrame`):
                A row for each new item: `item_id`, the columns of the features that were learned and, optionally,
                `title`.

        Returns:
            `dict[str, torch.Tensor]`: the encoded features of the new items, in the order of the rows.

        Raises:
            ValueError: If an item is known already or comes twice, an item id is none of this catalogue's type, or
                as [`learn_item_features`]. Nothing is changed then.
        """
        encoder, given = self._encoder(), _as_table(items)
        features = encoder.check(given)
        new = _as_item_table(given.select([name for name in ("item_id", "title") if name in given.column_names]))
        known = self.items
        if new["item_id"].type != known["item_id"].type:
            raise ValueError(f"new item ids must be {known['item_id'].type}, found {new['item_id'].type}")
        is_known = pc.is_in(new["item_id"], value_set=known["item_id"].combine_chunks())
        if pc.any(is_known).as_py():
            raise ValueError(f"new items must not be known, found {new['item_id'].filter(is_known)[0].as_py()!r}")
        if "count" in known.column_names:
            new = new.append_column("count", pa.array(np.zeros(new.num_rows, np.int64)))
        encoded = encoder.encode(features)
        items = pa.concat_tables([known, new]).combine_chunks()
        self.backend_tokenizer.model = _word_level(items)
        self._items = items
        self.item_encoder = encoder.lengthened(encoded)
        return encoded

    def _encoder(self) -> ItemEncoder:
        if self.item_encoder is None:
            raise ValueError("item features must be learned first, by learn_item_features, found none")
        return self.item_encoder

    @property
    def event_columns(self) -> dict[str, dict[str, Any]]:
        """`dict`: of each event column, in alphabetical order, the `categories`, of which the first has number 1, or
        the `mean` and the `deviation` of the numbers."""
        return dict(sorted(self.init_kwargs.get("event_columns", {}).items()))

    @property
    def event_features(self) -> dict[str, int]:
        """`dict`: the `event_features` of the configuration of a model that reads them."""
        return {name: len(known.get("categories", ())) for name, known in self.event_columns.items()}

    def encode_events(self, columns: Any) -> np.ndarray:
        """What a model reads as the features of the events of one history.

        Args:
            columns (`dict`): A list of values for each event column, None where there is none.

        Returns:
            `np.ndarray` of shape `(num_events, num_features)`: Categories, 0 where a value is none of the training
            events, and standardised numbers, 0 where there is none, in the order of `event_columns`.

        Raises:
            ValueError: If a column is missing, or holds values of another kind than in the training events.
        """
        encoded = []
        for name, known in self.event_columns.items():
            if name not in columns:
                raise ValueError(f"event column {name!r} must be given, found {', '.join(map(repr, columns)) or None}")
            values = columns[name]
            try:
                array = pa.array(values.tolist() if hasattr(values, "tolist") else values)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"event column {name!r} must hold values of one kind, found {values!r}") from error
            encoded.append(encode_event_column(name, array, known).to_numpy())
        return np.stack(encoded, axis=1)

    def __call__(self, text: Any = None, *args, **kwargs):
        return super().__call__(None if text is None else _as_strings(text), *args, **kwargs)

    def convert_tokens_to_ids(self, tokens: int | str | list[int | str]) -> int | list[int]:
        """Token ids of item ids, given as integers or strings; unknown items become `[UNK]`."""
        return super().convert_tokens_to_ids(_as_strings(tokens))

    def convert_ids_to_titles(self, ids: Any) -> str | list:
        """Titles of token ids; an item without a title gives its item id, a special token its name.

        Args:
            ids (`int`, `list`, `np.ndarray` or `torch.Tensor` of any shape): Token ids.

        Returns:
            `str` or (nested) `list[str]`: As `ids` is shaped.

        Raises:
            ValueError: If an id is not an integer from 0 to the size of the vocabulary - 1.
        """
        ids = np.asarray(to_py_obj(ids))
        num_tokens = NUM_SPECIAL_TOKENS + self.items.num_rows
        if ids.size == 0:
            return ids.tolist()
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= num_tokens:
            raise ValueError(f"ids must be token ids from 0 to {num_tokens - 1}, found {ids.tolist()}")
        rows = self.items.take(np.maximum(ids.ravel() - NUM_SPECIAL_TOKENS, 0))
        titles = pc.coalesce(rows["title"], rows["item_id"].cast(pa.string())).to_numpy().reshape(ids.shape)
        special = np.array(SPECIAL_TOKENS, dtype=object)[np.minimum(ids, NUM_SPECIAL_TOKENS - 1)]
        return np.where(ids < NUM_SPECIAL_TOKENS, special, titles).tolist()

    def encode_histories(self, histories: pa.ListArray | pa.LargeListArray | pa.ChunkedArray) -> pa.ListArray:
        """The fast path of `tokenizer(histories, is_split_into_words=True)["input_ids"]`, in Arrow from end to end.

        Args:
            histories (`pyarrow.ListArray` or `pyarrow.ChunkedArray` of lists): Item ids, integers or strings.

        Returns:
            `pyarrow.ListArray` of int32: Token ids, untruncated, the lists as long as they came.

        Raises:
            ValueError: If a history or an item id is null, or if `histories` are not lists of integers or strings.
        """
        return _encode_lists(histories, self.items["item_id"])

    def tokenize_histories(self, histories: Any, num_proc: int | None = None) -> Any:
        """Token ids of every split of [`load_histories`].

        Args:
            histories (`datasets.DatasetDict` or `datasets.IterableDatasetDict`):
                Splits with the column `item_ids` and, in evaluation splits, `target`. Streamed ones are tokenized as
                they are read.
            num_proc (`int`, *optional*): Number of processes of `Dataset.map`; a stream is read by one.

        Returns:
            `datasets.DatasetDict` or `datasets.IterableDatasetDict`: The same splits with `user_id` (where there is
            one), `input_ids` (`List(int32)`, the whole history, untruncated) and `target` (int32 token id, in
            evaluation splits), the event columns as [`encode_events`] makes numbers of them (`List(float32)`), and
            `timestamps` and `target_timestamp` as they are.

        Raises:
            ValueError: If a split is empty, does not name its columns, has no `item_ids` or lacks an event column, if
                `num_proc` is given for a stream, if an event column is not as long as `item_ids` or holds values of
                another kind than in the training events, and as [`encode_histories`].
        """
        tokenized = type(histories)()
        for name, split in histories.items():
            if "item_ids" not in (split.column_names or ()):
                raise ValueError(f"split {name!r} must have the column 'item_ids', found {split.column_names}")
            missing = [column for column in self.event_columns if column not in split.column_names]
            if missing:
                raise ValueError(
                    f"split {name!r} must have the event columns {', '.join(self.event_columns)}, found no "
                    f"{', '.join(missing)}"
                )
            is_stream = not hasattr(split, "__len__")
            # `Dataset.map` would hand an empty split back with its old columns.
            if not is_stream and len(split) == 0:
                raise ValueError(f"split {name!r} must have at least one history, found none")
            if is_stream and num_proc is not None:
                raise ValueError(f"num_proc must be None for the stream {name!r}, found {num_proc}")
            options = {}
            if not is_stream:
                options = {"num_proc": num_proc, "desc": f"Tokenizing {name} histories"}
                options["load_from_cache_file"] = False  # a damaged file of the cache would be taken for the result
            types = {"input_ids": pa.list_(pa.int32())}
            if "user_id" in split.column_names:
                types = {"user_id": split.features.arrow_schema.field("user_id").type, **types}
            if "target" in split.column_names:
                types["target"] = pa.int32()
            for column in UNCHANGED:
                if column in split.column_names:
                    types[column] = split.features.arrow_schema.field(column).type
            types |= dict.fromkeys(self.event_columns, pa.list_(pa.float32()))
            tokenized[name] = (
                split.with_format("arrow")
                .map(
                    _tokenize_batch,
                    fn_kwargs={"item_ids": self.items["item_id"], "event_columns": self.event_columns},
                    with_indices=True,
                    batched=True,
                    batch_size=HISTORIES_PER_BATCH,
                    remove_columns=[column for column in split.column_names if column not in types],
                    features=split.features.from_arrow_schema(pa.schema(types)),
                    **options,
                )
                .with_format(None)
            )
        return tokenized

    def add_special_tokens(self, special_tokens_dict: dict, *args, **kwargs) -> int:
        # Checked before the base class writes the tokens down as its own.
        for tokens in special_tokens_dict.values():
            _refuse_new_tokens(tokens if isinstance(tokens, list | tuple) else [tokens])
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _add_tokens(self, new_tokens: list, special_tokens: bool = False) -> int:
        _refuse_new_tokens(new_tokens)
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> tuple[str, ...]:
        file_names = super()._save_pretrained(save_directory, *args, **kwargs)
        items_file = os.path.join(save_directory, ITEMS_FILE)
        pq.write_table(self.items, items_file + ".tmp", compression="zstd")
        os.replace(items_file + ".tmp", items_file)
        features_file = os.path.join(save_directory, ITEM_FEATURES_FILE)
        if self.item_encoder is None:
            if os.path.exists(features_file):  # of another tokenizer, whose files these are no longer
                os.remove(features_file)
            return (*file_names, items_file)
        self.item_encoder.save(features_file + ".tmp")
        os.replace(features_file + ".tmp", features_file)
        return (*file_names, items_file, features_file)


def _word_level(items: pa.Table) -> WordLevel:
    """The vocabulary: special tokens, then items."""
    vocabulary = [*SPECIAL_TOKENS, *items["item_id"].cast(pa.string()).to_pylist()]
    return WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNK_TOKEN)


def _read_table(items: Any) -> pa.Table:
    """A table of items, with the ids as they are."""
    if hasattr(items, "with_format"):  # a datasets.Dataset
        items = items.with_format("arrow")[:]
    if not hasattr(items, "__arrow_c_stream__"):
        raise ValueError(f"items must be a table of datasets, Arrow or polars, found {type(items).__name__}")
    table = pa.table(items)
    if "item_id" not in table.column_names:
        raise ValueError(f"items must have the column 'item_id', found {table.column_names}")
    return table


def _as_table(items: Any) -> pa.Table:
    """A table of items, with the ids in a type they can be compared in."""
    table = _read_table(items)
    ids = _as_int64_or_string(table["item_id"].combine_chunks())
    return table.set_column(table.column_names.index("item_id"), "item_id", ids)


def _rows_of(table: pa.Table, item_ids: pa.ChunkedArray) -> pa.Table:
    """The row of each item, in their order."""
    given, wanted = table["item_id"].combine_chunks(), item_ids.combine_chunks()
    if pa.types.is_large_string(given.type) or pa.types.is_string(wanted.type):
        given, wanted = given.cast(pa.large_string()), wanted.cast(pa.large_string())
    _refuse_repeated(given)
    rows = pc.index_in(wanted, value_set=given)
    if rows.null_count:
        raise ValueError(
            f"items must have a row for each of the {len(wanted):,} items of the catalogue, found none for "
            f"{rows.null_count:,} of them, such as {wanted.filter(rows.is_null())[0].as_py()!r}"
        )
    return table.take(rows)


def _refuse_repeated(item_ids: pa.Array) -> None:
    counts = item_ids.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(repeated):
        raise ValueError(f"item ids must be unique, found {repeated[0].as_py()!r} more than once")


def _as_item_table(items: Any) -> pa.Table:
    """Checks a catalogue and reduces it to `item_id` (int64 or string), `title` (string) and, if given, `count`."""
    if not (hasattr(items, "with_format") or hasattr(items, "__arrow_c_stream__")):
        try:
            items = pa.table({"item_id": pa.array(list(items))})
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError("item ids must be all integers or all strings, found both or others") from error
    table = _read_table(items)
    if table.num_rows == 0:
        raise ValueError("items must list at least one item, found none")

    item_ids = table["item_id"].combine_chunks()
    if item_ids.null_count:
        raise ValueError(f"item ids must not be null, found {item_ids.null_count} nulls")
    item_ids = _as_int64_or_string(item_ids)
    _refuse_repeated(item_ids)
    if pa.types.is_large_string(item_ids.type):
        if pc.any(pc.equal(item_ids, "")).as_py():
            raise ValueError("item ids must not be empty strings, found one")
        # The backend cuts a special token out of the middle of an id as well.
        for token in SPECIAL_TOKENS:
            reserved = item_ids.filter(pc.match_substring(item_ids, token))
            if len(reserved):
                raise ValueError(f"item ids must not contain the special token {token}, found {reserved[0].as_py()!r}")
        item_ids = item_ids.cast(pa.string())

    if "title" in table.column_names:
        titles = table["title"].combine_chunks().cast(pa.string())
    else:
        titles = pa.nulls(table.num_rows, pa.string())
    columns = {"item_id": item_ids, "title": titles}
    if "count" in table.column_names:
        counts = table["count"].combine_chunks()
        if not pa.types.is_integer(counts.type):
            raise ValueError(f"counts must be integers, found {counts.type}")
        if counts.null_count or pc.min(counts).as_py() < 0:
            raise ValueError(f"counts must be at least 0, found {'a null' if counts.null_count else pc.min(counts)}")
        columns["count"] = counts.cast(pa.int64())
    return pa.table(columns)


def _refuse_new_tokens(tokens: list) -> None:
    """Refuse all but the special tokens: the backend cuts an added token out of every item id that contains it."""
    others = [str(token) for token in tokens if str(token) not in SPECIAL_TOKENS]
    if others:
        raise ValueError(
            f"tokens cannot be added to a catalogue, found {others[0]!r}: grow it with "
            "ElasticItemTokenizer.from_items(table, model_max_length), where the table holds tokenizer.items and then "
            "the new items, and call model.resize_token_embeddings(len(tokenizer))"
        )


def _as_strings(ids: Any) -> Any:
    """Item ids, nested or not, as the strings of the vocabulary."""
    if isinstance(ids, str):
        return ids
    if isinstance(ids, Integral) and not isinstance(ids, bool):
        return str(int(ids))
    if hasattr(ids, "tolist"):
        return _as_strings(ids.tolist())
    if isinstance(ids, list | tuple):
        return [_as_strings(item) for item in ids]
    raise ValueError(f"item ids must be integers or strings, found {ids!r}")


def _as_int64_or_string(values: pa.Array) -> pa.Array:
    """Item ids in one of the two types they are compared in: int64 or large_string."""
    if pa.types.is_dictionary(values.type):
        distinct = values.dictionary
        if pa.types.is_string_view(distinct.type):  # which Arrow does not take from
            distinct = distinct.cast(pa.large_string())
        values = distinct.take(values.indices)
    if pa.types.is_integer(values.type):
        return values.cast(pa.int64())
    is_string = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if is_string or pa.types.is_string_view(values.type) or pa.types.is_null(values.type):
        return values.cast(pa.large_string())
    raise ValueError(f"item ids must be integers or strings, found {values.type}")


def _encode(values: pa.Array, item_ids: pa.ChunkedArray) -> pa.Array:
    """Token ids (int32) of item ids; `item_ids` is the catalogue in token order."""
    if values.null_count:
        raise ValueError(f"histories must not hold null item ids, found {values.null_count}")
    values = _as_int64_or_string(values)
    catalogue = _as_int64_or_string(item_ids.combine_chunks())
    if values.type != catalogue.type:
        values, catalogue = values.cast(pa.large_string()), catalogue.cast(pa.large_string())
    indices = pc.index_in(values, value_set=catalogue)
    token_ids = pc.add(indices, pa.scalar(NUM_SPECIAL_TOKENS, pa.int32()))
    return pc.fill_null(token_ids, SPECIAL_TOKENS.index(UNK_TOKEN))


def _encode_lists(lists: pa.Array | pa.ChunkedArray, item_ids: pa.ChunkedArray) -> pa.ListArray:
    if isinstance(lists, pa.ChunkedArray):
        empty = pa.array([], pa.list_(pa.int32()))
        return pa.concat_arrays([empty, *(_encode_lists(chunk, item_ids) for chunk in lists.chunks)])
    if not isinstance(lists, pa.ListArray | pa.LargeListArray):
        raise ValueError(f"histories must be an Arrow array of lists, found {getattr(lists, 'type', type(lists))}")
    if lists.null_count:
        raise ValueError(f"histories must not be null, found {lists.null_count} nulls")
    # A slice keeps its parent's offsets, while `flatten` gives the items of the slice alone.
    offsets = pc.subtract(lists.offsets, lists.offsets[0]).cast(pa.int32())
    return pa.ListArray.from_arrays(offsets, _encode(lists.flatten(), item_ids))


def _learn_event_columns(events: Any) -> dict[str, dict[str, Any]]:
    """What is known of the columns of lists of training histories."""
    learned = {}
    for name in sorted({*events.column_names} - {*NO_FEATURES}):
        lists = events.select_columns(name).with_format("arrow")[:][name]
        if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
            raise ValueError(f"event column {name!r} must hold lists, found type {lists.type}")
        learned[name] = learn_event_column(name, pc.list_flatten(lists))
    return learned


def _tokenize_batch(
    table: pa.Table, rows: list[int], item_ids: pa.ChunkedArray, event_columns: dict[str, dict[str, Any]]
) -> pa.Table:
    columns = {"input_ids": _encode_lists(table["item_ids"], item_ids)}
    if "user_id" in table.column_names:
        columns = {"user_id": table["user_id"], **columns}
    if "target" in table.column_names:
        columns["target"] = _encode(table["target"].combine_chunks(), item_ids)
    columns |= {column: table[column] for column in UNCHANGED if column in table.column_names}
    for name, known in event_columns.items():
        num_items = columns["input_ids"].value_lengths()
        columns[name] = encode_event_lists(name, table[name].combine_chunks(), known, num_items, rows[0])
    return pa.table(columns)
