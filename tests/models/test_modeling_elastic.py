import copy
import math

import pytest
import torch
from transformers import AutoConfig, AutoModel

import reference
from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticModel
from elastic_hf.models import modeling_elastic
from elastic_hf.models.modeling_elastic import (
    ElasticBidirectionalAttention,
    ElasticInterestMemory,
    causal_convolution,
    count_subkeys,
    retrieve_slots,
    rotary_table,
    rotate,
    top_k_rows,
)


CAUSAL = {}
PREFIX = {"is_causal": False, "training_objective": "prefix"}
MASKED = {"is_causal": False, "training_objective": "masked_item"}
FLAGS = {
    "causal": CAUSAL,
    "causal prefix": {"training_objective": "prefix"},
    "no memory": {"num_memory_subkeys": 0},
    "no convolution": {"conv_kernel_size": 0},
    "untied": {"tie_word_embeddings": False},
    "sampled_softmax": {"training_loss": "sampled_softmax"},
    "gbce": {"training_loss": "gbce"},
    "bce": {"training_loss": "bce", "num_negatives": 1},
    "prefix": PREFIX,
    "masked": MASKED,
    "bidirectional, no memory": {**PREFIX, "num_memory_subkeys": 0},
}
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
every_mode = pytest.mark.parametrize("flags", [CAUSAL, PREFIX, MASKED], ids=["causal", "prefix", "masked"])


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
        "memory_top_k": 4,
        "num_negatives": 9,
    }
    return ElasticConfig(**{**sizes, **changes})


def tiny_model(**changes):
    torch.manual_seed(0)
    return ElasticForSequentialRecommendation(tiny_config(**changes)).eval()


def histories(length=7, batch_size=3, padding=2):
    input_ids = torch.randint(3, 31, (batch_size, length), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :padding] = 0
    return input_ids * attention_mask, attention_mask


# The mathematics


