import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from elastic_hf.training.checkpoints import read_record
from elastic_hf.training.output_folder import lock_output_dir
from launcher import TORCHRUN, launch
from trainers import make_model, make_trainer


OBJECTIVES = [
    ("group_by_length", {}),
    ("random", {}),
    ("batch_rebalance", {}),
    ("group_by_length", {"model_type": "bert4rec"}),
    ("group_by_length", {"training_objective": "prefix", "training_loss": "sampled_softmax", "num_negatives": 8}),
]


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_equal(expected, found):
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def untimed(log_history):
    """The logs without what depends on the clock."""
    timed = ("_runtime", "_per_second")
    return [{key: value for key, value in log.items() if not key.endswith(timed)} for log in log_history]


@pytest.mark.parametrize(("strategy", "overrides"), OBJECTIVES)
def test_a_resumed_run_is_the_same_run(tmp_path, strategy, overrides):
    def trainer(folder):
        return make_trainer(tmp_path / folder, make_model(**overrides), train_sampling_strategy=strategy)

    whole = trainer("whole")
    whole.train()
    first, *_, last = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(first, tmp_path / "resumed" / first.name)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / first.name))
    assert_equal(*(load_file(tmp_path / name / last.name / "model.safetensors") for name in ("whole", "resumed")))


@pytest.mark.parametrize(
    ("strategy", "overrides", "num_workers"),
    [*((*objective, 0) for objective in OBJECTIVES), ("random", {"model_type": "bert4rec"}, 2)],
)
def test_a_run_resumed_within_an_epoch_is_the_same_run(tmp_path, strategy, overrides, num_workers):
    def trainer(folder):
        arguments = dict(save_strategy="steps", save_steps=4, logging_strategy="steps", logging_steps=3)
        return make_trainer(
            folder,
            make_model(**overrides),
            **arguments,
            eval_strategy="no",
            num_train_epochs=2,  # of 7 steps each
            train_sampling_strategy=strategy,
            dataloader_num_workers=num_workers,
            dataloader_persistent_workers=num_workers > 0,
        )

    whole = trainer(tmp_path)
    expected = whole.train()
    for step in (4, 8):
        resumed = trainer(tmp_path / "resumed")
        found = resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_equal(weights(whole), weights(resumed))
        # The loss logged at step 6 or 9 is the mean of three steps, not of those after the checkpoint alone.
        assert untimed(whole.state.log_history) == untimed(resumed.state.log_history)
        assert found.training_loss == expected.training_loss == found.metrics["train_loss"]


def run_and_resume(folder):
    """Train, and go on from a checkpoint within the second epoch, in each of several processes."""
    for strategy, overrides in OBJECTIVES:
        trainers = []
        for checkpoint in (None, str(folder / strategy / "checkpoint-6")):
            arguments = dict(save_strategy="steps", save_steps=6, eval_strategy="no", num_train_epochs=2)
            arguments |= dict(per_device_train_batch_size=12, train_sampling_strategy=strategy)  # 5 steps an epoch
            trainer = make_trainer(folder / strategy, make_model(**overrides), **arguments)
            assert trainer.args.world_size == 2
            trainer.args.ddp_find_unused_parameters = False
            trainer.train(resume_from_checkpoint=checkpoint)
            trainers.append(trainer)
        assert_equal(*(weights(trainer) for trainer in trainers))
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            shutil.rmtree(folder / strategy)
        trainer.accelerator.wait_for_everyone()
    trainer.end()


@pytest.mark.long
def test_a_run_of_two_processes_resumed_within_an_epoch_is_the_same_run(tmp_path):
    launch(TORCHRUN, __file__, tmp_path)


def test_draws_differ_from_epoch_to_epoch(tmp_path):
    trainer = make_trainer(tmp_path, make_model("bert4rec"), train_sampling_strategy="sequential")
    labels = []

    def record(batch):
        labels[-1].append(batch["labels"])

    class Recorder(TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            labels.append([])

    trainer.add_callback(Recorder)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: (record(inputs), compute_loss(model, inputs, **kwargs))[1]
    trainer.train()
    first, second, third = labels
    assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))


