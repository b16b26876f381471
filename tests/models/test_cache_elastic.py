import copy

import pytest
import torch

from elastic_hf import ElasticCache, ElasticConfig, ElasticForSequentialRecommendation
from factories import elastic_model, times


LENGTH = 11


def make_histories(batch_size=4, length=LENGTH):
    return torch.randint(3, 31, (batch_size, length), generator=torch.Generator().manual_seed(1))


def assert_equal(cache, other, **tolerance):
    assert cache.tensors.keys() == other.tensors.keys()
    for name, tensor in cache.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], **tolerance)
    assert cache.model_digest == other.model_digest


def read(model, pieces):
    cache = None
    for piece in pieces:
        outputs = model(piece, cache=cache, use_cache=True)
        cache = outputs.cache
    return outputs


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("cuts", [[1], [10], [4, 5], [2, 3, 9], list(range(1, LENGTH))], ids=str)
@torch.no_grad()
def test_pieces_are_the_whole(cuts, kernel_size):
    model = elastic_model(conv_kernel_size=kernel_size).double()
    histories = make_histories()
    whole = model(histories, use_cache=True)
    outputs = read(model, histories.tensor_split(cuts, dim=1))
    torch.testing.assert_close(outputs.logits, whole.logits)
    torch.testing.assert_close(outputs.logits, model(histories).logits)
    assert_equal(outputs.cache, whole.cache)


