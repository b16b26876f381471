"""Pauses, buckets and phases beside plain Python, and every time that is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reference
from elastic_hf.models import event_time
from elastic_hf.models.event_time import (
    NUM_BUCKETS,
    elapsed_until,
    given_times,
    pauses_before,
    read_times,
    time_buckets,
    time_phases,
    validate_requests,
    validate_timestamps,
)
from factories import histories, times


nan, inf = math.nan, math.inf


def rows(*lists, dtype=torch.double):
    return torch.tensor(lists, dtype=dtype)


# What a model reads


def test_buckets_are_the_number_of_binary_digits():
    powers = [2**power for power in range(24)]
    seconds = [-1.0, 0.0, 0.5, 1.0, 2.5, 6.99, 1e9, 2.0**31, 2.0**32, 2.0**40, 1e30]
    seconds += [float(value) for power in powers for value in (power - 1, power, power + 0.5)]
    seconds = [value for value in seconds if value == torch.tensor(value).float().item()]
    found = time_buckets(torch.tensor(seconds)).tolist()
    assert found == [reference.time_bucket(value) for value in seconds]
    assert {0, 1, 2, NUM_BUCKETS - 1} <= {*found} and max(found) == 33


def test_phases_are_those_of_the_clock_and_the_calendar():
    """Also of sums of periods, whose phases are those of nothing."""
    seconds = [-1.0, 0.0, 21_600.0, 86_400.0 * 3, 1_700_000_000.25, 31_556_952.0 * 40, 4e9]
    found = time_phases(torch.tensor(seconds, dtype=torch.double).view(1, 7))
    assert found.shape == (1, 7, 6) and found.dtype == torch.float32
    expected = [reference.time_phases(value) for value in seconds]
    torch.testing.assert_close(found[0], torch.tensor(expected), atol=2e-6, rtol=0)
    assert (found[0, 0] == 0).all()
    assert found[0, 2, 0].abs() < 1e-6 and found[0, 2, 3] == 1  # six in the morning
    whole = torch.tensor([-1, 0, 21_600, 1_700_000_000])
    torch.testing.assert_close(time_phases(whole), time_phases(whole.double()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_pauses_equal_the_loop(dtype):
    timestamps, _ = times(9, 4, padding=3)
    _, mask = histories(9, 4, padding=3)
    mask[2], mask[3, :8] = 0, 0
    timestamps = timestamps.nan_to_num(7e9).to(dtype)
    last = [5.0, -1.0, 6.0, 1e8]
    for last_timestamps in (None, last):
        expected = torch.full((4, 9), -1.0)
        for row in range(4):
            items = mask[row].nonzero()[:, 0].tolist()
            seconds = timestamps[row, items].tolist()
            before = [] if last_timestamps is None or last_timestamps[row] == -1 else [last_timestamps[row]]
            pauses = reference.pauses_before([*before, *seconds])[len(before) :]
            expected[row, items] = torch.tensor(pauses, dtype=torch.float32)
        given = None if last_timestamps is None else torch.tensor(last_timestamps, dtype=torch.double)
        found = pauses_before(timestamps, mask.bool(), given)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_seconds_of_today_are_exact():
    """In float32 they would be two minutes off."""
    timestamps = rows([1.7e9, 1.7e9 + 1, 1.7e9 + 4])
    assert pauses_before(timestamps, torch.ones(1, 3, dtype=torch.bool)).tolist() == [[-1, 1, 3]]
    assert elapsed_until(rows([1.7e9 + 9.5]), timestamps[:, -1:]).tolist() == [[5.5]]


def test_elapsed_is_not_known_without_a_request_or_an_event():
    found = elapsed_until(rows([10, -1, 10, -1, 7]), rows([4, 4, -1, -1, 7]))
    assert found.tolist() == [[6, -1, -1, -1, 0]] and found.dtype == torch.float32


# What a base model is given


def model_with(training=False, use_timestamps=True, request_dropout=0.3):
    config = SimpleNamespace(use_timestamps=use_timestamps, request_dropout=request_dropout)
    return SimpleNamespace(config=config, training=training)


def test_padding_is_not_read():
    timestamps, requests = times()
    mask = histories()[1].bool()
    found, found_requests = read_times(model_with(), timestamps, requests, mask, last_position_only=False)
    assert (found[~mask] == -1).all() and torch.equal(found[mask], timestamps[mask])
    assert torch.equal(found_requests, requests)
    found, found_requests = read_times(model_with(), timestamps, requests[:, -1], mask, last_position_only=True)
    assert found.shape == (3, 7) and torch.equal(found_requests, requests[:, -1:])
    for only, width in ((False, 7), (True, 1)):
        _, unknown = read_times(model_with(), timestamps, None, mask, last_position_only=only)
        assert unknown.tolist() == [[-1] * width] * 3


@pytest.mark.parametrize("request_dropout", [0.0, 0.4, 1.0])
def test_requests_of_whole_histories_are_dropped_in_training(request_dropout):
    timestamps = torch.arange(2000 * 3).view(2000, 3)
    mask = torch.ones(2000, 3, dtype=torch.bool)
    torch.manual_seed(0)
    model = model_with(training=True, request_dropout=request_dropout)
    _, requests = read_times(model, timestamps, timestamps + 5, mask, last_position_only=False)
    is_dropped = (requests == -1).all(dim=1)
    assert torch.equal(requests[~is_dropped], timestamps[~is_dropped] + 5)
    assert abs(is_dropped.double().mean() - request_dropout) < 0.04
    model.training = False
    _, requests = read_times(model, timestamps, timestamps + 5, mask, last_position_only=False)
    assert torch.equal(requests, timestamps + 5)


@pytest.mark.parametrize("name", ["timestamps", "request_timestamps"])
def test_times_for_a_model_that_reads_none_are_refused(name):
    given = {"timestamps": None, "request_timestamps": None}
    mask = histories()[1].bool()
    assert read_times(model_with(use_timestamps=False), **given, attention_mask=mask, last_position_only=True) == ()
    given[name] = times()[0]
    with pytest.raises(ValueError, match=f"^{name} must be None for a model with use_timestamps=False, found a value"):
        read_times(model_with(use_timestamps=False), **given, attention_mask=mask, last_position_only=True)


def test_a_model_that_reads_times_needs_them():
    with pytest.raises(ValueError, match="timestamps must be given to a model with use_timestamps=True, found None"):
        read_times(model_with(), None, rows([5]), histories()[1].bool(), last_position_only=True)


@pytest.mark.parametrize(
    ("timestamps", "message"),
    [
        ([[1, 2], [3, 4]], r"must be a tensor of shape \(2, 3\), found list"),
        (rows([1, 2], [3, 4]), r"must be a tensor of shape \(2, 3\), found \(2, 2\)"),
        (torch.tensor([1, 2, 3]), r"must be a tensor of shape \(2, 3\), found \(3,\)"),
        (rows([1, 2, 3], [4, 5, 6]).float(), "must be of torch.int64 or torch.float64, found torch.float32"),
        (rows([1, 2, 3], [4, 5, 6]).int(), "must be of torch.int64 or torch.float64, found torch.int32"),
        (rows([0, 2, 3], [4, -5, 6]), "must be finite Unix seconds of at least 0, found -5.0 in row 1"),
        (rows([0, 2, 3], [-1, -5, 6]).long(), "must be finite Unix seconds of at least 0, found -1 in row 1"),
        (rows([0, 2, nan], [4, 5, 6]), "must be finite Unix seconds of at least 0, found nan in row 0"),
        (rows([0, 2, 3], [4, 5, inf]), "must be finite Unix seconds of at least 0, found inf in row 1"),
        (rows([9, 2, 3], [4, 7, 6]), r"must not go backwards \(oldest event first\), found 6.0 after 7.0 in row 1"),
    ],
)
def test_bad_timestamps_are_named(timestamps, message):
    """The first item of the first row is padding, where anything may stand."""
    mask = torch.tensor([[False, True, True], [True, True, True]])
    with pytest.raises(ValueError, match=f"^timestamps {message}"):
        validate_timestamps(timestamps, mask)


def test_good_timestamps_pass():
    mask = torch.tensor([[False, True, True], [True, True, True], [False, False, False]])
    validate_timestamps(rows([nan, 0, 3], [4, 4, 4], [-7, inf, nan]), mask)
    validate_timestamps(rows([9, 0, 3], [4, 4, 4], [9, -8, 7]).long(), mask)
    last = torch.tensor([0.0, 4.0, 1e9], dtype=torch.double)
    validate_timestamps(rows([9, 0, 3], [4, 4, 5], [9, -8, 7]), mask, last)
    validate_timestamps(rows([9, 0, 3], [4, 4, 5], [9, -8, 7]).long(), mask, last)


@pytest.mark.parametrize(
    ("last", "found", "after", "row"), [([1, 3], 0.0, 1.0, 0), ([0, 4.5], 4.0, 4.5, 1), ([-1, 1e9], 4.0, 1e9, 1)]
)
def test_events_before_the_last_of_a_cache_are_named(last, found, after, row):
    mask = torch.tensor([[False, False, True], [True, True, True]])
    message = f"timestamps must not go backwards .*, found {found} after {after} in row {row}"
    with pytest.raises(ValueError, match=message):
        validate_timestamps(rows([9, 7, 0], [4, 5, 6]), mask, torch.tensor(last, dtype=torch.double))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([9, 9], r"must be a tensor of shape \(2,\), found list"),
        (rows([9, 9, 9]), r"must be a tensor of shape \(2,\), found \(1, 3\)"),
        (torch.tensor([9.0, 9.0]), "must be of torch.int64 or torch.float64, found torch.float32"),
        (rows([9, 4])[0], "must be -1 or at least the time of the last event, 5.0, found 4.0 in row 1"),
        (rows([9, -2])[0], "must be -1 or at least the time of the last event, 5.0, found -2.0 in row 1"),
        (rows([nan, 9])[0], "must be -1 or at least the time of the last event, 3.0, found nan in row 0"),
        (rows([9, inf])[0], "must be -1 or at least the time of the last event, 5.0, found inf in row 1"),
    ],
)
def test_bad_requests_are_named(requests, message):
    with pytest.raises(ValueError, match=f"^request_timestamps {message}"):
        validate_requests(requests, rows([3, 5])[0])


def test_a_request_of_each_position_is_checked():
    latest = rows([3, 5, 6], [-1, 2, 4])
    validate_requests(rows([3, 6, -1], [-1, 2, 9]), latest)
    validate_requests(rows([0, 6, -1], [-1, 2, 9]), rows([-1, 5, 6], [-1, 2, 4]))
    with pytest.raises(ValueError, match="at least the time of the last event, 2.0, found 1.0 in row 1"):
        validate_requests(rows([3, 6, -1], [-1, 1, 9]), latest)


# What a caller gives


@pytest.mark.parametrize("convert", [torch.clone, torch.Tensor.numpy, torch.Tensor.tolist])
def test_times_may_be_lists_and_arrays(convert):
    timestamps, requests = rows([1.7e9, 1.7e9 + 0.25]), rows([1.7e9 + 1])[0]
    found = given_times(model_with(), convert(timestamps), convert(requests), 1, torch.device("cpu"))
    assert torch.equal(found[0], timestamps) and torch.equal(found[1], requests)


def test_a_request_without_a_time_is_for_now(monkeypatch):
    monkeypatch.setattr(event_time.time, "time", lambda: 1.7e9 + 0.5)
    _, found = given_times(model_with(), torch.tensor([[3], [4]]), None, 2, torch.device("cpu"))
    assert found.tolist() == [1.7e9 + 0.5] * 2 and found.dtype == torch.double
    plain = given_times(model_with(use_timestamps=False), None, None, 2, torch.device("cpu"))
    assert plain == (None, None)


@pytest.mark.parametrize("timestamps", [[[1, 2], [3]], [["now"]], np.array([["2026-01-01"]], "datetime64[s]")])
def test_what_is_no_seconds_is_refused(timestamps):
    found = type(timestamps).__name__
    with pytest.raises(ValueError, match=f"timestamps must be Unix seconds in a tensor, .*, found a {found}"):
        given_times(model_with(), timestamps, None, 1, torch.device("cpu"))
