import copy
import math

import pytest
import torch
from transformers import AutoConfig, AutoModel

import reference
from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticModel
from factories import assert_pieces_change_nothing, elastic_config, elastic_model, histories, read_in_pieces_of


FLAGS = {
    "default": {},
    "prefix": {"training_objective": "prefix"},
    "no memory": {"num_memory_subkeys": 0},
    "no earlier items": {"conv_kernel_size": 1},
    "three layers": {"num_hidden_layers": 3},
    "one layer": {"num_hidden_layers": 1},
    "untied": {"tie_word_embeddings": False},
    "sampled_softmax": {"training_loss": "sampled_softmax"},
    "gbce": {"training_loss": "gbce"},
    "bce": {"training_loss": "bce", "num_negatives": 1},
    "no block on the stream": {"stream_intermediate_size": 0},
}
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())


# The mathematics


@pytest.mark.parametrize("name", ["default", "three layers", "no earlier items", "no block on the stream"])
def test_training_and_serving_equal_the_loop(name):
    """Outputs and gradients, of all positions and of the last one."""
    model = elastic_model(**FLAGS[name]).double().model
    input_ids, attention_mask = histories()
    parameters = list(model.parameters())
    torch.manual_seed(0)
    weights = torch.randn(3, 7, 24, dtype=torch.float64) * attention_mask[..., None]

    def gradients(output, weights):
        return torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True, retain_graph=True)

    expected = reference.user_embeddings(model, input_ids, attention_mask)
    output = model(input_ids, attention_mask).last_hidden_state
    real = attention_mask.bool()
    torch.testing.assert_close(output[real], expected[real])
    torch.testing.assert_close(gradients(output, weights), gradients(expected, weights))
    last = model(input_ids, attention_mask, last_position_only=True).last_hidden_state
    torch.testing.assert_close(last, expected[:, -1:])
    torch.testing.assert_close(gradients(last, weights[:, -1:]), gradients(expected[:, -1:], weights[:, -1:]))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@every_flag
def test_the_last_position_alone_equals_the_last_of_all(flags, length):
    model = elastic_model(**flags).double().model
    input_ids, attention_mask = histories(length, padding=min(2, length - 1))
    every = model(input_ids, attention_mask).last_hidden_state
    last = model(input_ids, attention_mask, last_position_only=True).last_hidden_state
    assert last.shape == (3, 1, 24)
    torch.testing.assert_close(last[:, 0], every[:, -1])


@pytest.mark.parametrize("min_items", [1, 3, 50])
@pytest.mark.parametrize("num_positions", [1, 7, 64, 250])
@torch.no_grad()
def test_reading_in_pieces_changes_nothing(num_positions, min_items, monkeypatch):
    """Pieces of some rows and some items; the first row begins behind the first pieces."""
    input_ids, attention_mask = histories(101, padding=43)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    assert_pieces_change_nothing(elastic_model().double(), batch, monkeypatch, num_positions, min_items)


def test_attentions_are_refused():
    with pytest.raises(ValueError, match="output_attentions"):
        elastic_model()(*histories(), output_attentions=True)


def test_a_long_history_is_read_in_bounded_memory(monkeypatch):
    model = elastic_model()
    read_in_pieces_of(monkeypatch, 100, 40)
    sizes = []
    model.model.stream.register_forward_hook(lambda module, inputs, outputs: sizes.append(inputs[0].shape[:2].numel()))
    model.recommend(torch.randint(3, 31, (5, 730)), top_k=2, exclude_seen=False)
    assert sum(sizes) == 5 * 730 and max(sizes) <= 100


# No item after t reaches t


@pytest.mark.parametrize("t", [0, 63, 64, 100])
def test_positions_do_not_see_the_future(t):
    model = elastic_model().double().model
    input_ids, attention_mask = histories(length=130)
    changed = input_ids.clone()
    changed[:, t + 1 :] = 3 + (changed[:, t + 1 :] - 2) % 28
    before, after = (model(ids, attention_mask, output_hidden_states=True) for ids in (input_ids, changed))
    pairs = zip(
        [*before.hidden_states, before.last_hidden_state],
        [*after.hidden_states, after.last_hidden_state],
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one[:, : t + 1], other[:, : t + 1], rtol=0, atol=1e-12)
        assert not torch.allclose(one[:, t + 1 :], other[:, t + 1 :])


# Padding, batching, length


