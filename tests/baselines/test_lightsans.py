import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import gelu

from elastic_hf.baselines.lightsans import LightSANsConfig, LightSANsForSequentialRecommendation, low_rank_attention


SIZES = {
    "vocab_size": 31,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_latent_interests": 5,
    "intermediate_size": 10,
    "max_position_embeddings": 9,
}


def aggregate(states, interests):
    """(L, D) and (E, D) -> (E, D): each interest is a mean of the items, weighted by how much they are about it."""
    rows = []
    for interest in interests:
        shares = torch.stack([torch.exp(item @ interest) for item in states])
        rows.append(sum(share * item for share, item in zip(shares, states, strict=True)) / shares.sum())
    return torch.stack(rows)


def attend(query, keys, values):
    logits = torch.stack([query @ key / math.sqrt(len(query)) for key in keys])
    return sum(weight * value for weight, value in zip(logits.softmax(dim=0), values, strict=True))


def attention_loop(query, key, value, key_interests, value_interests, position_query, position_key, num_heads):
    """One history without padding, (Q, D) queries and (L, D) keys and values: reader by reader, head by head."""
    K = query.shape[-1] // num_heads
    pooled_key, pooled_value = aggregate(key, key_interests), aggregate(value, value_interests)
    rows = []
    for t in range(len(query)):
        parts = []
        for h in range(num_heads):
            part = slice(h * K, (h + 1) * K)
            from_items = attend(query[t, part], pooled_key[:, part], pooled_value[:, part])
            from_positions = attend(position_query[t, part], position_key[:, part], value[:, part])
            parts.append(from_items + from_positions)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def lightsans(model, input_ids, mask):
    """Each history by itself, without its padding."""
    config = model.config
    rows = []
    for ids, real in zip(input_ids, mask, strict=True):
        ids = ids[real]
        hidden = model.embedding_norm(model.embeddings.embed_tokens(ids))
        for layer in model.layers:
            attention = layer.attention
            positions = model.embeddings.embed_positions.weight[config.max_position_embeddings - len(ids) :]
            positions = attention.position_norm(positions)
            attended = attention_loop(
                attention.query(hidden),
                attention.key(hidden),
                attention.value(hidden),
                attention.key_interests,
                attention.value_interests,
                attention.position_query(positions),
                attention.position_key(positions),
                config.num_attention_heads,
            )
            hidden = layer.attention_norm(hidden + attention.output(attended))
            first, _, second = layer.feed_forward
            hidden = layer.feed_forward_norm(hidden + second(gelu(first(hidden))))
        rows.append(hidden)
    return rows


def assert_same_gradients(result, expected, inputs):
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(result.square().sum() + result.sin().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum() + expected.sin().sum(), inputs)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("num_readers", [1, 7])
def test_low_rank_attention_is_its_loop(num_readers):
    torch.manual_seed(0)
    B, L, D, E, H = 4, 7, 12, 5, 3
    shapes = [(B, num_readers, D), (B, L, D), (B, L, D), (E, D), (E, D), (num_readers, D), (L, D)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    query, key, value, key_interests, value_interests, position_query, position_key = inputs
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, :6] = mask[2, :3] = False
    expected = torch.stack(
        [
            attention_loop(
                query[b],
                key[b, mask[b]],
                value[b, mask[b]],
                key_interests,
                value_interests,
                position_query,
                position_key[mask[b]],
                H,
            )
            for b in range(B)
        ]
    )
    assert_same_gradients(low_rank_attention(*inputs, mask, H), expected, inputs)


@pytest.mark.parametrize("objective", ["prefix", "masked_item"])
def test_lightsans_is_the_paper_history_by_history(objective):
    torch.manual_seed(0)
    model = LightSANsForSequentialRecommendation(LightSANsConfig(**SIZES, training_objective=objective))
    model = model.model.double().eval()
    input_ids = torch.randint(3, 31, (4, 7))
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[0, :5] = mask[1, :1] = False
    output = model(input_ids, mask).last_hidden_state
    last = model(input_ids, mask, last_position_only=True).last_hidden_state
    torch.testing.assert_close(last, output[:, -1:])
    assert_same_gradients(output[mask], torch.cat(lightsans(model, input_ids, mask)), list(model.parameters()))


def test_a_history_of_padding_alone_gives_no_nan():
    model = LightSANsForSequentialRecommendation(LightSANsConfig(**SIZES))
    input_ids = torch.tensor([[0] * 7, [0] * 5 + [8, 4]])
    labels = torch.tensor([[-100] * 7, [-100] * 6 + [5]])
    assert model(input_ids).logits.isfinite().all()
    model(input_ids, labels=labels).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_no_longer_than_its_positions():
    model = LightSANsForSequentialRecommendation(LightSANsConfig(**SIZES))
    model(torch.full((2, 9), 5))
    with pytest.raises(ValueError, match=r"max_position_embeddings \(9\), found 10"):
        model(torch.full((2, 10), 5))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("is_causal", True, "is_causal must be False for lightsans, found True"),
        ("training_objective", "next_item", "needs is_causal=True"),
        ("num_attention_heads", 5, "multiple of num_attention_heads, found 64 and 5"),
        ("num_latent_interests", 0, "num_latent_interests must be at least 1, found 0"),
        ("max_position_embeddings", 0, "max_position_embeddings must be at least 1, found 0"),
        ("hidden_dropout", 1.5, "hidden_dropout must be between 0 and 1, found 1.5"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        LightSANsConfig(**{field: value})
