"""Linear layers that are the product with their weight and nothing else, which can be computed in other ways."""

from typing import TypeGuard

from torch import Tensor, nn

from .item_features import ItemHead


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer is the product with its weight and nothing else: no adapter, bias or hook, and no
    quantised, sharded or offloaded weight."""
    return (
        type(layer) in (nn.Linear, ItemHead)
        and layer.bias is None
        and type(layer.weight) in (nn.Parameter, Tensor)
        and layer.weight.is_floating_point()
        and not layer.weight.is_meta
        and "forward" not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def add_projected(vectors: Tensor, projection: nn.Module, inputs: Tensor) -> Tensor:
    """Add projected inputs to vectors, in place where that is possible: (B, L, D) and (B, L, K) -> (B, L, D)."""
    inputs = inputs.to(vectors.dtype)
    if not is_plain_linear(projection):
        return vectors + projection(inputs)
    if vectors.requires_grad and vectors.is_leaf:  # a hook that lets gradients into a frozen model makes it so
        vectors = vectors.clone()
    vectors.view(-1, vectors.shape[-1]).addmm_(inputs.flatten(0, 1), projection.weight.T)
    return vectors
