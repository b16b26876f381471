import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import reference
from elastic_hf.baselines.hstu import HSTUConfig, HSTUForSequentialRecommendation, HSTUModel


def tiny_model(**changes):
    """A model in evaluation mode whose scores are far enough from zero for SiLU to bend."""
    sizes = {
        "vocab_size": 31,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 9,
    }
    torch.manual_seed(0)
    model = HSTUModel(HSTUConfig(**{**sizes, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def histories():
    """Four histories of 7, 4, 2 and 1 items."""
    input_ids = torch.randint(3, 31, (4, 7), generator=torch.Generator().manual_seed(1))
    attention_mask = (torch.arange(7) >= torch.tensor([[0], [3], [5], [6]])).long()
    return input_ids, attention_mask


def test_hstu_is_the_loop_with_its_gradients():
    model = tiny_model()
    input_ids, attention_mask = histories()
    weights = list(model.parameters())
    output = model(input_ids, attention_mask).last_hidden_state[attention_mask == 1]
    expected = torch.cat(reference.hstu(model, input_ids, attention_mask))
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.square().sum() + output.sin().sum(), weights)
    wanted = torch.autograd.grad(expected.square().sum() + expected.sin().sum(), weights)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)
        assert want.abs().max() > 1e-6


def test_the_last_position_alone_is_the_last_of_all():
    model = tiny_model()
    input_ids, attention_mask = histories()
    last = model(input_ids, attention_mask, last_position_only=True).last_hidden_state
    torch.testing.assert_close(last, model(input_ids, attention_mask).last_hidden_state[:, -1:])


def test_the_length_of_the_batch_does_not_count():
    """The divisor is the longest history that the model can read, however little the norm's epsilon lets it count."""
    model = tiny_model(layer_norm_eps=10.0)
    input_ids, attention_mask = histories()
    padded = model(input_ids[1:2], attention_mask[1:2]).last_hidden_state[:, 3:]
    torch.testing.assert_close(model(input_ids[1:2, 3:]).last_hidden_state, padded)


def test_a_row_of_padding_trains():
    torch.manual_seed(0)
    model = HSTUForSequentialRecommendation(HSTUConfig(vocab_size=31, hidden_size=12, max_position_embeddings=9))
    input_ids, attention_mask = histories()
    attention_mask[3] = 0
    labels = input_ids.roll(-1, dims=-1).masked_fill(attention_mask == 0, -100)
    model(input_ids, attention_mask, labels=labels).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_history_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match=r"max_position_embeddings \(9\), found 10"):
        tiny_model()(torch.full((2, 10), 5))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("is_causal", False, "is_causal must be True for hstu, found False"),
        ("num_hidden_layers", 0, "num_hidden_layers must be at least 1, found 0"),
        ("num_attention_heads", 5, "multiple of num_attention_heads, found 64 and 5"),
        ("max_position_embeddings", 0, "max_position_embeddings must be at least 1, found 0"),
        ("hidden_dropout", 1.5, "hidden_dropout must be between 0 and 1, found 1.5"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        HSTUConfig(**{"training_objective": "prefix", field: value})
