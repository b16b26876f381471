"""When events happened, and when a recommendation is asked for: Unix seconds to what a model reads.

    pause     = seconds since the event before           elapsed = seconds from the last event to the request
    bucket(s) = 1 + floor(log2(1 + s)), 33 at most; 0 where s is not known
    phases    = cosine and sine of the place of a moment in its day, its week and its year, in UTC

Axis letters: B batch, L history length, Q positions that read (L in training, 1 in serving).
"""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


UNKNOWN = -1  # of a request whose time is not known, of a pause with no event before it, and of padding
NUM_BUCKETS = 34
# The first seconds of each bucket but 0: floor(log2(1 + s)) as the number of powers of two that 1 + s reaches, which
# is exact where a logarithm is rounded.
BUCKET_STARTS = tuple(float(2**power - 1) for power in range(NUM_BUCKETS - 1))
PERIODS = (86_400, 7 * 86_400, 31_556_952)  # seconds: a day, a week and a mean year of the Gregorian calendar
NUM_PHASES = 2 * len(PERIODS)


def given_times(
    model: PreTrainedModel, timestamps: Any, request_timestamps: Any, batch_size: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return the times that a caller gives with histories, as tensors for `forward`.

    Args:
        model (`PreTrainedModel`): with its head.
        timestamps (tensor, array or lists of shape `(B, L)`, *optional*): Unix seconds of the items.
        request_timestamps (tensor, array or list of shape `(B,)`, *optional*):
            Of the requests. Defaults to now, for a model that reads times.
        batch_size (`int`): B.
        device (`torch.device`): of the histories.

    Returns:
        The timestamps and those of the requests, `None` where a model that reads none is given none.

    Raises:
        ValueError: if they are no numbers, or lists of different lengths.
    """
    if model.config.use_timestamps and request_timestamps is None:
        request_timestamps = torch.full((batch_size,), time.time(), dtype=torch.double)
    return (
        _as_tensor("timestamps", timestamps, device),
        _as_tensor("request_timestamps", request_timestamps, device),
    )


def _as_tensor(name: str, seconds: Any, device: torch.device) -> Tensor | None:
    if seconds is None:
        return None
    try:
        # Lists as float64: float32 is minutes off today.
        return torch.as_tensor(seconds, dtype=None if hasattr(seconds, "dtype") else torch.double, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be Unix seconds in a tensor, an array or lists of one length (padded on the left), "
            f"found a {type(seconds).__name__}: {error}"
        ) from error


def read_times(
    model: PreTrainedModel,
    timestamps: Tensor | None,
    request_timestamps: Tensor | None,
    attention_mask: Tensor,
    last_position_only: bool,
    last_timestamps: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Check the times that a base model is given, and return what it is to read of them.

    In training mode the times of the requests of some histories, drawn with the configuration's `request_dropout`,
    become unknown.

    Args:
        model (`PreTrainedModel`): a base model.
        timestamps (`torch.LongTensor` or `torch.DoubleTensor` of shape `(B, L)`, *optional*): Unix seconds of the
            items.
        request_timestamps (`torch.LongTensor` or `torch.DoubleTensor`, *optional*):
            Of the requests, (B, L) or, with `last_position_only`, (B,); -1, and without it all, are not known.
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): `False` for padding.
        last_position_only (`bool`): whether the last position alone is asked for.
        last_timestamps (`torch.Tensor` of shape `(B,)`, *optional*): as in [`validate_timestamps`].

    Returns:
        Nothing without `use_timestamps`, and else the timestamps, (B, L), -1 at padding, and the times of the
        requests, (B, Q).

    Raises:
        ValueError: if a model with `use_timestamps` gets no timestamps, or another model any, or if they are not as
            described.
    """
    if not model.config.use_timestamps:
        for name, values in (("timestamps", timestamps), ("request_timestamps", request_timestamps)):
            if values is not None:
                raise ValueError(f"{name} must be None for a model with use_timestamps=False, found a value")
        return ()
    if timestamps is None:
        raise ValueError("timestamps must be given to a model with use_timestamps=True, found None")
    validate_timestamps(timestamps, attention_mask, last_timestamps)
    timestamps = torch.where(attention_mask, timestamps, UNKNOWN)
    latest = timestamps[:, -1:] if last_position_only else timestamps
    if request_timestamps is None:
        request_timestamps = torch.full_like(latest, UNKNOWN)
    else:
        validate_requests(request_timestamps, latest[:, 0] if last_position_only else latest)
        request_timestamps = request_timestamps.view_as(latest)
    if model.training:
        is_known = torch.rand(len(timestamps), 1, device=timestamps.device) >= model.config.request_dropout
        request_timestamps = torch.where(is_known, request_timestamps, UNKNOWN)
    return timestamps, request_timestamps


def validate_timestamps(timestamps: Tensor, attention_mask: Tensor, last_timestamps: Tensor | None = None) -> None:
    """Check the timestamps of events. What depends on the values is not checked while a program is traced.

    Args:
        timestamps (`torch.LongTensor` or `torch.DoubleTensor` of shape `(B, L)`): Unix seconds.
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): `False` for padding, whose timestamps are not read.
        last_timestamps (`torch.Tensor` of shape `(B,)`, *optional*): of the event before these, -1 where there is
            none.

    Raises:
        ValueError: if the shape or the type is another one, or if a time is negative, not finite, or before the one
            of an earlier event.
    """
    _validate_seconds("timestamps", timestamps, attention_mask.shape)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or timestamps.is_meta:
        return
    is_bad = attention_mask & ~((timestamps >= 0) & (timestamps < math.inf))
    seconds = timestamps
    if last_timestamps is not None:
        timestamps = torch.cat([last_timestamps[:, None], timestamps.double()], dim=1)
        timestamps = torch.where(F.pad(attention_mask, (1, 0), value=True), timestamps, timestamps[:, :1])
        attention_mask = F.pad(attention_mask, (1, 0), value=True)
    goes_back = attention_mask[:, 1:] & (timestamps[:, 1:] < timestamps[:, :-1])
    goes_back &= attention_mask[:, :-1] | (last_timestamps is not None)
    if not (is_bad.any() | goes_back.any()):  # one transfer from the device for both
        return
    if is_bad.any():
        row = int(is_bad.any(dim=1).nonzero()[0])
        found = seconds[row][is_bad[row]][0].item()
        raise ValueError(f"timestamps must be finite Unix seconds of at least 0, found {found} in row {row}")
    if goes_back.any():
        row, position = goes_back.nonzero()[0].tolist()
        earlier, later = timestamps[row, position : position + 2].tolist()
        raise ValueError(
            f"timestamps must not go backwards (oldest event first), found {later} after {earlier} in row {row}"
        )


def validate_requests(request_timestamps: Tensor, last_timestamps: Tensor) -> None:
    """Check the times of requests.

    Args:
        request_timestamps (`torch.LongTensor` or `torch.DoubleTensor` of shape `(B, Q)` or `(B,)`): Unix seconds, -1
            where the time is not known.
        last_timestamps (`torch.Tensor` of the same shape): of the latest event that each has read, -1 for none.

    Raises:
        ValueError: if the shape or the type is another one, or if a request is before the event or not finite.
    """
    _validate_seconds("request_timestamps", request_timestamps, last_timestamps.shape)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or request_timestamps.is_meta:
        return
    is_good = (request_timestamps >= last_timestamps) & (request_timestamps < math.inf)
    is_bad = (request_timestamps != UNKNOWN) & ~is_good
    if is_bad.any():
        raise ValueError(
            f"request_timestamps must be {UNKNOWN} or at least the time of the last event, "
            f"{last_timestamps[is_bad][0].item()}, found {request_timestamps[is_bad][0].item()} "
            f"in row {int(is_bad.nonzero()[0, 0])}"
        )


def _validate_seconds(name: str, seconds: Tensor, shape: torch.Size) -> None:
    if not isinstance(seconds, Tensor) or seconds.shape != shape:
        found = tuple(seconds.shape) if isinstance(seconds, Tensor) else type(seconds).__name__
        raise ValueError(f"{name} must be a tensor of shape {tuple(shape)}, found {found}")
    if seconds.dtype not in (torch.int64, torch.float64):
        raise ValueError(f"{name} must be of torch.int64 or torch.float64, found {seconds.dtype}")


def pauses_before(timestamps: Tensor, attention_mask: Tensor, last_timestamps: Tensor | None = None) -> Tensor:
    """Return the seconds since the event before each.

    Args:
        timestamps (`torch.Tensor` of shape `(B, L)`): Unix seconds, oldest event first.
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): `False` for padding, which is on the left.
        last_timestamps (`torch.Tensor` of shape `(B,)`, *optional*): of the event before these, -1 where there is
            none.

    Returns:
        `torch.FloatTensor` of shape `(B, L)`: -1 for the first event of a user, and at padding.
    """
    pauses = torch.where(attention_mask[:, :-1], timestamps[:, 1:] - timestamps[:, :-1], UNKNOWN).float()
    pauses = F.pad(pauses, (1, 0), value=UNKNOWN)
    if last_timestamps is not None:
        last_timestamps = last_timestamps[:, None].to(timestamps.dtype)
        is_first = attention_mask & ~F.pad(attention_mask[:, :-1], (1, 0))
        is_after = is_first & (last_timestamps != UNKNOWN)
        pauses = torch.where(is_after, (timestamps - last_timestamps).float(), pauses)
    return pauses


def elapsed_until(request_timestamps: Tensor, last_timestamps: Tensor) -> Tensor:
    """Return the seconds from the last event to the request, -1 where one of them is: (B, Q) twice -> (B, Q)."""
    is_known = (request_timestamps != UNKNOWN) & (last_timestamps != UNKNOWN)
    return torch.where(is_known, request_timestamps - last_timestamps, UNKNOWN).float()


def time_buckets(seconds: Tensor) -> Tensor:
    """Return `1 + floor(log2(1 + s))`, 0 for -1 seconds: `torch.FloatTensor` -> `torch.LongTensor`."""
    return torch.bucketize(seconds.contiguous(), seconds.new_tensor(BUCKET_STARTS), right=True)


def time_phases(timestamps: Tensor) -> Tensor:
    """Return the cosines and sines of moments in their day, week and year, zeros for -1: (...) -> (..., 6)."""
    periods = torch.tensor(PERIODS, dtype=torch.double, device=timestamps.device)
    turns = timestamps / periods.view(-1, *[1] * timestamps.dim())  # (3, ...): one after the other in memory
    angles = (turns - turns.floor()).float().mul_(2 * math.pi)
    phases = torch.cat([angles.cos(), angles.sin_()])
    return phases.mul_(timestamps != UNKNOWN).movedim(0, -1)
