import io
import runpy
import sqlite3
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import Dataset

import streaming
from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticItemTokenizer
from factories import EVENT_FEATURES, NUM_TOKENS, elastic_model, event_features, featured_model


ROOT = Path(__file__).parents[2]
NUM_ITEMS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights."""
    path = tmp_path_factory.mktemp("model")
    items = pa.table(
        {"item_id": [f"sku {i}" for i in range(NUM_ITEMS)], "title": [f"No. {i}" for i in range(NUM_ITEMS)]}
    )
    ElasticItemTokenizer.from_items(items, model_max_length=50).save_pretrained(path)
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(vocab_size=NUM_ITEMS + 3, num_memory_subkeys=5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


@pytest.fixture
def serve(monkeypatch, capsys):
    """Runs the program on events: its exit status and the lines of its output and errors."""

    def run(folder, store, events, *more):
        options = ["--model_name_or_path", folder, "--store", store, "--top_k", 4, *more]
        monkeypatch.setattr(sys, "argv", ["streaming.py", *map(str, options)])
        text = "".join("\t".join(event) + "\n" for event in events)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(streaming.__file__, run_name="__main__")
        return ended.value.code, *map(str.splitlines, capsys.readouterr())

    return run


def test_the_service_recommends_what_the_whole_history_says(serve, folder, tmp_path):
    """Two runs, one after the other, on one store; users come back, one of them to an item."""
    store = tmp_path / "users.sqlite"
    first = [("ada", "sku 3"), ("bob", "sku 7"), ("ada", "sku 5")]
    second = [("ada", "sku 3"), ("bob", "sku 0"), ("eve", "sku 19")]
    lines = []
    for events in (first, second):
        status, printed, errors = serve(folder, store, events)
        assert status == 0, errors
        lines += printed

    model = ElasticForSequentialRecommendation.from_pretrained(folder).eval()
    tokenizer = ElasticItemTokenizer.from_pretrained(folder)
    histories = {}
    for (user, item), line in zip(first + second, lines, strict=True):
        histories.setdefault(user, []).append(item)
        inputs = tokenizer([histories[user]], is_split_into_words=True, return_tensors="pt")
        expected = tokenizer.convert_ids_to_titles(model.recommend(**inputs, top_k=4).token_ids[0])
        assert line.split("\t") == [user, *expected]
    sizes = sqlite3.connect(store).execute("SELECT user, length(state) FROM users ORDER BY user").fetchall()
    assert [user for user, _ in sizes] == ["ada", "bob", "eve"]
    assert max(size for _, size in sizes) - min(size for _, size in sizes) <= 2 * 8  # the ids of two items seen more


def test_an_event_that_cannot_be_read_is_reported_and_the_stream_goes_on(serve, folder, tmp_path):
    events = [("ada", "sku 1"), ("ada", "sku 99"), ("ada", "x", "sku 1"), ("bob", "[PAD]"), ("", "sku 2")]
    status, printed, errors = serve(folder, tmp_path / "users.sqlite", events)
    assert status == 1
    assert [line.split("\t")[0] for line in printed] == ["ada", ""]
    assert [line for line in errors if line.startswith("line ")] == [
        "line 2: the model does not know the item 'sku 99'",
        "line 3: a line must be a user, an item with tabs between them, found b'ada\\tx\\tsku 1\\n'",
        "line 4: the model does not know the item '[PAD]'",
    ]


def test_an_event_that_is_sent_again_is_answered_again_and_counts_once(serve, folder, tmp_path):
    """As after a kill between storing and answering; the same id is another event of another user."""
    file = tmp_path / "users.sqlite"
    events = [("ada", "sku 3", "1"), ("ada", "sku 5", "2"), ("bob", "sku 3", "1")]
    lines = [serve(folder, file, events, "--event_ids")[1] for _ in range(2)]
    assert len(lines[0]) == 3 and lines[1] == [lines[0][1], *lines[0][1:]]
    state = streaming.UserStore(file).read("ada")
    assert [state[0].num_items.tolist(), state[1].tolist()] == [[2], [6, 8]]


@pytest.fixture
def store(tmp_path):
    return streaming.UserStore(tmp_path / "users.sqlite")


def test_a_model_that_keeps_seen_items_recommends_them(store):
    model = elastic_model(exclude_seen=False)
    for token_id in (3, 4, 3, 5):
        token_ids = streaming.append(model, store, "ada", token_id, NUM_TOKENS - 3)
    assert sorted(token_ids.tolist()) == [*range(3, NUM_TOKENS)]


def test_only_items_that_were_not_seen_are_recommended(store):
    """All items but five are read, some of them twice."""
    model = elastic_model()
    history = [*range(3, NUM_TOKENS - 5), 3, 8]
    for token_id in history:
        token_ids = streaming.append(model, store, "ada", token_id, 5)
    assert sorted(token_ids.tolist()) == list(range(NUM_TOKENS - 5, NUM_TOKENS))
    assert torch.equal(token_ids, model.recommend(torch.tensor([history]), top_k=5).token_ids[0])
    before = store.values.connection.execute("SELECT * FROM users").fetchall()
    for top_k in (6, NUM_TOKENS, 10 * NUM_TOKENS):
        with pytest.raises(ValueError, match=f"top_k={top_k} asks for more than the 5 items left to recommend"):
            streaming.append(model, store, "ada", 3, top_k)
    for top_k in (0, -1):
        with pytest.raises(ValueError, match=f"top_k must be an integer of at least 1, found {top_k}"):
            streaming.append(model, store, "ada", 3, top_k)
    for token_id in (0, 1, 2, NUM_TOKENS):
        with pytest.raises(ValueError, match=f"token_id must be items, from 3 to 30, found {token_id}"):
            streaming.append(model, store, "ada", token_id, 1)
    assert store.values.connection.execute("SELECT * FROM users").fetchall() == before


def test_a_model_with_features_of_items_scores_with_them(store):
    model, _ = featured_model()
    for i, token_id in enumerate((3, 8, 5), start=1):
        found = streaming.append(model, store, "ada", token_id, 5)
        assert torch.equal(found, model.recommend(torch.tensor([[3, 8, 5][:i]]), top_k=5).token_ids[0])


def test_states_of_another_model_are_refused(store):
    model = elastic_model()
    streaming.append(model, store, "ada", 3, 5)
    other = elastic_model()
    with torch.no_grad():
        other.model.experts.log_half_life.add_(0.1)
    for _ in range(2):
        with pytest.raises(ValueError, match="cache.model_digest must be that of this model"):
            streaming.append(other, store, "ada", 4, 5)
        streaming.append(model, store, "ada", 4, 5)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] += 1
    with pytest.raises(ValueError, match="cache.model_digest must be that of this model"):
        streaming.append(model, store, "ada", 4, 5)


def test_services_that_share_a_store_lose_nothing(tmp_path):
    model = elastic_model()
    file = tmp_path / "users.sqlite"
    streaming.append(model, streaming.UserStore(file), "ada", 3, 5)

    def serve_all():
        store = streaming.UserStore(file)
        for token_id in range(3, 13):
            streaming.append(model, store, "ada", token_id, 5)

    services = [threading.Thread(target=serve_all) for _ in range(4)]
    for service in services:
        service.start()
    for service in services:
        service.join()
    cache, seen = streaming.UserStore(file).read("ada")
    assert cache.num_items.tolist() == [41] and seen.tolist() == list(range(3, 13))


def test_a_model_that_reads_times_is_told_them(store):
    """Each answer is that of the whole history at the moment of its last event, from states of one size."""
    model = elastic_model(use_timestamps=True)
    events = [(3, 10.0), (8, 10.0), (5, 90_000.5), (9, 1.7e9)]
    sizes = []
    for i, (token_id, timestamp) in enumerate(events, start=1):
        found = streaming.append(model, store, "ada", token_id, 5, timestamp)
        items, times = zip(*events[:i], strict=True)
        expected = model.recommend([items], timestamps=[times], request_timestamps=[timestamp], top_k=5)
        assert torch.equal(found, expected.token_ids[0])
        sizes += store.values.connection.execute("SELECT length(state) FROM users").fetchone()
    assert [size - sizes[0] for size in sizes] == [0, 8, 16, 24]
    for timestamp, message in (
        (1.6e9, "timestamps must not go backwards .*, found 1600000000.0 after 1700000000.0 in row 0"),
        (None, "timestamps must be given to a model with use_timestamps=True, found None"),
        (float("nan"), "timestamps must be finite Unix seconds of at least 0, found nan"),
    ):
        with pytest.raises(ValueError, match=message):
            streaming.append(model, store, "ada", 4, 5, timestamp)
    with pytest.raises(ValueError, match="timestamps must be None for a model with use_timestamps=False"):
        streaming.append(elastic_model(), store, "bob", 4, 5, 1.7e9)


def test_lines_for_a_model_that_reads_times(serve, folder, tmp_path):
    elastic_model(use_timestamps=True, vocab_size=NUM_ITEMS + 3).save_pretrained(tmp_path)
    ElasticItemTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    events = [("ada", "sku 1"), ("ada", "sku 1", "yesterday"), ("ada", "sku 1", "17.5"), ("ada", "sku 2", "17")]
    status, (printed,), errors = serve(tmp_path, tmp_path / "users.sqlite", events)
    assert status == 1 and printed.startswith("ada\t")
    reports = [line for line in errors if line.startswith("line ")]
    assert [report.partition(" found")[0] for report in reports] == [
        "line 1: a line must be a user, an item, Unix seconds with tabs between them,",
        "line 2: Unix seconds must be a number,",
        "line 4: timestamps must not go backwards (oldest event first),",
    ]


def test_a_known_event_of_another_model_is_refused(store):
    model, other = elastic_model(), elastic_model()
    with torch.no_grad():
        other.model.experts.log_half_life.add_(0.1)
    first = streaming.append(model, store, "ada", 3, 5, event_id="1")
    assert torch.equal(streaming.append(model, store, "ada", 3, 5, event_id="1"), first)
    with pytest.raises(ValueError, match="cache.model_digest must be that of this model"):
        streaming.append(other, store, "ada", 3, 5, event_id="1")


def test_a_model_that_reads_features_of_events_is_told_them(store):
    """Each answer is that of the whole history, from states of one size."""
    model = elastic_model(event_features=EVENT_FEATURES)
    features = event_features(padding=0)[0]
    token_ids = [3, 8, 5, 9]
    for i, token_id in enumerate(token_ids, start=1):
        found = streaming.append(model, store, "ada", token_id, 5, event_features=features[i - 1])
        expected = model.recommend([token_ids[:i]], event_features=features[None, :i], top_k=5)
        assert torch.equal(found, expected.token_ids[0])
    with pytest.raises(ValueError, match="event_features .* found None"):
        streaming.append(model, store, "ada", 4, 5)


def test_lines_for_a_model_that_reads_features_of_events(serve, folder, tmp_path):
    events = Dataset.from_dict({"action": [["buy", "view"]], "rating": [[4, 5]]})
    tokenizer = ElasticItemTokenizer.from_items(ElasticItemTokenizer.from_pretrained(folder).items, 50, events)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"vocab_size": NUM_ITEMS + 3, "event_features": tokenizer.event_features}
    model = elastic_model(use_timestamps=True, **sizes)
    model.save_pretrained(tmp_path)
    lines = [
        ("ada", "sku 1", "17.5", "buy", "5"),
        ("ada", "sku 1", "18", "buy"),
        ("ada", "sku 1", "18", "buy", "five"),
    ]
    lines.append(("ada", "sku 3", "18", "", "4"))
    _, (first, second), errors = serve(tmp_path, tmp_path / "users.sqlite", lines)
    expected = model.recommend(
        [[4, 6]],
        timestamps=[[17.5, 18]],
        request_timestamps=[18],
        event_features=tokenizer.encode_events({"action": ["buy", None], "rating": [5, 4]})[None],
        top_k=4,
    )
    assert second.split("\t") == ["ada", *tokenizer.convert_ids_to_titles(expected.token_ids[0])]
    reports = [line for line in errors if line.startswith("line ")]
    assert [report.partition(" found")[0] for report in reports] == [
        "line 2: a line must be a user, an item, Unix seconds, action, rating with tabs between them,",
        "line 3: event column 'rating' must hold integers,",
    ]
    known = [("ada", "sku 3", "18", "", "4", "1"), ("ada", "sku 3", "18", "", "4", "1")]
    _, again, _ = serve(tmp_path, tmp_path / "others.sqlite", known, "--event_ids")
    assert len(again) == 2 and again[0] == again[1]
