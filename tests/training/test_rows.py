import pytest
from datasets import Dataset

from elastic_hf.training.rows import (
    check_columns,
    check_evaluation_rows,
    history_lengths,
    leave_out_short_histories,
)
from trainers import evaluation_rows, make_histories, make_model, make_trainer, train_rows, with_times


def test_history_lengths_also_of_a_selection():
    dataset = Dataset.from_dict({"input_ids": [[3, 4], [5], [], [6, 7, 8]]})
    assert history_lengths(dataset).tolist() == [2, 1, 0, 3]
    assert history_lengths(dataset.select([3, 1])).tolist() == [3, 1]


def test_short_histories_are_left_out_with_a_count(caplog):
    dataset = Dataset.from_dict({"input_ids": [[3, 4], [5], [], [6, 7, 8]]})
    assert leave_out_short_histories(dataset)["input_ids"][:] == [[3, 4], [6, 7, 8]]
    assert "2 training histories of fewer than 2 items, with nothing to predict, are left out" in caplog.text
    assert leave_out_short_histories(dataset.select([0, 3]))["input_ids"][:] == [[3, 4], [6, 7, 8]]
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="train_dataset must have histories of at least 2 items, found 2 of fewer"):
        leave_out_short_histories(dataset.select([1, 2]))
    with pytest.raises(ValueError, match="train_dataset must have the column input_ids, found items"):
        leave_out_short_histories(dataset.rename_column("input_ids", "items"))
    assert leave_out_short_histories(None) is None


def test_a_training_with_short_histories(tmp_path):
    histories = [*make_histories(20), [3, 4, 5], [6, 7, 8]]  # the last two leave one item to train on
    trainer = make_trainer(tmp_path, make_model(), histories=histories, num_train_epochs=1)
    assert len(trainer.train_dataset) == 20
    trainer.train()
    assert len(trainer.predict(trainer.eval_dataset).predictions[0]) == 22


def test_evaluation_rows_are_checked(tmp_path):
    rows = evaluation_rows(make_histories(3))
    check_evaluation_rows(rows)
    check_evaluation_rows({"a": rows, "b": None})
    with pytest.raises(ValueError, match="eval_dataset must have the columns input_ids and target, found input_ids"):
        check_evaluation_rows(rows.remove_columns("target"))
    empty = Dataset.from_dict({"input_ids": [[3], []], "target": [4, 5]})
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] must have at least 1 item .*, found 1 empty"):
        check_evaluation_rows({"a": rows, "b": empty})
    with pytest.raises(ValueError, match="found 1 empty"):
        make_trainer(tmp_path, options={}, histories=[*make_histories(20), [7, 8], [9]])


def test_columns_that_a_model_asks_for_are_checked():
    histories = make_histories(3)
    rows = with_times(evaluation_rows(histories), histories)
    times = (["timestamps", "target_timestamp"], "use_timestamps=True")
    check_columns(rows, "eval_dataset", *times)
    check_columns({"a": rows, "b": None}, "eval_dataset", *times)
    check_columns(rows, "eval_dataset", [], "nothing")
    wanted = "must have the columns timestamps and target_timestamp for a model with use_timestamps=True"
    found = "found input_ids, target, timestamps$"
    with pytest.raises(ValueError, match=f"^eval_dataset {wanted}, {found}"):
        check_columns(rows.remove_columns("target_timestamp"), "eval_dataset", *times)
    with pytest.raises(ValueError, match=rf"^eval_dataset\['b'\] {wanted}, found input_ids, target$"):
        check_columns({"a": rows, "b": evaluation_rows(histories)}, "eval_dataset", *times)
    with pytest.raises(
        ValueError, match="^train_dataset must have the column rating for a model with a, found user_id"
    ):
        check_columns(train_rows(histories), "train_dataset", ["rating"], "a")
