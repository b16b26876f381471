import http.client
import importlib.util
import json
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import pipeline

from elastic_hf import ElasticItemTokenizer, SequentialRecommendationPipeline
from elastic_hf.serving.recommender import Recommender
from elastic_hf.serving.stores import SQLiteStore, StoreUnavailable
from elastic_hf.sharing.repository import TEMPLATES
from factories import NUM_TOKENS, elastic_model
from servers import Service, ask


for name in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(name)

from starlette.testclient import TestClient  # noqa: E402

import serve  # noqa: E402


def save(folder, events=None):
    """Save a model of random weights, which reads what `events` hold, and return its folder."""
    items = pa.table({"item_id": range(10, 7 + NUM_TOKENS), "title": [f"No. {i}" for i in range(NUM_TOKENS - 3)]})
    tokenizer = ElasticItemTokenizer.from_items(items, 500, None if events is None else Dataset.from_dict(events))
    model = elastic_model(event_features=tokenizer.event_features)
    SequentialRecommendationPipeline(model, tokenizer, device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("sequential-recommendation", model=str(folder), device="cpu")


@pytest.fixture
def make_client(pipe, tmp_path):
    """Starts an application on an empty store."""
    clients = []

    def make(token=None, pipe=pipe):
        client = TestClient(serve.create_app(Recommender(pipe, SQLiteStore(tmp_path / "users.sqlite")), token))
        clients.append(client.__enter__())
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make_client):
    return make_client()


def event(user="ada", item=17, event_id="1", **more):
    return {"user": user, "item": item, "event_id": event_id, **more}


def post(client, *events):
    answer = client.post("/events", json={"events": [*events]})
    return answer.status_code, answer.json()


def value_of(metric, text):
    """Return what the metrics say, 0 where they do not say anything."""
    found = re.search(rf"^{re.escape(metric)} (\S+)$", text, flags=re.MULTILINE)
    return float(found[1]) if found else 0


def test_events_come_in_and_recommendations_go_out(client, pipe):
    status, answer = post(client, event(), event("b/o b", "12", 1), event(item=30, event_id="2"))
    assert status == 200 and answer == {
        "events": [
            {"user": "ada", "event_id": "1", "outcome": "appended"},
            {"user": "b/o b", "event_id": "1", "outcome": "appended"},
            {"user": "ada", "event_id": "2", "outcome": "appended"},
        ]
    }
    assert post(client, event(item=11))[1]["events"][0]["outcome"] == "duplicate"
    for user, history in (("ada", [17, 30]), ("b%2Fo%20b", [12])):
        found = client.get(f"/recommendations/{user}?top_k=4")
        expected = pipe(history, top_k=4)
        assert found.status_code == 200 and [row.pop("score") for row in found.json()] == pytest.approx(
            [row.pop("score") for row in expected], abs=1e-4
        )
        assert len(client.get(f"/recommendations/{user}").json()) == 10
    assert client.get("/healthz").json()["status"] == "ok"


def load_handler():
    """Return the handler of a repository, as a module."""
    spec = importlib.util.spec_from_file_location("handler", TEMPLATES / "handler.py")
    handler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handler)
    return handler


def test_answers_the_json_of_an_inference_endpoint(client, folder, pipe):
    """The same request to the handler of the repository and to the service; and users have answers of that shape."""
    endpoint = load_handler().EndpointHandler(str(folder))
    for request in (
        {"inputs": [17, "No. 3"], "parameters": {"top_k": 2}},
        {"inputs": [[17], [12, 13]], "parameters": {"candidates": [20, 21], "top_k": 1}},
    ):
        answer = client.post("/recommendations", json=request)
        assert answer.status_code == 200 and answer.json() == json.loads(json.dumps(endpoint(request)))
    post(client, event(item=17))
    (row,) = client.get("/recommendations/ada?top_k=1").json()
    (expected,) = endpoint({"inputs": [17], "parameters": {"top_k": 1}})
    assert row == {**expected, "score": pytest.approx(expected["score"], abs=1e-4)}


