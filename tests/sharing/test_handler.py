"""The handler of Inference Endpoints, as the file that stands in a model's repository."""

import importlib.util
import json
import shutil

import pyarrow as pa
import pytest
import torch

import elastic_hf
from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticItemTokenizer
from elastic_hf.models.pipeline import SequentialRecommendationPipeline
from elastic_hf.sharing.hub import HANDLER_FILE, REQUIREMENTS


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    items = pa.table({"item_id": list("abcdefghijkl"), "title": [*"ABCDEFGHIJK", None], "count": range(12)})
    tokenizer = ElasticItemTokenizer.from_items(items, model_max_length=4)
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(vocab_size=len(tokenizer), num_memory_subkeys=5))
    SequentialRecommendationPipeline(model, tokenizer, device="cpu").save_pretrained(folder)
    shutil.copy(HANDLER_FILE, folder / "handler.py")
    return folder


@pytest.fixture(scope="module")
def endpoint(repository):
    """The handler of the copied file, which no package holds."""
    spec = importlib.util.spec_from_file_location("handler", repository / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.__package__
    return module.EndpointHandler(str(repository))


def test_answers_as_the_pipeline_does(endpoint):
    for inputs, parameters in (
        (["a", "B"], {"top_k": 2}),
        ([["a"], ["b", "c"]], {"top_k": 1}),
        ({"history": ["a"]}, {"candidates": ["c", "D"], "top_k": 2}),
        ([], {"fallback": "popularity"}),
        (["a", "?"], {"unknown": "ignore", "exclude_seen": False, "top_k": 12}),
    ):
        answer = endpoint(json.loads(json.dumps({"inputs": inputs, "parameters": parameters})))
        assert answer == endpoint.pipeline(inputs, **parameters)
        assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def test_parameters_may_be_left_out(endpoint):
    assert endpoint({"inputs": ["a"]}) == endpoint({"inputs": ["a"], "parameters": None}) == endpoint.pipeline(["a"])


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


def test_requirements_pin_this_version():
    assert REQUIREMENTS == f"elastic_hf=={elastic_hf.__version__}\n"