@every_flag
def test_extra_left_padding_changes_nothing(flags):
    model = elastic_model(**flags).double()
    batch = histories()
    padded = [torch.cat([x.new_zeros(3, 4), x], dim=-1) for x in batch]
    torch.testing.assert_close(model(*padded).logits, model(*batch).logits)
    real = batch[1].bool()
    everywhere = model.model(*batch).last_hidden_state
    torch.testing.assert_close(model.model(*padded).last_hidden_state[:, 4:][real], everywhere[real])


@every_flag
def test_a_row_alone_equals_the_row_in_a_batch(flags):
    model = elastic_model(**flags).double()
    input_ids, attention_mask = histories()
    together = model(input_ids, attention_mask).logits
    torch.testing.assert_close(model(input_ids[:1, 2:]).logits, together[:1])
    for row in (1, 2):
        torch.testing.assert_close(model(input_ids[row : row + 1]).logits, together[row : row + 1])


def test_what_stands_at_padding_changes_nothing():
    model = elastic_model()
    input_ids, attention_mask = histories()
    other = input_ids.clone()
    other[0, :2] = 7
    assert torch.equal(model(input_ids, attention_mask).logits, model(other, attention_mask).logits)
    assert torch.equal(model(input_ids).logits, model(input_ids, attention_mask).logits)


def test_the_number_of_threads_changes_nothing():
    model = elastic_model()
    batch = histories(200)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(model(*batch).logits)
    finally:
        torch.set_num_threads(num_threads)
    torch.testing.assert_close(*results)


def test_a_history_a_hundred_times_longer_than_trained_on_is_read():
    model = elastic_model().train()
    optimizer = torch.optim.AdamW(model.parameters())
    input_ids, attention_mask = histories(length=200)
    model(input_ids, attention_mask, labels=input_ids).loss.backward()
    optimizer.step()
    model.eval()
    long = torch.randint(3, 31, (2, 20_000))
    with torch.no_grad():
        assert model(long).logits.isfinite().all()


def test_an_empty_history_is_read_as_zeros():
    model = elastic_model()
    input_ids, attention_mask = histories(padding=7)
    outputs = model.model(input_ids, attention_mask)
    assert outputs.last_hidden_state.isfinite().all()
    with torch.no_grad():
        assert model(input_ids, attention_mask).logits.isfinite().all()


# Training


def train_batch(model, length=13):
    input_ids, attention_mask = histories(length)
    labels = torch.roll(input_ids, -1, dims=1).masked_fill(attention_mask == 0, -100)
    if model.config.training_objective == "prefix":
        labels[:, :-1] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@every_flag
