"""The steps that training and evaluation share: the process, the histories, the tokenizer and the token ids."""

import io
import logging
import sys
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, TrainingArguments, set_seed

from ..data.histories import Histories, load_histories
from ..data.item_table import add_text_vectors, item_columns, read_item_table
from ..data.prepared_folder import is_prepared
from ..models.configuration_recommender import RecommenderConfig
from ..models.item_tokenizer import ElasticItemTokenizer
from .arguments import DEFAULT_MAX_LENGTH, DataArguments, ModelArguments


logger = logging.getLogger(__name__)


def set_up_process(training_args: TrainingArguments) -> None:
    """Let the first process alone log, and set the seed."""
    is_main_process = training_args.process_index == 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # titles, where the locale lacks their letters
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main_process else logging.ERROR)
    if not is_main_process:
        datasets.disable_progress_bars()
    has_bfloat16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if training_args.bf16 and training_args.device.type == "cpu" and not has_bfloat16:
        logger.warning("bf16 is many times slower than float32 on this processor, which has no instructions for it")
    set_seed(training_args.seed)


def read_histories(
    data_args: DataArguments,
    training_args: TrainingArguments,
    model_name_or_path: str | None = None,
    with_item_features: bool = False,
) -> Histories:
    """Return the histories of all splits, the items and the counts; with the event columns that a trained model reads,
    where there is one. An items_file `with_item_features` may lack titles."""
    if data_args.split == "none":
        raise ValueError("split must be 'leave_one_out' or 'temporal', which hold out something to evaluate on")
    event_columns = sorted(data_args.event_columns or [])
    if model_name_or_path is not None:
        read = [*AutoConfig.from_pretrained(model_name_or_path).event_features]
        if event_columns not in ([], read):
            raise ValueError(
                f"event_columns must be those of {model_name_or_path}, {', '.join(read) or None}, found "
                f"{', '.join(event_columns)}"
            )
        event_columns = read
    items_file = data_args.items_file
    if items_file is not None and with_item_features:
        # Prepared histories have their titles.
        if is_prepared(data_args.source) or "title" not in item_columns(items_file):
            items_file = None
    with training_args.main_process_first(local=False, desc="loading the interactions"):
        loaded = load_histories(
            data_args.source,
            **data_args.reading,
            data_dir=data_args.data_dir,
            title_column=data_args.title_column,
            event_columns=event_columns,
            items_file=items_file,
            dataset_config_name=data_args.dataset_config_name,
            dataset_split=data_args.dataset_split,
            k_core=data_args.k_core,
            split=data_args.split,
            validation_fraction=data_args.validation_fraction,
            test_fraction=data_args.test_fraction,
            validation_users=data_args.validation_users,
        )
    logger.info(", ".join(f"{key}: {value:,}" for key, value in loaded.counts.items()))
    return loaded


def make_tokenizer(
    model_name_or_path: str | None, data_args: DataArguments, items: Dataset, events: Dataset
) -> ElasticItemTokenizer:
    """Return the tokenizer of the catalogue and the training `events`, or that of the trained model, which must know
    the catalogue.

    Its `model_max_length` is the number of items that the model sees.
    """
    if model_name_or_path is None:
        return ElasticItemTokenizer.from_items(items, data_args.max_length or DEFAULT_MAX_LENGTH, events)
    tokenizer = ElasticItemTokenizer.from_pretrained(model_name_or_path)
    token_ids = np.array(tokenizer.convert_tokens_to_ids(items["item_id"][:]))
    num_unknown = int((token_ids == tokenizer.unk_token_id).sum())
    if num_unknown:
        raise ValueError(
            f"the tokenizer of {model_name_or_path} does not know {num_unknown:,} of the {len(items):,} "
            f"items of {data_args.source}"
        )
    if data_args.max_length is not None:
        tokenizer.model_max_length = data_args.max_length
    return tokenizer


def learn_item_features(
    tokenizer: ElasticItemTokenizer, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> dict[str, torch.Tensor] | None:
    """Return the encoded features of the items, for [`~modeling_elastic.ElasticModel`], if a new model reads any."""
    if not model_args.reads_features:
        return None
    columns = [*(model_args.item_features or ())]
    with args.main_process_first(local=False, desc="reading the items"):
        table = read_item_table(data_args.items_file)
        if model_args.text_column is not None:
            table = add_text_vectors(table, model_args.text_column, model_args.text_model)
            columns.append(f"{model_args.text_column}_vector")
        features = tokenizer.learn_item_features(table, columns)
        logger.info("Item features: " + ", ".join(f"{name} ({features[name]['kind']})" for name in features))
        return tokenizer.encode_item_features(table)


def tokenize(
    tokenizer: ElasticItemTokenizer, histories: DatasetDict, data_args: DataArguments, training_args: TrainingArguments
) -> DatasetDict:
    """Return the token ids of all splits."""
    with training_args.main_process_first(local=False, desc="tokenizing the histories"):
        splits = tokenizer.tokenize_histories(histories, num_proc=data_args.preprocessing_num_workers)
    return splits.with_format("numpy")


def describe_protocol(data_args: DataArguments, config: RecommenderConfig) -> str:
    """Return how the results say that the data were split and the catalogue ranked, and what the model was told."""
    events = f", events with {' and '.join(config.event_features)}" if config.event_features else ""
    return data_args.protocol + (", target times given" if config.use_timestamps else "") + events


def settings_of(config: RecommenderConfig) -> dict[str, Any]:
    """Return the fields that this package's configurations add to those of Transformers, as they are in effect."""
    classes = [base for base in type(config).__mro__ if issubclass(base, RecommenderConfig)]
    names = sorted({name for base in classes for name in base.__annotations__})
    return {name: getattr(config, name) for name in names} | {"mask_seen_in_loss": config.masks_seen}
