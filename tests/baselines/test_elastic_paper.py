import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import reference
from elastic_hf.baselines.elastic_paper import (
    ElasticBidirectionalAttention,
    ElasticPaperConfig,
    ElasticPaperConvolution,
    ElasticPaperForSequentialRecommendation,
    attend,
)
from elastic_hf.models.interest_memory import count_subkeys


FLAGS = {
    "prefix": {},
    "masked": {"training_objective": "masked_item"},
    "no memory": {"num_memory_subkeys": 0},
    "no convolution": {"conv_kernel_size": 0},
    "untied": {"tie_word_embeddings": False},
    "sampled_softmax": {"training_loss": "sampled_softmax"},
}
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
every_objective = pytest.mark.parametrize("objective", ["prefix", "masked_item"])


def tiny_config(**changes):
    sizes = {
        "vocab_size": 31,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_interest_experts": 6,
        "intermediate_size": 20,
        "num_memory_subkeys": 5,
        "num_memory_heads": 2,
        "num_negatives": 9,
    }
    return ElasticPaperConfig(**{**sizes, **changes})


def tiny_model(**changes):
    torch.manual_seed(0)
    return ElasticPaperForSequentialRecommendation(tiny_config(**changes)).eval()


def histories(length=7, batch_size=3, padding=2):
    input_ids = torch.randint(3, 31, (batch_size, length), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :padding] = 0
    return input_ids * attention_mask, attention_mask


def train_batch(model):
    input_ids, attention_mask = histories(length=13)
    labels = torch.roll(input_ids, -1, dims=1).masked_fill(attention_mask == 0, -100)
    if model.config.training_objective == "prefix":
        labels[:, :-1] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def assert_same_gradients(output, expected, inputs):
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad((output**2).sum(), inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected**2).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, wanted)


# The mathematics


