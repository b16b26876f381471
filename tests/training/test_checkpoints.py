import json

import pytest

from elastic_hf.training.checkpoints import (
    RunTotals,
    find_checkpoint,
    find_damage,
    put_in_place,
    read_record,
    remove_old_checkpoints,
    write_record,
)


TOTALS = RunTotals(seconds=2.5, logged_loss=7.0, unlogged_loss=0.5, last_logged_step=3)


def make_checkpoint(folder, totals=TOTALS, record=True):
    (folder / "part").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / "part" / "optimizer.bin").write_bytes(b"123")
    if record:
        write_record(folder, totals)
    return folder


@pytest.mark.parametrize("totals", [TOTALS, None])
def test_record(tmp_path, totals):
    record = read_record(make_checkpoint(tmp_path / "checkpoint-1", totals))
    assert record.files == {"model.safetensors": 5, "part/optimizer.bin": 3, "trainer_state.json": 2}
    assert record.totals == totals


@pytest.mark.parametrize("name", ["model.safetensors", "part/optimizer.bin", "trainer_state.json", "checkpoint.json"])
def test_a_file_that_is_cut_off_or_missing_is_damage(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-1")
    assert find_damage(checkpoint) is None
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[: len(whole) // 2])
    assert find_damage(checkpoint) is not None
    (checkpoint / name).unlink()
    if name != "checkpoint.json":  # without which it is one of the stock trainer
        assert name in find_damage(checkpoint)


def test_a_checkpoint_of_the_stock_trainer_ends_with_its_state(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-1", record=False)
    assert read_record(checkpoint) is None and find_damage(checkpoint) is None
    (checkpoint / "trainer_state.json").write_text('{"epoch"')
    assert find_damage(checkpoint) is not None
    assert "checkpoint-2" in find_damage(tmp_path / "checkpoint-2")


def test_a_record_that_is_none_is_damage(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-1")
    for text in ("[]", '{"files": {}}', json.dumps({"files": {}, "totals": {"seconds": 1}})):
        (checkpoint / "checkpoint.json").write_text(text)
        assert find_damage(checkpoint) is not None


def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog):
    assert find_checkpoint(tmp_path) is None and find_checkpoint(tmp_path / "missing") is None
    for step in (8, 9, 10, 11):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    assert find_checkpoint(tmp_path) == str(tmp_path / "checkpoint-11")
    assert not caplog.text
    (tmp_path / "checkpoint-11" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-9" / "model.safetensors").unlink()
    (tmp_path / "incomplete" / "checkpoint-12").mkdir(parents=True)
    assert find_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    for name in ("checkpoint-9", "checkpoint-11", "incomplete/checkpoint-12"):
        assert f"{tmp_path / name} is not whole and is not used" in caplog.text
    assert "checkpoint-10 " not in caplog.text


def test_a_checkpoint_takes_the_place_of_an_older_one(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-4", None)
    put_in_place(make_checkpoint(tmp_path / "incomplete" / "checkpoint-4"))
    assert read_record(tmp_path / "checkpoint-4").totals == TOTALS
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("limit", "keep", "remaining"),
    [
        (2, [12], [10, 12]),
        (2, [9, 12], [9, 12]),
        (1, [9, 12], [9, 12]),
        (1, [9], [9]),
        (3, [12], [9, 10, 12]),
        (5, [12], [2, 9, 10, 12]),
    ],
)
def test_old_checkpoints_are_removed_but_for_those_to_keep(tmp_path, limit, keep, remaining):
    for step in (2, 9, 10, 12):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    remove_old_checkpoints(tmp_path, limit, {tmp_path / f"checkpoint-{step}" for step in keep})
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in remaining}
