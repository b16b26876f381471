"""ELASTIC with `use_timestamps`: beside its loop, without leaks, and what the time of a request changes."""

import copy
import math

import pytest
import torch
from transformers import AutoModel

import reference
from adapters import adapted
from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation
from elastic_hf.models import event_time
from factories import assert_pieces_change_nothing, elastic_config, elastic_model, histories, times


FLAGS = {
    "default": {},
    "no memory": {"num_memory_subkeys": 0},
    "no earlier items": {"conv_kernel_size": 1},
    "three layers": {"num_hidden_layers": 3},
    "no block on the stream": {"stream_intermediate_size": 0},
}
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
LENGTHS = [1, 2, 31, 32, 33, 65, 200]


def timed_model(**changes):
    return elastic_model(use_timestamps=True, **changes)


def batch_of(length=7, padding=2):
    """Arguments of a base model for all positions."""
    input_ids, attention_mask = histories(length, padding=padding)
    timestamps, request_timestamps = times(length, padding=padding)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "timestamps": timestamps,
        "request_timestamps": request_timestamps,
    }


def at_last(batch):
    """The same for the last position alone."""
    return {**batch, "request_timestamps": batch["request_timestamps"][:, -1]}


# The mathematics


@pytest.mark.parametrize(
    ("name", "knows"),
    [
        *(("default", knows) for knows in ("all requests", "no request", "some requests")),
        *((name, "all requests") for name in ("three layers", "no earlier items", "no block on the stream")),
    ],
)
def test_training_and_serving_equal_the_loop(name, knows):
    """Outputs and gradients, of all positions and of the last one. The phases are float32."""
    model = timed_model(**FLAGS[name]).double().model
    batch = batch_of()
    if knows == "no request":
        batch["request_timestamps"][:] = -1
    elif knows == "some requests":
        batch["request_timestamps"][1, 3:], batch["request_timestamps"][2, ::2] = -1, -1
    parameters = list(model.parameters())
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


@pytest.mark.parametrize("length", LENGTHS)
@every_flag
def test_the_last_position_alone_equals_the_last_of_all(flags, length):
    model = timed_model(**flags).double().model
    batch = batch_of(length, padding=min(2, length - 1))
    every = model(**batch).last_hidden_state
    last = model(**at_last(batch), last_position_only=True).last_hidden_state
    assert last.shape == (3, 1, 24)
    torch.testing.assert_close(last[:, 0], every[:, -1])


@pytest.mark.parametrize(("num_positions", "min_items"), [(1, 1), (7, 3), (64, 3), (64, 50), (250, 50)])
def test_reading_in_pieces_changes_nothing(num_positions, min_items, monkeypatch):
    """Pieces of some rows and some items; the first row begins behind the first pieces."""
    batch = at_last(batch_of(101, padding=43))
    assert_pieces_change_nothing(timed_model().double(), batch, monkeypatch, num_positions, min_items)


@pytest.mark.parametrize("t", [0, 31, 32, 40])
def test_positions_do_not_see_later_items_or_times(t):
    model = timed_model().double().model
    batch = batch_of(length=70)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][:, t + 1 :] = 3 + (changed["input_ids"][:, t + 1 :] - 2) % 28
    later_times = {name: tensor.clone() for name, tensor in batch.items()}
    later_times["timestamps"][:, t + 1 :] += 4000
    later_times["request_timestamps"][:, t + 1 :] += 9000
    before = model(**batch, output_hidden_states=True)
    for other in (changed, later_times):
        after = model(**other, output_hidden_states=True)
        pairs = zip(
            [*before.hidden_states, before.last_hidden_state],
            [*after.hidden_states, after.last_hidden_state],
            strict=True,
        )
        for one, another in pairs:
            torch.testing.assert_close(one[1:, : t + 1], another[1:, : t + 1], rtol=0, atol=1e-12)
            assert not torch.allclose(one[1:, t + 1], another[1:, t + 1])


def test_integer_seconds_equal_floating_ones():
    model = timed_model()
    batch = at_last(batch_of(padding=0))
    whole = {name: value.long() for name, value in batch.items()}
    torch.testing.assert_close(model(**whole).logits, model(**batch).logits)


