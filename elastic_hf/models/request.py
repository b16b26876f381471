"""
A request for recommendations as JSON, and its answer: what an Inference Endpoint and a service have in common.

    {"inputs": ["sku 17", "sku 4"], "parameters": {"top_k": 5, "fallback": "popularity"}}

`inputs` is a history of item ids or titles, oldest first, bare or as `{"history": [...]}`, or a list of histories. For
a model that reads times a history is `{"history": [...], "timestamps": [...], "now": ...}`, in Unix seconds; for one
that reads features of events it holds a list for each of them, too, such as `"rating": [5, null]`. The answer is a
list of `item`, `title` and `score`, best first, or a list of such lists. `parameters` are those of
`SequentialRecommendationPipeline`: `top_k`, `exclude_seen`, `candidates`, `unknown` and `fallback`. Whether items of
the history are recommended is the model's own setting, unless `exclude_seen` is given.

A request holds at most 256 histories of 10,000 items each, and asks for at most 1,000 recommendations for each of
them, from at most 10,000 candidates or from the whole catalogue.
"""

from typing import Any


MAX_HISTORIES = 256
MAX_ITEMS = 10_000  # in one history
MAX_TOP_K = 1_000
MAX_CANDIDATES = 10_000


def check_request(request: Any, parameter_names: tuple[str, ...]) -> dict[str, Any]:
    """Return the parameters of a request, after checking that it is as described and within its bounds.

    Args:
        request (`dict`): `inputs` and, optionally, `parameters`.
        parameter_names (`tuple[str, ...]`): the parameters there are.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(request, dict) or "inputs" not in request or not request.keys() <= {"inputs", "parameters"}:
        found = f"the keys {list(request)}" if isinstance(request, dict) else repr(request)
        raise ValueError(f"a request must be an object with 'inputs' and, optionally, 'parameters', found {found}")
    parameters = request.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict) or not parameters.keys() <= set(parameter_names):
        raise ValueError(f"parameters must be an object of {', '.join(parameter_names)}, found {parameters!r}")
    check_inputs(request["inputs"])
    check_parameters(parameters)
    return parameters


def check_inputs(inputs: Any) -> None:
    """Refuse more or longer histories than a request may hold."""
    is_many = isinstance(inputs, list) and any(isinstance(element, list | dict) for element in inputs)
    histories = inputs if is_many else [inputs]
    if len(histories) > MAX_HISTORIES:
        raise ValueError(f"inputs must hold at most {MAX_HISTORIES:,} histories, found {len(histories):,}")
    for number, history in enumerate(histories):
        items = history.get("history") if isinstance(history, dict) else history
        if isinstance(items, list) and len(items) > MAX_ITEMS:
            name = f"history {number}" if is_many else "the history"
            raise ValueError(f"{name} must hold at most {MAX_ITEMS:,} items, found {len(items):,}")


def check_parameters(parameters: dict[str, Any]) -> None:
    """Refuse more recommendations or candidates than a request may ask for."""
    top_k, candidates = parameters.get("top_k"), parameters.get("candidates")
    if isinstance(top_k, int) and top_k > MAX_TOP_K:
        raise ValueError(f"top_k must be at most {MAX_TOP_K:,}, found {top_k:,}")
    if isinstance(candidates, list) and len(candidates) > MAX_CANDIDATES:
        raise ValueError(f"candidates must be at most {MAX_CANDIDATES:,}, found {len(candidates):,}")
