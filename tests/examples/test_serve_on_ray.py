import argparse
import http.client
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import pipeline

from elastic_hf import ElasticItemTokenizer, SequentialRecommendationPipeline
from factories import NUM_TOKENS, elastic_model
from servers import ask


for name in ("fastapi", "prometheus_client", "ray"):
    pytest.importorskip(name)
try:
    import serve_on_ray
except ImportError as error:
    pytest.skip(f"needs Ray Serve, of the extra [ray]: {error}", allow_module_level=True)

TOKEN = "s3cret"


@pytest.fixture
def arguments(tmp_path):
    """A model of random weights, saved, and a free port."""
    tokenizer = ElasticItemTokenizer.from_items(range(10, 7 + NUM_TOKENS), model_max_length=500)
    SequentialRecommendationPipeline(elastic_model(), tokenizer, device="cpu").save_pretrained(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    given = {"model_name_or_path": str(tmp_path), "revision": None, "host": "127.0.0.1", "port": port}
    return argparse.Namespace(**given, num_replicas=2)


@pytest.fixture
def address(arguments, redis_url, ray_cluster, monkeypatch):
    """Where two replicas answer, which share a store."""
    monkeypatch.setenv("ELASTIC_HF_TOKEN", TOKEN)
    arguments.store = redis_url
    serve_on_ray.deploy(arguments, blocking=False)
    yield arguments.host, arguments.port
    serve_on_ray.ray.serve.shutdown()


@pytest.mark.long
def test_replicas_share_the_states_of_users(address, arguments):
    """Four clients send all events of two users, each in the same order: every event counts once, whoever answers."""
    items = [10 + 7 * i % 20 for i in range(25)]

    def work(number):
        connection = http.client.HTTPConnection(*address, timeout=60)
        outcomes, processes = [], set()
        for i, item in enumerate(items):
            events = [{"user": user, "item": item, "event_id": str(i)} for user in ("somebody", "else")]
            status, answer = ask(connection, "POST", "/events", {"events": events}, TOKEN)
            assert status == 200
            outcomes += [row["outcome"] for row in json.loads(answer)["events"]]
            _, metrics = ask(connection, "GET", "/metrics", None, TOKEN)
            processes.add(re.search(rb"^process_start_time_seconds (\S+)$", metrics, flags=re.MULTILINE)[1])
        return outcomes, processes

    with ThreadPoolExecutor(4) as executor:
        found = [*executor.map(work, range(4))]
    outcomes = [outcome for of_client, _ in found for outcome in of_client]
    assert (outcomes.count("appended"), outcomes.count("duplicate")) == (2 * 25, 3 * 2 * 25)
    assert len({process for _, of_client in found for process in of_client}) == 2
    recommend = pipeline("sequential-recommendation", model=arguments.model_name_or_path, device="cpu")
    connection = http.client.HTTPConnection(*address, timeout=60)
    for user in ("somebody", "else"):
        status, answer = ask(connection, "GET", f"/recommendations/{user}?top_k=3", None, TOKEN)
        assert status == 200
        assert [row["item"] for row in json.loads(answer)] == [row["item"] for row in recommend(items, top_k=3)]
    for path, token, expected in (("/recommendations/somebody", None, 401), ("/somebody", TOKEN, 404)):
        assert ask(connection, "GET", path, None, token)[0] == expected
    logs = Path(serve_on_ray.ray._private.worker.global_worker.node.get_logs_dir_path())
    text = "".join(file.read_text(errors="replace") for file in logs.rglob("serve/*.log"))
    assert "GET /recommendations/" in text and not re.search("somebody|s3cret", text)


def test_a_store_that_replicas_cannot_share_is_refused(arguments):
    arguments.store = "users.sqlite"
    with pytest.raises(
        ValueError, match="store must be a URL of Redis, which all replicas share, found 'users.sqlite'"
    ):
        serve_on_ray.deploy(arguments)
