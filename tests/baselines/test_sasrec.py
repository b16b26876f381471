import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import gelu
from transformers import AutoModel

from elastic_hf.baselines.sasrec import SASRecConfig, SASRecForSequentialRecommendation


SIZES = {
    "vocab_size": 31,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 10,
    "max_position_embeddings": 9,
}
MODERN = {"hidden_act": "gelu", "attention_output": True, "residual_gate": True}


def sasrec(model, input_ids, mask):
    """Equations 1 to 6 of the paper, and the gates of LiGR, for each history by itself: position by position, head by
    head."""
    config = model.config
    K = config.hidden_size // config.num_attention_heads
    rows = []
    for ids, real in zip(input_ids, mask, strict=True):
        ids = ids[real]
        positions = model.embeddings.embed_positions.weight[config.max_position_embeddings - len(ids) :]
        hidden = model.embeddings.embed_tokens(ids) * math.sqrt(config.hidden_size) + positions
        for layer in model.layers:
            normed = layer.attention_norm(hidden)
            attended = []
            for t in range(len(ids)):
                heads = []
                for h in range(config.num_attention_heads):
                    part = slice(h * K, (h + 1) * K)
                    query = layer.attention.query(normed[t])[part]
                    keys = layer.attention.key(normed[: t + 1])[:, part]
                    values = layer.attention.value(normed[: t + 1])[:, part]
                    weights = (keys @ query / math.sqrt(K)).softmax(dim=0)
                    heads.append(weights @ values)
                attended.append(torch.cat(heads))
            attended = torch.stack(attended)
            if config.attention_output:
                attended = attended @ layer.attention.output.weight.T + layer.attention.output.bias
            if config.residual_gate:
                attended = attended / (1 + torch.exp(-layer.attention_gate(hidden)))
            hidden = hidden + attended
            first, _, second = layer.feed_forward
            activation = {"relu": torch.relu, "gelu": gelu}[config.hidden_act]
            transformed = second(activation(first(layer.feed_forward_norm(hidden))))
            if config.residual_gate:
                transformed = transformed / (1 + torch.exp(-layer.feed_forward_gate(hidden)))
            hidden = hidden + transformed
        rows.append(model.norm(hidden))
    return rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{}, MODERN], ids=["paper", "modern"])
def test_sasrec_is_the_paper_position_by_position(settings, attention):
    torch.manual_seed(0)
    config = SASRecConfig(**SIZES, **settings)
    model = AutoModel.from_config(config, attn_implementation=attention).model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    input_ids = torch.randint(3, 31, (3, 7))
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[0, :5] = mask[1, :1] = False
    weights = list(model.parameters())
    output = model(input_ids, mask).last_hidden_state
    result = torch.cat([states[real] for states, real in zip(output, mask, strict=True)])
    expected = torch.cat(sasrec(model, input_ids, mask))
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(result.square().sum() + result.sin().sum(), weights)
    wanted = torch.autograd.grad(expected.square().sum() + expected.sin().sum(), weights)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


def test_no_longer_than_its_positions():
    model = SASRecForSequentialRecommendation(SASRecConfig(**SIZES))
    with pytest.raises(ValueError, match=r"max_position_embeddings \(9\), found 10"):
        model(torch.full((2, 10), 5))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("is_causal", False, "is_causal must be True for sasrec, found False"),
        ("num_attention_heads", 5, "multiple of num_attention_heads, found 64 and 5"),
        ("max_position_embeddings", 0, "max_position_embeddings must be at least 1, found 0"),
        ("hidden_act", "sigmoud", "hidden_act must be one of .*relu.*, found 'sigmoud'"),
        ("hidden_dropout", 1.5, "hidden_dropout must be between 0 and 1, found 1.5"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        SASRecConfig(**{"training_objective": "prefix", field: value})
