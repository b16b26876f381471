"""Why ELASTIC recommends what it recommends: half-lives, assignments, weights and contributions of the items."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .dispatcher_attention import dispatch, final_weights, to_exponent
from .modeling_recommender import validate_histories


if TYPE_CHECKING:
    from .modeling_elastic import ElasticForSequentialRecommendation, ElasticInterestExperts


@dataclass
class ElasticExplanation(ModelOutput):
    """
    How ELASTIC arrived at its recommendations. N layers, H heads, E interest experts; zeros at padding.

    Args:
        half_lives (`torch.FloatTensor` of shape `(N, H, E)`):
            How far back each expert looks: the number of items after which it has forgotten half of what it held.
        assignments (`torch.FloatTensor` of shape `(batch_size, N, H, history_length, E)`):
            How each item is shared out among the experts of a head; sums to 1 over them.
        item_weights (`torch.FloatTensor` of shape `(batch_size, N, H, history_length)`):
            The weight of each item in what the last position reads from the experts; sums to 1 over the items.
        token_ids (`torch.LongTensor` of shape `(batch_size, top_k)`):
            The recommended items, best first.
        contributions (`torch.FloatTensor` of shape `(batch_size, top_k, history_length)`):
            How much each item of the history carried each recommendation, to first order: the gradient of the score
            by the item's embedding, times that embedding. Negative where the item spoke against it.
    """

    half_lives: torch.FloatTensor | None = None
    assignments: torch.FloatTensor | None = None
    item_weights: torch.FloatTensor | None = None
    token_ids: torch.LongTensor | None = None
    contributions: torch.FloatTensor | None = None


def explain(
    model: "ElasticForSequentialRecommendation",
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor | None = None,
    top_k: int = 10,
) -> ElasticExplanation:
    """Show which experts took each interaction, how far back they look, and which items carried the recommendations.

    Args:
        model ([`ElasticForSequentialRecommendation`]).
        input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`): as in `recommend`.
        attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*): as in `recommend`.
        top_k (`int`, defaults to 10): how many recommendations are explained, each by a backward pass.

    Returns:
        [`ElasticExplanation`]

    Raises:
        ValueError: as `recommend`.
    """
    token_ids = model.recommend(input_ids, attention_mask, top_k).token_ids
    attention_mask = validate_histories(input_ids, attention_mask, model.config)
    base, experts = model.model, model.model.experts
    shares = []
    with torch.enable_grad():
        embeddings = base.embed(input_ids, attention_mask).detach().requires_grad_()
        stream = base.to_stream(embeddings, attention_mask)[0]
        hidden_states, last = embeddings[:, -1:], stream[:, -1:]
        for layer, (key, value) in zip(base.layers, experts.project(experts.pool(stream, attention_mask)), strict=True):
            query, _ = layer.attention.query_and_gate(hidden_states, last)
            logits = query.to(key.dtype) @ key.mT / math.sqrt(key.shape[-1])  # (B, H, 1, E)
            shares.append(logits.softmax(dim=-1)[:, :, 0].detach())
            hidden_states = layer(hidden_states, last, attention_mask[:, -1:], dispatch, key, value)
        scores = model.lm_head(base.norm(hidden_states)[:, 0]).gather(1, token_ids)
        scores = scores.sum(dim=0)  # (top_k,): rows do not depend on each other
        gradients = [torch.autograd.grad(score, embeddings, retain_graph=True)[0] for score in scores]
    contributions = torch.stack([(gradient * embeddings).sum(dim=-1) for gradient in gradients], dim=1).detach()
    with torch.no_grad():
        assignments, item_weights = _assign(experts, stream, attention_mask, torch.stack(shares, dim=1))
        return ElasticExplanation(experts.half_lives, assignments, item_weights, token_ids, contributions)


def _assign(
    experts: "ElasticInterestExperts", stream: Tensor, attention_mask: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, L, D), (B, L) and the share of each expert in what the last position reads, (B, N, H, E), to the assignments,
    (B, N, H, L, E), and the item weights, (B, N, H, L)."""
    sigmoids = experts.sigmoids(stream)
    scores = to_exponent(sigmoids, sigmoids.new_zeros(()))
    sizes = shares.shape[1:]
    assignments = scores.unflatten(-1, sizes).permute(0, 2, 3, 1, 4).softmax(dim=-1)
    weights = final_weights(sigmoids, experts.log_forget().to(scores.dtype).flatten()) * attention_mask[:, None]
    weights = (weights / weights.sum(dim=-1, keepdim=True)).unflatten(1, sizes)  # (B, N, H, E, L)
    item_weights = (shares[..., None] * weights).sum(dim=-2)
    return assignments * attention_mask[:, None, None, :, None], item_weights
