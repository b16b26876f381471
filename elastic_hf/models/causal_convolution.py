"""The short causal convolution of the stream, as pure functions (B batch, L history length, D hidden size)."""

import torch
from torch import Tensor


def causal_convolution(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Add a depthwise convolution over the latest items to each item: `y_t = x_t + sum_i weight_i * x_(t-i)`.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, kernel_size - 1 + L, D)`): those before the first position, too.
        weight (`torch.Tensor` of shape `(kernel_size, D)`).

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.
    """
    earlier = weight.shape[0] - 1
    length = hidden_states.shape[1] - earlier
    output = hidden_states[:, earlier:] * (1 + weight[0])
    for i in range(1, weight.shape[0]):
        output.addcmul_(weight[i], hidden_states[:, earlier - i : earlier - i + length])
    return output


def prepend(earlier: Tensor, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Put what came earlier right in front of each row's first item, behind its padding.

    Args:
        earlier (`torch.Tensor` of shape `(B, P, D)`).
        hidden_states (`torch.Tensor` of shape `(B, L, D)`): zeros at padding.
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): False for padding, which is on the left.

    Returns:
        `torch.Tensor` of shape `(B, P + L, D)`.
    """
    num_earlier = earlier.shape[1]
    padding = (~attention_mask).sum(dim=1)  # (B,)
    indices = padding[:, None] + torch.arange(num_earlier, device=padding.device)  # (B, P)
    indices = indices[..., None].expand(-1, -1, hidden_states.shape[-1])
    inputs = torch.cat([torch.zeros_like(earlier, dtype=hidden_states.dtype), hidden_states], dim=1)
    return inputs.scatter_(1, indices, earlier.to(hidden_states.dtype))
