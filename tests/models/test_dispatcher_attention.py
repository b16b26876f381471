import math

import pytest
import torch

import reference
from elastic_hf.models import dispatcher_attention
from elastic_hf.models.dispatcher_attention import (
    causal_lda_chunked,
    causal_lda_parallel,
    causal_lda_recurrent,
    dispatch,
    final_state,
    read_weights,
)


B, H, K, E = 2, 3, 4, 5
LENGTHS = [1, 2, 63, 64, 65, 200]


def make_inputs(length, padding=0, per_position=False, dtype=torch.float64):
    """Random query, key, value, scores and log-forgetting; the first row has `padding` positions to the left."""
    generator = torch.Generator().manual_seed(length)
    query, key, value = torch.randn(3, B, H, length, K, generator=generator, dtype=dtype)
    scores = 2 * torch.randn(B, H, length, E, generator=generator, dtype=dtype)
    scores[0, :, :padding] = -math.inf
    if per_position:
        log_forget = -math.log(2) * torch.rand(B, H, length, E, generator=generator, dtype=dtype)
    else:
        half_life = torch.logspace(0, 4, H * E, dtype=dtype).view(H, 1, E)  # from one item, the shortest allowed
        log_forget = -math.log(2) / half_life
    return [x.requires_grad_() for x in (query, key, value, scores, log_forget)]


def outputs_and_gradients(function, inputs):
    output = function(*inputs)
    torch.manual_seed(0)
    return output, torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs)


def loop(query, key, value, scores, log_forget):
    return reference.causal_lda(query, key, value, scores, log_forget.expand_as(scores))


FORMS = {
    "recurrent": lambda *inputs: causal_lda_recurrent(*inputs)[0],
    "parallel": causal_lda_parallel,
    "chunked": lambda *inputs: causal_lda_chunked(*inputs)[0],
    "chunked by 5": lambda *inputs: causal_lda_chunked(*inputs, chunk_size=5)[0],
}


@pytest.mark.parametrize("padding", [0, 3], ids=["full", "padded"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_causal_form_equals_the_loop(length, padding):
    inputs = make_inputs(length, min(padding, length))
    expected, expected_gradients = outputs_and_gradients(loop, inputs)
    for name, form in FORMS.items():
        output, gradients = outputs_and_gradients(form, inputs)

        def message(text, name=name):
            return f"{name}: {text}"

        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11, msg=message)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-8, atol=1e-10, msg=message)


@pytest.mark.parametrize("form", FORMS)
def test_forgetting_may_differ_at_every_position(form):
    inputs = make_inputs(65, padding=3, per_position=True)
    expected, expected_gradients = outputs_and_gradients(loop, inputs)
    output, gradients = outputs_and_gradients(FORMS[form], inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_a_history_longer_than_a_block_equals_the_recurrence(monkeypatch):
    monkeypatch.setattr(dispatcher_attention, "CHUNKS_PER_BLOCK", 2)
    inputs = make_inputs(65, padding=3)
    expected, expected_gradients = outputs_and_gradients(loop, inputs)
    output, gradients = outputs_and_gradients(lambda *x: causal_lda_chunked(*x, chunk_size=8)[0], inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("max_chunks", [1, 4])
def test_gradients_of_a_few_chunks_at_once_equal_the_loop(max_chunks, monkeypatch):
    monkeypatch.setitem(dispatcher_attention.MAX_CHUNKS, "cpu", max_chunks)
    inputs = make_inputs(65, padding=3)
    _, expected = outputs_and_gradients(loop, inputs)
    _, gradients = outputs_and_gradients(lambda *x: causal_lda_chunked(*x, chunk_size=8)[0], inputs)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("form", [causal_lda_recurrent, causal_lda_chunked])
@pytest.mark.parametrize("cut", [1, 64, 70])
def test_a_state_carries_the_history(form, cut):
    inputs = make_inputs(130, padding=3)
    *items, log_forget = inputs
    whole, last = causal_lda_recurrent(*inputs)
    first, state = form(*(x[..., :cut, :] for x in items), log_forget)
    second, end = form(*(x[..., cut:, :] for x in items), log_forget, state)
    torch.testing.assert_close(torch.cat([first, second], dim=-2), whole)
    torch.testing.assert_close(end, last)


def test_final_state_is_where_the_recurrence_ends():
    query, *inputs = make_inputs(65, padding=3)
    outputs, state = causal_lda_recurrent(query, *inputs)
    torch.testing.assert_close(final_state(*inputs), state)
    torch.testing.assert_close(dispatch(query[..., -1, :], final_state(*inputs)), outputs[..., -1, :])


def test_read_weights_are_what_the_last_output_reads():
    query, key, value, scores, log_forget = make_inputs(65, padding=65)
    outputs, _ = causal_lda_recurrent(query, key, value, scores, log_forget)
    shares, weights = read_weights(query[..., -1, :], key, scores, log_forget)
    assert shares.shape == (B, H, E) and weights.shape == (B, H, E, 65)
    torch.testing.assert_close((shares[..., None, :] @ weights @ value)[..., 0, :], outputs[..., -1, :])
    assert (shares[0] == 0).all() and (weights[0] == 0).all()  # an empty history
    torch.testing.assert_close(shares[1].sum(dim=-1), torch.ones(H, dtype=torch.float64))
    torch.testing.assert_close(weights[1].sum(dim=-1), torch.ones(H, E, dtype=torch.float64))


def test_an_empty_history_gives_zeros_and_finite_gradients():
    inputs = make_inputs(4, padding=4)
    for form in FORMS.values():
        output, gradients = outputs_and_gradients(form, inputs)
        assert (output[0] == 0).all() and (output[1] != 0).any()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_float32_holds_the_stated_range():
    """Scores of +-10 and half-lives from one item on, at several chunks, against float64."""
    inputs = make_inputs(200)
    with torch.no_grad():
        inputs[3].copy_(10 * torch.sign(inputs[3]))
    expected, expected_gradients = outputs_and_gradients(FORMS["chunked"], inputs)
    single = [x.detach().float().requires_grad_() for x in inputs]
    output = causal_lda_chunked(*single)[0]
    torch.manual_seed(0)
    gradients = torch.autograd.grad((output * torch.randn_like(expected).float()).sum(), single)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-4)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        error = (gradient.double() - wanted).norm() / wanted.norm()
        assert error < 1e-3, f"relative error {error:.2e}"