@pytest.mark.parametrize("length", [1, 7])
def test_bidirectional_attention_is_the_papers_two_attentions(length):
    torch.manual_seed(0)
    attention = ElasticBidirectionalAttention(tiny_config(**PREFIX)).double()
    hidden_states = torch.randn(3, length, 24, dtype=torch.float64, requires_grad=True)
    experts = torch.randn(3, 6, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, : length // 2] = False
    mask[2] = False  # an empty history
    inputs = [hidden_states, experts, *attention.parameters()]
    results = []
    for output in (
        attention.dispatch(hidden_states, *attention.aggregate(hidden_states, mask, experts)),
        reference.bidirectional_layer(hidden_states, experts, mask, attention),
    ):
        results.append((output, *torch.autograd.grad((output**2).sum(), inputs)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def test_causal_attention_is_the_loop_between_its_projections():
    torch.manual_seed(0)
    model = ElasticModel(tiny_config()).double()
    attention = model.layers[0].attention
    hidden_states = torch.randn(3, 7, 24, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :2] = False
    query, gate = attention.query_gate(hidden_states).chunk(2, dim=-1)
    query, key, value = (
        torch.stack(states.chunk(3, dim=-1), dim=2)  # (B, L, H, K)
        for states in (query, *attention.key_value(hidden_states).chunk(2, dim=-1))
    )
    scores = 10 * torch.tanh(torch.einsum("blhk,hmk->bhlm", key, attention.experts) / math.sqrt(8) / 10)
    scores = scores.masked_fill(~mask[:, None, :, None], -math.inf)
    half_life = 1 + attention.log_half_life.exp()
    log_forget = (math.log(0.5) / half_life)[None, :, None].expand_as(scores)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    rotated = [reference.rotate(states, positions).transpose(1, 2) for states in (query, key)]
    expected = reference.causal_lda(*rotated, value.transpose(1, 2), scores, log_forget)
    expected = torch.cat(expected.unbind(dim=1), dim=-1)
    expected = attention.output(expected * torch.nn.functional.silu(gate))
    output, _ = attention(hidden_states, mask, rotary_table(positions, 8), None, last_position_only=False)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("num_rows", [1, 4, 7, 24, 128])
@pytest.mark.parametrize("top_k", [1, 4])
def test_top_rows_are_those_of_topk(num_rows, top_k):
    """Whole groups, no whole groups and fewer groups than sought; many columns and few."""
    scores = torch.randn(3, num_rows, 300, generator=torch.Generator().manual_seed(0))
    top_k = min(top_k, num_rows)
    for columns in (300, 10):
        values, rows = top_k_rows(scores[..., :columns], top_k)
        expected, expected_rows = scores[..., :columns].topk(top_k, dim=-2)
        assert torch.equal(rows, expected_rows) and torch.equal(values, expected)


def test_top_rows_of_nan_exist():
    values, rows = top_k_rows(torch.full((3, 24, 300), math.nan), 4)
    assert values.isnan().all() and ((rows >= 0) & (rows < 24)).all()


@pytest.mark.parametrize("max_scores", [modeling_elastic.MAX_SUBKEY_SCORES, 100, 1], ids=["at once", "by 5", "by 1"])
@pytest.mark.parametrize("top_k", [1, 4, 7, 25])
def test_product_keys_find_the_best_of_all_slots(top_k, max_scores, monkeypatch):
    """S = 5 sub-keys, so that 7 and 25 retrieve more slots than one half has sub-keys."""
    monkeypatch.setattr(modeling_elastic, "MAX_SUBKEY_SCORES", max_scores)
    torch.manual_seed(0)
    query = torch.randn(3, 7, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    sub_keys = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2, 5, dtype=torch.float64)
    scores, slots = retrieve_slots(query, sub_keys, bias, top_k)
    expected, expected_slots = reference.retrieve_slots(query, sub_keys, bias, top_k)
    torch.testing.assert_close(scores, expected)
    assert (slots == expected_slots).all()
    for gradient, wanted in zip(
        torch.autograd.grad((scores**2).sum(), (query, sub_keys)),
        torch.autograd.grad((expected**2).sum(), (query, sub_keys)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted)


def test_memory_adds_up_the_weighted_values_of_its_heads():
    model = tiny_model().double()
    memory = model.model.layers[-1].memory
    hidden_states = torch.randn(3, 7, 24, dtype=torch.float64)
    weights, slots = memory.retrieve(hidden_states, 4)
    assert weights.shape == slots.shape == (3, 7, 2, 4)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 7, 2, dtype=torch.float64))
    expected = torch.zeros_like(hidden_states)
    for b in range(3):
        for t in range(7):
            for g in range(2):
                for r in range(4):
                    expected[b, t] += weights[b, t, g, r] * memory.values.weight[slots[b, t, g, r]]
    torch.testing.assert_close(memory(hidden_states, torch.ones(3, 7, dtype=torch.bool)), expected)


@every_mode
def test_retrieved_slots_are_those_whose_values_get_a_gradient(flags):
    model = tiny_model(**flags)
    input_ids, attention_mask = histories()
    slots = model.get_retrieved_slots(input_ids, attention_mask)
    assert slots.shape == (3, 2, 4 if model.config.is_causal else 3)
    memory = model.model.layers[-1].memory if model.config.is_causal else model.model.memory
    for row in range(3):
        model.zero_grad()
        model(input_ids[row : row + 1], attention_mask[row : row + 1]).logits.square().sum().backward()
        read = memory.values.weight.grad.abs().sum(dim=-1).nonzero().flatten().tolist()
        assert read == sorted({*slots[row].flatten().tolist()})


@every_mode
def test_retrieved_slots_do_not_depend_on_how_histories_are_read(flags, monkeypatch):
    model = tiny_model(**flags)
    expected = model.get_retrieved_slots(*histories())
    monkeypatch.setattr(modeling_elastic, "MAX_POSITIONS", {"cpu": 2, "cuda": 0})
    assert torch.equal(model.get_retrieved_slots(*histories()), expected)


def test_a_model_without_memory_retrieves_no_slots():
    with pytest.raises(ValueError, match="num_memory_subkeys must be at least 1"):
        tiny_model(num_memory_subkeys=0).get_retrieved_slots(histories()[0])


def test_subkeys_are_counted_one_by_one():
    slots = torch.randint(25, (3, 7, 2, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :2] = False
    expected = torch.zeros(2, 2, 5)
    for b in range(3):
        for t in range(7):
            for g in range(2):
                for slot in slots[b, t, g].tolist() if mask[b, t] else []:
                    expected[g, 0, slot // 5] += 1
                    expected[g, 1, slot % 5] += 1
    assert torch.equal(count_subkeys(slots, 5, mask), expected)


@every_mode
def test_training_steps_balance_the_subkeys(flags):
    """Queries that all ask for the same slots come to use all sub-keys."""
    model = tiny_model(**flags)
    memory = model.model.layers[-1].memory if model.config.is_causal else model.model.memory
    with torch.no_grad():
        memory.query.weight.zero_()
        memory.query.bias.normal_()
    optimizer = torch.optim.Adam([memory.bias], lr=1e-2)
    memory.train()
    used = set()
    for _ in range(400):
        weights, slots = memory.retrieve(torch.zeros(1, 24), 2)
        used |= {*(slots // 5).flatten().tolist()}
        optimizer.zero_grad()
        weights.sum().backward()
        optimizer.step()
    assert used == set(range(5))


def test_the_balancing_gradient_is_the_excess_share_of_each_subkey():
    model = tiny_model().train()
    memory = model.model.layers[-1].memory
    input_ids, attention_mask = histories()
    hidden_states = []
    memory.register_forward_pre_hook(lambda module, inputs: hidden_states.append(inputs[0]))
    torch.manual_seed(0)
    model.zero_grad()
    model(input_ids, attention_mask, labels=input_ids).loss.backward()
    _, slots = memory.eval().retrieve(hidden_states[0], 4)
    counts = count_subkeys(slots, 5, attention_mask == 1)
    assert counts.sum() == 19 * 2 * 2 * 4
    torch.testing.assert_close(memory.bias.grad, 1e-8 * (counts - 19 * 4 / 5), rtol=1e-5, atol=1e-12)


def test_memory_gives_a_history_its_experts():
    memory = tiny_model(**PREFIX).model.memory
    history = torch.randn(3, 24)
    weights, slots = memory.retrieve(history, 3)  # 6 experts from 2 heads
    experts = memory.retrieve_experts(history, 6)
    for b in range(3):
        for g in range(2):
            for r in range(3):
                expected = 3 * weights[b, g, r] * memory.values.weight[slots[b, g, r]]
                torch.testing.assert_close(experts[b, 3 * g + r], expected)


def test_memory_sits_where_each_mode_reads_it():
    causal, bidirectional = tiny_model(), tiny_model(**PREFIX)
    assert [layer.memory is not None for layer in causal.model.layers] == [False, True]
    assert causal.model.memory is None and isinstance(bidirectional.model.memory, ElasticInterestMemory)
    assert all(layer.memory is None for layer in bidirectional.model.layers)


def test_rotation_equals_the_loop():
    torch.manual_seed(0)
    states = torch.randn(3, 7, 2, 10, dtype=torch.float64, requires_grad=True)
    positions = torch.randint(1000, (3, 7))
    gradients = []
    tables = (table.double() for table in rotary_table(positions, 10))
    outputs = rotate(states.transpose(1, 2), *tables).transpose(1, 2), reference.rotate(states, positions)
    for output in outputs:
        gradients.append(torch.autograd.grad((output**3).sum(), states)[0])
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)  # angles are float32
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def test_products_of_rotated_states_know_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 10, dtype=torch.float64)
    places = torch.tensor([[[3], [0]], [[45], [42]], [[45], [0]]])
    near, moved, far = (
        (rotate(query, *rotary_table(q[None], 10)) * rotate(key, *rotary_table(k[None], 10))).sum() for q, k in places
    )
    torch.testing.assert_close(near, moved, atol=1e-4, rtol=1e-4)
    assert abs(near - far) > 0.1


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
def test_convolution_equals_the_loop(kernel_size):
    torch.manual_seed(0)
    hidden_states, weight = torch.randn(3, 7, 5), torch.randn(kernel_size, 5)
    inputs = torch.nn.functional.pad(hidden_states, (0, 0, weight.shape[0] - 1, 0))
    torch.testing.assert_close(causal_convolution(inputs, weight), reference.causal_convolution(hidden_states, weight))


# No item after t reaches t


def layer_outputs(model, input_ids, attention_mask):
    outputs = model.model(input_ids, attention_mask, output_hidden_states=True)
    return [*outputs.hidden_states, outputs.last_hidden_state]


@pytest.mark.parametrize("t", [0, 63, 64, 100])
def test_causal_positions_do_not_see_the_future(t):
    model = tiny_model().double()
    input_ids, attention_mask = histories(length=130)
    changed = input_ids.clone()
    changed[:, t + 1 :] = 3 + (changed[:, t + 1 :] - 2) % 28
    before = layer_outputs(model, input_ids, attention_mask)
    after = layer_outputs(model, changed, attention_mask)
    assert len(before) == 4
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one[:, : t + 1], other[:, : t + 1], rtol=0, atol=1e-12)
        assert not torch.allclose(one[:, t + 1 :], other[:, t + 1 :])


@pytest.mark.parametrize("flags", [PREFIX, {**PREFIX, "num_memory_subkeys": 0}], ids=["memory", "no memory"])
def test_bidirectional_positions_see_the_future(flags):
    model = tiny_model(**flags).double()
    input_ids, attention_mask = histories()
    changed = input_ids.clone()
    changed[:, -1] = 3 + (changed[:, -1] - 2) % 28
    before = layer_outputs(model, input_ids, attention_mask)
    after = layer_outputs(model, changed, attention_mask)
    for one, other in zip(before[1:], after[1:], strict=True):
        assert (one[1, 0] - other[1, 0]).abs().max() > 1e-9


# Padding, batching, length


@every_flag
def test_extra_left_padding_changes_nothing(flags):
    model = tiny_model(**flags).double()
    input_ids, attention_mask = histories()
    padded = [torch.cat([x.new_zeros(3, 4), x], dim=-1) for x in (input_ids, attention_mask)]
    torch.testing.assert_close(model(*padded).logits, model(input_ids, attention_mask).logits)
    hidden, padded_hidden = layer_outputs(model, input_ids, attention_mask), layer_outputs(model, *padded)
    for one, other in zip(hidden, padded_hidden, strict=True):
        real = attention_mask.bool()
        torch.testing.assert_close(other[:, 4:][real], one[real])


@every_flag
def test_a_row_alone_equals_the_row_in_a_batch(flags):
    model = tiny_model(**flags).double()
    input_ids, attention_mask = histories()
    together = model(input_ids, attention_mask).logits
    torch.testing.assert_close(model(input_ids[:1, 2:]).logits, together[:1])
    for row in (1, 2):
        torch.testing.assert_close(model(input_ids[row : row + 1]).logits, together[row : row + 1])


def test_the_mask_defaults_to_everything_but_padding():
    model = tiny_model()
    input_ids, attention_mask = histories()
    assert torch.equal(model(input_ids).logits, model(input_ids, attention_mask).logits)


@every_flag
def test_the_last_position_alone_equals_the_last_of_all(flags):
    model = tiny_model(**flags).double()
    input_ids, attention_mask = histories()
    every = model.model(input_ids, attention_mask).last_hidden_state
    last = model.model(input_ids, attention_mask, last_position_only=True).last_hidden_state
    assert last.shape == (3, 1, 24)
    torch.testing.assert_close(last[:, 0], every[:, -1])


@every_mode
def test_a_history_20_times_longer_than_trained_on_runs(flags):
    model = tiny_model(**flags).train()
    optimizer = torch.optim.AdamW(model.parameters())
    input_ids, attention_mask = histories(length=200)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    model(input_ids, attention_mask, labels=labels).loss.backward()
    optimizer.step()
    model.eval()
    long = torch.randint(3, 31, (2, 4000))
    assert model(long).logits.isfinite().all()


# Training


def train_batch(model):
    input_ids, attention_mask = histories(length=13)
    labels = torch.roll(input_ids, -1, dims=1).masked_fill(attention_mask == 0, -100)
    if model.config.training_objective == "prefix":
        labels[:, :-1] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@every_flag
def test_every_parameter_gets_a_gradient(flags):
    model = tiny_model(**flags, hidden_dropout=0.0).train()
    model(**train_batch(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_mode
def test_bfloat16_autocast_trains_200_steps(flags):
    model = tiny_model(**flags).train()
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
@pytest.mark.parametrize("name", ["causal", "no memory", "prefix"])
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


@pytest.mark.parametrize("name", ["causal", "prefix", "bidirectional, no memory"])
def test_initial_scale(name):
    """Standard deviations (or values) of every parameter of a model of the default size, with all optional parts."""
    torch.manual_seed(0)
    config = ElasticConfig(**FLAGS[name], tie_word_embeddings=False)
    model = ElasticForSequentialRecommendation(config)
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
        elif name.endswith("experts"):
            assert 0.9 < parameter.std() < 1.1, name
        elif name.endswith("sub_keys"):
            assert 0.33 < parameter.std() < 0.38, name  # 1 / sqrt(8)
        elif name.endswith("convolution"):
            assert 0.017 < parameter.std() < 0.023, name  # 192 values only
        else:
            assert 0.019 < parameter.std() < 0.021, name


# Explaining


def test_an_explanation_shares_out_each_item_and_each_reading():
    model = tiny_model()
    input_ids, attention_mask = histories()
    explanation = model.explain(input_ids, attention_mask, top_k=5)
    assert explanation.half_lives.shape == (2, 3, 6) and explanation.half_lives.min() >= 1
    assert explanation.assignments.shape == (3, 2, 3, 7, 6) and explanation.item_weights.shape == (3, 2, 3, 7)
    is_item = attention_mask[:, None, None].bool().expand(-1, 2, 3, -1)
    torch.testing.assert_close(explanation.assignments.sum(dim=-1), is_item.float())
    torch.testing.assert_close(explanation.item_weights.sum(dim=-1), torch.ones(3, 2, 3))
    assert (explanation.item_weights[~is_item] == 0).all() and (explanation.item_weights[is_item] > 0).all()
    assert torch.equal(explanation.token_ids, model.recommend(input_ids, attention_mask, top_k=5).token_ids)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_contributions_are_the_slopes_of_the_scores():
    """Scaling an item's embedding by 1 + e changes the score by e times its contribution."""
    model = tiny_model().double().requires_grad_(False)
    input_ids, attention_mask = histories()
    explanation = model.explain(input_ids, attention_mask, top_k=4)
    assert explanation.contributions.shape == (3, 4, 7)
    step = 1e-6
    for t in range(7):
        scores = []
        for sign in (-1, 1):
            scale = torch.ones(7, 1, dtype=torch.float64)
            scale[t] += sign * step
            hook = model.model.embed_tokens.register_forward_hook(lambda *call, scale=scale: call[-1] * scale)
            scores.append(model(input_ids, attention_mask).logits.gather(1, explanation.token_ids))
            hook.remove()
        slope = (scores[1] - scores[0]) / (2 * step)
        torch.testing.assert_close(explanation.contributions[..., t], slope, atol=1e-7, rtol=1e-5)


def test_bfloat16_weights_are_explained_in_float32():
    explanation = tiny_model().to(torch.bfloat16).explain(*histories(), top_k=2)
    assert explanation.half_lives.dtype == explanation.item_weights.dtype == torch.float32
    torch.testing.assert_close(explanation.item_weights.sum(dim=-1), torch.ones(3, 2, 3))


def test_a_bidirectional_model_is_not_explained():
    with pytest.raises(ValueError, match="explain needs is_causal=True"):
        tiny_model(**PREFIX).explain(histories()[0])


# Saving, loading, compiling


@every_flag
def test_safetensors_round_trip_is_exact(flags, tmp_path):
    model = tiny_model(**flags)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
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
    input_ids, attention_mask = histories()
    assert torch.equal(loaded(input_ids, attention_mask).logits, model(input_ids, attention_mask).logits)


def test_base_model_and_head_load_each_other(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "head")
    base, info = ElasticModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"]
    base.save_pretrained(tmp_path / "base")
    head = ElasticForSequentialRecommendation.from_pretrained(tmp_path / "base")
    input_ids, attention_mask = histories()
    assert torch.equal(head(input_ids, attention_mask).logits, model(input_ids, attention_mask).logits)


def test_bfloat16_weights_run():
    model = tiny_model().to(torch.bfloat16)
    input_ids, attention_mask = histories()
    assert model(input_ids, attention_mask).logits.isfinite().all()


@every_mode
def test_compiled_equals_eager(flags):
    model = tiny_model(**flags)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager", dynamic=True)
    for length, batch_size in ((7, 3), (70, 2)):
        inputs = histories(length, batch_size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs).logits, model(*inputs).logits)


@every_mode
def test_compiled_base_model_equals_eager_in_one_graph_a_piece(flags, monkeypatch):
    monkeypatch.setattr(modeling_elastic, "MAX_POSITIONS", {"cpu": 80, "cuda": 80})
    monkeypatch.setattr(modeling_elastic, "MIN_PIECE", 40)
    model = tiny_model(**flags)
    inputs = histories(90, batch_size=2)
    expected = model.get_user_embeddings(*inputs)
    torch._dynamo.utils.counters.clear()
    model.model.compile(backend="aot_eager")
    torch.testing.assert_close(model.get_user_embeddings(*inputs), expected)
    assert not torch._dynamo.utils.counters["graph_break"]


@every_mode
def test_exported_equals_eager(flags):
    model = tiny_model(**flags)
    shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        model, histories(70), dynamic_shapes={"input_ids": shape, "attention_mask": shape}
    ).module()
    for length, batch_size, padding in ((2, 2, 0), (7, 3, 2), (64, 2, 1), (128, 4, 5), (200, 5, 0), (1000, 1, 0)):
        inputs = histories(length, batch_size, padding)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs).logits, model(*inputs).logits)
