import math
import threading
import time

import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from elastic_hf import ElasticItemTokenizer, SequentialRecommendationPipeline
from elastic_hf.serving import recommender as module
from elastic_hf.serving.recommender import Event, Recommender, Request, StateError, UnknownUser
from elastic_hf.serving.stores import SQLiteStore, open_store
from elastic_hf.serving.user_state import UserState
from factories import NUM_TOKENS, elastic_model


NUM_ITEMS = NUM_TOKENS - 3


LOG = {"action": [["buy", "view"]], "price": [[1.5, 4.0]], "rating": [[4, 5]]}  # what is known of events


def make_pipeline(events=None, **changes):
    items = pa.table(
        {"item_id": [f"sku {i}" for i in range(NUM_ITEMS)], "title": [f"No. {i}" for i in range(NUM_ITEMS)]}
    )
    events = None if events is None else Dataset.from_dict(events)
    tokenizer = ElasticItemTokenizer.from_items(items, model_max_length=500, events=events)
    model = elastic_model(event_features=tokenizer.event_features, **changes)
    return SequentialRecommendationPipeline(model, tokenizer, device="cpu")


def make(store, **changes):
    return Recommender(make_pipeline(**changes), store)


@pytest.fixture
def sqlite(tmp_path):
    return SQLiteStore(tmp_path / "users.sqlite")


def stored_events(recommender, user):
    """The number of events in a user's cache and beside it, and of the ids that are kept."""
    state = UserState.from_bytes(recommender.store.read([user])[user])
    return int(state.cache.num_items) + len(state.latest_id), len(state.event_numbers)


def assert_same(found, expected):
    """Equal but for rounding: what is read together is summed up in another order."""
    assert [(row["item"], row["title"]) for row in found] == [(row["item"], row["title"]) for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-4)


@pytest.mark.parametrize(("use_timestamps", "log"), [(False, None), (True, None), (False, LOG), (True, LOG)])
def test_recommends_what_the_whole_history_says(store, use_timestamps, log):
    """Users come and go, one or several events at a time; some are in a batch twice. What is told of events is of
    several kinds, unknown or missing."""
    recommender = make(store, use_timestamps=use_timestamps, events=log)
    told = {"action": ["buy", "?", None], "price": [7, -0.5, None, 4.0], "rating": [4, 9, None, 5, 4]}
    generator = torch.Generator().manual_seed(3)
    histories, seconds = {}, 1e9
    for call, size in enumerate((1, 7, 2, 11, 5, 1)):
        events = []
        for i in range(size):
            user = f"user {int(torch.randint(5, (1,), generator=generator))}"
            item = f"sku {int(torch.randint(NUM_ITEMS, (1,), generator=generator))}"
            seconds += 10.0 ** int(torch.randint(7, (1,), generator=generator))
            features = {name: told[name][(call + i) % len(told[name])] for name in log or ()}
            events.append(Event(user, item, f"{call}.{i}", seconds if use_timestamps else None, features))
            histories.setdefault(user, []).append((item, seconds, features))
        assert recommender.append(events) == ["appended"] * size
        now = seconds + 1e5 if use_timestamps else None
        users = [*histories, *histories]
        found = recommender.recommend([Request(user, 1 + row, now) for row, user in enumerate(users)])
        for row, (user, answer) in enumerate(zip(users, found, strict=True)):
            items, times, features = map(list, zip(*histories[user], strict=True))
            history = {"history": items, "timestamps": times, "now": now} if use_timestamps else {"history": items}
            history |= {name: [row[name] for row in features] for name in log or ()}
            assert_same(answer, recommender.pipeline(history, top_k=1 + row))
    assert stored_events(recommender, "user 0") == (len(histories["user 0"]),) * 2