# Padding and batching


@every_flag
def test_extra_left_padding_changes_nothing(flags):
    model = timed_model(**flags).double()
    batch = batch_of()
    padded = {name: torch.cat([value.new_full((3, 4), -7), value], dim=1) for name, value in batch.items()}
    padded["attention_mask"][:, :4], padded["input_ids"][:, :4] = 0, 5
    padded["request_timestamps"][:, :4] = -1
    torch.testing.assert_close(model(**at_last(padded)).logits, model(**at_last(batch)).logits)
    real = batch["attention_mask"].bool()
    everywhere = model.model(**batch).last_hidden_state
    torch.testing.assert_close(model.model(**padded).last_hidden_state[:, 4:][real], everywhere[real])


def test_a_row_alone_equals_the_row_in_a_batch():
    model = timed_model().double()
    batch = at_last(batch_of())
    together = model(**batch).logits
    for row, start in ((0, 2), (1, 0), (2, 0)):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        alone |= {name: alone[name][:, start:] for name in ("input_ids", "attention_mask", "timestamps")}
        torch.testing.assert_close(model(**alone).logits, together[row : row + 1])


def test_what_stands_at_padding_changes_nothing():
    model = timed_model()
    batch, other = at_last(batch_of()), at_last(batch_of())
    other["input_ids"][0, :2], other["timestamps"][0, :2] = 7, 3e10
    assert torch.equal(model(**batch).logits, model(**other).logits)


def test_an_empty_history_is_finite_whatever_its_padding():
    model = timed_model()
    batch = at_last(batch_of(padding=7))
    outputs = model(**batch, use_cache=True)
    assert outputs.logits.isfinite().all()
    assert outputs.cache.last_timestamps.tolist() == [-1, *batch["timestamps"][1:, -1].tolist()]
    assert (outputs.cache.recurrent_state[0] == 0).all()


def test_special_tokens_are_left_out_with_their_times():
    model = timed_model()
    batch = at_last(batch_of(padding=0))
    with_unknown = {**batch}
    for name, value in (("input_ids", 1), ("attention_mask", 1), ("timestamps", torch.nan)):
        inserted = batch[name].new_full((3, 2), value)
        with_unknown[name] = torch.cat([batch[name][:, :4], inserted, batch[name][:, 4:]], dim=1)
    torch.testing.assert_close(model(**with_unknown).logits, model(**batch).logits)
    expected = model.get_retrieved_slots(**batch)
    assert torch.equal(model.get_retrieved_slots(**with_unknown), expected)


# The time of the request


@torch.no_grad()
def test_the_time_of_the_request_changes_the_answer_and_not_the_state():
    """What passes after the last event cancels in the experts; the reader is told."""
    model = timed_model()
    batch = at_last(batch_of())
    latest = batch["timestamps"][:, -1]
    answers = []
    for request in (latest, latest + 3600, latest + 3 * 86_400 + 60, torch.full_like(latest, -1), None):
        outputs = model(**{**batch, "request_timestamps": request}, use_cache=True)
        answers.append(outputs.logits)
        for name, tensor in outputs.cache.tensors.items():
            torch.testing.assert_close(tensor, model(**batch, use_cache=True).cache.tensors[name], rtol=0, atol=0)
    assert torch.equal(answers[-1], answers[-2])
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(answers[i], answers[j], atol=1e-3)


