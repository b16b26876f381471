import math
from functools import partial

import pytest
import torch

import reference
from elastic_hf.models import dispatcher_attention
from elastic_hf.models.dispatcher_attention import (
    CHUNK_SIZE_WITH_PAUSES,
    MAX_HALF_LIVES,
    SCORE_CAP,
    compressed_interests,
    dispatch,
    expert_scores,
    final_weights,
    forgetting,
    pool_history,
    prefix_states,
    prepare_chunks,
    read_chunks,
    sum_later,
    to_exponent,
)


B, H, K, E, D, M = 2, 3, 4, 5, 7, 6
LENGTHS = [1, 2, 63, 64, 65, 130]


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


def chunked(query, key, value, scores, log_forget, chunk_size=64, bias=None):
    """Keys and values beside other projections of the items, as those of other layers are."""
    items, weights, total, past = prepare_chunks(
        torch.cat([key, value, value[..., :1]], dim=-1), scores, log_forget, chunk_size
    )
    key, value, _ = items.split([K, K, 1], dim=-1)
    past_keys, past_values, _ = past.split([K, K, 1], dim=-1)
    return read_chunks(query, key, value, weights, total, past_keys, past_values, bias)


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
    assert_float32_holds_extreme_scores(chunked, make_inputs(200))


def assert_float32_holds_extreme_scores(function, inputs):
    """Outputs and gradients for scores of +-10, in float32 against float64."""
    with torch.no_grad():
        inputs[3].copy_(10 * torch.sign(inputs[3]))
    expected, expected_gradients = outputs_and_gradients(function, inputs)
    single = [x.detach().float().requires_grad_() for x in inputs]
    output = function(*single)
    torch.manual_seed(0)
    gradients = torch.autograd.grad((output * torch.randn_like(expected).float()).sum(), single)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-4)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.isfinite().all()
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


# Pauses, and what requests add to the logits


PAUSE_LENGTHS = [1, 2, 31, 32, 33, 65]


def make_pauses(length, dtype=torch.float64):
    """Seconds since the item before, from nothing to years, -1 for the first; half-lives from a minute to a year."""
    generator = torch.Generator().manual_seed(length + 1)
    pauses = 10 ** (8 * torch.rand(B, length, generator=generator, dtype=dtype))
    pauses[:, 1::5] = 0
    pauses[:, 0] = -1
    half_lives = torch.logspace(math.log10(60), math.log10(3e7), H * E, dtype=dtype).requires_grad_()
    return pauses, half_lives


def test_forgetting_equals_the_loop():
    pauses, half_lives = make_pauses(33)
    log_forget = -math.log(2) / torch.logspace(0, 4, H * E, dtype=torch.float64)
    found = forgetting(log_forget, pauses, half_lives.requires_grad_(False))
    assert found.shape == (B, 33, H * E)
    num_capped = 0
    for b in range(B):
        for t in range(33):
            for m in range(H * E):
                num = max(0.0, pauses[b, t].item()) / half_lives[m].item()
                num_capped += num > 2
                kept = math.exp(log_forget[m]) * 0.5 ** min(2.0, num)
                assert math.isclose(math.exp(found[b, t, m]), kept, rel_tol=1e-12)
    assert 0 < num_capped < found.numel() and MAX_HALF_LIVES == 2