def test_every_parameter_gets_a_gradient(flags):
    model = elastic_model(**flags, hidden_dropout=0.0).train()
    model(**train_batch(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["default", "prefix"])
def test_bfloat16_autocast_trains_200_steps(name):
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(elastic_config(**FLAGS[name])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = train_batch(model)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_interests_stay_in_float32_under_autocast():
    model = elastic_model().model
    seen = []
    model.experts.register_forward_hook(lambda module, inputs, outputs: seen.extend([inputs[0], *outputs]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*histories())
        interests = model.chunk(torch.randn(3, 7, 24), histories()[1].bool())
    assert {tensor.dtype for tensor in [*seen, *interests[0]]} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["default", "no memory"])
def test_activation_checkpointing_keeps_less_and_changes_no_gradient(name, use_reentrant):
    model = elastic_model(**FLAGS[name], hidden_dropout=0.3).train()
    batch = train_batch(model)
    num_kept = 0

    def keep(tensor):
        nonlocal num_kept
        num_kept += tensor.numel()
        return tensor

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    num_kept_before, num_kept = num_kept, 0
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradients(), expected)
    assert 0 < num_kept < 0.8 * num_kept_before


def test_initial_scale():
    """Standard deviations (or values) of every parameter of a model of the default size."""
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        part = name.split(".")[-2] + "." + name.split(".")[-1]
        if "norm" in part:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name.endswith("log_half_life"):
            half_life = 1 + parameter.exp()
            torch.testing.assert_close(half_life.min().item(), 2.0)
            torch.testing.assert_close(half_life.max().item(), 1025.0, rtol=1e-4, atol=0)
        elif name.endswith("experts.experts"):
            assert 0.12 < parameter.std() < 0.13, name  # 1 / sqrt(64)
        elif name.endswith("sub_keys"):
            assert 0.33 < parameter.std() < 0.38, name  # 1 / sqrt(8)
        elif name.endswith("convolution"):
            assert 0.017 < parameter.std() < 0.023, name  # 192 values only
        else:
            assert 0.019 < parameter.std() < 0.021, name


# The interest memory in the model


def test_the_memory_sits_in_the_last_layer():
    assert [layer.retrieval is not None for layer in elastic_model().model.layers] == [False, True]


def test_retrieved_slots_are_those_whose_values_get_a_gradient():
    model = elastic_model()
    input_ids, attention_mask = histories()
    slots = model.get_retrieved_slots(input_ids, attention_mask)
    assert slots.shape == (3, 2, 4)
    values = model.model.layers[-1].retrieval.memory.values.weight
    for row in range(3):
        model.zero_grad()
        model(input_ids[row : row + 1], attention_mask[row : row + 1]).logits.square().sum().backward()
        read = values.grad.abs().sum(dim=-1).nonzero().flatten().tolist()
        assert read == sorted({*slots[row].flatten().tolist()})


def test_slots_of_unknown_items_and_of_training_mode_are_those_of_the_items():
    model = elastic_model(hidden_dropout=0.5)
    input_ids, _ = histories()
    expected = model.get_retrieved_slots(input_ids)
    unknown = torch.cat([input_ids[:, :4], torch.ones(3, 2, dtype=torch.long), input_ids[:, 4:]], dim=1)
    assert torch.equal(model.train().get_retrieved_slots(unknown), expected)
    assert all(module.training for module in model.modules())


def test_a_model_without_memory_retrieves_no_slots():
    with pytest.raises(ValueError, match="num_memory_subkeys must be at least 1"):
        elastic_model(num_memory_subkeys=0).get_retrieved_slots(histories()[0])


# Saving, loading, compiling


@every_flag
def test_safetensors_round_trip_is_exact(flags, tmp_path):
    model = elastic_model(**flags)
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ElasticForSequentialRecommendation
    assert type(AutoConfig.from_pretrained(tmp_path)) is ElasticConfig
    for (name, saved), (other_name, restored) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*loaded.named_parameters(), *loaded.named_buffers()],
        strict=True,
    ):
        assert name == other_name and torch.equal(saved, restored), name
    batch = histories()
    assert torch.equal(loaded(*batch).logits, model(*batch).logits)


def test_base_model_and_head_load_each_other(tmp_path):
    model = elastic_model()
    model.save_pretrained(tmp_path / "head")
    base, info = ElasticModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"]
    base.save_pretrained(tmp_path / "base")
    head = ElasticForSequentialRecommendation.from_pretrained(tmp_path / "base")
    batch = histories()
    assert torch.equal(head(*batch).logits, model(*batch).logits)


def test_bfloat16_weights_run():
    model = elastic_model().to(torch.bfloat16)
    batch = histories()
    assert model(*batch).logits.isfinite().all()
    assert model(*batch, use_cache=True).cache.recurrent_state.dtype == torch.float32
    model.train()(**train_batch(model)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["default", pytest.param("no memory", marks=pytest.mark.long)])
def test_compiled_equals_eager(name):
    model = elastic_model(**FLAGS[name])
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager", dynamic=True)
    for length, batch_size in ((7, 3), (70, 2)):
        batch = histories(length, batch_size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*batch).logits, model(*batch).logits)


def test_compiled_training_equals_eager():
    model = elastic_model(hidden_dropout=0.0).train()
    compiled = copy.deepcopy(model)
    compiled.model.compile(fullgraph=True, backend="aot_eager")
    for one in (model, compiled):
        one(**train_batch(one, length=130)).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.long
def test_a_compiled_base_model_goes_on_from_a_cache():
    model = elastic_model()
    input_ids, _ = histories(9, padding=0)
    expected = model(input_ids).logits
    model.model.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        cache = model(input_ids[:, :5], use_cache=True).cache
        outputs = model(input_ids[:, 5:], cache=cache, use_cache=True)
    torch.testing.assert_close(outputs.logits, expected)
    assert outputs.cache.model_digest == model.model.digest()


def test_exported_equals_eager():
    model = elastic_model()
    shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        model, histories(70), dynamic_shapes={"input_ids": shape, "attention_mask": shape}
    ).module()
    for length, batch_size, padding in ((2, 2, 0), (7, 3, 2), (64, 2, 1), (128, 4, 5), (200, 5, 0), (1000, 1, 0)):
        batch = histories(length, batch_size, padding)
        with torch.no_grad():
            torch.testing.assert_close(program(*batch).logits, model(*batch).logits)
