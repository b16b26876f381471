"""Heads that are more than a linear layer."""

from torch import nn


class LowRankAdapter(nn.Module):
    """What an adapter makes of a linear layer, which it freezes: `W x + B A x`."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, states):
        return self.base(states) + self.up(self.down(states))