def test_seconds_are_those_of_the_whole_run(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-7"
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    assert 0 < record["totals"]["seconds"] < read_record(tmp_path / "checkpoint-14").totals.seconds
    record["totals"]["seconds"] = 5000.0
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    resumed = make_trainer(tmp_path / "resumed", num_train_epochs=2)
    metrics = resumed.train(resume_from_checkpoint=str(checkpoint)).metrics
    assert resumed.seconds_before == 5000.0
    assert metrics["train_runtime"] > 5000 and metrics["train_steps_per_second"] == 0.003  # of 14 steps
    assert read_record(tmp_path / "resumed" / "checkpoint-14").totals.seconds > 5000


def test_figures_that_are_not_known_are_left_out(tmp_path):
    make_trainer(tmp_path, num_train_epochs=1).train()
    (tmp_path / "checkpoint-7" / "checkpoint.json").unlink()  # as the stock trainer leaves it
    for checkpoint in ("checkpoint-7", "checkpoint-14"):
        trainer = make_trainer(tmp_path, num_train_epochs=3)
        metrics = trainer.train(resume_from_checkpoint=str(tmp_path / checkpoint)).metrics
        assert trainer.seconds_before is None
        assert not {"train_loss", "train_runtime"} & metrics.keys()
        assert read_record(tmp_path / "checkpoint-21").totals is None


def test_early_stopping_goes_on_counting(tmp_path):
    def trainer(folder):
        # The metric cannot get better: the first evaluation is the best, and the run stops after two more.
        arguments = dict(learning_rate=0.0, num_train_epochs=10, load_best_model_at_end=True)
        return make_trainer(tmp_path / folder, callbacks=[EarlyStoppingCallback(2)], **arguments)

    trainer("whole").train()
    for step in (14, 21):
        shutil.rmtree(tmp_path / "resumed", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
        for later in range(step + 7, 28, 7):
            shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{later}")
        resumed = trainer("resumed")
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 21
        assert resumed.best_epoch() == 1


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(tmp_path):
    arguments = dict(learning_rate=0.0, num_train_epochs=2, load_best_model_at_end=True)
    make_trainer(tmp_path / "old", **arguments).train()
    (tmp_path / "old").rename(tmp_path / "new")
    trainer = make_trainer(tmp_path / "new", **{**arguments, "num_train_epochs": 3})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-7")


def test_without_its_best_checkpoint_a_run_chooses_anew(tmp_path, caplog):
    arguments = dict(learning_rate=0.0, num_train_epochs=3, load_best_model_at_end=True)
    make_trainer(tmp_path, **arguments).train()
    (tmp_path / "checkpoint-7" / "model.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "checkpoint-21")
    trainer = make_trainer(tmp_path, **arguments)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-21")
    assert "checkpoint-7, the best checkpoint, is not whole" in caplog.text


def test_the_newest_whole_checkpoint_is_taken(tmp_path, caplog):
    make_trainer(tmp_path).train()
    optimizer = tmp_path / "checkpoint-21" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must be a whole checkpoint, found .*optimizer.pt must have"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-21"))
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._resumed_from == str(tmp_path / "checkpoint-14")
    assert f"{tmp_path / 'checkpoint-21'} is not whole" in caplog.text
    assert read_record(tmp_path / "checkpoint-21").files["optimizer.pt"] == optimizer.stat().st_size
    with pytest.raises(ValueError, match="must find a whole checkpoint in .*, found none"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("unexpected position")  # what torch says of a full disk

    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(RuntimeError, match="unexpected position") as error:
        trainer.train()
    (note,) = error.value.__notes__
    assert note.startswith(f"{tmp_path / 'checkpoint-7'} is not written; ") and note.endswith("free on its disk")


def test_the_newest_and_the_best_checkpoint_remain(tmp_path):
    arguments = dict(learning_rate=0.0, num_train_epochs=4)
    trainer = make_trainer(tmp_path, save_total_limit=2, **arguments)  # the first evaluation is the best
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-28", "checkpoint-7"]
    make_trainer(tmp_path / "all", **arguments).train()
    assert len([*(tmp_path / "all").glob("checkpoint-*")]) == 4


def test_two_trainings_cannot_share_a_folder(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    with lock_output_dir(tmp_path):
        trainer.train()  # whoever holds the lock may take it again

    monkeypatch.setattr("elastic_hf.training.resumable_trainer.lock_output_dir", raise_in_use)
    with pytest.raises(ValueError, match="in use"):
        make_trainer(tmp_path).train()


def raise_in_use(output_dir):
    raise ValueError(f"{output_dir} in use")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, value):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    compute_loss, num_steps = trainer.compute_loss, []

    def diverge(*args, **kwargs):
        num_steps.append(1)
        loss = compute_loss(*args, **kwargs)
        return loss * value if len(num_steps) == 4 else loss

    trainer.compute_loss = diverge
    with pytest.raises(
        FloatingPointError, match="the loss at step 4 must be finite, found (nan|inf): .* learning_rate 0.005, 0.0042"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, save_strategy):
    """The last step breaks the weights: no loss tells."""

    class BreakWeights(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                torch.nn.init.constant_(model.model.norm.weight, float("nan"))

    trainer = make_trainer(
        tmp_path,
        callbacks=[BreakWeights()],
        max_steps=3,
        save_strategy=save_strategy,
        save_steps=1,
        eval_strategy="no",
    )
    with pytest.raises(FloatingPointError, match="the weights after step 3 must be finite, found model.norm.weight"):
        trainer.train()
    kept = {Path(f"checkpoint-{step}").name for step in (1, 2)} if save_strategy == "steps" else set()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == kept


if __name__ == "__main__":
    run_and_resume(Path(sys.argv[1]))