def test_events_come_with_what_the_model_reads_of_them(make_client, tmp_path):
    """Once only, whatever is sent again; from states, from histories and from an endpoint the answers are the same."""
    rated = save(tmp_path / "rated", {"rating": [[1, 4, 5]], "the price": [[1.5, 4.0]]})
    client = make_client(pipe=pipeline("sequential-recommendation", model=str(rated), device="cpu"))
    history = {"history": [17, 30, 12], "rating": [5, None, 9], "the price": [2.5, None, 7]}
    told = [{"rating": 5, "the price": 2.5}, {"rating": None, "the price": None}, {"rating": "9", "the price": 7}]
    events = [event(item=item, event_id=item, **more) for item, more in zip(history["history"], told, strict=True)]
    assert post(client, *events[:2])[0] == 200
    status, answer = post(client, *events)
    assert status == 200 and [row["outcome"] for row in answer["events"]] == ["duplicate", "duplicate", "appended"]
    request = {"inputs": history, "parameters": {"top_k": 4}}
    expected = load_handler().EndpointHandler(str(rated))(json.loads(json.dumps(request)))
    assert client.post("/recommendations", json=request).json() == expected
    found = client.get("/recommendations/ada?top_k=4").json()
    for row, expected_row in zip(found, expected, strict=True):
        assert row == {**expected_row, "score": pytest.approx(expected_row["score"], abs=1e-4)}
    schema = client.get("/openapi.json").json()["components"]["schemas"]["EventBody"]
    assert {"rating", "the price", "user", "item", "event_id"} <= {*schema["required"]}

    for more, message in (
        ({"rating": 5}, "body.events.0.the price: Field required"),
        ({"rating": 5, "the price": 1, "stars": 5}, "body.events.0.stars: Extra inputs are not permitted"),
        ({"rating": 5, "the price": 1, "feature_0": 5}, "body.events.0.feature_0: Extra inputs are not permitted"),
    ):
        status, answer = post(client, event(event_id="new", **more))
        assert (status, answer) == (422, {"error": message})
    wrong = event(event_id="wrong", **{"rating": "five", "the price": 1})
    status, answer = post(client, wrong, event("bob", **told[0]))
    assert status == 422 and [row["outcome"] for row in answer["events"]] == ["refused", "appended"]
    assert answer["events"][0]["error"].startswith("event column 'rating' must hold integers, found other values: ")


def test_features_with_the_names_of_fields_are_refused():
    with pytest.raises(ValueError, match="event_features must not be called user, item, .*, found 'item'"):
        serve.make_events_body(["action", "item"])


def test_one_unknown_item_does_not_stop_the_others(client):
    status, answer = post(client, event(event_id="1"), event(item="nope", event_id="2"), event(event_id="3"))
    assert status == 422 and [row["outcome"] for row in answer["events"]] == ["appended", "refused", "appended"]
    assert answer["events"][1]["error"] == "item must be one that the model knows, found 'nope'"


def test_states_of_another_model_are_refused(make_client, pipe):
    post(make_client(), event())
    client = make_client()
    weight = pipe.model.model.experts.log_half_life
    with torch.no_grad():
        weight.add_(0.1)
    try:
        status, answer = post(client, event(event_id="2"), event("new user"))
        assert status == 409 and [row["outcome"] for row in answer["events"]] == ["refused", "appended"]
        found = client.get("/recommendations/ada")
        assert found.status_code == 409
        assert found.json()["error"].startswith(
            "the state of the user 'ada' must be one of this model: cache.model_dig"
        )
    finally:
        with torch.no_grad():
            weight.sub_(0.1)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 422, "body.1: JSON decode error"),
        (b"[" * 100_000, 400, "There was an error parsing the body"),
        (b"[]", 422, "body: Input should be a valid dictionary"),
        ({"events": []}, 422, "body.events: List should have at least 1 item"),
        ({"events": [event()] * 1_001}, 422, "body.events: List should have at most 1000 items"),
        ({"events": [event()], "more": 1}, 422, "body.more: Extra inputs are not permitted"),
        ({"events": [event(more=1)]}, 422, "body.events.0.more: Extra inputs are not permitted"),
        ({"events": [{"user": "ada", "item": 17}]}, 422, "body.events.0.event_id: Field required"),
        ({"events": [event(user="")]}, 422, "body.events.0.user: String should have at least 1 character"),
        ({"events": [event(user="u" * 257)]}, 422, "body.events.0.user: String should have at most 256 characters"),
        ({"events": [event(item=1.5)]}, 422, "body.events.0.item: Input should be a valid string"),
        ({"events": [event(item=True)]}, 422, "body.events.0.item: Input should be a valid string"),
        (b'{"events": [{"user": "\\ud800", "item": 17, "event_id": 1}]}', 422, "body.events.0.user: "),
        (
            b'{"events": [{"user": "a", "item": 17, "event_id": 1, "timestamp": NaN}]}',
            422,
            "body.events.0.timestamp: ",
        ),
        ({"events": [event(timestamp=17)]}, 422, None),
    ],
)
def test_bodies_that_are_refused(client, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/events", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    if message is not None:
        assert answer.json().keys() == {"error"} and answer.json()["error"].startswith(message)
    assert client.get("/recommendations/ada").status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/recommendations/ada?top_k=0", 422, "query.top_k: Input should be greater than or equal to 1"),
        ("/recommendations/ada?top_k=1001", 422, "query.top_k: Input should be less than or equal to 1000"),
        ("/recommendations/ada?top_k=28", 422, "top_k=28 asks for more than the 27 items left to recommend to 'ada'"),
        ("/recommendations/ada?now=17", 422, "now must be None for a model with use_timestamps=False, found 17.0"),
        ("/recommendations/ada?now=nan", 422, "query.now: Input should be a finite number"),
        ("/recommendations/bob", 404, "no event of the user 'bob' is stored"),
        ("/elsewhere", 404, "Not Found"),
    ],
)
def test_requests_that_are_refused(client, path, status, message):
    post(client, event())
    answer = client.get(path)
    assert (answer.status_code, answer.json()) == (status, {"error": answer.json()["error"]})
    assert answer.json()["error"].startswith(message)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "a body must be JSON"),
        (b"[" * 100_000, 400, "a body must be JSON"),
        (b'{"inputs": [17], "parameters": {"top_k": 1001}}', 422, "top_k must be at most 1,000, found 1,001"),
        (b'{"inputs": [%s]}' % b",".join([b"17"] * 10_001), 422, "the history must hold at most 10,000 items"),
        (b'{"inputs": ["\\ud800"]}', 422, "'utf-8' codec can't encode character"),
        (b'{"inputs": [NaN]}', 422, "the history must hold item ids (integers or strings) or titles, found nan"),
    ],
)
def test_histories_that_are_refused(client, content, status, message):
    answer = client.post("/recommendations", content=content)
    assert answer.status_code == status and answer.json()["error"].startswith(message)


