"""The handler of Inference Endpoints, as the file that stands in a model's repository."""

import importlib.util
import json
import shutil

import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticItemTokenizer
from elastic_hf.models import request as bounds
from elastic_hf.models.pipeline import BATCH_SIZE, SequentialRecommendationPipeline
from elastic_hf.sharing.repository import TEMPLATES


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    items = pa.table({"item_id": list("abcdefghijkl"), "title": [*"ABCDEFGHIJK", None], "count": range(12)})
    tokenizer = ElasticItemTokenizer.from_items(items, model_max_length=4)
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(vocab_size=len(tokenizer), num_memory_subkeys=5))
    SequentialRecommendationPipeline(model, tokenizer, device="cpu").save_pretrained(folder)
    shutil.copy(TEMPLATES / "handler.py", folder)
    return folder


@pytest.fixture(scope="module")
def handler(repository):
    """The module of the copied file, which no package holds."""
    spec = importlib.util.spec_from_file_location("handler", repository / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.__package__
    return module


@pytest.fixture(scope="module")
def endpoint(handler, repository):
    return handler.EndpointHandler(str(repository))


def assert_same(answer, expected):
    """Equal but for rounding: histories that are read together are summed up in another order."""
    if isinstance(expected, dict):
        assert answer == {**expected, "score": pytest.approx(expected["score"], abs=1e-5)}
    else:
        for row, expected_row in zip(answer, expected, strict=True):
            assert_same(row, expected_row)


def test_answers_as_the_pipeline_does(endpoint):
    for inputs, parameters in (
        (["a", "B"], {"top_k": 2}),
        ([["a"], ["b", "c"]], {"top_k": 1}),
        ({"history": ["a"]}, {"candidates": ["c", "D"], "top_k": 2}),
        ([], {"fallback": "popularity"}),
        (["a", "?"], {"unknown": "ignore", "exclude_seen": False, "top_k": 12}),
    ):
        answer = endpoint(json.loads(json.dumps({"inputs": inputs, "parameters": parameters})))
        assert_same(answer, endpoint.pipeline(inputs, **parameters))
        assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def test_parameters_may_be_left_out(endpoint):
    assert endpoint({"inputs": ["a"]}) == endpoint({"inputs": ["a"], "parameters": None}) == endpoint.pipeline(["a"])


def test_seen_items_are_left_out_as_the_model_says(endpoint, monkeypatch):
    def answer(**parameters):
        return {item["item"] for item in endpoint({"inputs": ["a", "b"], "parameters": parameters})}

    for exclude_seen in (True, False):
        monkeypatch.setattr(endpoint.pipeline.model.config, "exclude_seen", exclude_seen)
        assert answer(top_k=10) == answer(top_k=10, exclude_seen=None) == answer(top_k=10, exclude_seen=exclude_seen)
    assert answer(top_k=12) == set("abcdefghijkl") and answer(top_k=10, exclude_seen=True) == set("cdefghijkl")


def test_features_of_events_come_as_json(handler, repository, tmp_path):
    events = Dataset.from_dict({"rating": [[1, 2, 3, 4, 5]], "action": [["buy", "view"]]})
    tokenizer = ElasticItemTokenizer.from_items(ElasticItemTokenizer.from_pretrained(repository).items, 4, events)
    config = ElasticConfig(vocab_size=15, num_memory_subkeys=5, event_features=tokenizer.event_features)
    model = ElasticForSequentialRecommendation(config)
    SequentialRecommendationPipeline(model, tokenizer, device="cpu").save_pretrained(tmp_path)
    endpoint = handler.EndpointHandler(str(tmp_path))
    history = {"history": ["a", "B"], "rating": [5, None], "action": ["buy", "?"]}
    request = json.loads(json.dumps({"inputs": [history, history], "parameters": {"top_k": 3}}))
    assert_same(endpoint(request), endpoint.pipeline([history, history], top_k=3))
    request["inputs"][1]["rating"] = [5]
    with pytest.raises(ValueError, match="history 1 must have as many values of 'rating' as items, 2, found 1"):
        endpoint(request)


@pytest.mark.parametrize(
    ("request_data", "message"),
    [
        ([1], r"a request must be an object with 'inputs' and, optionally, 'parameters', found \[1\]"),
        ({}, r"a request must be .* found the keys \[\]"),
        ({"history": ["a"]}, r"found the keys \['history'\]"),
        ({"inputs": ["a"], "top_k": 3}, r"found the keys \['inputs', 'top_k'\]"),
        ({"inputs": ["a"], "parameters": ["top_k"]}, r"parameters must be an object of top_k, .*, found \['top_k'\]"),
        ({"inputs": ["a"], "parameters": {"num_workers": 99}}, "parameters must be .* found {'num_workers': 99}"),
        ({"inputs": ["a"], "parameters": {"top_k": "3"}}, "top_k must be an integer of at least 1, found '3'"),
        ({"inputs": None}, "the history must be a list of item ids or titles, found None"),
        ({"inputs": ["a", "z"]}, "the history must hold items that the model knows, found 'z'"),
        ({"inputs": []}, "the history must have at least one item"),
    ],
)
def test_bad_requests_are_refused(endpoint, request_data, message):
    with pytest.raises(ValueError, match=message):
        endpoint(request_data)


def test_a_request_is_answered_up_to_its_bounds(endpoint):
    """Many histories are read together, and one of them may be long."""
    inputs = [["a", "b"], ["c"] * bounds.MAX_ITEMS, *[["d"]] * (bounds.MAX_HISTORIES - 2)]
    sizes = []
    hook = endpoint.pipeline.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs.get("input_ids", args[0] if args else ()))),
        with_kwargs=True,
    )
    answer = endpoint({"inputs": inputs, "parameters": {"top_k": 2, "candidates": ["e", "f", "g"]}})
    hook.remove()
    assert len(answer) == bounds.MAX_HISTORIES and all(len(rows) == 2 for rows in answer)
    assert sizes == [BATCH_SIZE] * (bounds.MAX_HISTORIES // BATCH_SIZE)
    assert_same(answer[0], endpoint.pipeline(["a", "b"], top_k=2, candidates=["e", "f", "g"]))


def too_large():
    """Requests that are one above a bound, and what they are told."""
    histories, items, top_k, candidates = (
        bounds.MAX_HISTORIES + 1,
        bounds.MAX_ITEMS + 1,
        bounds.MAX_TOP_K + 1,
        bounds.MAX_CANDIDATES + 1,
    )
    yield {"inputs": [["a"]] * histories}, f"inputs must hold at most 256 histories, found {histories}"
    yield {"inputs": [{"history": ["a"]}] * histories}, "inputs must hold at most 256 histories"
    yield {"inputs": ["a"] * items}, "the history must hold at most 10,000 items, found 10,001"
    yield {"inputs": {"history": ["a"] * items}}, "the history must hold at most 10,000 items"
    yield {"inputs": [["a"], ["a"] * items]}, "history 1 must hold at most 10,000 items, found 10,001"
    yield {"inputs": [["a"], {"history": ["a"] * items}]}, "history 1 must hold at most 10,000 items"
    yield {"inputs": [None, ["a"] * items]}, "history 1 must hold at most 10,000 items"
    yield {"inputs": ["a"], "parameters": {"top_k": top_k}}, "top_k must be at most 1,000, found 1,001"
    yield {"inputs": ["a"], "parameters": {"candidates": ["b"] * candidates}}, "candidates must be at most 10,000"


def test_larger_requests_are_refused_before_anything_is_computed(endpoint, monkeypatch):
    def compute(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(endpoint.pipeline, "preprocess", compute)
    for request, message in too_large():
        with pytest.raises(ValueError, match=message):
            endpoint(request)
    with pytest.raises(AssertionError, match="computed"):
        endpoint({"inputs": ["a"]})


def test_the_bounds_are_documented():
    text = " ".join(bounds.__doc__.split())
    assert f"at most {bounds.MAX_HISTORIES} histories of {bounds.MAX_ITEMS:,} items each" in text
    assert f"at most {bounds.MAX_TOP_K:,} recommendations" in text
    assert f"at most {bounds.MAX_CANDIDATES:,} candidates" in text