@torch.no_grad()
def test_one_item_at_a_time_is_the_whole_after_hundreds():
    model = elastic_model()
    histories = make_histories(2, 300)
    outputs = read(model, histories.split(1, dim=1))
    torch.testing.assert_close(outputs.logits, model(histories).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@torch.no_grad()
def test_users_add_different_numbers_of_items(kernel_size):
    """Padded pieces, some of them shorter than the convolution, some empty on the way."""
    model = elastic_model(conv_kernel_size=kernel_size).double()
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
    torch.testing.assert_close(outputs.logits, whole.logits)
    assert_equal(cache, whole.cache)


@torch.no_grad()
def test_padding_before_a_piece_changes_nothing():
    model = elastic_model()
    histories = make_histories()
    cache = model(histories[:, :6], use_cache=True).cache
    piece = histories[:, 6:]
    padding = torch.randint(3, 31, (4, 3), generator=torch.Generator().manual_seed(2))
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(piece)], dim=1)
    padded = model(torch.cat([padding, piece], dim=1), attention_mask=mask, cache=cache, use_cache=True)
    plain = model(piece, cache=cache, use_cache=True)
    torch.testing.assert_close(padded.logits, plain.logits, atol=1e-5, rtol=1e-5)
    assert_equal(padded.cache, plain.cache, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_is_not_changed_by_going_on():
    model = elastic_model()
    cache = model(make_histories(), use_cache=True).cache
    before = copy.deepcopy(cache)
    model(make_histories(), cache=cache, use_cache=True)
    assert_equal(cache, before, atol=0, rtol=0)


@torch.no_grad()
def test_the_empty_cache_is_the_beginning():
    model = elastic_model()
    histories = make_histories()
    outputs = model(histories, cache=ElasticCache.empty(model, 4), use_cache=True)
    whole = model(histories, use_cache=True)
    torch.testing.assert_close(outputs.logits, whole.logits, atol=1e-5, rtol=1e-5)
    assert_equal(outputs.cache, whole.cache, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_user_takes_the_stated_bytes_whatever_the_length():
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(vocab_size=31)).eval()
    assert "8,840 with the default" in ElasticCache.__doc__
    for length in (1, 2, 150):
        cache = model(make_histories(3, length), use_cache=True).cache
        assert sum(tensor.nbytes for tensor in cache.tensors.values()) == 3 * 8_840


@torch.no_grad()
def test_users_are_selected_and_put_together():
    model = elastic_model()
    histories = make_histories()
    cache = model(histories, use_cache=True).cache
    assert len(cache) == 4
    rows = model(histories[[2, 0, 2]], use_cache=True).cache
    assert_equal(cache.select([2, 0, 2]), rows, atol=1e-5, rtol=1e-5)
    assert_equal(ElasticCache.cat([cache.select([1]), cache.select([3, 0])]), cache.select(torch.tensor([1, 3, 0])))
    with pytest.raises(ValueError, match="at least one cache"):
        ElasticCache.cat([])
    other = elastic_model(num_memory_subkeys=0)
    with pytest.raises(ValueError, match="caches must be of one model, found the digests"):
        ElasticCache.cat([cache, ElasticCache.empty(other, 1)])


@torch.no_grad()
def test_a_cache_is_saved_and_loaded(tmp_path):
    model = elastic_model()
    cache = model(make_histories(), use_cache=True).cache.select([3, 1])
    cache.save(tmp_path / "users.safetensors")
    assert_equal(ElasticCache.load(tmp_path / "users.safetensors"), cache, atol=0, rtol=0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold recurrent_state, conv_state, num_items, model_digest, found "):
        ElasticCache.load(tmp_path / "model.safetensors")


@torch.no_grad()
def test_a_cache_stays_in_float32_under_autocast():
    model = elastic_model()
    histories = make_histories()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = read(model, histories.tensor_split([4, 6], dim=1))
        whole = model(histories)
    assert outputs.cache.recurrent_state.dtype == outputs.cache.conv_state.dtype == torch.float32
    torch.testing.assert_close(outputs.logits, whole.logits, atol=0.3, rtol=0.05)


def test_the_digest_is_that_of_the_weights_behind_a_state(tmp_path):
    model = elastic_model().model
    digest = model.digest()
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).digest() == digest
    assert copy.deepcopy(model).digest() == digest
    with torch.no_grad():
        model.layers[0].feed_forward.up.weight.add_(1)
        assert model.digest() == digest  # the reader may be trained on
        for weight in (model.embed_tokens.weight, model.stream.convolution, model.experts.log_half_life):
            weight.view(-1)[-1].add_(1)
            assert model.digest() != digest
            digest = model.digest()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_the_digest_is_another_after_training_on(options):
    model = elastic_model()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    digests = [model.model.digest()]
    for _ in range(2):
        model(make_histories(), labels=make_histories()).loss.backward()
        optimizer.step()
        digests.append(model.model.digest())
    assert len({*digests}) == 3


@torch.no_grad()
def test_the_cache_of_another_model_is_refused():
    """As it is once the weights have changed."""
    model = elastic_model()
    histories = make_histories()
    cache = model(histories, use_cache=True).cache
    model.model.experts.experts.mul_(1.01)
    with pytest.raises(ValueError, match="cache.model_digest must be that of this model, .*, found "):
        model(histories, cache=cache)


def test_what_cannot_be_continued_is_refused():
    model = elastic_model()
    histories = make_histories()
    cache = model(histories, use_cache=True).cache
    with pytest.raises(ValueError, match=r"cache.recurrent_state must be torch.float32 of shape \(4, 18, 25\), found"):
        model(histories, cache=cache.select([0, 1]))
    with pytest.raises(ValueError, match="cache.conv_state must be"):
        elastic_model(conv_kernel_size=3)(histories, cache=cache)
    with pytest.raises(ValueError, match="labels must not be given with cache, use_cache or query"):
        model(histories, labels=histories, cache=cache)
    for arguments in ({"cache": cache}, {"use_cache": True}):
        with pytest.raises(ValueError, match="cache and use_cache need last_position_only=True"):
            model.model(histories, **arguments)
    assert model(histories).cache is None
    assert model(histories, cache=cache).cache is None


# With times


def make_times(length=LENGTH, batch_size=4):
    """When the items of [`make_histories`] came, and for when a recommendation is asked."""
    timestamps, request_timestamps = times(length, batch_size, padding=0)
    return timestamps, request_timestamps[:, -1]


def read_with_times(model, histories, timestamps, request_timestamps, cuts):
    """All pieces, the last of them with the requests."""
    cache = None
    pieces = zip(histories.tensor_split(cuts, dim=1), timestamps.tensor_split(cuts, dim=1), strict=True)
    for items, seconds in pieces:
        is_last = items.shape[1] and seconds[0, -1] == timestamps[0, -1]
        requests = request_timestamps if is_last else None
        outputs = model(items, cache=cache, use_cache=True, timestamps=seconds, request_timestamps=requests)
        cache = outputs.cache
    return outputs


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("cuts", [[1], [10], [4, 5], [2, 3, 9], list(range(1, LENGTH))], ids=str)
@torch.no_grad()
def test_pieces_with_times_are_the_whole(cuts, kernel_size):
    model = elastic_model(use_timestamps=True, conv_kernel_size=kernel_size).double()
    histories, (timestamps, requests) = make_histories(), make_times()
    whole = model(histories, use_cache=True, timestamps=timestamps, request_timestamps=requests)
    outputs = read_with_times(model, histories, timestamps, requests, cuts)
    torch.testing.assert_close(outputs.logits, whole.logits)
    assert_equal(outputs.cache, whole.cache)
    assert torch.equal(outputs.cache.last_timestamps, timestamps[:, -1])
    assert outputs.cache.last_timestamps.dtype == torch.float64


@torch.no_grad()
def test_a_state_with_times_has_one_size():
    """Of 300 events one at a time, which are the whole, as of one event; 8 bytes more than without times."""
    model, plain = elastic_model(use_timestamps=True), elastic_model()
    histories, (timestamps, requests) = make_histories(4, 300), make_times(300)
    outputs = read_with_times(model, histories, timestamps, requests, list(range(1, 300)))
    whole = model(histories, timestamps=timestamps, request_timestamps=requests)
    torch.testing.assert_close(outputs.logits, whole.logits, atol=1e-5, rtol=1e-5)
    one = model(histories[:, :1], timestamps=timestamps[:, :1], use_cache=True).cache
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in outputs.cache.tensors.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in one.tensors.items()
    }
    without = plain(histories, use_cache=True).cache
    sizes = [sum(tensor.nbytes for tensor in cache.tensors.values()) for cache in (one, without)]
    assert sizes[0] == sizes[1] + 4 * 8


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@torch.no_grad()
def test_users_add_different_numbers_of_items_with_times(kernel_size):
    """Padded pieces, with anything for the times of the padding; some are empty on the way."""
    model = elastic_model(use_timestamps=True, conv_kernel_size=kernel_size).double()
    histories, (timestamps, requests) = make_histories(), make_times()
    num_items = [[5, 1, 0, 7], [1, 6, 2, 0], [5, 4, 9, 4]]
    cache, read_so_far = ElasticCache.empty(model, 4), [0, 0, 0, 0]
    assert cache.last_timestamps.tolist() == [-1] * 4
    for counts in num_items:
        piece = torch.zeros(4, max(counts) + 1, dtype=torch.long)
        seconds = torch.full(piece.shape, torch.nan, dtype=torch.double)
        for row, count in enumerate(counts):
            start = read_so_far[row]
            piece[row, piece.shape[1] - count :] = histories[row, start : start + count]
            seconds[row, piece.shape[1] - count :] = timestamps[row, start : start + count]
            read_so_far[row] += count
        now = requests if read_so_far == [LENGTH] * 4 else None
        outputs = model(piece, cache=cache, use_cache=True, timestamps=seconds, request_timestamps=now)
        cache = outputs.cache
        latest = [timestamps[row, count - 1].item() if count else -1 for row, count in enumerate(read_so_far)]
        assert cache.last_timestamps.tolist() == latest
    assert read_so_far == [LENGTH] * 4
    whole = model(histories, use_cache=True, timestamps=timestamps, request_timestamps=requests)
    torch.testing.assert_close(outputs.logits, whole.logits)
    assert_equal(cache, whole.cache)


