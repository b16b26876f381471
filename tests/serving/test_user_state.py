import pickle

import pytest
import torch

from elastic_hf import ElasticCache
from elastic_hf.serving.user_state import EventTensors, UserState, event_number, pack_state, unpack_state
from factories import elastic_model, histories, times


@pytest.mark.parametrize("use_timestamps", [False, True])
def test_states_come_back_from_their_bytes(use_timestamps):
    model = elastic_model(use_timestamps=use_timestamps)
    (input_ids, mask), (timestamps, _) = histories(batch_size=1, padding=0), times(batch_size=1, padding=0)
    given = {"timestamps": timestamps} if use_timestamps else {}
    with torch.inference_mode():
        cache = model(input_ids, mask, use_cache=True, **given).cache
    found, others = unpack_state(pack_state(cache, more=torch.tensor([3, 5])), "more")
    assert found.tensors.keys() == cache.tensors.keys() and found.model_digest == cache.model_digest
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in cache.tensors.items())
    assert others.keys() == {"more"} and others["more"].tolist() == [3, 5]


def events(token_ids, seconds, features):
    return EventTensors(torch.tensor(token_ids), torch.tensor(seconds, dtype=torch.double), torch.tensor(features))


def test_events_are_noted_and_all_but_the_latest_are_to_be_read():
    state = UserState(ElasticCache.empty(elastic_model(), 1), latest_features=torch.empty(0, 2))
    state = UserState.from_bytes(state.to_bytes())
    unread = [
        state.append(events([9, 5], [1.5, 2.5], [[1.0, 0.5], [2.0, 0.25]]), [7, -7]),
        state.append(events([9], [-1], [[3.0, -0.5]]), [2**63 - 1]),
    ]
    assert [[tensor.tolist() for tensor in tensors] for tensors in unread] == [
        [[9], [1.5], [[1.0, 0.5]]],
        [[5], [2.5], [[2.0, 0.25]]],
    ]
    state = UserState.from_bytes(state.to_bytes())
    assert [tensor.tolist() for tensor in state.latest] == [[9], [-1], [[3.0, -0.5]]]
    assert (state.seen_ids.tolist(), state.event_numbers.tolist()) == ([5, 9], [7, -7, 2**63 - 1])


def test_states_without_features_hold_nothing_of_them():
    state = UserState(ElasticCache.empty(elastic_model(), 1))
    state.append(events([9], [-1], [[]]), [7])
    names = ("latest_id", "latest_timestamp", "seen_ids", "event_numbers")
    assert unpack_state(state.to_bytes(), *names)[1].keys() == {*names}
    assert UserState.from_bytes(state.to_bytes()).latest_features.shape == (1, 0)


def test_other_bytes_are_refused():
    cache = ElasticCache.empty(elastic_model(), 1)
    for value in (b"", b"text", pickle.dumps({"a": 1}), pack_state(cache)[:-1]):
        with pytest.raises(ValueError, match="a state must be bytes of safetensors, found others"):
            unpack_state(value)
    for value, names in ((pack_state(cache), ["seen"]), (pack_state(cache, seen=torch.ones(2)), [])):
        with pytest.raises(ValueError, match="a state must hold .*model_digest, .*, found conv_state, .*"):
            unpack_state(value, *names)


def test_numbers_of_events_do_not_depend_on_the_process():
    assert event_number("order 1") == -2956733091741747309
    assert len({event_number(str(i)) for i in range(1_000)}) == 1_000
