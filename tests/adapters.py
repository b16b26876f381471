"""Layers that are more than a linear layer."""

import copy

import torch
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


def adapted(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """Return copies of a model with an adapter of one of its linear layers, beside its weight and merged into it."""
    beside, merged = copy.deepcopy(model), copy.deepcopy(model)
    adapter = LowRankAdapter(beside.get_submodule(name))
    beside.set_submodule(name, adapter)
    with torch.no_grad():
        merged.get_submodule(name).weight += adapter.up.weight @ adapter.down.weight
    return beside, merged
