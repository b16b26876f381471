import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from elastic_hf.baselines.gru4rec import (
    GRU4RecConfig,
    GRU4RecForSequentialRecommendation,
    GRU4RecModel,
    items_first,
)


every_depth = pytest.mark.parametrize("num_hidden_layers", [1, 2])


def tiny_config(**changes):
    return GRU4RecConfig(**{"vocab_size": 31, "hidden_size": 6, "recurrent_size": 5, **changes})


def tiny_model(**changes):
    torch.manual_seed(0)
    return GRU4RecForSequentialRecommendation(tiny_config(**changes)).eval()


def histories():
    """Four histories of 7, 4, 1 and 0 items."""
    input_ids = torch.randint(3, 31, (4, 7), generator=torch.Generator().manual_seed(1))
    attention_mask = (torch.arange(7) >= torch.tensor([[0], [3], [6], [7]])).long()
    return input_ids * attention_mask, attention_mask


def gru4rec(model, input_ids, attention_mask):
    """(B, L) -> (B, L, D): the gates of each layer written out, one item after the other, padding skipped."""
    R = model.config.recurrent_size
    rows = []
    for ids, mask in zip(input_ids, attention_mask, strict=True):
        state = [model.output.weight.new_zeros(R) for _ in model.layers]
        for token_id, is_item in zip(ids, mask, strict=True):
            if is_item:
                x = model.embed_tokens.weight[token_id]
                for layer, h in enumerate(state):
                    gru = model.layers[layer].gru
                    read = gru.weight_ih_l0 @ x + gru.bias_ih_l0
                    kept = gru.weight_hh_l0 @ h + gru.bias_hh_l0
                    r = torch.sigmoid(read[:R] + kept[:R])
                    z = torch.sigmoid(read[R : 2 * R] + kept[R : 2 * R])
                    n = torch.tanh(read[2 * R :] + r * kept[2 * R :])
                    state[layer] = x = (1 - z) * n + z * h
            rows.append(model.output.weight @ state[-1] + model.output.bias)
    return torch.stack(rows).reshape(*input_ids.shape, -1)


@every_depth
def test_outputs_and_gradients_are_the_loops(num_hidden_layers):
    """Every bias counts, so that reading a padding token would show."""
    torch.manual_seed(0)
    model = GRU4RecModel(tiny_config(num_hidden_layers=num_hidden_layers)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    input_ids, attention_mask = histories()
    results = []
    for output in (model(input_ids, attention_mask).last_hidden_state, gru4rec(model, input_ids, attention_mask)):
        results.append((output, *torch.autograd.grad((output**2).sum(), list(model.parameters()))))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def test_the_last_position_alone_is_the_last_of_all():
    model = tiny_model().model
    input_ids, attention_mask = histories()
    expected = model(input_ids).last_hidden_state[:, -1:]
    result = model(input_ids, attention_mask, last_position_only=True).last_hidden_state
    assert result.shape == (4, 1, 6)
    torch.testing.assert_close(result, expected)


def test_items_move_to_the_front_in_their_order():
    items = torch.tensor([[0, 0, 9, 5, 9], [7, 4, 8, 3, 6], [0, 0, 0, 0, 0]])
    expected = torch.tensor([[9, 5, 9, 0, 0], [7, 4, 8, 3, 6], [0, 0, 0, 0, 0]])
    features = torch.tensor([1.0, 10.0])
    assert torch.equal(items_first(items[..., None] * features, items != 0), expected[..., None] * features)


@every_depth
def test_hidden_states_are_those_after_each_item(num_hidden_layers):
    """At each position of a padded history, too, and zeros before its first item."""
    model = tiny_model(num_hidden_layers=num_hidden_layers).model
    input_ids, attention_mask = histories()
    hidden_states = model(input_ids, attention_mask, output_hidden_states=True).hidden_states
    sizes = [6] + [5] * (num_hidden_layers - 1) + [6]  # the last is what the model returns
    assert [tuple(states.shape) for states in hidden_states] == [(4, 7, size) for size in sizes]
    alone = model(input_ids[1:2, 3:], output_hidden_states=True).hidden_states
    for states, expected in zip(hidden_states, alone, strict=True):
        torch.testing.assert_close(states[1:2, 3:], expected)
    for states in hidden_states[1:-1]:
        assert (states[attention_mask == 0] == 0).all()


@every_depth
def test_dropout_is_drawn_in_training_only(num_hidden_layers):
    """A quarter of what each GRU and the linear layer read is zero, and none of it in evaluation."""
    model = tiny_model(num_hidden_layers=num_hidden_layers, hidden_dropout=0.25).model
    inputs = []
    for module in (*model.layers, model.output):
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    input_ids = torch.randint(3, 31, (50, 40))
    model(input_ids)
    assert all((x != 0).all() for x in inputs)
    inputs.clear()
    model.train()(input_ids)
    shares = [(x == 0).float().mean().item() for x in inputs]
    assert shares == pytest.approx([0.25] * (num_hidden_layers + 1), abs=0.02)


def test_a_round_trip_changes_nothing(tmp_path):
    model = tiny_model(num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    loaded = GRU4RecForSequentialRecommendation.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    input_ids, attention_mask = histories()
    torch.testing.assert_close(loaded(input_ids, attention_mask).logits, model(input_ids, attention_mask).logits)


def test_weights_missing_from_a_checkpoint_are_drawn_as_in_a_new_model(tmp_path):
    """Loading builds the model without weights: what the checkpoint lacks has to be initialised afterwards."""
    model = tiny_model(recurrent_size=200)
    weights = {name: weight for name, weight in model.state_dict().items() if "_hh_" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, _ = GRU4RecForSequentialRecommendation.from_pretrained(tmp_path, output_loading_info=True)
    loaded = loaded.model.layers[0].gru
    assert torch.equal(loaded.weight_ih_l0, model.model.layers[0].gru.weight_ih_l0)
    assert (loaded.bias_hh_l0 == 0).all()
    for gru in (model.model.layers[0].gru, loaded):
        bound = (6 / (200 + 200)) ** 0.5
        assert gru.weight_hh_l0.abs().max() <= bound
        torch.testing.assert_close(gru.weight_hh_l0.std().item(), bound / 3**0.5, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurrent_size": 0}, "recurrent_size must be at least 1, found 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, found 0"),
        ({"hidden_dropout": 1.5}, "hidden_dropout must be between 0 and 1, found 1.5"),
        ({"is_causal": False, "training_objective": "prefix"}, "is_causal must be True for gru4rec, found False"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        GRU4RecConfig(**changes)