def test_recommendations_are_for_now_unless_they_are_told_for_when(monkeypatch):
    model = timed_model()
    batch = at_last(batch_of())
    histories_alone = {name: batch[name] for name in ("input_ids", "attention_mask", "timestamps")}
    now = batch["timestamps"][:, -1].max().item() + 5000.5
    monkeypatch.setattr(event_time.time, "time", lambda: now)
    moment = torch.full((3,), now, dtype=torch.double)
    for function, name in ((model.recommend, "scores"), (model.explain, "item_weights")):
        by_default, told = function(**histories_alone), function(**histories_alone, request_timestamps=moment)
        assert torch.equal(by_default.token_ids, told.token_ids)
        assert torch.equal(getattr(by_default, name), getattr(told, name))
    unknown = model.recommend(**histories_alone, request_timestamps=[-1, -1, -1], top_k=28, exclude_seen=False)
    logits = model(**histories_alone).logits
    torch.testing.assert_close(unknown.scores, logits[:, 3:].sort(descending=True).values)
    assert not torch.allclose(unknown.scores, model.recommend(**histories_alone, top_k=28, exclude_seen=False).scores)
    embeddings = model.get_user_embeddings(**histories_alone, request_timestamps=moment)
    scores = model.recommend(**histories_alone, top_k=28, exclude_seen=False).scores
    torch.testing.assert_close((embeddings @ model.lm_head.weight.T)[:, 3:].sort(descending=True).values, scores)


def test_recommend_takes_times_as_lists_and_arrays():
    model = timed_model()
    batch = {name: value[1:] for name, value in at_last(batch_of()).items()}
    expected = model.recommend(**batch, top_k=4)
    for convert in (torch.Tensor.numpy, torch.Tensor.tolist):
        found = model.recommend(**{name: convert(value) for name, value in batch.items()}, top_k=4)
        assert torch.equal(found.token_ids, expected.token_ids) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamps": None}, "timestamps must be given to a model with use_timestamps=True, found None"),
        ({"timestamps": [[1.0, 2.0]]}, r"timestamps must be a tensor of shape \(3, 7\), found \(1, 2\)"),
        ({"request_timestamps": [5.0, 5.0, 5.0]}, "request_timestamps must be -1 or at least .* in row 0"),
        ({"request_timestamps": [2e9, 2e9]}, r"request_timestamps must be a tensor of shape \(3,\), found \(2,\)"),
    ],
)
@pytest.mark.parametrize("method", ["recommend", "explain", "get_retrieved_slots", "get_user_embeddings", "forward"])
def test_wrong_times_are_named(method, changes, message):
    changes = {name: None if value is None else torch.tensor(value).double() for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        getattr(timed_model(), method)(**{**at_last(batch_of()), **changes})


@pytest.mark.parametrize("method", ["recommend", "explain", "get_retrieved_slots", "get_user_embeddings", "forward"])
@pytest.mark.parametrize("name", ["timestamps", "request_timestamps"])
def test_a_model_without_times_refuses_them(method, name):
    batch = at_last(batch_of())
    arguments = {"input_ids": batch["input_ids"], name: batch[name]}
    with pytest.raises(ValueError, match=f"{name} must be None for a model with use_timestamps=False, found a value"):
        getattr(elastic_model(), method)(**arguments)


# Training


def training_batch(length=13):
    batch = batch_of(length)
    labels = torch.roll(batch["input_ids"], -1, dims=1).masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def test_requests_are_dropped_in_training_alone():
    batch = training_batch()
    without = {**batch, "request_timestamps": torch.full_like(batch["request_timestamps"], -1)}
    for request_dropout, training, is_dropped in ((1.0, True, True), (0.0, True, False), (1.0, False, False)):
        model = timed_model(hidden_dropout=0.0, request_dropout=request_dropout).train(training)
        assert torch.equal(model(**batch).loss, model(**without).loss) == is_dropped
    model = timed_model(request_dropout=1.0).train()
    answer = model.recommend(**at_last(batch_of()), top_k=3).scores
    assert torch.equal(answer, model.eval().recommend(**at_last(batch_of()), top_k=3).scores)


@every_flag
def test_every_parameter_gets_a_gradient(flags):
    model = timed_model(**flags, hidden_dropout=0.0, request_dropout=0.0).train()
    model(**training_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_initial_values():
    """Half-lives from a minute to a year, evenly spaced in the logarithm."""
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(use_timestamps=True)).model
    half_lives = model.experts.half_lives_seconds
    assert half_lives.shape == (2, 16)
    expected = 60 * (365 * 1440) ** (torch.arange(16) / 15)
    torch.testing.assert_close(half_lives, expected.expand(2, 16), rtol=1e-4, atol=0)
    for name, weight in model.time.named_parameters():
        assert 0.017 < weight.std() < 0.023, name
    plain = ElasticForSequentialRecommendation(ElasticConfig()).model
    assert plain.time is None and plain.experts.half_lives_seconds is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(use_reentrant):
    model = timed_model(hidden_dropout=0.3).train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(**training_batch()).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradients(), expected)


