"""
Answers the requests to a Hugging Face Inference Endpoint with the pipeline in this repository.

    {"inputs": ["sku 17", "sku 4"], "parameters": {"top_k": 5, "fallback": "popularity"}}

`request.py` says what a request may hold, within which bounds, and what the answer is.
"""

from typing import Any

from transformers import pipeline


class EndpointHandler:
    """
    Loads the model of a repository and answers requests.

    Args:
        path (`str`): The folder of the repository's files.
    """

    def __init__(self, path: str = "") -> None:
        self.pipeline = pipeline("sequential-recommendation", model=path, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> list[dict] | list[list[dict]]:
        """
        Recommend what a request asks for.

        Args:
            data (`dict`): The request: `inputs` and, optionally, `parameters`.

        Raises:
            ValueError: if the request is not as described or too large, and as the pipeline.
        """
        return self.pipeline.answer(data)