@pytest.mark.parametrize("length", [1, 7, 65])
def test_attend_is_the_loop(length):
    """A full row, a padded one and an empty one."""
    torch.manual_seed(0)
    shapes = [(3, 2, 4, 5), (3, 2, length, 5), (3, 2, length, 5)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, : length // 2] = False
    assert_same_gradients(attend(*inputs), reference.attend(*inputs, mask | True), inputs)
    mask[2] = False
    assert_same_gradients(attend(*inputs, mask), reference.attend(*inputs, mask), inputs)


@pytest.mark.parametrize("length", [1, 7])
def test_bidirectional_attention_is_the_papers_two_attentions(length):
    torch.manual_seed(0)
    attention = ElasticBidirectionalAttention(tiny_config()).double()
    hidden_states = torch.randn(3, length, 24, dtype=torch.float64, requires_grad=True)
    experts = torch.randn(3, 6, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, : length // 2] = False
    mask[2] = False  # an empty history
    expected = reference.bidirectional_layer(hidden_states, experts, mask, attention)
    inputs = [hidden_states, experts, *attention.parameters()]
    assert_same_gradients(attention(hidden_states, hidden_states, experts, mask), expected, inputs)
    last = attention(hidden_states[:, -1:], hidden_states, experts, mask)
    torch.testing.assert_close(last, expected[:, -1:])


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
def test_the_convolution_is_the_loop(kernel_size):
    torch.manual_seed(0)
    convolution = ElasticPaperConvolution(tiny_config(conv_kernel_size=kernel_size)).double()
    hidden_states = torch.randn(3, 7, 24, dtype=torch.float64, requires_grad=True)
    weight = convolution.depthwise.weight[:, 0].T.flip(0)  # (kernel_size, D), that of the item itself first
    expected = reference.causal_convolution(hidden_states, weight)
    assert_same_gradients(convolution(hidden_states), expected, [hidden_states, convolution.depthwise.weight])


def slow_user_embeddings(model, input_ids, attention_mask):
    """(B, L, D): each history by itself, without its padding, its experts retrieved one by one."""
    memory, H = model.memory, model.config.num_memory_heads
    rows = []
    for ids, is_item in zip(input_ids, attention_mask.bool(), strict=True):
        hidden = model.embed_tokens(ids[is_item]) * math.sqrt(model.config.hidden_size)  # (n, D)
        query = memory.query(hidden.mean(dim=0))
        query = torch.stack([memory.query_norm(part) for part in query.chunk(H)]).unflatten(-1, (2, -1))
        scores, slots = reference.retrieve_slots(query, memory.sub_keys, memory.bias, memory.top_k)
        experts = []
        for g in range(H):
            for weight, slot in zip(scores[g].softmax(dim=-1), slots[g], strict=True):
                experts.append(memory.top_k * weight * memory.values.weight[slot])
        experts, everything = torch.stack(experts)[None], torch.ones(1, len(hidden), dtype=torch.bool)
        for layer in model.layers:
            dispatch, feed_forward = layer.dispatch, layer.feed_forward
            kernel = dispatch.convolution.depthwise.weight[:, 0].T.flip(0)
            stream = reference.causal_convolution(dispatch.norm(hidden)[None], kernel)
            hidden = hidden + reference.bidirectional_layer(stream, experts, everything, dispatch.attention)[0]
            widened = torch.nn.functional.gelu(feed_forward.up(feed_forward.norm(hidden)))
            hidden = hidden + feed_forward.down(widened)
        rows.append(model.norm(hidden))
    return rows


def test_the_model_is_the_loop_history_by_history():
    model = tiny_model().model.double()
    input_ids, attention_mask = histories()
    expected = torch.cat(slow_user_embeddings(model, input_ids, attention_mask))
    output = model(input_ids, attention_mask).last_hidden_state
    weights = [weight for name, weight in model.named_parameters() if name != "memory.bias"]  # balanced, not trained
    assert_same_gradients(output[attention_mask.bool()], expected, weights)
    last = model(input_ids, attention_mask, last_position_only=True).last_hidden_state
    torch.testing.assert_close(last, output[:, -1:])


@pytest.mark.parametrize("name", ["prefix", "no memory"])
def test_positions_see_the_future(name):
    model = tiny_model(**FLAGS[name]).double().model
    input_ids, attention_mask = histories()
    changed = input_ids.clone()
    changed[:, -1] = 3 + (changed[:, -1] - 2) % 28
    before = model(input_ids, attention_mask, output_hidden_states=True).hidden_states
    after = model(changed, attention_mask, output_hidden_states=True).hidden_states
    assert len(before) == 3
    for one, other in zip(before[1:], after[1:], strict=True):
        assert (one[1, 0] - other[1, 0]).abs().max() > 1e-9


# Padding, batches, length


@every_flag
def test_extra_left_padding_changes_nothing(flags):
    model = tiny_model(**flags).double()
    input_ids, attention_mask = histories()
    padded = [torch.cat([x.new_zeros(3, 4), x], dim=-1) for x in (input_ids, attention_mask)]
    torch.testing.assert_close(model(*padded).logits, model(input_ids, attention_mask).logits)
    states = model.model(input_ids, attention_mask, output_hidden_states=True).hidden_states
    padded_states = model.model(*padded, output_hidden_states=True).hidden_states
    is_item = attention_mask.bool()
    for one, other in zip(states, padded_states, strict=True):
        torch.testing.assert_close(other[:, 4:][is_item], one[is_item])


@every_flag
def test_a_row_alone_equals_the_row_in_a_batch(flags):
    model = tiny_model(**flags).double()
    input_ids, attention_mask = histories()
    together = model(input_ids, attention_mask).logits
    torch.testing.assert_close(model(input_ids[:1, 2:]).logits, together[:1])
    for row in (1, 2):
        torch.testing.assert_close(model(input_ids[row : row + 1]).logits, together[row : row + 1])


def test_a_history_of_padding_alone_gives_no_nan():
    model = tiny_model().train()
    input_ids = torch.tensor([[0] * 7, [0] * 5 + [8, 4]])
    labels = torch.tensor([[-100] * 7, [-100] * 6 + [5]])
    assert model(input_ids).logits.isfinite().all()
    model(input_ids, labels=labels).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_objective
def test_a_history_20_times_longer_than_trained_on_runs(objective):
    model = tiny_model(training_objective=objective).train()
    optimizer = torch.optim.AdamW(model.parameters())
    input_ids, attention_mask = histories(length=200)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    model(input_ids, attention_mask, labels=labels).loss.backward()
    optimizer.step()
    model.eval()
    assert model(torch.randint(3, 31, (2, 4000))).logits.isfinite().all()


# The memory


def test_the_memory_gives_a_history_its_experts():
    model = tiny_model().model
    embeddings, mask = torch.randn(3, 7, 24), torch.ones(3, 7, dtype=torch.bool)
    weights, slots = model.retrieve_slots(embeddings, mask)
    assert weights.shape == slots.shape == (3, 2, 3)  # 6 experts from 2 heads
    experts = model.combine_slots(weights, slots)
    for b in range(3):
        for g in range(2):
            for r in range(3):
                expected = 3 * weights[b, g, r] * model.memory.values.weight[slots[b, g, r]]
                torch.testing.assert_close(experts[b, 3 * g + r], expected)


@every_objective
def test_retrieved_slots_are_those_whose_values_get_a_gradient(objective):
    model = tiny_model(training_objective=objective)
    input_ids, attention_mask = histories()
    input_ids[1, 3] = 1  # an unknown item
    slots = model.get_retrieved_slots(input_ids, attention_mask)
    assert slots.shape == (3, 2, 3)
    for row in range(3):
        model.zero_grad()
        model(input_ids[row : row + 1], attention_mask[row : row + 1]).logits.square().sum().backward()
        read = model.model.memory.values.weight.grad.abs().sum(dim=-1).nonzero().flatten().tolist()
        assert read == sorted({*slots[row].flatten().tolist()})


def test_a_model_without_memory_retrieves_no_slots():
    with pytest.raises(ValueError, match="num_memory_subkeys must be at least 1"):
        tiny_model(num_memory_subkeys=0).get_retrieved_slots(histories()[0])


def test_the_balancing_gradient_is_the_excess_share_of_each_subkey():
    model = tiny_model().train()
    batch = train_batch(model)
    slots = model.get_retrieved_slots(batch["input_ids"], batch["attention_mask"])
    model(**batch).loss.backward()
    counts = count_subkeys(slots, 5, torch.ones(3, dtype=torch.bool))
    assert counts.sum() == 3 * 2 * 2 * 3
    torch.testing.assert_close(model.model.memory.bias.grad, 1e-8 * (counts - 3 * 3 / 5), rtol=1e-5, atol=1e-12)


# Training


@every_flag
def test_every_parameter_gets_a_gradient(flags):
    model = tiny_model(**flags, hidden_dropout=0.0).train()
    model(**train_batch(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_objective
def test_bfloat16_autocast_trains_200_steps(objective):
    model = tiny_model(training_objective=objective).train()
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


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["prefix", "no memory"])
def test_activation_checkpointing_keeps_less_and_changes_no_gradient(name, use_reentrant):
    model = tiny_model(**FLAGS[name], hidden_dropout=0.3).train()
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
    assert 0 < num_kept < num_kept_before / 2


@pytest.mark.parametrize("name", ["prefix", "no memory"])
def test_initial_scale(name):
    """Standard deviations (or values) of every parameter of a model of the default size, with all optional parts."""
    torch.manual_seed(0)
    config = ElasticPaperConfig(**FLAGS[name], tie_word_embeddings=False)
    for name, parameter in ElasticPaperForSequentialRecommendation(config).named_parameters():
        part = name.split(".")[-2] + "." + name.split(".")[-1]
        if "norm" in part:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name.endswith("experts"):
            assert 0.9 < parameter.std() < 1.1, name
        elif name.endswith("sub_keys"):
            assert 0.33 < parameter.std() < 0.38, name  # 1 / sqrt(8)
        elif "depthwise" in part:
            assert 0.017 < parameter.std() < 0.023, name  # 192 values only
        else:
            assert 0.019 < parameter.std() < 0.021, name


# Saving, loading, compiling


@every_flag
def test_safetensors_round_trip_is_exact(flags, tmp_path):
    model = tiny_model(**flags)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded, info = ElasticPaperForSequentialRecommendation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    for (name, saved), (other_name, restored) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*loaded.named_parameters(), *loaded.named_buffers()],
        strict=True,
    ):
        assert name == other_name and torch.equal(saved, restored), name
    input_ids, attention_mask = histories()
    assert torch.equal(loaded(input_ids, attention_mask).logits, model(input_ids, attention_mask).logits)


def test_bfloat16_weights_run():
    output = tiny_model().to(torch.bfloat16)(*histories())
    assert output.logits.isfinite().all() and output.user_embeddings.dtype == torch.bfloat16


@pytest.mark.long
@every_objective
def test_compiled_equals_eager(objective):
    model = tiny_model(training_objective=objective)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager", dynamic=True)
    for length, batch_size in ((7, 3), (70, 2)):
        inputs = histories(length, batch_size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs).logits, model(*inputs).logits)


