import numpy as np
import pytest
from datasets import Dataset

from elastic_hf.data.windows import split_into_prefixes, split_into_windows


@pytest.mark.parametrize("num_items", [1, 2, 5, 6, 7, 11, 12, 23])
def test_windows_make_every_item_but_the_first_a_target_once(num_items):
    histories = [list(range(100, 103)), list(range(3, 3 + num_items)), list(range(50, 59))]
    dataset = Dataset.from_dict({"user_id": [7, 8, 9], "input_ids": histories}).select([1, 2])
    windows = split_into_windows(dataset, max_length=5)
    assert windows.column_names == ["user_id", "input_ids"]
    for user_id, history in zip([8, 9], histories[1:], strict=True):
        mine = windows.filter(lambda row, user_id=user_id: row["user_id"] == user_id)["input_ids"]
        assert all(2 <= len(window) <= 6 for window in mine) or num_items == 1
        assert [item for window in mine for item in window[1:]] == history[1:]
        assert mine[0][0] == history[0]
        assert all(len(window) == 6 for window in mine[1:])


def test_prefixes_are_all_and_hold_the_most_recent_items():
    """Of histories of one item, of fewer than the model sees and one more, and of more."""
    histories = [[*range(50, 59)], [99], [*range(20, 24)], [*range(3, 9)], [*range(70, 77)]]
    dataset = Dataset.from_dict({"user_id": [*range(5)], "input_ids": histories, "timestamps": histories})
    prefixes = split_into_prefixes(dataset.select([1, 4, 3, 2]), max_length=5)
    expected = [[99]]
    for history in (histories[4], histories[3], histories[2]):
        expected += [history[max(0, end - 6) : end] for end in range(2, len(history) + 1)]
    assert prefixes.column_names == ["input_ids"] and prefixes["input_ids"][:] == expected


@pytest.mark.parametrize("split", [split_into_windows, split_into_prefixes])
def test_histories_are_cut_alike_in_any_number_of_batches(split, monkeypatch):
    dataset = Dataset.from_dict({"input_ids": [[*range(3, 5 + n)] for n in range(9)]}).with_format("numpy")
    whole = split(dataset, 4)
    for name in ("WINDOWED_AT_ONCE", "PREFIXED_AT_ONCE"):
        monkeypatch.setattr(f"elastic_hf.data.windows.{name}", 2)
    parts = split(dataset, 4)
    assert whole.format["type"] == "numpy" and len(whole) == len(parts)
    assert all(np.array_equal(one, other) for one, other in zip(whole["input_ids"], parts["input_ids"], strict=True))


@pytest.mark.parametrize("split", [split_into_windows, split_into_prefixes])
def test_an_earlier_result_is_not_trusted(tmp_path, split):
    histories = Dataset.from_dict({"input_ids": [list(range(3, 30))]})
    histories.save_to_disk(tmp_path)
    histories = Dataset.load_from_disk(tmp_path)
    first = split(histories, max_length=5)
    expected = first["input_ids"][:]
    for file in first.cache_files:
        with open(file["filename"], "r+b") as stream:
            stream.truncate(100)
    assert first.cache_files and split(histories, max_length=5)["input_ids"][:] == expected


def test_timestamps_and_event_columns_are_cut_in_the_same_places():
    """Beside another list, which is repeated."""
    histories = [list(range(50, 59)), list(range(3, 26)), [99]]
    columns = {"input_ids": histories, "timestamps": [[item / 2 for item in items] for items in histories]}
    columns["rating"] = [[-float(item) for item in items] for items in histories]
    dataset = Dataset.from_dict({"timestamps": columns["timestamps"], "tags": [[1], [2, 3], []], **columns})
    windows = split_into_windows(dataset.select([2, 1]), 5, ["rating"])
    assert windows.column_names == dataset.column_names and len(windows) == 6
    for row in windows:
        assert row["timestamps"] == [item / 2 for item in row["input_ids"]]
        assert row["rating"] == [-item for item in row["input_ids"]]
        assert row["tags"] == ([] if row["input_ids"] == [99] else [2, 3])


def test_prefixes_hold_the_columns_that_are_asked_for():
    histories = [[*range(50, 59)], [*range(20, 24)], [99]]
    columns = {
        name: [[part * item for item in items] for items in histories] for name, part in (("a", 2), ("b", -0.5))
    }
    columns |= {"timestamps": [[item / 4 for item in items] for items in histories], "user_id": [7, 8, 9]}
    dataset = Dataset.from_dict({**columns, "input_ids": histories})
    prefixes = split_into_prefixes(dataset, 5, ["timestamps", "b"])
    assert prefixes.column_names == ["input_ids", "timestamps", "b"]
    assert prefixes["input_ids"][:] == split_into_prefixes(dataset, 5)["input_ids"][:]
    for row in prefixes:
        assert row["timestamps"] == [item / 4 for item in row["input_ids"]]
        assert row["b"] == [-item / 2 for item in row["input_ids"]]
    with pytest.raises(
        ValueError, match="must have the columns input_ids, c, found a, b, timestamps, user_id, input_ids"
    ):
        split_into_prefixes(dataset, 5, ["c"])
