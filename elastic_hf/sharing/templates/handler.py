"""
Hugging Face Inference Endpoints: this file stands in a model's repository as `handler.py`, and beside it a
`requirements.txt` that installs `elastic_hf`.

    {"inputs": ["sku 17", "sku 4"], "parameters": {"top_k": 5, "fallback": "popularity"}}

`inputs` is a history of item ids or titles, oldest first, or a list of histories, and `parameters` are those of
`elastic_hf.SequentialRecommendationPipeline`, whose lists of `item`, `title` and `score` are the answer.
"""

from typing import Any

from transformers import pipeline

import elastic_hf  # noqa: F401
from elastic_hf.models.pipeline import PARAMETERS


class EndpointHandler:
    """
    Answers requests with `pipeline("sequential-recommendation")`.

    Args:
        path (`str`): The folder of the repository's files.
    """

    def __init__(self, path: str = "") -> None:
        self.pipeline = pipeline("sequential-recommendation", model=path)

    def __call__(self, data: dict[str, Any]) -> list[dict] | list[list[dict]]:
        """
        Args:
            data (`dict`): The request: `inputs` and, optionally, `parameters`.

        Raises:
            ValueError: if the request is not as described, and as the pipeline.
        """
        if not isinstance(data, dict) or "inputs" not in data or not data.keys() <= {"inputs", "parameters"}:
            found = f"the keys {list(data)}" if isinstance(data, dict) else repr(data)
            raise ValueError(f"a request must be an object with 'inputs' and, optionally, 'parameters', found {found}")
        parameters = data.get("parameters")
        if parameters is None:
            parameters = {}
        if not isinstance(parameters, dict) or not parameters.keys() <= set(PARAMETERS):
            raise ValueError(f"parameters must be an object of {', '.join(PARAMETERS)}, found {parameters!r}")
        return self.pipeline(data["inputs"], **parameters)
