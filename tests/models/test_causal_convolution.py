import pytest
import torch

import reference
from elastic_hf.models.causal_convolution import causal_convolution, prepend
from factories import histories


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
def test_convolution_equals_the_loop(kernel_size):
    torch.manual_seed(0)
    hidden_states = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(kernel_size, 5, dtype=torch.float64, requires_grad=True)
    inputs = torch.nn.functional.pad(hidden_states, (0, 0, kernel_size - 1, 0))
    results = []
    for output in (causal_convolution(inputs, weight), reference.causal_convolution(hidden_states, weight)):
        results.append((output, *torch.autograd.grad((output**3).sum(), (hidden_states, weight))))
    torch.testing.assert_close(*results)


def test_what_came_earlier_stands_right_before_the_items():
    _, mask = histories(length=5, padding=3)
    hidden_states = torch.randn(3, 5, 2) * mask[..., None]
    earlier = torch.randn(3, 3, 2)
    inputs = prepend(earlier, hidden_states, mask.bool())
    for row, padding in enumerate((3, 0, 0)):
        expected = [torch.zeros(padding, 2), earlier[row], hidden_states[row, padding:]]
        torch.testing.assert_close(inputs[row], torch.cat(expected))