def test_features_of_events_that_are_refused(sqlite):
    """Each by itself, and what is written in another way is read."""
    recommender = make(sqlite, events=LOG)
    good = {"action": "buy", "price": 2.5, "rating": 4}
    cases = [
        (good, "appended"),
        ({**good, "rating": "4"}, "appended"),
        ({**good, "rating": 4.5}, "event column 'rating' must hold integers, found other values: "),
        ({**good, "rating": 10**30}, "event column 'rating' must hold values of one kind, found [1000"),
        ({**good, "price": math.nan}, "event column 'price' must hold finite numbers, found nan"),
        ({**good, "action": [1]}, "event column 'action' must hold strings, found type list<"),
        ({"price": 2.5, "rating": 4}, "features must be those of the model, ['action', 'price', 'rating'], found"),
        ({**good, "more": 1}, "features must be those of the model, ['action', 'price', 'rating'], found"),
        (dict.fromkeys(good), "appended"),
    ]
    outcomes = recommender.append([Event("ada", "sku 1", str(i), None, given) for i, (given, _) in enumerate(cases)])
    for outcome, (_, expected) in zip(outcomes, cases, strict=True):
        assert str(outcome).startswith(expected)
    assert stored_events(recommender, "ada") == (3, 3)
    assert recommender.append([Event("ada", "sku 1", "0", None, {"rating": []})]) == ["duplicate"]
    (error,) = make(sqlite).append([Event("bob", "sku 1", "1", None, good)])
    assert str(error) == "features must be those of the model, [], found ['action', 'price', 'rating']"


def test_one_pass_of_the_model_for_all_users(sqlite):
    recommender = make(sqlite)
    sizes = []
    recommender.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    events = [Event(user, f"sku {i}", f"{i}") for i in range(3) for user in ("ada", "bob", "eve")]
    recommender.append([*events, Event("joe", "sku 1", "0")])
    recommender.append([Event("ada", "sku 9", "9"), Event("joe", "sku 9", "9")])
    recommender.recommend([Request(user) for user in ("ada", "bob", "eve", "joe")])
    assert sizes == [(3, 2), (2, 1), (4, 1)]


def test_an_event_that_is_sent_again_counts_once(store):
    recommender = make(store)
    events = [Event("ada", "sku 3", "1"), Event("bob", "sku 3", "1"), Event("ada", "sku 3", "1")]
    assert recommender.append(events) == ["appended", "appended", "duplicate"]
    assert recommender.append([Event("ada", "sku 4", "1"), Event("ada", "sku 4", "2")]) == ["duplicate", "appended"]
    before = store.read(["ada", "bob"])
    again = [*events, Event("ada", "no such item", "2")]
    assert recommender.append(again) == ["duplicate"] * 4
    assert store.read(["ada", "bob"]) == before and stored_events(recommender, "ada") == (2, 2)


def test_an_event_that_is_refused_leaves_the_others_as_they_are(sqlite, monkeypatch):
    monkeypatch.setattr(module, "MAX_EVENTS_OF_USER", 3)
    recommender = make(sqlite)
    names = ["sku 1", "sku 99", "[PAD]", "[MASK]", "sku 2"]
    first, *refused, last = recommender.append([Event("ada", name, name) for name in names])
    assert (first, last) == ("appended", "appended")
    for name, error in zip(names[1:-1], refused, strict=True):
        assert str(error) == f"item must be one that the model knows, found {name!r}"
    found = recommender.append([Event("ada", "sku 3", "3"), Event("ada", "sku 4", "4"), Event("bob", "sku 4", "4")])
    assert [found[0], str(found[1]), found[2]] == [
        "appended",
        "a user must have at most 3 events, found one more",
        "appended",
    ]
    (error,) = recommender.append([Event("bob", "sku 1", "1", 17.0)])
    assert str(error) == "timestamp must be None for a model with use_timestamps=False, found 17.0"
    assert stored_events(recommender, "ada") == (3, 3) and stored_events(recommender, "bob") == (1, 1)


def test_times_of_events(sqlite):
    recommender = make(sqlite, use_timestamps=True)
    seconds = [17.5, 17.5, 17.0, None, math.nan, -1.0, time.time() * 1_000, 18]
    outcomes = recommender.append([Event("ada", "sku 1", f"{i}", value) for i, value in enumerate(seconds)])
    assert [outcome == "appended" for outcome in outcomes] == [True, True, *[False] * 5, True]
    assert "timestamp must be Unix seconds, not before the user's latest event and at most a day ahead, from 17.5" in (
        str(outcomes[2])
    )
    assert str(outcomes[3]) == "timestamp must be Unix seconds for a model with use_timestamps=True, found None"
    (error,) = recommender.append([Event("ada", "sku 1", "late", 17.9)])
    assert "from 18.0 to" in str(error) and stored_events(recommender, "ada") == (3, 3)
    early, never, good = recommender.recommend([Request("ada", 5, now) for now in (17.9, math.inf, 18.0)])
    for error, now in ((early, 17.9), (never, math.inf)):
        assert str(error) == f"now must be Unix seconds of at least those of the latest event, 18.0, found {now}"
    assert len(good) == 5


