"""Tiny configurations and models whose sizes are all different, and histories for them."""

import torch

from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation


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
