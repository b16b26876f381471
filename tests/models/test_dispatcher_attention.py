import math

import pytest
import torch

import reference
from elastic_hf.models import dispatcher_attention
from elastic_hf.models.dispatcher_attention import (
    SCORE_CAP,
    compressed_interests,
    dispatch,
    expert_scores,
    final_weights,
    pool_history,
    prefix_states,
    prepare_chunks,
    read_chunks,
    to_exponent,
)


B, H, K, E, D, M = 2, 3, 4, 5, 7, 6
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


def make_history(length, padding=0, dtype=torch.float64):
    """A stream, sigmoids of scores, log-forgetting and a mask; the first row has `padding` positions to the left."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(B, length, dtype=torch.bool)
    mask[0, :padding] = False
    stream = torch.randn(B, length, D, generator=generator, dtype=dtype)
    sigmoids = torch.rand(B, length, M, generator=generator, dtype=dtype)
    log_forget = -math.log(2) / torch.logspace(0, 4, M, dtype=dtype)
    return [x.requires_grad_() for x in (stream, sigmoids, log_forget)] + [mask]


def outputs_and_gradients(function, inputs):
    output = function(*inputs)
    torch.manual_seed(0)
    return output, torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs)


def loop(query, key, value, scores, log_forget):
    return reference.causal_lda(query, key, value, scores, log_forget.expand_as(scores))


def chunked(query, key, value, scores, log_forget, chunk_size=64):
    """Keys and values beside other projections of the items, as those of other layers are."""
    items, weights, total, past = prepare_chunks(
        torch.cat([key, value, value[..., :1]], dim=-1), scores, log_forget, chunk_size
    )
    key, value, _ = items.split([K, K, 1], dim=-1)
    past_keys, past_values, _ = past.split([K, K, 1], dim=-1)
    return read_chunks(query, key, value, weights, total, past_keys, past_values)


@pytest.mark.parametrize(
    "length, padding, per_position",
    [*((length, padding, False) for length in LENGTHS for padding in (0, min(3, length))), (65, 3, True)],
)
def test_chunks_equal_the_loop(length, padding, per_position):
    inputs = make_inputs(length, padding, per_position)
    expected, expected_gradients = outputs_and_gradients(loop, inputs)
    for chunk_size in (64, 5):
        output, gradients = outputs_and_gradients(lambda *x, size=chunk_size: chunked(*x, size), inputs)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-8, atol=1e-10)


def test_more_chunks_than_a_group_equal_the_loop(monkeypatch):
    monkeypatch.setattr(dispatcher_attention, "MAX_PREFIX", 3)
    inputs = make_inputs(65, padding=3)
    expected, expected_gradients = outputs_and_gradients(loop, inputs)
    for chunk_size in (2, 8):  # 33 chunks are groups of groups, 9 are three groups
        output, gradients = outputs_and_gradients(lambda *x, size=chunk_size: chunked(*x, size), inputs)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7, 64, 65, 130])
def test_prefix_states_equal_the_recurrence(num_chunks):
    generator = torch.Generator().manual_seed(num_chunks)
    added = torch.randn(B, num_chunks, E, D, generator=generator, dtype=torch.float64)
    log_kept = -torch.rand(B, num_chunks, E, generator=generator, dtype=torch.float64)
    state = torch.zeros(B, E, D, dtype=torch.float64)
    expected = []
    for j in range(num_chunks):
        expected.append(state)
        state = log_kept[:, j].exp()[..., None] * (state + added[:, j])
    torch.testing.assert_close(prefix_states(added, log_kept), torch.stack(expected, dim=1))


@pytest.mark.parametrize("max_chunks", [1, 4])
def test_gradients_of_a_few_chunks_at_once_equal_the_loop(max_chunks, monkeypatch):
    monkeypatch.setitem(dispatcher_attention.MAX_CHUNKS, "cpu", max_chunks)
    inputs = make_inputs(65, padding=3)
    _, expected = outputs_and_gradients(loop, inputs)
    _, gradients = outputs_and_gradients(lambda *x: chunked(*x, chunk_size=8), inputs)
    torch.testing.assert_close(gradients, expected)


def test_an_empty_history_gives_zeros_and_finite_gradients():
    output, gradients = outputs_and_gradients(chunked, make_inputs(4, padding=4))
    assert (output[0] == 0).all() and (output[1] != 0).any()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_float32_holds_the_stated_range():
    """Scores of +-10 and half-lives from one item on, at several chunks, against float64."""
    inputs = make_inputs(200)
    with torch.no_grad():
        inputs[3].copy_(10 * torch.sign(inputs[3]))
    expected, expected_gradients = outputs_and_gradients(chunked, inputs)
    single = [x.detach().float().requires_grad_() for x in inputs]
    output = chunked(*single)
    torch.manual_seed(0)
    gradients = torch.autograd.grad((output * torch.randn_like(expected).float()).sum(), single)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-4)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        error = (gradient.double() - wanted).norm() / wanted.norm()
        assert error < 1e-3, f"relative error {error:.2e}"


def test_scores_are_capped_products():
    torch.manual_seed(0)
    stream, experts = 3 * torch.randn(B, 5, D, dtype=torch.float64), 3 * torch.randn(M, D, dtype=torch.float64)
    expected = [[[10 * math.tanh(float(p @ x) / 10) for p in experts] for x in row] for row in stream]
    scores = to_exponent(expert_scores(stream, experts), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))
    assert scores.abs().max() > 9


def pool(stream, sigmoids, log_forget, mask, state=None):
    """[`pool_history`] of a stream that is zero at padding, as it must be."""
    return pool_history(stream * mask[..., None], sigmoids, log_forget, mask, state)


@pytest.mark.parametrize("padding", [0, 3], ids=["full", "padded"])
@pytest.mark.parametrize("length", LENGTHS)
def test_pooling_equals_the_loop(length, padding):
    *inputs, mask = make_history(length, min(padding, length))

    def pool_by_loop(stream, sigmoids, log_forget):
        return reference.pool_history(stream, 20 * sigmoids - 10, log_forget, mask)

    output, gradients = outputs_and_gradients(lambda *x: pool(*x, mask), inputs)
    expected, expected_gradients = outputs_and_gradients(pool_by_loop, inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("cut", [1, 2, 64, 129])
def test_pooling_goes_on_from_a_state(cut):
    """The first row begins behind the cut in some cases."""
    *inputs, mask = make_history(130, padding=3)

    def in_two(stream, sigmoids, log_forget):
        state = pool(stream[:, :cut], sigmoids[:, :cut], log_forget, mask[:, :cut])
        return pool(stream[:, cut:], sigmoids[:, cut:], log_forget, mask[:, cut:], state)

    output, gradients = outputs_and_gradients(in_two, inputs)
    expected, expected_gradients = outputs_and_gradients(lambda *x: pool(*x, mask), inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_bounding_exponents_changes_no_interest():
    """Half-lives of one item after 3,000 items: exponents down to -2,090, against the same without a bound."""
    *inputs, mask = make_history(3000, padding=3)
    stream, sigmoids, log_forget = (x.detach() for x in inputs)
    later = torch.arange(2999, -1, -1, dtype=torch.float64)[:, None]
    weights = torch.exp(SCORE_CAP * (2 * sigmoids - 1) + later * log_forget) * mask[..., None]
    expected = weights.mT @ (stream * mask[..., None]) / weights.sum(dim=1)[..., None]
    result = compressed_interests(pool(stream, sigmoids, log_forget, mask))
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-15)
    assert final_weights(sigmoids.float(), log_forget.float()).min() > torch.finfo(torch.float32).tiny


def test_an_empty_state_holds_zeros():
    state = torch.zeros(B, M, D + 1, requires_grad=True)
    interests = compressed_interests(state)
    (gradient,) = torch.autograd.grad(interests.sum(), state)
    assert (interests == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("length", [1, 65])
def test_one_position_reads_what_chunks_read_there(length):
    """Projecting before the sum and after it is the same."""
    torch.manual_seed(0)
    *inputs, mask = make_history(length, padding=min(3, length - 1))
    stream, sigmoids, log_forget = inputs
    query = torch.randn(B, 1, length, K, dtype=torch.float64)
    project_key, project_value = torch.randn(2, K, D, dtype=torch.float64)
    unread = torch.where(mask, 0.0, -math.inf).double()[..., None]
    scores = to_exponent(sigmoids, unread)[:, None]
    key, value = ((stream * mask[..., None])[:, None] @ weight.T for weight in (project_key, project_value))
    everywhere = chunked(query, key, value, scores, log_forget[None, None, None])
    interests = compressed_interests(pool(stream, sigmoids, log_forget, mask))[:, None]
    at_last = dispatch(query[:, :, -1:], interests @ project_key.T, interests @ project_value.T)
    torch.testing.assert_close(at_last, everywhere[:, :, -1:])
