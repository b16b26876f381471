import copy
from dataclasses import fields

import pytest
import torch

from elastic_hf import ElasticCache, ElasticConfig, ElasticForSequentialRecommendation
from elastic_hf.models import modeling_elastic


SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_interest_experts": 6,
    "intermediate_size": 20,
    "num_memory_subkeys": 5,
    "num_memory_heads": 2,
    "memory_top_k": 4,
}
LENGTH = 11


def make_model(**changes):
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_histories(batch_size=4, length=LENGTH):
    return torch.randint(3, 31, (batch_size, length), generator=torch.Generator().manual_seed(1))


def equal(cache, other):
    for field in fields(ElasticCache):
        torch.testing.assert_close(getattr(cache, field.name), getattr(other, field.name), atol=1e-4, rtol=1e-4)


def read(model, pieces):
    cache = None
    for piece in pieces:
        outputs = model(piece, cache=cache, use_cache=True)
        cache = outputs.cache
    return outputs


@pytest.mark.parametrize("kernel_size", [0, 1, 3, 4])
@pytest.mark.parametrize("cuts", [[1], [10], [4, 5], [2, 3, 9], list(range(1, LENGTH))], ids=str)
@torch.no_grad()
def test_pieces_are_the_whole(cuts, kernel_size):
    model = make_model(conv_kernel_size=kernel_size)
    histories = make_histories()
    whole = model(histories, use_cache=True)
    outputs = read(model, histories.tensor_split(cuts, dim=1))
    torch.testing.assert_close(outputs.logits, whole.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.logits, model(histories).logits, atol=1e-5, rtol=1e-5)
    equal(outputs.cache, whole.cache)


@torch.no_grad()
def test_pieces_may_be_longer_than_a_chunk():
    model = make_model()
    histories = make_histories(2, 300)
    outputs = read(model, histories.split([131, 70, 99], dim=1))
    torch.testing.assert_close(outputs.logits, model(histories).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel_size", [0, 3, 5])
@torch.no_grad()
def test_users_add_different_numbers_of_items(kernel_size):
    """Padded pieces, some of them shorter than the convolution, some empty on the way."""
    model = make_model(conv_kernel_size=kernel_size)
    histories = make_histories()
    num_items = [[5, 1, 0, 7], [1, 6, 2, 0], [5, 4, 9, 4]]
    cache, read_so_far = None, [0, 0, 0, 0]
    for counts in num_items:
        piece = torch.zeros(4, max(counts) + 1, dtype=torch.long)
        for row, count in enumerate(counts):
            start = read_so_far[row]
            piece[row, piece.shape[1] - count :] = histories[row, start : start + count]
            read_so_far[row] += count
        outputs = model(piece, cache=cache, use_cache=True)
        cache = outputs.cache
    assert read_so_far == [LENGTH] * 4
    assert cache.num_items.tolist() == [LENGTH] * 4
    whole = model(histories, use_cache=True)
    torch.testing.assert_close(outputs.logits, whole.logits, atol=1e-5, rtol=1e-5)
    equal(cache, whole.cache)


@pytest.mark.parametrize(
    "max_positions, shapes",
    [
        (1, [(1, 2)] * 5 + [(1, 1)]),
        (5, [(2, 2)] * 5 + [(2, 1)]),
        (20, [(4, 5), (4, 5), (4, 1)]),
        (44, [(4, 11)]),
    ],
)
@torch.no_grad()
def test_large_batches_are_read_by_rows_and_long_histories_in_pieces(max_positions, shapes, monkeypatch):
    """Batches of 4 users and of one; a row of padding alone in front of its items."""
    model = make_model()
    histories = make_histories()
    histories[1, :9] = histories[2, :3] = 0
    whole = model(histories, use_cache=True)
    read = []
    model.model.register_forward_pre_hook(lambda module, inputs: read.append(tuple(inputs[0].shape)))
    monkeypatch.setattr(modeling_elastic, "MAX_POSITIONS", {"cpu": max_positions, "cuda": 0})
    monkeypatch.setattr(modeling_elastic, "MIN_PIECE", 2)
    pieces = model(histories, use_cache=True)
    assert read == shapes * (4 // shapes[0][0])
    torch.testing.assert_close(pieces.logits, whole.logits, atol=1e-5, rtol=1e-5)
    equal(pieces.cache, whole.cache)
    assert model(histories).cache is None
    torch.testing.assert_close(model(histories[:1]).logits, whole.logits[:1], atol=1e-5, rtol=1e-5)
    hidden_states = model(histories, output_hidden_states=True).hidden_states
    assert hidden_states[0].shape == (4, LENGTH, 24)


@torch.no_grad()
def test_padding_before_a_piece_changes_nothing():
    model = make_model()
    histories = make_histories()
    cache = model(histories[:, :6], use_cache=True).cache
    piece = histories[:, 6:]
    padding = torch.randint(3, 31, (4, 3), generator=torch.Generator().manual_seed(2))
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(piece)], dim=1)
    padded = model(torch.cat([padding, piece], dim=1), attention_mask=mask, cache=cache, use_cache=True)
    plain = model(piece, cache=cache, use_cache=True)
    torch.testing.assert_close(padded.logits, plain.logits, atol=1e-5, rtol=1e-5)
    equal(padded.cache, plain.cache)


