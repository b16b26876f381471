import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import gelu

import reference
from elastic_hf.baselines.bert4rec import BERT4RecConfig, BERT4RecForSequentialRecommendation


SIZES = {
    "vocab_size": 31,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 10,
    "max_position_embeddings": 9,
}


def bert4rec(model, input_ids, mask):
    """Equations 1 to 7 of the paper, without b^O, for each history by itself."""
    config = model.config

    def heads(states):
        return torch.stack(states.chunk(config.num_attention_heads, dim=-1))[None]  # (1, H, L, K)

    rows = []
    for ids, real in zip(input_ids, mask, strict=True):
        ids = ids[real]
        positions = model.embeddings.embed_positions.weight[config.max_position_embeddings - len(ids) :]
        hidden = model.embedding_norm(model.embeddings.embed_tokens(ids) + positions)
        for layer in model.layers:
            query, key, value = layer.attention.query, layer.attention.key, layer.attention.value
            everything = torch.ones(1, len(ids), dtype=torch.bool)
            attended = reference.attend(heads(query(hidden)), heads(key(hidden)), heads(value(hidden)), everything)
            attended = torch.cat(attended[0].unbind(), dim=-1)
            hidden = layer.attention_norm(hidden + layer.attention.output(attended))
            first, _, second = layer.feed_forward
            hidden = layer.feed_forward_norm(hidden + second(gelu(first(hidden))))
        rows.append(gelu(model.output(hidden)))
    return rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert4rec_is_the_paper_history_by_history(attention):
    torch.manual_seed(0)
    model = BERT4RecForSequentialRecommendation._from_config(BERT4RecConfig(**SIZES), attn_implementation=attention)
    model = model.model.double().eval()
    input_ids = torch.randint(3, 31, (4, 7))
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[0, :5] = mask[1, :1] = False
    input_ids[2, 3] = model.config.mask_token_id
    output = model(input_ids, mask).last_hidden_state
    last = model(input_ids, mask, last_position_only=True).last_hidden_state
    expected = torch.cat(bert4rec(model, input_ids, mask))
    torch.testing.assert_close(output[mask], expected)
    torch.testing.assert_close(last, output[:, -1:])
    weights = list(model.parameters())
    gradients = torch.autograd.grad(output[mask].square().sum() + output[mask].sin().sum(), weights)
    wanted = torch.autograd.grad(expected.square().sum() + expected.sin().sum(), weights)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


def test_a_history_of_padding_alone_gives_no_nan():
    model = BERT4RecForSequentialRecommendation(BERT4RecConfig(**SIZES))
    input_ids = torch.tensor([[0] * 7, [0] * 5 + [8, 2]])
    labels = torch.tensor([[-100] * 7, [-100] * 6 + [5]])
    model(input_ids, labels=labels).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_no_longer_than_its_positions():
    """The mask token that is appended at inference takes one of them."""
    model = BERT4RecForSequentialRecommendation(BERT4RecConfig(**SIZES))
    model(torch.full((2, 8), 5))
    with pytest.raises(ValueError, match=r"max_position_embeddings \(9\), found 10"):
        model(torch.full((2, 9), 5))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("is_causal", True, "is_causal must be False for bert4rec, found True"),
        ("training_objective", "next_item", "needs is_causal=True"),
        ("num_attention_heads", 5, "multiple of num_attention_heads, found 64 and 5"),
        ("intermediate_size", 0, "intermediate_size must be at least 1, found 0"),
        ("max_position_embeddings", 0, "max_position_embeddings must be at least 1, found 0"),
        ("hidden_dropout", 1.5, "hidden_dropout must be between 0 and 1, found 1.5"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        BERT4RecConfig(**{field: value})
