"""The pipeline: inputs of every form, seen and unknown items, titles, popularity, saving and loading."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import elastic_hf
from elastic_hf import (
    ElasticConfig,
    ElasticForSequentialRecommendation,
    ElasticItemTokenizer,
    SequentialRecommendationPipeline,
    SequentialRecommendationTrainer,
)
from elastic_hf.baselines import BERT4RecConfig, BERT4RecForSequentialRecommendation


WINDOW = 5
ITEM_IDS = [70, 3, 12, 9, 500, 41, 8, 66, 1, 25, 30, 17, 99]  # token ids 3 to 15
TITLES = ["Alien", "Brazil", None, "Twice", "Twice", "12", "Fargo", "300", "Heat", "Ikiru", "Jaws", "Kes", "M"]
COUNTS = [4, 7, 0, 2, 7, 1, 3, 5, 2, 2, 9, 0, 1]
HISTORIES = [[70, 3, 12], [9], [500, 41, 8, 66, 1, 25, 30], [17, 17, 70, 9, 3], [25, 30]]


def make_tokenizer(**columns) -> ElasticItemTokenizer:
    return ElasticItemTokenizer.from_items(pa.table({"item_id": ITEM_IDS, "title": TITLES, **columns}), WINDOW)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(count=COUNTS)


def make_model(tokenizer, **changes) -> ElasticForSequentialRecommendation:
    torch.manual_seed(0)
    config = ElasticConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_attention_heads=3,
        num_interest_experts=4,
        num_memory_subkeys=7,
        num_memory_heads=2,
        **changes,
    )
    return ElasticForSequentialRecommendation(config)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = make_model(tokenizer)
    torch.nn.init.normal_(model.lm_head.weight)
    return model


@pytest.fixture
def pipe(model, tokenizer):
    return pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, device="cpu", top_k=4)


def expected_for(model, history, top_k=4, exclude_seen=True, candidates=ITEM_IDS):
    """Item ids, titles and scores from all logits, one history alone, the window cut by hand."""
    token_ids = [3 + ITEM_IDS.index(item) for item in history]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([token_ids[-WINDOW:]])).logits[0]
    allowed = [item for item in candidates if not (exclude_seen and item in history)]
    scores = {item: logits[3 + ITEM_IDS.index(item)].item() for item in allowed}
    best = sorted(scores, key=scores.get, reverse=True)[:top_k]
    return [{"item": item, "title": TITLES[ITEM_IDS.index(item)], "score": scores[item]} for item in best]


def assert_same(found, expected):
    """The same items and titles, and scores that are equal but for rounding."""
    assert [[(row["item"], row["title"]) for row in rows] for rows in found] == [
        [(row["item"], row["title"]) for row in rows] for rows in expected
    ]
    for found_rows, expected_rows in zip(found, expected, strict=True):
        scores = [row["score"] for row in found_rows]
        assert all(type(score) is float for score in scores)
        assert scores == pytest.approx([row["score"] for row in expected_rows], abs=1e-5)


# ---- inputs and outputs


def test_one_history(pipe, model):
    expected = expected_for(model, HISTORIES[0])
    for history in (
        HISTORIES[0],
        tuple(HISTORIES[0]),
        [str(item) for item in HISTORIES[0]],
        ["Alien", 3, "12"],
        np.array(HISTORIES[0]),
        torch.tensor(HISTORIES[0]),
        {"history": HISTORIES[0]},
        {"history": np.array(HISTORIES[0])},
    ):
        found = pipe(history)
        assert_same([found], [expected])
        assert all(type(row["item"]) is int for row in found)
        json.dumps(found, allow_nan=False)


def test_string_ids_keep_their_type(model):
    tokenizer = ElasticItemTokenizer.from_items([f"sku {item}" for item in ITEM_IDS], WINDOW)
    found = pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, device="cpu")(["sku 70", "sku 3"])
    assert [row["item"] for row in found] == [f"sku {row['item']}" for row in expected_for(model, [70, 3], top_k=10)]
    assert all(row["title"] is None for row in found)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_many_histories_equal_each_alone(pipe, model, batch_size):
    """Seven items are read through a window of five, beside histories that are padded on the left."""
    expected = [expected_for(model, history) for history in HISTORIES]
    assert_same(pipe(HISTORIES, batch_size=batch_size), expected)
    assert_same(pipe([{"history": history} for history in HISTORIES], batch_size=batch_size), expected)


def test_datasets_and_generators(pipe, model):
    dataset = Dataset.from_dict({"user_id": list("abcde"), "item_ids": HISTORIES})
    expected = [expected_for(model, history) for history in HISTORIES]
    assert_same(pipe(dataset["item_ids"], batch_size=2), expected)
    assert_same(pipe(dataset.with_format("numpy")["item_ids"], batch_size=2), expected)
    assert_same(pipe(dataset.select_columns("item_ids").rename_column("item_ids", "history")), expected)
    for histories in (KeyDataset(dataset, "item_ids"), (history for history in HISTORIES)):
        recommendations = pipe(histories, batch_size=3)
        assert not isinstance(recommendations, list)
        assert_same(list(recommendations), expected)
    assert pipe(dataset.select([])["item_ids"]) == []
    with pytest.raises(ValueError, match=r"history 0 .* found the keys \['user_id', 'item_ids'\] .*give one column"):
        pipe(dataset)


def test_a_model_in_training_is_put_into_evaluation(model, tokenizer):
    pipe = SequentialRecommendationPipeline(model.train(), tokenizer, device="cpu", top_k=4)
    assert_same([pipe(HISTORIES[0])], [expected_for(model, HISTORIES[0])])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_models_with_positions_and_a_mask_read_the_window(tokenizer, batch_size):
    torch.manual_seed(1)
    config = BERT4RecConfig(
        vocab_size=len(tokenizer), hidden_size=12, num_attention_heads=3, max_position_embeddings=WINDOW + 1
    )
    model = BERT4RecForSequentialRecommendation(config)
    pipe = pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, device="cpu", top_k=4)
    found = pipe(HISTORIES, batch_size=batch_size)
    assert_same(found, [expected_for(model, history) for history in HISTORIES])


def test_a_longer_window_is_set_on_the_tokenizer(model):
    tokenizer = make_tokenizer()
    pipe = SequentialRecommendationPipeline(model, tokenizer, device="cpu", top_k=4)
    history = HISTORIES[2]
    short = pipe(history)
    tokenizer.model_max_length = len(history)
    with torch.no_grad():
        logits = model(torch.tensor([[3 + ITEM_IDS.index(item) for item in history]])).logits[0]
    long = pipe(history)
    assert [row["score"] for row in long] == pytest.approx(
        [logits[3 + ITEM_IDS.index(row["item"])].item() for row in long], abs=1e-5
    )
    assert long != short


def test_agrees_with_the_evaluation_of_the_trainer(model, tokenizer, tmp_path):
    """Of three items that the window cuts off, none comes back."""
    histories = [ITEM_IDS[start : start + WINDOW + 3] for start in range(4)]
    token_ids = [tokenizer.convert_tokens_to_ids(history) for history in histories]
    rows = Dataset.from_dict({"input_ids": token_ids, "target": [15] * 4})
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = SequentialRecommendationTrainer(model, args, eval_dataset=rows, processing_class=tokenizer)
    _, top_ids = trainer.predict(rows).predictions
    pipe = pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, device="cpu", top_k=5)
    found = [[3 + ITEM_IDS.index(row["item"]) for row in recommended] for recommended in pipe(histories, batch_size=4)]
    assert found == top_ids[:, :5].tolist()


# ---- parameters


def test_parameters_of_the_pipeline_and_of_a_call(model, tokenizer):
    pipe = pipeline(
        "sequential-recommendation",
        model=model,
        tokenizer=tokenizer,
        device="cpu",
        top_k=2,
        exclude_seen=False,
        candidates=[70, "Brazil", "17", 99, "Fargo"],
    )
    candidates, history = [70, 3, 17, 99, 8], [3, 70]
    assert_same([pipe(history)], [expected_for(model, history, 2, False, candidates)])
    assert_same([pipe(history, top_k=3)], [expected_for(model, history, 3, False, candidates)])
    assert_same([pipe(history, exclude_seen=True)], [expected_for(model, history, 2, True, candidates)])
    assert_same([pipe(history, candidates=[25, 70])], [expected_for(model, history, 2, False, [25, 70])])
    assert_same([pipe(history, candidates=None)], [expected_for(model, history, 2, False)])
    assert_same([pipe(history)], [expected_for(model, history, 2, False, candidates)])


def test_seen_items_are_recommended_where_the_model_says_so(pipe, model, monkeypatch):
    monkeypatch.setattr(model.config, "exclude_seen", False)
    assert_same(pipe(HISTORIES), [expected_for(model, history, 4, False) for history in HISTORIES])
    assert_same([pipe(HISTORIES[2], exclude_seen=None)], [expected_for(model, HISTORIES[2], 4, False)])
    assert_same([pipe(HISTORIES[2], exclude_seen=True)], [expected_for(model, HISTORIES[2], 4, True)])
    assert len(pipe(HISTORIES[2], top_k=13)) == 13


@pytest.mark.parametrize("batch_size", [1, 2])
def test_top_k_is_never_cut(pipe, model, batch_size):
    """Thirteen items, of which the second history has seen seven; two of the candidates it has not."""
    assert len(pipe(HISTORIES[2], top_k=6)) == 6
    message = r"history 1: top_k must be at most the 6 items left to recommend \(exclude_seen=True\), found 7"
    with pytest.raises(ValueError, match=message):
        pipe([HISTORIES[0], HISTORIES[2]], top_k=7, batch_size=batch_size)
    with pytest.raises(ValueError, match="history 1: top_k must be at most the 2 items left"):
        pipe([[70], HISTORIES[2]], top_k=3, candidates=[3, 8, 66, 99], batch_size=batch_size)
    found = pipe([[70], HISTORIES[2]], top_k=4, candidates=[3, 8, 66, 99], exclude_seen=False, batch_size=batch_size)
    assert_same(found, [expected_for(model, h, 4, False, [3, 8, 66, 99]) for h in ([70], HISTORIES[2])])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer of at least 1, found 0"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"top_k": 2.0}, "top_k must be an integer of at least 1, found 2.0"),
        ({"top_k": None}, "top_k must be an integer"),
        ({"exclude_seen": "no"}, "exclude_seen must be True, False or None, found 'no'"),
        ({"unknown": "drop"}, "unknown must be 'error' or 'ignore', found 'drop'"),
        ({"fallback": None}, "fallback must be 'error' or 'popularity', found None"),
        ({"candidates": []}, "candidates must hold at least one item that the model knows, found none"),
        ({"candidates": "Alien"}, "candidates must be a list of item ids or titles, found 'Alien'"),
        ({"candidates": [3, 8, "Brazil"]}, "candidates must be distinct, found more than once: 3"),
        ({"candidates": [3, "Psycho", 4]}, "candidates must hold items that the model knows, found 'Psycho', 4"),
        ({"candidates": ["Twice"]}, "candidates must name items uniquely, found the title 'Twice' of several: 9, 500"),
        ({"topk": 3}, "parameters must be among top_k, .*, found 'topk'"),
    ],
)
def test_bad_parameters_are_refused(model, tokenizer, pipe, parameters, message):
    with pytest.raises(ValueError, match=message):
        pipe([70], **parameters)
    with pytest.raises(ValueError, match=message):
        pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, device="cpu", **parameters)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("Alien", "the history must be a list of item ids or titles, found 'Alien'"),
        (70, "the history must be a list of item ids or titles, found 70"),
        (None, "the history must be a list of item ids or titles, found None"),
        ({"histories": [70]}, r"a dictionary with 'history' alone, found the keys \['histories'\]"),
        ({"history": [70], "user": 1}, r"'history' alone, found the keys \['history', 'user'\]"),
        ({"history": [70], "now": 1}, r"'history' alone, found the keys \['history', 'now'\]"),
        ({"history": "Alien"}, "the history must be a list of item ids or titles, found 'Alien'"),
        ([[70], 3], "history 1 must be a list of item ids or titles, found 3"),
        ([70, None], r"the history must hold item ids \(integers or strings\) or titles, found None"),
        ([70, 3.0], "the history must hold item ids .* found 3.0"),
        ([[70], [True]], "history 1 must hold item ids .* found True"),
        ([[70], [[3]]], r"history 1 must hold item ids .* found \[3\]"),
    ],
)
def test_bad_inputs_are_refused(pipe, inputs, message):
    with pytest.raises(ValueError, match=message):
        pipe(inputs)


# ---- times


WHEN = [[10, 20, 20], [1e9 + 0.5], [1, 2, 3, 4, 5, 6, 1e6], [5, 6, 7, 8, 9], [86_400, 86_401]]
NOW = 2e9


@pytest.fixture(scope="module")
def timed_model(tokenizer):
    model = make_model(tokenizer, use_timestamps=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def timed(timed_model, tokenizer):
    return pipeline("sequential-recommendation", model=timed_model, tokenizer=tokenizer, device="cpu", top_k=4)


def with_times(i, **changes):
    return {"history": HISTORIES[i], "timestamps": WHEN[i], "now": NOW + i, **changes}


def expected_with_times(model, history, timestamps, now):
    """As [`expected_for`], from one history with its times."""
    token_ids = [3 + ITEM_IDS.index(item) for item in history]
    with torch.no_grad():
        seconds, request = (torch.tensor(x, dtype=torch.double) for x in ([timestamps[-WINDOW:]], [now]))
        ids = torch.tensor([token_ids[-WINDOW:]])
        logits = model(ids, timestamps=seconds, request_timestamps=request).logits[0]
    scores = {item: logits[3 + ITEM_IDS.index(item)].item() for item in ITEM_IDS if item not in history}
    best = sorted(scores, key=scores.get, reverse=True)[:4]
    return [{"item": item, "title": TITLES[ITEM_IDS.index(item)], "score": scores[item]} for item in best]


def test_one_history_with_times(timed, timed_model):
    expected = expected_with_times(timed_model, **with_times(0))
    for convert in (list, tuple, np.array, torch.tensor):
        history = {"history": convert(HISTORIES[0]), "timestamps": convert(WHEN[0]), "now": NOW}
        assert_same([timed(history)], [expected])
    assert_same([timed(with_times(0, now=np.float64(NOW)))], [expected])
    later = timed(with_times(0, now=NOW + 1e6))
    assert [row["score"] for row in later] != pytest.approx([row["score"] for row in expected], abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_many_histories_with_times_equal_each_alone(timed, timed_model, batch_size):
    found = timed([with_times(i) for i in range(5)], batch_size=batch_size)
    assert_same(found, [expected_with_times(timed_model, **with_times(i)) for i in range(5)])


def test_recommendations_are_for_now_by_default(timed, timed_model, monkeypatch):
    monkeypatch.setattr("elastic_hf.models.pipeline.time.time", lambda: NOW)
    expected = expected_with_times(timed_model, **with_times(0))
    for history in (with_times(0, now=None), {"history": HISTORIES[0], "timestamps": WHEN[0]}):
        assert_same([timed(history)], [expected])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ignored_items_take_their_times_along(timed, timed_model, batch_size):
    history = with_times(3, history=[17, 4, 17, 70, "Psycho", 9, 3], timestamps=[5, 5.5, 6, 7, 7.5, 8, 9])
    found = timed([history, with_times(1), history], unknown="ignore", batch_size=batch_size)
    expected = expected_with_times(timed_model, **with_times(3))
    assert_same(found, [expected, expected_with_times(timed_model, **with_times(1)), expected])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_popularity_beside_histories_with_times(timed, timed_model, batch_size):
    empty = {"history": [], "timestamps": []}
    unknown = {"history": [4, 5], "timestamps": [1, 2], "now": 3}
    arguments = {"unknown": "ignore", "fallback": "popularity", "batch_size": batch_size}
    found = timed([empty, with_times(2), unknown], **arguments)
    assert_same(found[1:2], [expected_with_times(timed_model, **with_times(2))])
    assert found[0] == found[2] and [row["score"] for row in found[0]] == sorted(COUNTS, reverse=True)[:4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamps": [10, 20]}, "the history must have as many timestamps as items, 3, .*, found 2"),
        ({"timestamps": None}, "the history must have as many timestamps as items, 3, .*, found None"),
        ({"timestamps": 10}, "the history must have as many timestamps as items, 3, .*, found 10"),
        ({"timestamps": [10, 20, "30"]}, "the history: timestamps must be finite Unix seconds .*, found '30'"),
        ({"timestamps": [10, True, 30]}, "the history: timestamps must be finite Unix seconds .*, found True"),
        ({"timestamps": [-10, 20, 30]}, "the history: timestamps must be .* of at least 0, found -10"),
        ({"timestamps": [10, float("nan"), 30]}, "the history: timestamps must be finite .*, found nan"),
        ({"timestamps": [10, 20, float("inf")]}, "the history: timestamps must be finite .*, found inf"),
        ({"timestamps": [10, 30, 20]}, "from the oldest to the latest, and now after them, found 20 after 30"),
        ({"now": 5}, "from the oldest to the latest, and now after them, found 5 after 20"),
        ({"now": "today"}, "the history: now must be finite Unix seconds of at least 0, found 'today'"),
        ({"now": float("nan")}, "the history: now must be finite Unix seconds of at least 0, found nan"),
        ({"user": 1}, "with 'history' and 'timestamps' and 'now' alone, found the keys"),
    ],
)
def test_bad_times_are_refused(timed, changes, message):
    with pytest.raises(ValueError, match=message):
        timed(with_times(0, **changes))
    with pytest.raises(ValueError, match=message.replace("the history", "history 1")):
        timed([with_times(1), with_times(0, **changes)])


def test_a_model_that_reads_times_needs_them(timed):
    with pytest.raises(ValueError, match="as many timestamps as items, 3, for a model with use_timestamps=True"):
        timed(HISTORIES[0])


# ---- features of events


RATED = [[5, 3, None], [9], [1, 2, 3, 4, 5, 1, 2], [5, 4, 3, 2, 1], [None, None]]
ACTIONS = [["buy", "view", "buy"], ["return"], [*["view"] * 6, "buy"], [*["buy"] * 5], [None, "view"]]


@pytest.fixture(scope="module")
def rated_tokenizer():
    events = Dataset.from_dict({"rating": [[1, 2, 3, 4, 5]], "action": [["buy", "view"]]})
    items = pa.table({"item_id": ITEM_IDS, "title": TITLES, "count": COUNTS})
    return ElasticItemTokenizer.from_items(items, WINDOW, events)


@pytest.fixture(scope="module")
def rated(rated_tokenizer):
    model = make_model(rated_tokenizer, event_features=rated_tokenizer.event_features).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return pipeline("sequential-recommendation", model=model, tokenizer=rated_tokenizer, device="cpu", top_k=4)


def with_ratings(i, **changes):
    return {"history": HISTORIES[i], "rating": RATED[i], "action": ACTIONS[i], **changes}


def expected_with_ratings(pipe, history, rating, action):
    """As [`expected_for`], from one history with the categories of its events, counted by hand."""
    token_ids = [3 + ITEM_IDS.index(item) for item in history]
    codes = [
        [{"buy": 1, "view": 2}.get(action, 0), rating if rating in range(1, 6) else 0]
        for action, rating in zip(action, rating, strict=True)
    ]
    with torch.no_grad():
        features = torch.tensor([codes[-WINDOW:]], dtype=torch.float)
        logits = pipe.model(torch.tensor([token_ids[-WINDOW:]]), event_features=features).logits[0]
    scores = {item: logits[3 + ITEM_IDS.index(item)].item() for item in ITEM_IDS if item not in history}
    best = sorted(scores, key=scores.get, reverse=True)[:4]
    return [{"item": item, "title": TITLES[ITEM_IDS.index(item)], "score": scores[item]} for item in best]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_histories_with_features_of_events(rated, batch_size):
    expected = [expected_with_ratings(rated, **with_ratings(i)) for i in range(5)]
    assert_same(rated([with_ratings(i) for i in range(5)], batch_size=batch_size), expected)
    assert_same([rated(with_ratings(3, rating=np.array(RATED[3])))], expected[3:4])
    other = rated(with_ratings(0, rating=[1, 1, 1]))
    assert [row["score"] for row in other] != pytest.approx([row["score"] for row in expected[0]], abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ignored_items_take_their_features_along(rated, batch_size):
    columns = {"rating": [5, 1, 4, 3, 1, 2, 1], "action": ["buy", "view", "buy", "buy", "view", "buy", "buy"]}
    history = with_ratings(3, history=[17, 4, 17, 70, "Psycho", 9, 3], **columns)
    empty = {"history": [], "rating": [], "action": []}
    arguments = {"unknown": "ignore", "fallback": "popularity", "batch_size": batch_size}
    found = rated([history, empty, with_ratings(1)], **arguments)
    expected = [expected_with_ratings(rated, **with_ratings(i)) for i in (3, 1)]
    assert_same([found[0], found[2]], expected)
    assert [row["score"] for row in found[1]] == sorted(COUNTS, reverse=True)[:4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rating": [5, 3]}, "the history must have as many values of 'rating' as items, 3, found 2"),
        ({"rating": None}, "the history must have as many values of 'rating' as items, 3, found None"),
        ({"rating": 5}, "the history must have as many values of 'rating' as items, 3, found 5"),
        ({"rating": [5, "five", 3]}, "the history: event column 'rating' must hold values of one kind, found"),
        (
            {"rating": ["a", "b", "c"]},
            "the history: event column 'rating' must hold integers, found other values: .*parse",
        ),
        ({"rating": [5, 2.5, 3]}, "the history: event column 'rating' must hold integers, found other values: .*2.5"),
        ({"rating": [5, float("nan"), 3]}, "the history: event column 'rating' must hold integers, .* nan"),
        ({"action": [True, True, False]}, "the history: event column 'action' must hold strings, found type bool"),
        ({"stars": [1, 2, 3]}, "with 'history' and 'action' and 'rating' alone, found the keys"),
        ({"timestamps": [1, 2, 3]}, "with 'history' and 'action' and 'rating' alone, found the keys"),
    ],
)
def test_bad_features_of_events_are_refused(rated, changes, message):
    with pytest.raises(ValueError, match=message):
        rated(with_ratings(0, **changes))
    with pytest.raises(ValueError, match=message.replace("the history", "history 1")):
        rated([with_ratings(1), with_ratings(0, **changes)])


def test_a_model_that_reads_features_of_events_needs_them(rated, tokenizer):
    with pytest.raises(ValueError, match="the history must have as many values of 'action' as items, 3, found None"):
        rated(HISTORIES[0])
    with pytest.raises(
        ValueError, match="tokenizer must have the model's event_features, {'action': 2, 'rating': 5}, "
    ):
        SequentialRecommendationPipeline(rated.model, tokenizer)


# ---- unknown items and titles


def test_unknown_items_are_named(pipe):
    with pytest.raises(ValueError, match="history 1 must hold items that the model knows, found 4, 'Psycho' "):
        pipe([[70], [4, "Psycho", 3, 4]])
    with pytest.raises(ValueError, match=r"found 100, 101, .*, 109 and 1,990 more"):
        pipe([70, *range(100, 500), *range(501, 2101)])


def test_special_tokens_are_no_items(pipe):
    with pytest.raises(ValueError, match=r"found '\[PAD\]', '\[UNK\]', '\[MASK\]'"):
        pipe([70, "[PAD]", "[UNK]", "[MASK]"])


def test_ignored_items_are_named(pipe, model, caplog):
    with caplog.at_level(logging.WARNING, logger="elastic_hf"):
        found = pipe([[4, 70, "Psycho", 3, 4], [9]], unknown="ignore", batch_size=2)
    assert_same(found, [expected_for(model, [70, 3]), expected_for(model, [9])])
    assert caplog.messages == ["history 0: left out what the model does not know: 4, 'Psycho'"]


def test_ignored_candidates_are_named(model, tokenizer, pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="elastic_hf"):
        found = pipe([70], candidates=[3, 4, 8], top_k=2, unknown="ignore")
        ignoring = SequentialRecommendationPipeline(model, tokenizer, device="cpu", top_k=2, unknown="ignore")
        assert_same([found, ignoring([70], candidates=[3, 4, 8])], [expected_for(model, [70], 2, True, [3, 8])] * 2)
    assert caplog.messages == ["candidates: left out what the model does not know: 4"] * 2


def test_titles_stand_for_items_where_no_id_does(pipe, model):
    """The title "12" is that of item 41, but an item has the id 12; the title "300" is no id."""
    assert_same([pipe(["12", "300"])], [expected_for(model, [12, 66])])
    with pytest.raises(ValueError, match="history 1 must name items uniquely, found the title 'Twice' .*: 9, 500"):
        pipe([["Alien"], ["Twice"]], unknown="ignore")
    with pytest.raises(ValueError, match="found 300"):
        pipe([300])  # an integer is no title


# ---- histories without items


@pytest.mark.parametrize("inputs", [[], {"history": []}, np.array([], dtype=int)])
def test_an_empty_history_is_an_error(pipe, inputs):
    with pytest.raises(ValueError, match="the history must have at least one item that the model knows, found none"):
        pipe(inputs)


def test_a_history_of_unknown_items_is_an_error(pipe):
    with pytest.raises(ValueError, match="history 1 must have at least one item that the model knows, found none"):
        pipe([[70], [4]], unknown="ignore")
    with pytest.raises(ValueError, match="history 1 must hold items that the model knows, found 4"):
        pipe([[70], [4]], fallback="popularity")


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_popularity(pipe, model, batch_size):
    """The counts 9, 7, 7, 5, the equal ones in the order of the catalogue, beside histories that are read."""
    popular = [
        {"item": 30, "title": "Jaws", "score": 9.0},
        {"item": 3, "title": "Brazil", "score": 7.0},
        {"item": 500, "title": "Twice", "score": 7.0},
        {"item": 66, "title": "300", "score": 5.0},
    ]
    read = [expected_for(model, history) for history in HISTORIES]
    assert pipe([], fallback="popularity") == popular
    found = pipe([*HISTORIES, [], [4]], fallback="popularity", unknown="ignore", batch_size=batch_size)
    assert_same(found, [*read, popular, popular])


def test_popularity_of_candidates(pipe):
    found = pipe([], fallback="popularity", candidates=[500, 12, 3, 1], top_k=3)
    assert [(row["item"], row["score"]) for row in found] == [(500, 7.0), (3, 7.0), (1, 2.0)]
    with pytest.raises(ValueError, match="top_k must be at most the 2 items left"):
        pipe([], fallback="popularity", candidates=[500, 12])


def test_popularity_needs_counts(model):
    pipe = SequentialRecommendationPipeline(model, make_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match="fallback='popularity' needs the items' counts in the training histories"):
        pipe([70], fallback="popularity")


# ---- construction, saving and loading


def test_what_does_not_belong_together_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be an ElasticItemTokenizer, found NoneType"):
        SequentialRecommendationPipeline(model)
    with pytest.raises(ValueError, match="tokenizer must have the model's 16 tokens, found 5"):
        SequentialRecommendationPipeline(model, ElasticItemTokenizer.from_items([1, 2], WINDOW))
    with pytest.raises(ValueError, match="model must be a sequential recommender of elastic_hf, found ElasticModel"):
        SequentialRecommendationPipeline(model.model, tokenizer)


def approx(recommendations):
    """The same, but for rounding: weights that lie elsewhere in memory are summed up in another order."""
    if isinstance(recommendations, list):
        return [approx(element) for element in recommendations]
    return {**recommendations, "score": pytest.approx(recommendations["score"], rel=1e-5)}


def test_save_and_load(pipe, tmp_path):
    """No code is saved, and none has to be trusted, again and again."""
    expected = approx([pipe(HISTORIES), pipe([], fallback="popularity")])
    for folder in (tmp_path / "first", tmp_path / "second"):
        pipe.save_pretrained(folder)
        files = {file.name for file in folder.iterdir()}
        assert files == {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "items.parquet",
        }
        assert "custom_pipelines" not in json.loads((folder / "config.json").read_text())
        pipe = pipeline("sequential-recommendation", model=str(folder), top_k=4, device="cpu")
        assert [pipe(HISTORIES), pipe([], fallback="popularity")] == expected


def test_a_fresh_process_loads_from_the_hub_cache(pipe, tmp_path):
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--someone--shop"
    pipe.save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    script = """
import json
import elastic_hf
from transformers import pipeline
print(json.dumps(pipeline("sequential-recommendation", model="someone/shop", top_k=4, device="cpu")([9])))
"""
    root = Path(elastic_hf.__file__).parents[1]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1_800)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == approx(pipe([9]))