@torch.no_grad()
def test_all_positions_go_on_from_the_cache():
    model = make_model()
    histories = make_histories()
    whole = model.model(histories).last_hidden_state
    cache = model.model(histories[:, :4], use_cache=True).cache
    rest = model.model(histories[:, 4:], cache=cache).last_hidden_state
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_is_not_changed_by_going_on():
    model = make_model()
    cache = model(make_histories(), use_cache=True).cache
    before = copy.deepcopy(cache)
    model(make_histories(), cache=cache, use_cache=True)
    for field in fields(ElasticCache):
        assert torch.equal(getattr(cache, field.name), getattr(before, field.name))


@torch.no_grad()
def test_the_empty_cache_is_the_beginning():
    model = make_model()
    histories = make_histories()
    outputs = model(histories, cache=ElasticCache.empty(model.config, 4), use_cache=True)
    whole = model(histories, use_cache=True)
    torch.testing.assert_close(outputs.logits, whole.logits, atol=1e-5, rtol=1e-5)
    equal(outputs.cache, whole.cache)


@torch.no_grad()
def test_a_user_takes_the_stated_bytes_whatever_the_length():
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(vocab_size=31)).eval()
    assert "17,672 with the default" in ElasticCache.__doc__
    for length in (1, 2, 150):
        cache = model(make_histories(3, length), use_cache=True).cache
        tensors = [getattr(cache, field.name) for field in fields(cache)]
        assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 3 * 17_672


@torch.no_grad()
def test_users_are_selected_and_put_together():
    model = make_model()
    histories = make_histories()
    cache = model(histories, use_cache=True).cache
    assert len(cache) == 4
    equal(cache.select([2, 0, 2]), model(histories[[2, 0, 2]], use_cache=True).cache)
    equal(ElasticCache.cat([cache.select([1]), cache.select([3, 0])]), cache.select(torch.tensor([1, 3, 0])))
    with pytest.raises(ValueError, match="at least one cache"):
        ElasticCache.cat([])


@torch.no_grad()
def test_a_cache_is_saved_and_loaded(tmp_path):
    model = make_model()
    cache = model(make_histories(), use_cache=True).cache.select([3, 1])
    cache.save(tmp_path / "users.safetensors")
    loaded = ElasticCache.load(tmp_path / "users.safetensors")
    for field in fields(ElasticCache):
        assert torch.equal(getattr(cache, field.name), getattr(loaded, field.name))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold the tensors states, convolution, num_items, found "):
        ElasticCache.load(tmp_path / "model.safetensors")


@torch.no_grad()
def test_a_cache_stays_in_float32_under_autocast():
    model = make_model()
    histories = make_histories()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = read(model, histories.tensor_split([4, 6], dim=1))
        whole = model(histories)
    assert outputs.cache.states.dtype == outputs.cache.convolution.dtype == torch.float32
    torch.testing.assert_close(outputs.logits, whole.logits, atol=0.3, rtol=0.05)


def test_what_cannot_be_continued_is_refused():
    model = make_model()
    histories = make_histories()
    cache = model(histories, use_cache=True).cache
    with pytest.raises(ValueError, match=r"cache.states must be torch.float32 of shape \(4, 2, 3, 6, 17\), found"):
        model(histories, cache=cache.select([0, 1]))
    with pytest.raises(ValueError, match="cache.convolution must be"):
        make_model(conv_kernel_size=4)(histories, cache=cache)
    with pytest.raises(ValueError, match="labels must not be given with cache or use_cache"):
        model(histories, labels=histories, cache=cache)
    bidirectional = make_model(is_causal=False, training_objective="prefix")
    for arguments in ({"cache": cache}, {"use_cache": True}):
        with pytest.raises(ValueError, match="cache and use_cache need is_causal=True"):
            bidirectional(histories, **arguments)
    assert model(histories).cache is None
    assert model(histories, cache=cache).cache is None
