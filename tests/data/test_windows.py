import pytest
from datasets import Dataset

from elastic_hf.data.windows import split_into_windows


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


def test_an_earlier_result_is_not_trusted(tmp_path):
    histories = Dataset.from_dict({"input_ids": [list(range(3, 30))]})
    histories.save_to_disk(tmp_path)
    histories = Dataset.load_from_disk(tmp_path)
    first = split_into_windows(histories, max_length=5)
    expected = first["input_ids"][:]
    for file in first.cache_files:
        with open(file["filename"], "r+b") as stream:
            stream.truncate(100)
    assert first.cache_files and split_into_windows(histories, max_length=5)["input_ids"][:] == expected


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