@pytest.mark.parametrize(
    "length, padding, has_bias",
    [*((length, padding, True) for length in PAUSE_LENGTHS for padding in (0, 3)), (33, 3, False)],
)
def test_chunks_with_pauses_equal_the_loop(length, padding, has_bias):
    *inputs, log_forget = make_inputs(length, min(padding, length))
    pauses, half_lives = make_pauses(length)
    log_forget = log_forget.detach().flatten().requires_grad_()  # (M,)
    bias = 2 * torch.randn(B, H, length, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs += [log_forget, half_lives, *([bias.requires_grad_()] if has_bias else [])]

    def with_pauses(read):
        def function(query, key, value, scores, log_forget, half_lives, bias=None):
            forget = forgetting(log_forget, pauses, half_lives).unflatten(-1, (H, E)).transpose(1, 2)
            return read(query, key, value, scores, forget, bias=bias)

        return function

    expected, expected_gradients = outputs_and_gradients(with_pauses(reference.causal_lda), inputs)
    for chunk_size in (CHUNK_SIZE_WITH_PAUSES, 5):
        fast = with_pauses(lambda *x, size=chunk_size, **bias: chunked(*x, size, **bias))
        output, gradients = outputs_and_gradients(fast, inputs)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("max_chunks", [1, 4])
def test_gradients_of_biases_of_a_few_chunks_at_once_equal_the_loop(max_chunks, monkeypatch):
    monkeypatch.setitem(dispatcher_attention.MAX_CHUNKS, "cpu", max_chunks)
    inputs = make_inputs(33, padding=3, per_position=True)
    inputs.append(torch.randn(B, H, 33, E, dtype=torch.float64, requires_grad=True))
    _, expected = outputs_and_gradients(lambda *x: reference.causal_lda(*x[:5], bias=x[5]), inputs)
    _, gradients = outputs_and_gradients(lambda *x: chunked(*x[:5], 8, bias=x[5]), inputs)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("length", [32, 200])
def test_float32_holds_the_stated_range_with_pauses(length):
    """Scores of +-10, half-lives from one item on, and long pauses before all items, against float64."""
    *inputs, log_forget = make_inputs(length)
    forget = forgetting(log_forget.detach().flatten(), torch.full((B, length), 1e12).double(), torch.ones(H * E))
    inputs.append(forget.unflatten(-1, (H, E)).transpose(1, 2).contiguous().requires_grad_())
    assert forget.min() < -2.07  # ln 8: three half-lives
    assert_float32_holds_extreme_scores(partial(chunked, chunk_size=CHUNK_SIZE_WITH_PAUSES), inputs)


@pytest.mark.parametrize("padding", [0, 3], ids=["full", "padded"])
@pytest.mark.parametrize("length", PAUSE_LENGTHS)
def test_pooling_with_pauses_equals_the_loop(length, padding):
    stream, sigmoids, log_forget, mask = make_history(length, min(padding, length))
    pauses, _ = make_pauses(length)
    half_lives = torch.logspace(2, 7, M, dtype=torch.float64).requires_grad_()
    inputs = (stream, sigmoids, log_forget, half_lives)

    def pool_by_loop(stream, sigmoids, log_forget, half_lives):
        return reference.pool_history(stream, 20 * sigmoids - 10, forgetting(log_forget, pauses, half_lives), mask)

    def pool_at_once(stream, sigmoids, log_forget, half_lives):
        return pool(stream, sigmoids, forgetting(log_forget, pauses, half_lives), mask)

    output, gradients = outputs_and_gradients(pool_at_once, inputs)
    expected, expected_gradients = outputs_and_gradients(pool_by_loop, inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("cut", [1, 2, 31, 64])
def test_pooling_with_pauses_goes_on_from_a_state(cut):
    stream, sigmoids, log_forget, mask = make_history(65, padding=3)
    log_forget = forgetting(log_forget, make_pauses(65)[0], torch.logspace(2, 7, M, dtype=torch.float64))

    def in_two(stream, sigmoids, log_forget):
        state = pool(stream[:, :cut], sigmoids[:, :cut], log_forget[:, :cut], mask[:, :cut])
        return pool(stream[:, cut:], sigmoids[:, cut:], log_forget[:, cut:], mask[:, cut:], state)

    inputs = [x.detach().requires_grad_() for x in (stream, sigmoids, log_forget)]
    output, gradients = outputs_and_gradients(in_two, inputs)
    expected, expected_gradients = outputs_and_gradients(lambda *x: pool(*x, mask), inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_the_weights_of_recent_items_are_exact_after_many_pauses():
    """In float32, after 20,000 items: a difference of sums over all of them would be rounded to a thousandth."""
    _, sigmoids, log_forget, _ = make_history(20_000)
    forget = forgetting(log_forget.detach(), torch.full((B, 20_000), 1e9).double(), torch.full((M,), 1e9).double())
    expected = final_weights(sigmoids.detach(), forget)
    found = final_weights(sigmoids.detach().float(), forget.float())
    torch.testing.assert_close(found[..., -30:].double(), expected[..., -30:], rtol=2e-5, atol=0)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 65])
def test_sums_of_what_comes_later_equal_the_loop(length):
    values = torch.randn(B, length, M, dtype=torch.float64)
    expected = torch.stack([values[:, t + 1 :].sum(dim=1) - 10 for t in range(length)], dim=1)
    torch.testing.assert_close(sum_later(values, -10), expected)


@pytest.mark.parametrize("length", [1, 33])
def test_one_position_with_a_bias_reads_what_chunks_read_there(length):
    torch.manual_seed(0)
    query, key, value, scores, log_forget = make_inputs(length, per_position=True)
    bias = torch.randn(B, H, length, E, dtype=torch.float64)
    everywhere = chunked(query, key, value, scores, log_forget, CHUNK_SIZE_WITH_PAUSES, bias)
    kept = log_forget.cumsum(dim=-2)
    weights = torch.exp(scores + kept[..., -1:, :] - kept)
    weights = (weights / weights.sum(dim=-2, keepdim=True)).mT  # (B, H, E, L)
    at_last = dispatch(query[:, :, -1:], weights @ key, weights @ value, bias[:, :, -1:])
    torch.testing.assert_close(at_last, everywhere[:, :, -1:])
    # After one item all experts hold the same.
    without = dispatch(query[:, :, -1:], weights @ key, weights @ value)
    assert torch.allclose(at_last, without) == (length == 1)
