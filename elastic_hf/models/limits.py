"""How much of a long computation is held at once, by kind of device: what fits a processor's cache, or keeps a GPU
busy. Results do not depend on these numbers."""

import torch


# Positions of a batch that are compressed at once where no gradient is needed.
MAX_POSITIONS = {"cpu": 2**13, "cuda": 2**17}
# Items of a history that are compressed at once at least.
MIN_ITEMS = 2048
# Chunks, over all histories and heads, whose (C x C) tables a backward pass holds at once.
MAX_CHUNKS = {"cpu": 64, "cuda": 2**14}
# Scores of the interest memory's sub-keys: 8 MiB of float32.
MAX_SUBKEY_SCORES = {"cpu": 2**21, "cuda": 2**26}


def limit(limits: dict[str, int], device: torch.device) -> int:
    """Return the limit for a device; all accelerators count as `"cuda"`."""
    return limits.get(device.type, limits["cuda"])
