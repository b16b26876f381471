"""Tiny configurations and models whose sizes are all different, and histories for them."""

import numpy as np
import pyarrow as pa
import torch

from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticItemTokenizer
from elastic_hf.models import modeling_elastic


NUM_TOKENS = 31
EVENT_FEATURES = {"action": 4, "price": 0, "rating": 7}


def elastic_config(**changes) -> ElasticConfig:
    sizes = {
        "vocab_size": NUM_TOKENS,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_interest_experts": 6,
        "intermediate_size": 20,
        "conv_kernel_size": 4,
        "stream_intermediate_size": 10,
        "num_memory_subkeys": 5,
        "num_memory_heads": 2,
        "memory_top_k": 4,
        "num_negatives": 9,
    }
    return ElasticConfig(**{**sizes, **changes})


def elastic_model(**changes) -> ElasticForSequentialRecommendation:
    """A model in evaluation mode whose weights are far enough from their initial values to tell its parts apart."""
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(elastic_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def histories(length: int = 7, batch_size: int = 3, padding: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, each of shape (batch_size, length); the first row has padding on the left."""
    input_ids = torch.randint(3, NUM_TOKENS, (batch_size, length), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :padding] = 0
    return input_ids * attention_mask, attention_mask


def event_features(length: int = 7, batch_size: int = 3, padding: int = 2) -> torch.Tensor:
    """Categories and numbers of the events of [`histories`], as `EVENT_FEATURES` says: (batch_size, length, 3), NaN at
    the padding of the first row. Some are unknown."""
    sizes = torch.tensor([*EVENT_FEATURES.values()])
    generator = torch.Generator().manual_seed(length)
    draws = torch.rand(batch_size, length, len(sizes), generator=generator)
    features = torch.where(sizes > 0, (draws * (sizes + 1)).floor(), 4 * draws - 2)
    features[0, :padding] = torch.nan
    return features


def times(length: int = 7, batch_size: int = 3, padding: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Unix seconds of the items of [`histories`], and of the item after each: float64, (batch_size, length) both.

    They are whole, with pauses from nothing to some months. NaN stands at the padding of the first row, and -1 for its
    next items.
    """
    generator = torch.Generator().manual_seed(length)
    pauses = 10 ** (7 * torch.rand(batch_size, length + 1, generator=generator, dtype=torch.double))
    pauses[:, 1::4] = 0
    seconds = 1e9 + pauses.floor().cumsum(dim=1)
    timestamps, request_timestamps = seconds[:, :-1].clone(), seconds[:, 1:].clone()
    timestamps[0, :padding], request_timestamps[0, :padding] = torch.nan, -1
    return timestamps, request_timestamps


def item_table(item_ids, seed: int = 0) -> pa.Table:
    """Features of each kind, of items with these ids; some are not known of some items."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(len(item_ids), 6)) @ generator.normal(size=(6, 6))
    return pa.table(
        {
            "item_id": item_ids,
            "title": [f"Item no. {item}" for item in item_ids],
            "brand": [None if i % 7 == 3 else f"brand {i % 5}" for i in range(len(item_ids))],
            "tags": [[f"tag {j}" for j in range(i % 4)] for i in range(len(item_ids))],
            "price": [None if i % 9 == 4 else 1.5 + i for i in range(len(item_ids))],
            "vector": [None if i % 11 == 5 else vector.tolist() for i, vector in enumerate(vectors)],
        }
    )


ITEM_FEATURES = ["brand", "tags", "price", "vector"]


def featured_model(**changes) -> tuple[ElasticForSequentialRecommendation, ElasticItemTokenizer]:
    """[`elastic_model`] with the features of [`item_table`], and its tokenizer; item ids are 100 and more."""
    table = item_table(range(100, 100 + NUM_TOKENS - 3))
    tokenizer = ElasticItemTokenizer.from_items(table, model_max_length=7)
    model = elastic_model(item_features=tokenizer.learn_item_features(table, ITEM_FEATURES), **changes)
    model.set_item_features(tokenizer.encode_item_features(table))
    return model, tokenizer


def read_in_pieces_of(monkeypatch, num_positions: int, min_items: int) -> None:
    """Let ELASTIC read at most so many positions at once, and no fewer items of a history."""
    monkeypatch.setattr(modeling_elastic, "MAX_POSITIONS", {"cpu": num_positions, "cuda": 0})
    monkeypatch.setattr(modeling_elastic, "MIN_ITEMS", min_items)


@torch.no_grad()
def assert_pieces_change_nothing(model, batch: dict, monkeypatch, num_positions: int, min_items: int) -> None:
    """Check scores, states and retrieved slots of histories that are read in pieces against those read at once."""
    expected, expected_slots = model(**batch, use_cache=True), model.get_retrieved_slots(**batch)
    read_in_pieces_of(monkeypatch, num_positions, min_items)
    outputs = model(**batch, use_cache=True)
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert outputs.cache.tensors.keys() == expected.cache.tensors.keys()
    for name, tensor in expected.cache.tensors.items():
        torch.testing.assert_close(outputs.cache.tensors[name], tensor)
    assert torch.equal(model.get_retrieved_slots(**batch), expected_slots)
