import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError

from elastic_hf.baselines.linrec import (
    LinRecAttention,
    LinRecConfig,
    LinRecForSequentialRecommendation,
    causal_linear_attention,
    linear_attention,
)


CAUSAL = {}
PREFIX = {"is_causal": False, "training_objective": "prefix"}
every_mode = pytest.mark.parametrize("flags", [CAUSAL, PREFIX], ids=["causal", "bidirectional"])


def tiny_config(**changes):
    sizes = {
        "vocab_size": 31,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 80,
    }
    return LinRecConfig(**{**sizes, **changes})


def inputs(length, num_readers):
    """A full row, one padded up to its middle, and one that is padding."""
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(3, 2, num_readers, 5, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 3, 2, length, 5, dtype=torch.float64, generator=generator).unbind()
    attention_mask = torch.ones(3, length, dtype=torch.bool)
    attention_mask[1, : length // 2] = False
    attention_mask[2] = False
    return query.requires_grad_(), key.clone().requires_grad_(), value.clone().requires_grad_(), attention_mask


def read(query, key, value):
    """One (K,) reader of the items in (n, K) keys and values: the paper's A', weight by weight."""
    row = F.elu(query) / F.elu(query).norm()
    columns = F.elu(key) / F.elu(key).norm(dim=0)
    output = torch.zeros_like(query)
    for j in range(len(key)):
        output = output + row @ columns[j] * value[j] / math.sqrt(len(query))
    return output


def loop(query, key, value, attention_mask, is_causal):
    B, H, Q, K = query.shape
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(Q):
                real = attention_mask[b, : t + 1 if is_causal else None].nonzero()[:, 0]
                rows.append(read(query[b, h, t], key[b, h, real], value[b, h, real]))
    return torch.stack(rows).reshape(B, H, Q, K)


def assert_equal_with_gradients(output, expected, tensors):
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad((output**2).sum(), tensors)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected**2).sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("length", [1, 7])
def test_linear_attention_is_the_loop(length):
    *tensors, mask = inputs(length, num_readers=4)
    assert_equal_with_gradients(linear_attention(*tensors, mask), loop(*tensors, mask, is_causal=False), tensors)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
def test_causal_linear_attention_is_the_loop(length):
    *tensors, mask = inputs(length, num_readers=length)
    if length > 7:  # the loop is slow
        tensors = [x[:, :1] for x in tensors]
    assert_equal_with_gradients(causal_linear_attention(*tensors, mask), loop(*tensors, mask, is_causal=True), tensors)


def test_the_chunk_size_changes_nothing():
    *tensors, mask = inputs(11, num_readers=11)
    for chunk_size in (1, 2, 4, 11):
        assert_equal_with_gradients(
            causal_linear_attention(*tensors, mask, chunk_size), causal_linear_attention(*tensors, mask), tensors
        )


@pytest.mark.parametrize("length", [1, 7, 70])
def test_the_last_position_is_the_same_in_both_forms(length):
    *tensors, mask = inputs(length, num_readers=length)
    assert_equal_with_gradients(
        causal_linear_attention(*tensors, mask)[..., -1, :], linear_attention(*tensors, mask)[..., -1, :], tensors
    )


@every_mode
@pytest.mark.parametrize("fill", [0.0, 1e-20, 1.0])
def test_padding_and_vectors_without_length_have_finite_gradients(flags, fill):
    attention = causal_linear_attention if flags is CAUSAL else linear_attention
    tensors = [torch.full((3, 2, 7, 5), fill, requires_grad=True) for _ in range(3)]
    *_, mask = inputs(7, num_readers=7)
    output = attention(*tensors, mask)
    assert (output[2] == 0).all()
    for result in (output, *torch.autograd.grad(output.sum(), tensors)):
        assert result.isfinite().all()


@every_mode
def test_a_row_of_padding_trains(flags):
    torch.manual_seed(0)
    model = LinRecForSequentialRecommendation(tiny_config(**flags)).train()
    input_ids = torch.randint(3, 31, (3, 7))
    input_ids[1, :4] = 0
    input_ids[2] = 0
    labels = input_ids.roll(-1, dims=-1).masked_fill(input_ids == 0, -100)
    model(input_ids, labels=labels).loss.backward()
    assert model(input_ids).logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_mode
def test_the_last_position_alone_is_the_last_of_all(flags):
    torch.manual_seed(0)
    model = LinRecForSequentialRecommendation(tiny_config(**flags)).eval()
    input_ids = torch.randint(3, 31, (3, 70))
    input_ids[0, :20] = 0
    everywhere = model.model(input_ids).last_hidden_state
    torch.testing.assert_close(model.model(input_ids, last_position_only=True).last_hidden_state, everywhere[:, -1:])


@every_mode
def test_sums_are_float32_under_autocast(flags):
    """Projections round to bfloat16; what they give is then added up exactly."""
    torch.manual_seed(0)
    attention = LinRecAttention(tiny_config(**flags))
    hidden_states, mask = torch.randn(3, 70, 12), torch.ones(3, 70, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention(hidden_states, mask, last_position_only=False)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (3, 4)).transpose(1, 2).double()
            for projection in (attention.query, attention.key, attention.value)
        )
        exact = (causal_linear_attention if flags is CAUSAL else linear_attention)(query, key, value, mask)
        torch.testing.assert_close(output, attention.output(exact.transpose(1, 2).flatten(2).float()))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 0, "num_hidden_layers must be at least 1, found 0"),
        ("num_attention_heads", 5, "multiple of num_attention_heads, found 64 and 5"),
        ("intermediate_size", 0, "intermediate_size must be at least 1, found 0"),
        ("max_position_embeddings", 0, "max_position_embeddings must be at least 1, found 0"),
        ("hidden_dropout", 1.5, "hidden_dropout must be between 0 and 1, found 1.5"),
        ("is_causal", False, "needs is_causal=True"),
        ("training_objective", "masked_item", "needs is_causal=False"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message) as error:
        LinRecConfig(**{field: value})
    assert isinstance(error.value.__cause__, ValueError)


def test_a_history_longer_than_the_positions_is_refused():
    model = LinRecForSequentialRecommendation(tiny_config(max_position_embeddings=6))
    with pytest.raises(ValueError, match=r"max_position_embeddings \(6\), found 7"):
        model(torch.full((1, 7), 3))