def test_bfloat16_autocast_trains_100_steps():
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(elastic_config(use_timestamps=True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**training_batch(33)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_times_stay_in_float32_under_autocast():
    """Seconds, what is kept over them, and the biases of the logits: bfloat16 tells no two days of a year apart."""
    model = timed_model().model
    seen, biases = [], []
    model.experts.register_forward_hook(lambda module, inputs, outputs: seen.extend([*inputs, *outputs]))
    model.layers[0].attention.register_forward_hook(lambda module, inputs, output: biases.append(inputs[-1]))
    for only in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**(at_last(batch_of()) if only else batch_of()), last_position_only=only)
    assert {tensor.dtype for tensor in [*seen, *biases]} == {torch.float32} and len(seen) == 8 and len(biases) == 2


def test_bfloat16_weights_run():
    model = timed_model().to(torch.bfloat16)
    outputs = model(**at_last(batch_of()), use_cache=True)
    assert outputs.logits.isfinite().all()
    assert outputs.cache.recurrent_state.dtype == torch.float32
    assert outputs.cache.last_timestamps.dtype == torch.float64
    model.train()(**training_batch()).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Why, and which slots


def test_an_explanation_reads_the_times():
    model = timed_model().double()
    batch = at_last(batch_of())
    explanation = model.explain(**batch, top_k=4)
    assert torch.equal(explanation.half_lives_seconds, model.model.experts.half_lives_seconds)
    assert elastic_model().explain(*histories(), top_k=1).half_lives_seconds is None
    assert torch.equal(explanation.token_ids, model.recommend(**batch, top_k=4).token_ids)
    torch.testing.assert_close(explanation.item_weights.sum(dim=-1), torch.ones(3, 2, 3, dtype=torch.double))
    later = {**batch, "request_timestamps": batch["request_timestamps"] + 1e6}
    assert not torch.allclose(model.explain(**later, top_k=4).item_weights, explanation.item_weights)


def test_retrieved_slots_are_those_whose_values_get_a_gradient():
    model = timed_model()
    batch = at_last(batch_of())
    slots = model.get_retrieved_slots(**batch)
    values = model.model.layers[-1].retrieval.memory.values.weight
    for row in range(3):
        model.zero_grad()
        model(**{name: value[row : row + 1] for name, value in batch.items()}).logits.square().sum().backward()
        read = values.grad.abs().sum(dim=-1).nonzero().flatten().tolist()
        assert read == sorted({*slots[row].flatten().tolist()})


@pytest.mark.parametrize("name", ["phases", "request_phases"])
def test_an_adapter_of_the_phases_takes_part(name):
    beside, merged = adapted(timed_model(), f"model.time.{name}")
    batch = at_last(batch_of())
    with torch.no_grad():
        torch.testing.assert_close(beside(**batch).logits, merged(**batch).logits)


def test_an_offloaded_model_reads_the_same():
    accelerate = pytest.importorskip("accelerate")
    model, batch = timed_model(), at_last(batch_of())
    expected = model(**batch).logits
    torch.testing.assert_close(accelerate.cpu_offload(model, execution_device="cpu")(**batch).logits, expected)


# Saving, loading, compiling


def test_safetensors_round_trip_is_exact(tmp_path):
    model = timed_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.use_timestamps is True
    batch = at_last(batch_of())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.long
def test_compiled_equals_eager():
    model = timed_model()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (7, 70):
        batch = at_last(batch_of(length, padding=0))
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.long
def test_compiled_training_equals_eager():
    model = timed_model(hidden_dropout=0.0, request_dropout=0.0).train()
    compiled = copy.deepcopy(model)
    compiled.model.compile(fullgraph=True, backend="aot_eager")
    for one in (model, compiled):
        one(**training_batch(length=70)).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
