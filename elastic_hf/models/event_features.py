"""What events carry beside their items and times, such as ratings or actions: what a model adds to the items for it.

    e_j += sum over the features of embedding[category of event j] or w * number of event j

Category 0 stands for what was not trained on, or is missing, and its embedding is zero and stays so; numbers are
standardised, and a missing one is 0, their mean. Both add nothing: such an event is read as its item alone. A feature
describes its own event, and so informs what is predicted after that event, and nothing before.

Axis letters: B batch, L history length, F features, D hidden size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_recommender import RecommenderConfig
from .plain_linear import add_projected


class EventFeatures(nn.Module):
    """An embedding for each feature of categories, a vector for each feature of numbers, and their sum."""

    def __init__(self, config: RecommenderConfig):
        super().__init__()
        self.sizes = [*config.event_features.values()]
        self.features = nn.ModuleList(
            nn.Embedding(1 + size, config.hidden_size, padding_idx=0)
            if size > 0
            else nn.Linear(1, config.hidden_size, bias=False)
            for size in self.sizes
        )

    def forward(self, embeddings: Tensor, event_features: Tensor) -> Tensor:
        """Return the items' embeddings and what is added to them: (B, L, D) and (B, L, F) -> (B, L, D)."""
        for size, feature, values in zip(self.sizes, self.features, event_features.unbind(-1), strict=True):
            if size > 0:
                embeddings = feature(values.long()).add_(embeddings)
            else:
                embeddings = add_projected(embeddings, feature, values[..., None])
        return embeddings


def given_event_features(event_features: Any, device: torch.device) -> Tensor | None:
    """Return what a caller gives with histories, as a tensor for `forward`.

    Args:
        event_features (tensor, array or lists of shape `(B, L, F)`, *optional*).
        device (`torch.device`): of the histories.

    Raises:
        ValueError: if they are no numbers, or lists of different lengths.
    """
    if event_features is None:
        return None
    try:
        return torch.as_tensor(event_features, dtype=torch.float, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "event_features must be numbers in a tensor, an array or lists of one length (padded on the left), "
            f"found a {type(event_features).__name__}: {error}"
        ) from error


def read_event_features(
    model: PreTrainedModel, event_features: Tensor | None, attention_mask: Tensor
) -> dict[str, Tensor]:
    """Check the features of events that a base model is given, and return what it is to read of them.

    What depends on the values is not checked while a program is traced.

    Args:
        model (`PreTrainedModel`): a base model.
        event_features (`torch.FloatTensor` of shape `(B, L, F)`, *optional*):
            Categories, from 0 on, and standardised numbers, in the order of the configuration's `event_features`.
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): `False` for padding, whose features are not read.

    Returns:
        `dict[str, torch.Tensor]`: the `event_features`, zeros at padding; nothing of a model without.

    Raises:
        ValueError: if a model with event features gets none, or another model any, or if they are not as described.
    """
    config = model.config
    check_shape(event_features, attention_mask.shape, config)
    if event_features is None:
        return {}
    event_features = torch.where(attention_mask[..., None], event_features, 0.0)
    _check_values(event_features, config)
    return {"event_features": event_features}


def check_shape(event_features: Tensor | None, shape: torch.Size, config: PreTrainedConfig) -> None:
    """Check that a model with event features is given a number for each event and feature, and another model none.

    Raises:
        ValueError: if that is not so.
    """
    names = ", ".join(config.event_features)
    if not names:
        if event_features is not None:
            raise ValueError("event_features must be None for a model without event features, found a value")
        return
    wanted = (*shape, len(config.event_features))
    if isinstance(event_features, Tensor) and event_features.shape == wanted and event_features.is_floating_point():
        return
    found = type(event_features).__name__ if event_features is not None else None
    if isinstance(event_features, Tensor):
        found = f"{event_features.dtype} of shape {tuple(event_features.shape)}"
    raise ValueError(f"event_features ({names}) must be a floating tensor of shape {wanted}, found {found}")


def _check_values(event_features: Tensor, config: PreTrainedConfig) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or event_features.is_meta:
        return
    is_good = torch.stack(
        [
            values.clamp(0, size).floor() == values if size > 0 else values.abs() < math.inf
            for size, values in zip(config.event_features.values(), event_features.unbind(-1), strict=True)
        ]
    )
    if not is_good.all():
        index, row, position = (~is_good).nonzero()[0].tolist()
        name, size = [*config.event_features.items()][index]
        expected = f"categories from 0 to {size}" if size else "finite numbers"
        raise ValueError(
            f"event_features of {name!r} must be {expected}, found {event_features[row, position, index].item():g} in "
            f"row {row}"
        )
