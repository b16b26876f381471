import pytest
import torch
from torch import nn

from adapters import LowRankAdapter
from elastic_hf.models.plain_linear import add_projected, is_plain_linear


B, L, K, D = 2, 5, 3, 7


def make_projection(kind):
    projection = nn.Linear(K, D, bias=kind == "bias")
    if kind == "hook":
        projection.register_forward_hook(lambda module, inputs, output: 2 * output)
    return LowRankAdapter(projection) if kind == "adapter" else projection


@pytest.mark.parametrize("kind", ["plain", "bias", "hook", "adapter"])
@pytest.mark.parametrize("is_leaf", [False, True])
def test_vectors_and_projected_inputs_are_added(kind, is_leaf):
    """Outputs and gradients; a leaf that takes gradients, as a hook on frozen embeddings makes one, is not changed."""
    torch.manual_seed(0)
    projection = make_projection(kind)
    vectors, inputs = torch.randn(B, L, D, requires_grad=True), torch.randn(B, L, K)
    wanted = vectors + projection(inputs)
    before = vectors.detach().clone()
    weights = [vectors, *(weight for weight in projection.parameters() if weight.requires_grad)]
    found = add_projected(vectors if is_leaf else vectors + 0, projection, inputs.double())
    torch.testing.assert_close(found, wanted)
    assert is_plain_linear(projection) == (kind == "plain") and torch.equal(vectors, before)
    gradients = torch.randn(B, L, D)
    torch.testing.assert_close(
        torch.autograd.grad(found, weights, gradients), torch.autograd.grad(wanted, weights, gradients)
    )
