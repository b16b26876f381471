"""What items are beside their ids: with `item_features`, v_i = id embedding + the sum of what each feature adds.

    categories: the mean of their embeddings;   numbers and whitened vectors: a linear map

Item vectors are what a history is read by, and what its user embedding is scored with. In training, the id embedding
is left out at random, so that the features alone can stand for an item. One that was never trained on takes its id
embedding from the items that are most like it ([`~borrowed_ids.borrow_ids`]).

Axis letters: V vocabulary, D hidden size.
"""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_recommender import RecommenderConfig
from .weight_versions import versions_of


# Rows of the catalogue whose vectors are computed at once.
MAX_ROWS = 2**16
# Rows of a catalogue are filled up to a multiple of this, see [`ItemHead`].
BLOCK = 64


class ItemCategories(nn.Module):
    """The mean of the embeddings of an item's categories."""

    encoded: Tensor

    def __init__(self, config: RecommenderConfig, size: int, length: int):
        super().__init__()
        self.embedding = nn.Embedding(1 + size, config.hidden_size, padding_idx=0)
        self.register_buffer("encoded", torch.zeros(config.vocab_size, length, dtype=torch.int32))

    def forward(self, token_ids: Tensor) -> Tensor:
        """(n,) -> (n, D)"""
        return F.embedding_bag(self.encoded[token_ids], self.embedding.weight, mode="mean", padding_idx=0)


class ItemNumbers(nn.Module):
    """A linear map of an item's numbers, or of a whitened vector."""

    encoded: Tensor

    def __init__(self, config: RecommenderConfig, size: int):
        super().__init__()
        self.linear = nn.Linear(size, config.hidden_size, bias=False)
        self.register_buffer("encoded", torch.zeros(config.vocab_size, size))

    def forward(self, token_ids: Tensor) -> Tensor:
        """(n,) -> (n, D)"""
        return self.linear(self.encoded[token_ids])


class ItemHead(nn.Linear):
    """
    The head of a catalogue: scores by its item vectors, without gradient.

    A matrix product rounds its last columns otherwise than the others. The rows are therefore filled up to whole
    blocks: the scores of items stay the same, bit for bit, when more items come.

    Args:
        filled (`torch.Tensor` of shape `(V or more, D)`): the vectors of the items, and any others.
        vocab_size (`int`): V.
    """

    def __init__(self, filled: Tensor, vocab_size: int):
        super().__init__(filled.shape[1], vocab_size, bias=False, device="meta")
        self.filled = nn.Parameter(filled, requires_grad=False)
        self.weight = nn.Parameter(filled[:vocab_size], requires_grad=False)

    def forward(self, user_embeddings: Tensor) -> Tensor:
        """(B, D) -> (B, V)"""
        return F.linear(user_embeddings, self.filled)[..., : self.out_features]


# The heads of catalogues, and the versions of the weights that they are of.
_HEADS: WeakKeyDictionary[nn.Module, tuple[list[tuple], ItemHead]] = WeakKeyDictionary()


class ItemFeatures(nn.Module):
    """The features of all items, and what they add to the id embeddings."""

    def __init__(self, config: RecommenderConfig):
        super().__init__()
        features = config.item_features or {}
        self.names = sorted(features)  # a saved configuration has its keys in this order
        self.features = nn.ModuleList(_feature(config, **features[name]) for name in self.names)
        self.num_special_tokens = config.num_special_tokens
        self.id_dropout = config.item_id_dropout

    @torch.no_grad()
    def set(self, encoded: dict[str, Tensor]) -> None:
        """Set the features of all items, as [`ElasticItemTokenizer.encode_item_features`] returns them.

        Raises:
            ValueError: if they are of other names or shapes than those of the configuration.
        """
        if sorted(encoded) != self.names:
            raise ValueError(f"item features must be {', '.join(self.names)}, found {', '.join(sorted(encoded))}")
        for name, feature in zip(self.names, self.features, strict=True):
            items = feature.get_buffer("encoded")[self.num_special_tokens :]
            if encoded[name].shape != items.shape:
                raise ValueError(
                    f"item feature {name!r} must have shape {tuple(items.shape)}, found {tuple(encoded[name].shape)}"
                )
            items.copy_(encoded[name])

    @torch.no_grad()
    def add(self, encoded: dict[str, Tensor]) -> None:
        """Append the features of new items, in wider tables where one of them has more categories than any other."""
        for name, feature in zip(self.names, self.features, strict=True):
            old = feature.get_buffer("encoded")
            new = encoded[name].to(old)
            width = max(old.shape[1], new.shape[1])
            feature.encoded = torch.cat([F.pad(rows, (0, width - rows.shape[1])) for rows in (old, new)])

    def directions(self, token_ids: Tensor) -> Tensor:
        """Return unit vectors whose products say how much items are alike, by what their features add and by their
        vectors as they are: (n,) -> (n, C), zeros for an item of which nothing is known."""
        parts = [self(token_ids)]
        for feature in self.features:
            if isinstance(feature, ItemNumbers) and feature.linear.in_features > 1:
                parts.append(feature.encoded[token_ids])
        return F.normalize(torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=-1), dim=-1)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return what the features add: (n,) -> (n, D)."""
        return sum(feature(token_ids) for feature in self.features)

    def vectors(self, embed_tokens: nn.Embedding, token_ids: Tensor) -> Tensor:
        """Return the vectors of items, in training with their ids left out at random: (...,) -> (..., D)."""
        embeddings = embed_tokens(token_ids)
        if self.training and self.id_dropout > 0:
            is_kept = torch.rand(token_ids.shape, device=token_ids.device) >= self.id_dropout
            embeddings = embeddings * is_kept[..., None]
        return embeddings + self(token_ids.flatten()).unflatten(0, token_ids.shape)

    def head(self, embed_tokens: nn.Embedding) -> nn.Linear:
        """Return the head of the catalogue. Where no gradient is needed, the vectors of a model in use are computed
        once, for as long as its weights stay the same; else they pass gradients on, as in training mode or not."""
        size, device = embed_tokens.num_embeddings, embed_tokens.weight.device
        if torch.is_grad_enabled():
            return linear_head(self.vectors(embed_tokens, torch.arange(size, device=device)))
        weights = [embed_tokens.weight, *self.parameters(), *self.buffers()]
        versions = versions_of(weights)
        if self not in _HEADS or _HEADS[self][0] != versions:
            filled = F.pad(torch.arange(size, device=device), (0, -size % BLOCK))
            with torch.autocast(device.type, enabled=False):
                vectors = [embed_tokens.weight[chunk] + self(chunk) for chunk in filled.split(MAX_ROWS)]
            _HEADS[self] = (versions, ItemHead(torch.cat(vectors), size))
        return _HEADS[self][1]


def linear_head(vectors: Tensor) -> nn.Linear:
    """Return the linear layer with these weights, which need not be parameters: (V, D)."""
    head = nn.Linear(vectors.shape[1], vectors.shape[0], bias=False, device="meta")
    del head.weight
    head.weight = vectors
    return head


def _feature(config: RecommenderConfig, kind: str, size: int, length: int = 0) -> nn.Module:
    return ItemCategories(config, size, length) if kind == "categories" else ItemNumbers(config, size)
