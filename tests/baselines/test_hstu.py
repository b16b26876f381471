import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import reference
from elastic_hf.baselines import common
from elastic_hf.baselines.hstu import HSTUConfig, HSTUForSequentialRecommendation, HSTUModel, buckets_between


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
    output = model(input_ids, attention_mask).last_hidden_state[attention_mask == 1]
    expected = torch.cat(reference.hstu(model, input_ids, attention_mask))
    reference.assert_equal_with_gradients(output, expected, model.parameters())


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


# With times


def timed_histories():
    """Arguments for all positions, with anything for the times of padding."""
    input_ids, attention_mask = histories()
    generator = torch.Generator().manual_seed(3)
    pauses = 10 ** (8 * torch.rand(4, 8, generator=generator, dtype=torch.double))
    pauses[:, 1::3] = 0
    seconds = 1e9 + pauses.cumsum(dim=1)
    timestamps = seconds[:, :-1].masked_fill(attention_mask == 0, torch.nan)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "timestamps": timestamps,
        "request_timestamps": seconds[:, 1:].masked_fill(attention_mask == 0, -1),
    }


def last_of(batch):
    return {**batch, "request_timestamps": batch["request_timestamps"][:, -1]}


@pytest.mark.parametrize("knows", [True, False])
def test_hstu_with_times_is_the_loop_with_its_gradients(knows):
    model = tiny_model(use_timestamps=True)
    batch = timed_histories()
    if not knows:
        batch["request_timestamps"][:] = -1
    output = model(**batch).last_hidden_state[batch["attention_mask"] == 1]
    expected = torch.cat(reference.hstu(model, **batch))
    reference.assert_equal_with_gradients(output, expected, model.parameters())


def test_buckets_are_of_the_authors_code():
    """floor(log(max(1, seconds)) / 0.301), in seconds until the next item."""
    timestamps = torch.tensor([[0, 50, 10_050]])
    found = buckets_between(timestamps, torch.tensor([[50, 10_050, 10_053]]))
    assert found.tolist() == [[[12, 0, 0], [30, 30, 0], [30, 30, 3]]]
    unknown = buckets_between(timestamps, torch.tensor([[-1, -1, -1]]))
    assert unknown.tolist() == [[[0, 0, 0], [12, 0, 0], [30, 30, 0]]]


@pytest.mark.parametrize("request_timestamp", [2e9, -1])
def test_the_last_position_with_times_alone_is_the_last_of_all(request_timestamp):
    """A request whose time is not known is read as in training, where none of a history is."""
    model = tiny_model(use_timestamps=True)
    batch = timed_histories()
    batch["request_timestamps"][:, -1] = request_timestamp
    last = model(**last_of(batch), last_position_only=True).last_hidden_state
    if request_timestamp == -1:
        batch["request_timestamps"][:] = -1
        without = {name: value for name, value in batch.items() if name != "request_timestamps"}
        assert torch.equal(model(**without, last_position_only=True).last_hidden_state, last)
    torch.testing.assert_close(last, model(**batch).last_hidden_state[:, -1:])
    later = {**last_of(batch), "request_timestamps": torch.full((4,), 3e9, dtype=torch.double)}
    assert not torch.allclose(model(**later, last_position_only=True).last_hidden_state, last)


@pytest.mark.parametrize("t", [0, 3, 5])
def test_no_later_item_or_time_reaches_a_position(t):
    model = tiny_model(use_timestamps=True)
    batch = timed_histories()
    other = {name: value.clone() for name, value in batch.items()}
    other["input_ids"][:, t + 1 :] = 3 + (other["input_ids"][:, t + 1 :] - 2) % 28
    other["timestamps"][:, t + 1 :] += 3e6
    other["request_timestamps"][:, t + 1 :] += 7e6
    before, after = (model(**x).last_hidden_state[0] for x in (batch, other))
    torch.testing.assert_close(before[: t + 1], after[: t + 1], rtol=0, atol=1e-12)
    assert not torch.allclose(before[t + 1], after[t + 1])


def test_padding_and_what_stands_there_change_nothing():
    model = tiny_model(use_timestamps=True)
    batch = last_of(timed_histories())
    expected = model(**batch, last_position_only=True).last_hidden_state
    batch["timestamps"][batch["attention_mask"] == 0] = 7e10
    torch.testing.assert_close(model(**batch, last_position_only=True).last_hidden_state, expected, rtol=0, atol=0)
    alone = {name: value[1:2] for name, value in batch.items()}
    alone |= {name: alone[name][:, 3:] for name in ("input_ids", "attention_mask", "timestamps")}
    torch.testing.assert_close(model(**alone, last_position_only=True).last_hidden_state, expected[1:2])


def test_a_large_timed_batch_is_encoded_a_few_rows_at_a_time(monkeypatch):
    model = tiny_model(use_timestamps=True)
    with torch.no_grad():
        expected = [model(**timed_histories()), model(**last_of(timed_histories()), last_position_only=True)]
        monkeypatch.setattr(common, "MAX_POSITIONS", 14)
        found = [model(**timed_histories()), model(**last_of(timed_histories()), last_position_only=True)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state)


def test_a_timed_model_recommends_and_trains():
    torch.manual_seed(0)
    config = HSTUConfig(vocab_size=31, hidden_size=12, max_position_embeddings=9, use_timestamps=True)
    model = HSTUForSequentialRecommendation(config)
    batch = timed_histories()
    labels = batch["input_ids"].roll(-1, dims=-1).masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    recommended = model.recommend(**last_of(batch), top_k=4)
    logits = model.eval()(**last_of(batch)).logits
    torch.testing.assert_close(recommended.scores, logits.gather(1, recommended.token_ids))
    with pytest.raises(ValueError, match="timestamps must be given to a model with use_timestamps=True"):
        model.recommend(batch["input_ids"])