def test_large_bodies_are_refused_before_they_are_read(client):
    """With their size in the header, and without."""
    size = serve.MAX_BODY_BYTES
    large = json.dumps({"events": [event()]}).encode() + b" " * size
    headers = {"Content-Type": "application/json"}
    assert client.post("/events", content=large[:size], headers=headers).status_code == 200
    for content in (large, iter([large[: size // 2]] * 3)):
        for path in ("/events", "/recommendations"):
            answer = client.post(path, content=content if isinstance(content, bytes) else iter([large] * 2))
            assert answer.status_code == 413
            assert answer.json()["error"].startswith("a body must have at most 1,048,576 bytes, found ")


def test_the_token_opens_the_door_and_is_never_named(make_client, caplog, capfd):
    caplog.set_level(0)
    client = make_client("s3cret")
    for given in (None, "s3cret", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer \xfc"):
        headers = {} if given is None else {"Authorization": given.encode("latin-1")}
        for path in ("/metrics", "/recommendations/ada", "/openapi.json", "/elsewhere"):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert client.post("/events", json={"events": [event()]}, headers=headers).status_code == 401
        assert client.get("/healthz", headers=headers).status_code == 200
    for given in ("Bearer s3cret", "bearer s3cret"):
        assert client.get("/metrics", headers={"Authorization": given}).status_code == 200
        assert client.get("/recommendations/ada", headers={"Authorization": given}).status_code == 404
    assert "s3cret" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("token", "is_good"), [(None, True), ("a-b.c", True), ("", False), ("a b", False), ("ü", False)]
)
def test_the_token_comes_from_the_environment(monkeypatch, token, is_good):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    if token is not None:
        monkeypatch.setenv(serve.TOKEN, token)
    if is_good:
        assert serve.read_token() == token
    else:
        with pytest.raises(ValueError, match="ELASTIC_HF_TOKEN must be printable ASCII .*, found others or none"):
            serve.read_token()


def test_metrics_count_what_happens(client):
    post(client, event(), event())
    post(client, event(item="nope", event_id="2"))
    client.get("/recommendations/ada")
    for user in ("x", "y", "z"):
        client.get(f"/recommendations/{user}")
        client.get(f"/{user}")
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    for metric, value in (
        ('elastic_hf_requests_total{route="/events",status="200"}', 1),
        ('elastic_hf_requests_total{route="/events",status="422"}', 1),
        ('elastic_hf_requests_total{route="/recommendations/{user:path}",status="200"}', 1),
        ('elastic_hf_requests_total{route="/recommendations/{user:path}",status="404"}', 3),
        ('elastic_hf_requests_total{route="none",status="404"}', 3),
        ('elastic_hf_events_total{outcome="appended"}', 1),
        ('elastic_hf_events_total{outcome="duplicate"}', 1),
        ('elastic_hf_events_total{outcome="refused"}', 1),
        ('elastic_hf_request_seconds_count{route="/events"}', 2),
        ('elastic_hf_batch_size_sum{kind="users"}', 4),
        ('elastic_hf_batch_size_bucket{kind="events",le="64.0"}', 2),
    ):
        assert value_of(metric, answer.text) == value
    assert value_of("process_resident_memory_bytes", answer.text) > 0


def test_concurrent_requests_are_answered_together_and_lose_nothing(client, pipe):
    """Eight clients append to the same two users, some events twice; the model is asked less often than the clients
    ask."""

    def work(number):
        for i in range(15):
            for user in ("ada", "bob"):
                assert post(client, event(user, 10 + i, f"{number // 2}.{i}"))[0] == 200
                assert client.get(f"/recommendations/{user}?top_k=3").status_code == 200

    with ThreadPoolExecutor(8) as executor:
        [*executor.map(work, range(8))]
    text = client.get("/metrics").text
    assert value_of('elastic_hf_events_total{outcome="appended"}', text) == 4 * 15 * 2
    assert value_of('elastic_hf_events_total{outcome="duplicate"}', text) == 4 * 15 * 2
    for kind in ("events", "users"):
        assert value_of(f'elastic_hf_batch_size_sum{{kind="{kind}"}}', text) == 8 * 15 * 2
        assert value_of(f'elastic_hf_batch_size_count{{kind="{kind}"}}', text) < 8 * 15 * 2


def test_a_store_that_fails_acknowledges_nothing(client, monkeypatch):
    def fail(*_):
        raise StoreUnavailable("the store is gone")

    post(client, event())
    with monkeypatch.context() as patch:
        patch.setattr(SQLiteStore, "update", fail)
        patch.setattr(SQLiteStore, "read", fail)
        for answer in (
            client.post("/events", json={"events": [event(event_id="2")]}),
            client.get("/recommendations/ada"),
            client.get("/healthz"),
        ):
            assert (answer.status_code, answer.json()) == (503, {"error": "the store is gone"})
            assert answer.headers["Retry-After"] == "1"
    assert post(client, event(event_id="2"))[1]["events"][0]["outcome"] == "appended"


def append_one(connection, user, item, event_id):
    """Send an event to a service, and return the status and what became of the event."""
    status, answer = ask(connection, "POST", "/events", {"events": [event(user, item, event_id)]})
    return status, json.loads(answer)["events"][0]["outcome"]


def test_a_killed_service_loses_nothing_that_it_acknowledged(folder, pipe, store_name):
    """Four clients append when it is killed; all send everything again to the next one."""
    histories = {f"user {i}": [10 + (7 * i + 3 * j) % 20 for j in range(60)] for i in range(4)}
    acknowledged = {user: 0 for user in histories}
    service = Service(folder, store_name, OMP_NUM_THREADS="1")
    half = threading.Event()

    def append(user):
        connection = service.connect()
        for number, item in enumerate(histories[user]):
            try:
                assert append_one(connection, user, item, number) == (200, "appended")
            except (OSError, http.client.HTTPException):
                return
            acknowledged[user] += 1
            if number == 20:
                half.set()

    clients = [threading.Thread(target=append, args=(user,)) for user in histories]
    for one in clients:
        one.start()
    assert half.wait(60)
    assert service.stop(signal.SIGKILL) == -signal.SIGKILL
    for one in clients:
        one.join()
    assert max(acknowledged.values()) >= 21 and min(acknowledged.values()) < 60

    service = Service(folder, store_name, OMP_NUM_THREADS="1")
    try:
        connection = service.connect()
        for user, history in histories.items():
            outcomes = [append_one(connection, user, item, i)[1] for i, item in enumerate(history)]
            num_stored = outcomes.count("duplicate")
            assert acknowledged[user] <= num_stored <= acknowledged[user] + 1
            assert outcomes == ["duplicate"] * num_stored + ["appended"] * (60 - num_stored)
            _, found = ask(connection, "GET", f"/recommendations/{user.replace(' ', '%20')}?top_k=3")
            assert [row["item"] for row in json.loads(found)] == [row["item"] for row in pipe(history, top_k=3)]
    finally:
        service.stop()


def test_the_process_listens_here_alone_and_logs_no_token_and_no_user(folder, tmp_path):
    service = Service(folder, tmp_path / "users.sqlite", OMP_NUM_THREADS="1", ELASTIC_HF_TOKEN="s3cret")
    try:
        assert service.host == "127.0.0.1"
        connection = service.connect()
        for given, status in (("Bearer s3cret", 404), ("Bearer other", 401)):
            connection.request("GET", "/recommendations/somebody", headers={"Authorization": given})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
    finally:
        service.stop()
    log = "".join(service.log)
    assert "Application shutdown complete" in log and not re.search("s3cret|other|somebody", log)
