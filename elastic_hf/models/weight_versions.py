"""Whether weights are still those that something was computed from."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


_num_steps = 0


def _count_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    global _num_steps
    _num_steps += 1


register_optimizer_step_post_hook(_count_step)


def versions_of(weights: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """Return what is another when a weight is assigned or changed in place.

    Fused optimizers change weights without a new version of them: the steps of all optimizers count as well.
    """
    return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version, _num_steps) for weight in weights]
