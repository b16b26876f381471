import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import reference
from elastic_hf.baselines.lrurec import (
    LinearRecurrentUnit,
    LRURecConfig,
    LRURecForSequentialRecommendation,
    LRURecModel,
    linear_recurrence,
)


def tiny_config(**changes):
    sizes = {"vocab_size": 31, "hidden_size": 6, "recurrent_size": 5, "intermediate_size": 7}
    return LRURecConfig(**{**sizes, **changes})


def tiny_model(**changes):
    """A model in evaluation mode whose parts all count."""
    torch.manual_seed(0)
    model = LRURecModel(tiny_config(**changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def histories(length=11):
    """Four histories: a full one, one padded up to its middle, one of two items and one of one."""
    input_ids = torch.randint(3, 31, (4, length), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.arange(length) >= torch.tensor([[0], [length // 2], [length - 2], [length - 1]])
    return input_ids, attention_mask.long()


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 33])
def test_linear_recurrence_is_the_loop(length):
    generator = torch.Generator().manual_seed(length)
    inputs = torch.randn(3, length, 5, dtype=torch.complex128, generator=generator).requires_grad_()
    factor = torch.polar(torch.tensor([0.99, 0.8, 1.0, 0.3, 0.0]), torch.tensor([0.1, 3.0, 1.0, 6.0, 2.0]))
    factor = factor.to(torch.complex128).requires_grad_()
    expected = [inputs[:, 0]]
    for t in range(1, length):
        expected.append(factor * expected[-1] + inputs[:, t])
    expected, states = torch.stack(expected, dim=1), linear_recurrence(inputs, factor)
    torch.testing.assert_close(states, expected)
    tensors = (inputs, factor) if length > 1 else (inputs,)
    gradients = torch.autograd.grad(states.abs().square().sum(), tensors)
    for gradient, want in zip(gradients, torch.autograd.grad(expected.abs().square().sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("length", [2, 11])
def test_lrurec_is_the_loop_with_its_gradients(length):
    model = tiny_model()
    input_ids, attention_mask = histories(length)
    output = model(input_ids, attention_mask).last_hidden_state[attention_mask == 1]
    expected = torch.cat(reference.lrurec(model, input_ids, attention_mask))
    reference.assert_equal_with_gradients(output, expected, model.parameters())


@pytest.mark.parametrize("length", [1, 2, 11])
def test_the_last_position_alone_is_the_last_of_all(length):
    model = tiny_model()
    input_ids, attention_mask = histories(length)
    last = model(input_ids, attention_mask, last_position_only=True).last_hidden_state
    torch.testing.assert_close(last, model(input_ids, attention_mask).last_hidden_state[:, -1:])


def test_states_are_float32_under_autocast():
    """The projection rounds to bfloat16; what it gives is then added up as if it were exact."""
    torch.manual_seed(0)
    unit = LinearRecurrentUnit(tiny_config())
    unit.init_weights()
    with torch.no_grad():
        unit.log_decay.fill_(-9.0)  # hardly anything is forgotten
    hidden_states, mask = torch.randn(3, 300, 6), torch.ones(3, 300, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [unit(hidden_states, mask, last_position_only=only)[0][:, -1] for only in (False, True)]
        inputs = torch.view_as_complex(unit.input(hidden_states).double().unflatten(-1, (-1, 2)))
        lags = torch.arange(299, -1, -1)[:, None]
        factor = torch.complex(-unit.log_decay.exp(), unit.log_angle.exp()).to(torch.complex128)
        states = (torch.exp(lags * factor) * inputs * unit.log_scale.exp()).sum(dim=1)
        expected = unit.output(torch.view_as_real(states).flatten(-2).float())
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


def test_the_paces_begin_on_a_ring_with_states_as_large_as_what_they_read():
    torch.manual_seed(0)
    model = LRURecModel(tiny_config(recurrent_size=4000, num_hidden_layers=1))
    unit = model.layers[0].attention
    modulus, angle = torch.exp(-unit.log_decay.exp()), unit.log_angle.exp()
    assert 0.8 <= modulus.min() < 0.81 and 0.98 < modulus.max() <= 0.99
    assert 0 < angle.min() < 0.05 and 6.23 < angle.max() < 6.284
    torch.testing.assert_close(unit.log_scale.exp() ** 2, 1 - modulus**2)
    # White noise of variance 1 and more of it than any of them remembers.
    noise = torch.randn(3, 500, 4000)
    factor = torch.polar(modulus, angle)
    states = linear_recurrence(unit.log_scale.exp() * noise.to(torch.complex64), factor)
    torch.testing.assert_close(states[:, -1].abs().square().mean().item(), 1.0, rtol=0.05, atol=0)


def test_weights_missing_from_a_checkpoint_are_drawn_as_in_a_new_model(tmp_path):
    """Loading builds the model without weights: what the checkpoint lacks has to be initialised afterwards."""
    model = LRURecForSequentialRecommendation(tiny_config(recurrent_size=50))
    weights = {name: weight for name, weight in model.state_dict().items() if "log_scale" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, _ = LRURecForSequentialRecommendation.from_pretrained(tmp_path, output_loading_info=True)
    for before, after in zip(model.model.layers, loaded.model.layers, strict=True):
        assert torch.equal(after.attention.log_decay, before.attention.log_decay)
        torch.testing.assert_close(after.attention.log_scale, before.attention.log_scale)


def test_dropout_is_drawn_in_training_only():
    """A quarter of what the norm and both feed-forward products read is zero, and none of it in evaluation."""
    model = LRURecModel(tiny_config(hidden_dropout=0.25, intermediate_size=40, num_hidden_layers=1))
    inputs = []
    for module in (model.norm, model.layers[0].feed_forward[2]):
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    input_ids = torch.randint(3, 31, (50, 40))
    model.eval()(input_ids)
    assert all((x != 0).all() for x in inputs)
    inputs.clear()
    model.train()(input_ids)
    assert [(x == 0).float().mean().item() for x in inputs] == pytest.approx([0.25] * 2, abs=0.02)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("is_causal", False, "is_causal must be True for lrurec, found False"),
        ("num_hidden_layers", 0, "num_hidden_layers must be at least 1, found 0"),
        ("recurrent_size", 0, "recurrent_size must be at least 1, found 0"),
        ("intermediate_size", 0, "intermediate_size must be at least 1, found 0"),
        ("hidden_dropout", 1.5, "hidden_dropout must be between 0 and 1, found 1.5"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        LRURecConfig(**{"training_objective": "prefix", field: value})
