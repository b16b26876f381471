"""Why ELASTIC recommends what it recommends: half-lives, assignments, weights and contributions of the items."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .catalogue import score_items
from .dispatcher_attention import dispatch, final_weights, pool_history, to_exponent
from .event_features import given_event_features, read_event_features
from .event_time import given_times, read_times
from .limits import MAX_POSITIONS, limit
from .modeling_recommender import evaluating, sharded_modules, validate_histories


if TYPE_CHECKING:
    from .modeling_elastic import ElasticForSequentialRecommendation


@dataclass
class ElasticExplanation(ModelOutput):
    """
    How ELASTIC arrived at its recommendations. N layers, H heads, E interest experts; zeros at padding.

    Args:
        half_lives (`torch.FloatTensor` of shape `(H, E)`):
            How far back each expert looks: the number of items after which it has forgotten half of what it held.
        half_lives_seconds (`torch.FloatTensor` of shape `(H, E)`):
            With `use_timestamps`: after how many seconds without an item each expert has forgotten half of what it
            held.
        assignments (`torch.FloatTensor` of shape `(batch_size, H, history_length, E)`):
            How each item is shared out among the experts of a head; sums to 1 over them.
        item_weights (`torch.FloatTensor` of shape `(batch_size, N, H, history_length)`):
            The weight of each item in what each layer reads from the experts; sums to 1 over the items.
        token_ids (`torch.LongTensor` of shape `(batch_size, top_k)`):
            The recommended items, best first.
        contributions (`torch.FloatTensor` of shape `(batch_size, top_k, history_length)`):
            How much each item of the history carried each recommendation: by how much its score would be lower
            without the item. Negative where the item spoke against it.
    """

    half_lives: Tensor | None = None
    half_lives_seconds: Tensor | None = None
    assignments: Tensor | None = None
    item_weights: Tensor | None = None
    token_ids: Tensor | None = None
    contributions: Tensor | None = None


@torch.no_grad()
def explain(
    model: "ElasticForSequentialRecommendation",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    top_k: int = 10,
    timestamps: Tensor | None = None,
    request_timestamps: Tensor | None = None,
    event_features: Tensor | None = None,
) -> ElasticExplanation:
    """Show which experts took each interaction, how far back they look, and which items carried the recommendations.

    The history is read once without each of its items: the time grows with the square of its length.

    Args:
        model ([`ElasticForSequentialRecommendation`]).
        input_ids (`torch.LongTensor` of shape `(batch_size, history_length)`): as in `recommend`.
        attention_mask (`torch.LongTensor` of shape `(batch_size, history_length)`, *optional*): as in `recommend`.
        top_k (`int`, defaults to 10): how many recommendations are explained.
        timestamps, request_timestamps, event_features (`torch.Tensor`, *optional*): as in `recommend`.

    Returns:
        [`ElasticExplanation`]

    Raises:
        ValueError: if a history holds a special token, such as an unknown item, if FSDP2 shards the model, and as
            `recommend`.
    """
    if sharded_modules(model):
        raise ValueError(
            "model must be whole to be explained, found one that FSDP2 shards: load it from where it was saved"
        )
    attention_mask = validate_histories(input_ids, attention_mask, model.config)
    timestamps, request_timestamps = given_times(
        model, timestamps, request_timestamps, len(input_ids), input_ids.device
    )
    event_features = given_event_features(event_features, input_ids.device)
    recommended = model.recommend(
        input_ids,
        attention_mask,
        top_k,
        timestamps=timestamps,
        request_timestamps=request_timestamps,
        event_features=event_features,
    )
    is_special = attention_mask & (input_ids < model.config.num_special_tokens)
    if is_special.any():
        raise ValueError(
            "input_ids must hold items alone where they are explained, found the special token "
            f"{int(input_ids[is_special][0])}"
        )
    base = model.model
    num_heads = model.config.num_attention_heads
    shares = []
    with evaluating(model):
        times = read_times(base, timestamps, request_timestamps, attention_mask, last_position_only=True)
        events = base.to_events(attention_mask, None, *times[:1])
        events |= read_event_features(base, event_features, attention_mask)
        embeddings = base.embed(input_ids, **events)
        stream = base.to_stream(embeddings, attention_mask)[0]
        sigmoids, log_forget = base.experts(stream, events.get("pauses"))
        interests = base.project(pool_history(stream, sigmoids, log_forget, attention_mask))
        hidden_states, last, bias = base.to_readers(base.scale(embeddings[:, -1:]), stream[:, -1:], *times)
        for layer, (key, value) in zip(base.layers, interests, strict=True):
            query, _ = layer.attention.query_and_gate(hidden_states, last)
            logits = query.to(key.dtype) @ key.mT / math.sqrt(key.shape[-1])  # (B, H, 1, E)
            shares.append(sum(bias, logits).softmax(dim=-1))
            hidden_states = layer(hidden_states, last, attention_mask[:, -1:], dispatch, key, value, *bias)
    given = {"input_ids": input_ids, "timestamps": timestamps, "event_features": event_features}
    given = {name: values for name, values in given.items() if values is not None}
    without = _scores_without(model, recommended.token_ids, attention_mask, request_timestamps, given)
    assignments = to_exponent(sigmoids, sigmoids.new_zeros(())).unflatten(-1, (num_heads, -1)).softmax(dim=-1)
    weights = final_weights(sigmoids, log_forget) * attention_mask[:, None]  # (B, M, L)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).unflatten(1, (num_heads, -1))  # (B, H, E, L)
    return ElasticExplanation(
        half_lives=base.experts.half_lives,
        half_lives_seconds=base.experts.half_lives_seconds,
        assignments=assignments.transpose(1, 2) * attention_mask[:, None, :, None],
        item_weights=torch.stack([(share @ weights)[..., 0, :] for share in shares], dim=1),
        token_ids=recommended.token_ids,
        contributions=(recommended.scores[..., None] - without) * attention_mask[:, None],
    )


def _scores_without(
    model: "ElasticForSequentialRecommendation",
    token_ids: Tensor,
    attention_mask: Tensor,
    request_timestamps: Tensor | None,
    given: dict[str, Tensor],
) -> Tensor:
    """The scores of `token_ids`, (B, K), after each history without each of its items in turn: (B, K, L).

    What is given of a history has the shape (B, L) or (B, L, F).
    """
    batch_size, length = attention_mask.shape
    head = model.scoring_head()
    scored, places = token_ids.unique(return_inverse=True)
    positions = torch.arange(length, device=token_ids.device)
    scores = []
    for left_out in positions.split(max(1, limit(MAX_POSITIONS, token_ids.device) // attention_mask.numel())):
        # What came before the item moves up by one, and leaves padding at the front.
        order = positions - (positions <= left_out[:, None]).long()  # (number left out, L)
        is_there = (order >= 0) & attention_mask[:, order.clamp(min=0)]
        shortened = {name: values[:, order.clamp(min=0)].flatten(0, 1) for name, values in given.items()}
        if request_timestamps is not None:
            shortened["request_timestamps"] = request_timestamps.repeat_interleave(len(left_out))
        users = model.get_user_embeddings(attention_mask=is_there.flatten(0, 1), **shortened)
        scores.append(score_items(head, users, scored).unflatten(0, (batch_size, -1)))
    return torch.cat(scores, dim=1).gather(2, places[:, None].expand(-1, length, -1)).mT
