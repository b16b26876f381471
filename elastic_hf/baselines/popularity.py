"""Popularity: everybody is recommended the items that occur most often in the training histories."""

from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ..models.configuration_recommender import RecommenderConfig
from .common import BaselineForSequentialRecommendation, BaselineModel, BaselinePreTrainedModel


@strict
class PopularityConfig(RecommenderConfig):
    r"""
    Configuration of [`PopularityModel`] and [`PopularityForSequentialRecommendation`]: the fields of
    [`RecommenderConfig`], two of them fixed.

    Args:
        hidden_size (`int`, defaults to 1):
            1: an item's embedding is its count.
        tie_word_embeddings (`bool`, defaults to `False`):
            `False`: items are not read, only scored.
    """

    model_type = "popularity"

    hidden_size: int = 1
    tie_word_embeddings: bool = False

    def validate_sizes(self):
        """One number for each item, and none for the histories."""
        if self.hidden_size != 1:
            raise ValueError(f"hidden_size must be 1 for popularity, found {self.hidden_size}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False for popularity, found True")


class PopularityPreTrainedModel(BaselinePreTrainedModel):
    config: PopularityConfig
    config_class = PopularityConfig

    def _init_weights(self, module: nn.Module):
        if isinstance(module, PopularityModel):
            init.ones_(module.user_embedding)
        elif isinstance(module, nn.Linear):
            init.zeros_(module.weight)


class PopularityModel(BaselineModel, PopularityPreTrainedModel):
    """The user vector 1 at each position, whatever the history."""

    def __init__(self, config: PopularityConfig):
        super().__init__(config)
        self.register_buffer("user_embedding", torch.ones(1), persistent=False)
        self.post_init()

    def encode(self, input_ids: Tensor, attention_mask: Tensor, last_position_only: bool) -> Tensor:
        length = 1 if last_position_only else input_ids.shape[1]
        return self.user_embedding.expand(input_ids.shape[0], length, 1)


class PopularityForSequentialRecommendation(BaselineForSequentialRecommendation, PopularityPreTrainedModel):
    """
    Items scored by their counts, all 0 until [`~PopularityForSequentialRecommendation.count_items`] sets them.

    There is nothing to train: counting is the closed form. The losses are there, but counts are no logits, so that
    their values say little, and gradient descent on them would at best find the logarithms of the counts: the same
    ranking, slowly.
    """

    _tied_weights_keys = {}
    base_model_class = PopularityModel
    paper = "counts of the training histories"
    description = "It recommends to everybody the items that occur most often in the training histories."

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head  # the inherited one has none for a model without input embeddings

    @torch.no_grad()
    def count_items(self, histories: Any) -> "PopularityForSequentialRecommendation":
        """Sets each item's score to the number of times it occurs; special tokens have 0.

        Args:
            histories (`datasets.Dataset` or an iterable of lists of token ids):
                The training histories; a `Dataset` has them as `input_ids`. Whole ones, each once: windows of
                histories may overlap.

        Returns:
            This model. Its counts are exact up to `2**24` in float32.

        Raises:
            ValueError: if `histories` are no lists of token ids, hold none, or one outside the vocabulary.
        """
        import pyarrow as pa  # here, since models are read, and their speed measured, without it
        import pyarrow.compute as pc

        if not hasattr(histories, "with_format"):  # as a datasets.Dataset has
            column = pa.array(list(histories))
        elif "input_ids" in histories.column_names:
            column = histories.with_format("arrow")[:]["input_ids"]
        else:
            raise ValueError(f"histories must have the column input_ids, found {histories.column_names}")
        if not pa.types.is_integer(getattr(column.type, "value_type", pa.null())):
            raise ValueError(f"histories must be lists of token ids, found {column.type}")
        token_ids = pc.list_flatten(column).to_numpy(zero_copy_only=False)
        if token_ids.size == 0:
            raise ValueError("histories must hold at least one token id, found none")
        vocab_size = self.config.vocab_size
        if not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
            raise ValueError(
                f"token ids must be between 0 and vocab_size - 1 ({vocab_size - 1}), "
                f"found {token_ids.min()} to {token_ids.max()}"
            )
        counts = np.bincount(token_ids, minlength=vocab_size)
        counts[: self.config.num_special_tokens] = 0
        self.lm_head.weight.copy_(torch.from_numpy(counts)[:, None])
        return self


__all__ = ["PopularityConfig", "PopularityForSequentialRecommendation", "PopularityModel"]