@torch.no_grad()
def test_a_cache_with_times_is_selected_put_together_saved_and_loaded(tmp_path):
    model = elastic_model(use_timestamps=True)
    histories, (timestamps, _) = make_histories(), make_times()
    cache = model(histories, timestamps=timestamps, use_cache=True).cache
    some = cache.select([2, 0, 2])
    assert torch.equal(some.last_timestamps, timestamps[[2, 0, 2], -1])
    assert_equal(ElasticCache.cat([cache.select([1]), cache.select([3, 0])]), cache.select([1, 3, 0]))
    some.to("cpu").save(tmp_path / "users.safetensors")
    assert_equal(ElasticCache.load(tmp_path / "users.safetensors"), some, atol=0, rtol=0)


@torch.no_grad()
def test_caches_with_and_without_times_are_no_caches_of_each_other():
    histories, (timestamps, _) = make_histories(), make_times()
    timed, plain = elastic_model(use_timestamps=True), elastic_model()
    of_timed = timed(histories, timestamps=timestamps, use_cache=True).cache
    of_plain = plain(histories, use_cache=True).cache
    names = "recurrent_state, conv_state, num_items"
    with pytest.raises(ValueError, match=f"cache must hold {names}, last_timestamps, found {names}$"):
        timed(histories, timestamps=timestamps + 2e9, cache=of_plain)
    with pytest.raises(ValueError, match=f"cache must hold {names}, found {names}, last_timestamps$"):
        plain(histories, cache=of_timed)


@torch.no_grad()
def test_events_before_those_of_the_cache_are_refused():
    model = elastic_model(use_timestamps=True)
    histories, (timestamps, _) = make_histories(), make_times()
    cache = model(histories, timestamps=timestamps, use_cache=True).cache
    later = timestamps[:, -1:].clone()
    model(histories[:, :1], timestamps=later, cache=cache)
    later[2] -= 1
    with pytest.raises(ValueError, match=r"timestamps must not go backwards \(oldest event first\), .* in row 2"):
        model(histories[:, :1], timestamps=later, cache=cache)
    with pytest.raises(ValueError, match="timestamps must be given to a model with use_timestamps=True"):
        model(histories[:, :1], cache=cache)
    later[2] += 10
    now = torch.tensor([-1, -1, later[2].item() - 1, -1], dtype=torch.double)
    with pytest.raises(ValueError, match="request_timestamps must be -1 or at least the time of .* in row 2"):
        model(histories[:, :1], timestamps=later, cache=cache, request_timestamps=now)


def test_the_digest_of_a_model_with_times_is_that_of_the_events_and_not_of_the_requests():
    model = elastic_model(use_timestamps=True).model
    digest = model.digest()
    with torch.no_grad():
        for weight in (model.time.elapsed.weight, model.time.request_phases.weight, model.time.expert_bias.weight):
            weight.view(-1)[-1].add_(1)
            assert model.digest() == digest
        for weight in (model.time.pause.weight, model.time.phases.weight, model.experts.log_half_life_seconds):
            weight.view(-1)[-1].add_(1)
            assert model.digest() != digest
            digest = model.digest()