@every_objective
def test_exported_equals_eager(objective):
    model = tiny_model(training_objective=objective)
    shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        model, histories(70), dynamic_shapes={"input_ids": shape, "attention_mask": shape}
    ).module()
    for length, batch_size, padding in ((2, 2, 0), (7, 3, 2), (128, 4, 5), (1000, 1, 0)):
        inputs = histories(length, batch_size, padding)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs).logits, model(*inputs).logits)


# The configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": True}, "is_causal must be False for elastic_paper, found True"),
        ({"training_objective": "next_item"}, "needs is_causal=True"),
        ({"num_attention_heads": 5}, "multiple of num_attention_heads, found 64 and 5"),
        ({"num_interest_experts": 0}, "num_interest_experts must be at least 1, found 0"),
        ({"conv_kernel_size": -1}, "conv_kernel_size must be at least 0, found -1"),
        ({"hidden_dropout": 1.5}, "hidden_dropout must be between 0 and 1, found 1.5"),
        ({"num_memory_heads": 0}, "num_memory_heads must be at least 1, found 0"),
        ({"num_memory_subkeys": -1}, "num_memory_subkeys must be at least 0, found -1"),
        ({"num_memory_heads": 3}, r"hidden_size must be a multiple of 2 \* num_memory_heads, found 64 and 3"),
        ({"num_interest_experts": 6}, "num_interest_experts must be a multiple of num_memory_heads, found 6 and 4"),
        ({"num_memory_subkeys": 1}, "asks for 4 slots per memory head, num_memory_subkeys=1 holds 1"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        ElasticPaperConfig(**changes)


def test_without_memory_its_fields_are_not_checked():
    assert ElasticPaperConfig(num_memory_subkeys=0, num_interest_experts=6).num_interest_experts == 6