def test_without_a_time_a_request_is_of_now(sqlite, monkeypatch):
    """Of the latest event, where a clock that is ahead has told its time."""
    recommender = make(sqlite, use_timestamps=True)
    monkeypatch.setattr(module.time, "time", lambda: 1e9)
    recommender.append([Event("ada", "sku 1", "1", 5e8), Event("bob", "sku 1", "1", 1e9 + 5)])
    for user, seconds, now in (("ada", 5e8, 1e9), ("bob", 1e9 + 5, 1e9 + 5)):
        expected = recommender.pipeline({"history": ["sku 1"], "timestamps": [seconds], "now": now})
        assert_same(recommender.recommend([Request(user)])[0], expected)
        assert recommender.recommend([Request(user)]) == recommender.recommend([Request(user, 10, now)])


def test_errors_of_requests(sqlite):
    recommender = make(sqlite)
    recommender.append([Event("ada", f"sku {i}", str(i)) for i in range(NUM_ITEMS - 4)])
    requests = [("ada", 4), ("ada", 5), ("bob", 1), ("ada", 10 * NUM_ITEMS), ("ada", 0), ("ada", 1, 17.0)]
    good, *errors = recommender.recommend([Request(*request) for request in requests])
    assert {row["item"] for row in good} == {f"sku {i}" for i in range(NUM_ITEMS - 4, NUM_ITEMS)}
    assert [str(error) for error in errors] == [
        "top_k=5 asks for more than the 4 items left to recommend to 'ada'",
        "no event of the user 'bob' is stored",
        f"top_k={10 * NUM_ITEMS} asks for more than the 4 items left to recommend to 'ada'",
        "top_k must be an integer of at least 1, found 0",
        "now must be None for a model with use_timestamps=False, found 17.0",
    ]
    assert isinstance(errors[1], UnknownUser)
    kept = make(sqlite, exclude_seen=False)
    assert len(kept.recommend([Request("ada", NUM_ITEMS)])[0]) == NUM_ITEMS


def test_states_of_another_model_are_refused_by_name(sqlite):
    recommender, other = make(sqlite), make(sqlite)
    with torch.no_grad():
        other.model.model.experts.log_half_life.add_(0.1)
    recommender.append([Event("ada", "sku 1", "1")])
    before = sqlite.read(["ada"])
    for stranger in (other, make(sqlite, use_timestamps=True), make(sqlite, num_interest_experts=5)):
        seconds = 17.0 if stranger.uses_timestamps else None
        name = f"user of {id(stranger)}"
        again, new = stranger.append([Event("ada", "sku 1", "1", seconds), Event(name, "sku 1", "1", seconds)])
        (answer,) = stranger.recommend([Request("ada")])
        for error in (again, answer):
            assert isinstance(error, StateError)
            assert str(error).startswith("the state of the user 'ada' must be one of this model: cache")
        assert new == "appended"
    sqlite.update(["ada"], lambda stored: {"ada": b"nonsense"})
    (answer,) = recommender.recommend([Request("ada")])
    assert isinstance(answer, StateError) and "a state must be bytes of safetensors" in str(answer)
    sqlite.update(["ada"], lambda stored: before)
    assert recommender.append([Event("ada", "sku 1", "2")]) == ["appended"]


def test_models_without_states_are_refused(sqlite):
    pipe = make_pipeline()
    pipe.model.supports_cache = False
    with pytest.raises(ValueError, match="model must keep states of users, found ElasticForSequentialRecommendation"):
        Recommender(pipe, sqlite)


def test_broken_weights_answer_nothing(sqlite):
    recommender = make(sqlite)
    recommender.append([Event("ada", "sku 1", "1")])
    with torch.no_grad():
        recommender.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="scores are not finite"):
        recommender.recommend([Request("ada")])


def test_services_that_share_a_store_lose_nothing(store_name):
    """Each of three appends events of its own, and some that all append, to two users at once."""
    pipe = make_pipeline()

    def serve(number):
        recommender = Recommender(pipe, open_store(store_name))
        for i in range(20):
            users = ("ada", "bob")
            recommender.append([Event(user, f"sku {i}", f"{number}.{i}") for user in users])
            recommender.append([Event(user, f"sku {i}", f"{i}") for user in users])

    services = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
    for service in services:
        service.start()
    for service in services:
        service.join()
    recommender = Recommender(pipe, open_store(store_name))
    assert [stored_events(recommender, user) for user in ("ada", "bob")] == [(80, 80)] * 2
