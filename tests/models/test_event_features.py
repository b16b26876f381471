"""Features of events: beside the loop, without leaks, in every way of reading, and what is unknown."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel

import reference
from adapters import adapted
from elastic_hf import ElasticCache
from elastic_hf.models.event_features import EventFeatures
from factories import (
    EVENT_FEATURES,
    assert_pieces_change_nothing,
    elastic_config,
    elastic_model,
    event_features,
    histories,
    times,
)


READERS = ("elastic", "hstu", "sasrec")


def featured_model(**changes):
    return elastic_model(event_features=EVENT_FEATURES, **changes)


def batch_of(length=7, padding=2, with_times=False):
    """Arguments of a base model for all positions."""
    input_ids, attention_mask = histories(length, padding=padding)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if with_times:
        batch["timestamps"], batch["request_timestamps"] = times(length, padding=padding)
    return {**batch, "event_features": event_features(length, padding=padding)}


def at_last(batch):
    """The same for the last position alone."""
    requests = {name: batch[name][:, -1] for name in ("request_timestamps",) if name in batch}
    return {**batch, **requests}


def reader(model_type):
    """A model of each type that reads features of events."""
    if model_type == "elastic":
        return featured_model()
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 12, "max_position_embeddings": 73, "event_features": EVENT_FEATURES}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


every_reader = pytest.mark.parametrize("model_type", READERS)


# The mathematics


def test_what_is_added_equals_the_loop():
    torch.manual_seed(0)
    module = EventFeatures(elastic_config(event_features=EVENT_FEATURES)).double()
    features = event_features(padding=0).double()
    items = torch.randn(*features.shape[:2], 24, dtype=torch.float64)
    expected = torch.stack([reference.event_vector(module, event) for event in features.flatten(0, 1)])
    expected = items.clone() + expected.unflatten(0, items.shape[:2])
    reference.assert_equal_with_gradients(module(items, features), expected, [module.features[1].weight])
    found, wanted = (
        torch.autograd.grad(output.square().sum(), module.features[2].weight)
        for output in (module(items, features), expected)
    )
    torch.testing.assert_close(found[0][1:], wanted[0][1:])
    assert (found[0][0] == 0).all() and (wanted[0][0] != 0).any()  # the embedding of what is unknown stays as it is


@pytest.mark.parametrize("with_times", [False, True])
def test_training_and_serving_equal_the_loop(with_times):
    """Outputs and gradients, of all positions and of the last one."""
    model = featured_model(use_timestamps=with_times).double().model
    batch = batch_of(with_times=with_times)
    parameters = [weight for name, weight in model.named_parameters() if not name.startswith("event_features.")]
    parameters.append(model.event_features.features[1].weight)
    torch.manual_seed(0)
    weights = torch.randn(3, 7, 24, dtype=torch.float64) * batch["attention_mask"][..., None]

    def gradients(output, weights):
        return torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True, retain_graph=True)

    expected = reference.user_embeddings(model, **batch)
    output = model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(output[real], expected[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(output, weights), gradients(expected, weights), atol=1e-4, rtol=1e-5)
    last = model(**at_last(batch), last_position_only=True).last_hidden_state
    torch.testing.assert_close(last, expected[:, -1:], atol=1e-5, rtol=1e-5)
    found, wanted = gradients(last, weights[:, -1:]), gradients(expected[:, -1:], weights[:, -1:])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


@every_reader
@pytest.mark.parametrize("feature", range(3))
@pytest.mark.parametrize("t", [0, 31, 40])
def test_features_inform_what_comes_after_them_and_nothing_before(model_type, feature, t):
    model = reader(model_type).double().model
    batch = batch_of(length=70)
    changed = {**batch, "event_features": batch["event_features"].clone()}
    values = changed["event_features"][:, t, feature]
    size = [*EVENT_FEATURES.values()][feature]
    values.copy_((values + 1) % (size + 1) if size else values + 1)
    before, after = (model(**some).last_hidden_state[1:] for some in (batch, changed))
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-12)
    assert ((before[:, t:] - after[:, t:]).abs().amax(dim=-1)[:, :5] > 1e-6).all()


@every_reader
def test_the_last_position_alone_equals_the_last_of_all(model_type):
    model = reader(model_type).double().model
    batch = batch_of()
    last = model(**batch, last_position_only=True).last_hidden_state
    torch.testing.assert_close(last[:, 0], model(**batch).last_hidden_state[:, -1])


@pytest.mark.parametrize(("num_positions", "min_items"), [(1, 1), (7, 3), (64, 50), (250, 50)])
def test_reading_in_pieces_changes_nothing(num_positions, min_items, monkeypatch):
    model = featured_model(use_timestamps=True).double()
    batch = at_last(batch_of(101, padding=43, with_times=True))
    assert_pieces_change_nothing(model, batch, monkeypatch, num_positions, min_items)


@pytest.mark.parametrize("model_type", ["hstu", "sasrec"])
def test_a_large_batch_is_encoded_a_few_rows_at_a_time(model_type, monkeypatch):
    model = reader(model_type)
    with torch.no_grad():
        expected = model(**batch_of()).logits
        monkeypatch.setattr("elastic_hf.baselines.common.MAX_POSITIONS", 14)
        torch.testing.assert_close(model(**batch_of()).logits, expected)


# What is not known


@every_reader
def test_what_is_unknown_adds_nothing(model_type):
    model = reader(model_type)
    config = copy.deepcopy(model.config)
    config.event_features = {}
    plain = type(model)(config).eval()
    shared = {name: tensor for name, tensor in model.state_dict().items() if "event_features" not in name}
    plain.load_state_dict(shared)
    with torch.no_grad():
        for feature in (module for module in model.modules() if isinstance(module, EventFeatures)):
            for embedding in (feature.features[0], feature.features[2]):
                embedding.weight[0] = 0
    batch = batch_of(padding=0)
    unknown = {**batch, "event_features": torch.zeros_like(batch["event_features"])}
    del batch["event_features"]
    torch.testing.assert_close(model(**unknown).logits, plain(**batch).logits)


def test_the_embedding_of_what_is_unknown_stays_zero_in_training():
    torch.manual_seed(0)
    model = type(featured_model())(elastic_config(event_features=EVENT_FEATURES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    batch = batch_of(13)
    labels = torch.roll(batch["input_ids"], -1, dims=1).masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(3):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    for embedding in (model.model.event_features.features[0], model.model.event_features.features[2]):
        assert (embedding.weight[0] == 0).all() and (embedding.weight[1:].abs().amax(dim=1) > 0).all()


@every_reader
def test_every_parameter_gets_a_gradient(model_type):
    model = reader(model_type).train()
    batch = batch_of(70)
    labels = torch.roll(batch["input_ids"], -1, dims=1).masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if "event_features" in name:
            assert parameter.grad.isfinite().all() and (parameter.grad.abs().amax(dim=1)[1:] > 0).all(), name


# Padding, special tokens and states


def test_what_stands_at_padding_changes_nothing():
    model = featured_model()
    batch, other = batch_of(), batch_of()
    other["event_features"][0, :2] = torch.tensor([3.0, 1e9, -5.5])
    assert torch.equal(model(**batch).logits, model(**other).logits)
    padded = {name: torch.cat([value[:, :1], value], dim=1) for name, value in batch.items()}
    padded["attention_mask"][:, 0], padded["event_features"][:, 0] = 0, torch.nan
    torch.testing.assert_close(model(**padded).logits, model(**batch).logits)
    assert model(**batch_of(padding=7)).logits.isfinite().all()


def test_special_tokens_are_left_out_with_their_features():
    model = featured_model()
    batch = batch_of(padding=0)
    with_unknown = {
        name: torch.cat([value[:, :4], value.new_full((3, 2, *value.shape[2:]), filling), value[:, 4:]], dim=1)
        for (name, value), filling in zip(batch.items(), (1, 1, torch.nan), strict=True)
    }
    torch.testing.assert_close(model(**with_unknown).logits, model(**batch).logits)
    assert torch.equal(model.get_retrieved_slots(**with_unknown), model.get_retrieved_slots(**batch))


@pytest.mark.parametrize("with_times", [False, True])
@pytest.mark.parametrize("cuts", [[1], [4, 5], [*range(1, 11)]], ids=str)
@torch.no_grad()
def test_appends_are_the_whole(cuts, with_times):
    model = featured_model(use_timestamps=with_times).double()
    batch = batch_of(11, padding=0, with_times=with_times)
    batch.pop("request_timestamps", None)
    whole = model(**batch, use_cache=True)
    cache = ElasticCache.empty(model, 3)
    pieces = zip(*(value.tensor_split(cuts, dim=1) for value in batch.values()), strict=True)
    for piece in pieces:
        outputs = model(**dict(zip(batch, piece, strict=True)), cache=cache, use_cache=True)
        cache = outputs.cache
    torch.testing.assert_close(outputs.logits, whole.logits)
    for name, tensor in whole.cache.tensors.items():
        torch.testing.assert_close(cache.tensors[name], tensor)
    # A state is as large as without features, and the features of earlier events are in it.
    plain = elastic_model(use_timestamps=with_times).double()
    without = {name: value for name, value in batch.items() if name != "event_features"}
    expected = plain(**without, use_cache=True).cache.tensors
    assert {name: tensor.shape for name, tensor in cache.tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


def test_a_state_names_the_weights_of_the_features():
    model = featured_model().model
    digest = model.digest()
    for feature in model.event_features.features:
        with torch.no_grad():
            feature.weight.view(-1)[-1].add_(1)
        assert model.digest() != digest
        digest = model.digest()


# Recommendations, and bad input


def test_recommend_takes_features_as_lists_and_arrays():
    model = featured_model()
    batch = {name: value[1:] for name, value in batch_of().items()}
    expected = model.recommend(**batch, top_k=4)
    for convert in (torch.Tensor.numpy, torch.Tensor.tolist):
        found = model.recommend(**{name: convert(value) for name, value in batch.items()}, top_k=4)
        assert torch.equal(found.token_ids, expected.token_ids) and torch.equal(found.scores, expected.scores)
    explanation = model.explain(**batch, top_k=4)
    assert torch.equal(explanation.token_ids, expected.token_ids)
    scores = model.get_user_embeddings(**batch) @ model.lm_head.weight.T
    torch.testing.assert_close(scores.gather(1, expected.token_ids), expected.scores)
    with pytest.raises(
        ValueError, match="event_features must be numbers in a tensor, an array or lists of one length"
    ):
        model.recommend(**{**batch, "event_features": [[[1, 2, 3]], []]})


def test_saved_and_loaded(tmp_path):
    model = featured_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.event_features == EVENT_FEATURES
    assert torch.equal(loaded(**batch_of()).logits, model(**batch_of()).logits)


NAMES = r"event_features \(action, price, rating\) must be a floating tensor of shape \(3, 7, 3\), found"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda features: None, f"{NAMES} None"),
        (lambda features: features[:, 1:], rf"{NAMES} torch.float32 of shape \(3, 6, 3\)"),
        (lambda features: features[..., :2], rf"{NAMES} torch.float32 of shape \(3, 7, 2\)"),
        (lambda features: features[..., 0], rf"{NAMES} torch.float32 of shape \(3, 7\)"),
        (lambda features: features + 20, "event_features of 'action' must be categories from 0 to 4, found 2. in row"),
        (lambda features: features - 20, "event_features of 'action' must be categories from 0 to 4, found -"),
        (
            lambda features: features + torch.tensor([0, 0, 0.5]),
            "event_features of 'rating' must be categories from 0 to 7, found .*.5 in row 0",
        ),
        (
            lambda features: features.index_put((torch.tensor(2), torch.tensor(4)), torch.tensor([1, torch.inf, 2])),
            "event_features of 'price' must be finite numbers, found inf in row 2",
        ),
        (
            lambda features: features.nan_to_num(0) * torch.nan,
            "event_features of 'action' must be .*, found nan in row",
        ),
    ],
)
@pytest.mark.parametrize("method", ["recommend", "explain", "get_retrieved_slots", "get_user_embeddings", "forward"])
def test_wrong_features_are_named(method, change, message):
    batch = batch_of()
    batch["event_features"] = change(batch["event_features"])
    with pytest.raises(ValueError, match=message):
        getattr(featured_model(), method)(**batch)


@pytest.mark.parametrize("method", ["recommend", "explain", "get_retrieved_slots", "get_user_embeddings", "forward"])
def test_a_model_without_features_refuses_them(method):
    message = "event_features must be None for a model without event features, found a value"
    for input_id in (5, 1):  # unknown items are left out
        batch = batch_of()
        batch["input_ids"][1, 3] = input_id
        with pytest.raises(ValueError, match=message):
            getattr(elastic_model(), method)(**batch)


def test_integer_categories_are_no_floating_tensor():
    batch = batch_of(padding=0)
    batch["event_features"] = batch["event_features"].long()
    with pytest.raises(ValueError, match=f"{NAMES} torch.int64 of shape"):
        featured_model()(**batch)


@every_reader
def test_an_adapter_of_a_number_takes_part(model_type):
    model = reader(model_type)
    name = next(name for name, module in model.named_modules() if isinstance(module, EventFeatures))
    beside, merged = adapted(model, f"{name}.features.1")
    with torch.no_grad():
        torch.testing.assert_close(beside(**batch_of()).logits, merged(**batch_of()).logits)


@every_reader
def test_an_offloaded_model_reads_the_same(model_type):
    accelerate = pytest.importorskip("accelerate")
    model, batch = reader(model_type), batch_of()
    expected = model(**batch).logits
    torch.testing.assert_close(accelerate.cpu_offload(model, execution_device="cpu")(**batch).logits, expected)


def test_one_program_reads_all_lengths():
    model = featured_model()
    batch = batch_of(padding=0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
