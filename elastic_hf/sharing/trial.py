"""A model is loaded and tried before it is sent: what is torn, broken or of another model is refused by its name."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from ..models.item_encoder import ItemEncoder
from ..models.item_tokenizer import ITEM_FEATURES_FILE, ElasticItemTokenizer
from ..models.pipeline import SequentialRecommendationPipeline
from ..registry import MODELS
from ..results import read_json


# What a folder holds of a model and its tokenizer.
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "items.parquet")
# Items of the catalogue that a trial reads, as far as the model reads so many.
TRIAL_ITEMS = 1_000
# Items that an example reads, and recommendations that it shows.
EXAMPLE_ITEMS = 3
ITEM_COLUMNS = {"item_id", "title", "count"}


def load_pipeline(folder: str | Path) -> SequentialRecommendationPipeline:
    """
    Load a model and its tokenizer from a folder, by this package's own code, and recommend once.

    Args:
        folder (`str` or `Path`): The folder, as `save_pretrained` of both writes it.

    Returns:
        [`SequentialRecommendationPipeline`], on the CPU.

    Raises:
        ValueError: if a file is missing, torn or no such file, if the weights are not all of this model's and finite,
            or if model, tokenizer and items do not belong together. The message names the file.
    """
    folder = Path(folder)
    check_files(folder, MODEL_FILES)
    model = _load_model(folder)
    tokenizer = _load_tokenizer(folder)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'} must have the model's {model.config.vocab_size} tokens, "
            f"found {len(tokenizer)}: model and tokenizer come from different runs"
        )
    if tokenizer.item_features != model.config.item_features:
        raise ValueError(
            f"{folder / ITEM_FEATURES_FILE} must hold the item_features of config.json, found "
            f"{tokenizer.item_features}: model and tokenizer come from different runs"
        )
    with _refusing(folder / "model.safetensors", "a model that recommends"):
        pipeline = SequentialRecommendationPipeline(model, tokenizer, device="cpu")
        history = tokenizer.items["item_id"][:TRIAL_ITEMS].to_pylist()
        (best,) = pipeline(with_events(pipeline, history), top_k=1, exclude_seen=False)
    if not math.isfinite(best["score"]):
        raise ValueError(f"{folder / 'model.safetensors'} must give finite scores, found {best['score']}")
    return pipeline


def recommend_example(pipeline: SequentialRecommendationPipeline) -> dict[str, list] | None:
    """
    Return the first recommendations after the most popular items of the catalogue, or its first where these were not
    counted. No user is shown.

    Returns:
        `dict` with `history`, as the pipeline takes it, titles where they stand for one item alone and item ids
        elsewhere, and `recommended`, as the pipeline returns it; None for a catalogue of one item.
    """
    items = pipeline.tokenizer.items
    num_items = min(EXAMPLE_ITEMS, len(items) - 1)
    if num_items == 0:
        return None
    # A title that is an item id, too, stands for the item of that id.
    names = Counter([*items["title"].to_pylist(), *items["item_id"].cast(pa.string()).to_pylist()])
    if "count" in items.column_names:
        items = items.sort_by([("count", "descending")])
    rows = items[:num_items].to_pylist()
    history = [row["title"] if row["title"] and names[row["title"]] == 1 else row["item_id"] for row in rows]
    history = with_events(pipeline, history)
    return {"history": history, "recommended": pipeline(history, top_k=min(EXAMPLE_ITEMS, len(items) - num_items))}


def with_events(pipeline: SequentialRecommendationPipeline, history: list) -> list | dict:
    """Return a history as the pipeline takes it: for a model that reads them, with timestamps, an hour apart, and with
    features of events, the last category or the mean."""
    events = {}
    if pipeline.model.config.use_timestamps:
        *events["timestamps"], events["now"] = range(0, 3600 * (len(history) + 1), 3600)
    for name, known in pipeline.tokenizer.event_columns.items():
        events[name] = [known["categories"][-1] if "categories" in known else known["mean"]] * len(history)
    return {"history": history, **events} if events else history


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder that lacks one of these files.

    Raises:
        ValueError: if it does, with the names of all that it lacks.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"folder {folder} must hold {', '.join(names)}, found no {', '.join(missing)}")


@contextmanager
def _refusing(file: Path, what: str) -> Iterator[None]:
    """Turn whatever goes wrong into a `ValueError` of one line that names the file."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} must be {what}, found {type(error).__name__}: {reason}") from error


def _load_model(folder: Path) -> PreTrainedModel:
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    model_type = read_json(config_file).get("model_type")
    if model_type not in MODELS:
        raise ValueError(f"{config_file} must have a model_type among {', '.join(MODELS)}, found {model_type!r}")
    model_class = MODELS[model_type]
    with _refusing(config_file, "a model's configuration"):
        config = model_class.config_class.from_pretrained(folder)
    saved_dtype, default_dtype = config.dtype or torch.float32, torch.get_default_dtype()
    with _refusing(weights_file, "the weights of the model in config.json"):
        # In PyTorch's default type: Transformers makes the type that it loads in the default of all threads, one of
        # which may be training.
        model, info = model_class.from_pretrained(folder, config=config, dtype=default_dtype, output_loading_info=True)
    for names, fault in ((info["missing_keys"], "without"), (info["unexpected_keys"], "with")):
        if names:
            raise ValueError(
                f"{weights_file} must be the weights of the model in config.json, found a file {fault} {min(names)}"
            )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{weights_file} must hold finite numbers, found NaN or infinity in {name}")
    return model.to(saved_dtype)


def _load_tokenizer(folder: Path) -> ElasticItemTokenizer:
    read_json(folder / "tokenizer_config.json")
    with _refusing(folder / "tokenizer.json", "an item tokenizer"):
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    items_file = folder / "items.parquet"
    with _refusing(items_file, "a table of items"):
        columns = pq.read_table(items_file).column_names
    if not {"item_id"} <= {*columns} <= ITEM_COLUMNS:
        raise ValueError(f"{items_file} must have item_id, title and count as its columns, found {', '.join(columns)}")
    features_file = folder / ITEM_FEATURES_FILE
    if features_file.exists():
        with _refusing(features_file, "what was learned of item features"):
            ItemEncoder.load(features_file)
    with _refusing(items_file, "the items of tokenizer.json"):
        return ElasticItemTokenizer.from_pretrained(folder)
