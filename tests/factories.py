"""Tiny configurations and models whose sizes are all different, and histories for them."""

import torch

from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation


NUM_TOKENS = 31


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
