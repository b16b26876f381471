"""A training that is killed at any file operation, or finds the disk full at any write, ends as if it had not been."""

import shutil
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

from elastic_hf.training.checkpoints import find_checkpoint
from faults import read_state, state_after_full_disk, states_after_kills, write_state
from trainers import make_histories, make_model, make_trainer


def train(folder, greater_is_better):
    """Train two steps, each followed by a checkpoint, on from the newest whole one; return what must be the same."""
    trainer = make_trainer(
        folder,
        make_model("bert4rec", num_hidden_layers=1, max_position_embeddings=21),
        histories=make_histories(16),
        options={"compute_metrics": lambda prediction: {"step": trainer.state.global_step}},
        per_device_train_batch_size=8,
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        logging_strategy="steps",
        logging_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="step",
        greater_is_better=greater_is_better,
    )
    output = trainer.train(resume_from_checkpoint=find_checkpoint(folder))
    trainer.save_model()
    log_keys = ("step", "loss", "eval_step")
    logs = [{key: log[key] for key in log_keys if key in log} for log in trainer.state.log_history]
    return output.training_loss, logs


# Where the last step is the best, the first checkpoint is removed for the second; else the second one after training.
@pytest.fixture(scope="module", params=[True, False], ids=["last is best", "first is best"])
def whole(request, tmp_path_factory):
    """What a training returns and saves, the states in which a kill can leave it, and how to train."""

    def run(folder):
        return train(folder, request.param)

    folder = tmp_path_factory.mktemp("whole")
    returned = []
    states = states_after_kills(folder, lambda: returned.append(run(folder)))
    return returned[0], load_file(folder / "model.safetensors"), states, run


def test_a_checkpoint_is_whole_or_absent_at_any_time(whole):
    _, _, states, _ = whole
    assert len(states) > 50
    for name in ("checkpoint-1", "checkpoint-2"):
        contents = [
            {file: content for file, content in state.items() if file.startswith(f"{name}/")} for state in states
        ]
        found = [content for content in contents if content]
        assert found and all(content == found[0] for content in found)
        assert {f"{name}/model.safetensors", f"{name}/optimizer.pt", f"{name}/trainer_state.json"} <= found[0].keys()


def test_a_killed_training_goes_on(whole, tmp_path, caplog):
    returned, weights, states, run = whole
    for number, state in enumerate(states):
        caplog.clear()
        folder = write_state(state, tmp_path / str(number))
        assert run(folder) == returned
        found = load_file(folder / "model.safetensors")
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
        named = {name for name in state if name.startswith("incomplete/") and name.count("/") == 1}
        assert all(name in caplog.text for name in named) and ("is not whole" in caplog.text) == bool(named)
        shutil.rmtree(folder)


def test_a_training_on_a_full_disk_leaves_what_a_kill_can_leave(tmp_path):
    def run(folder):
        return train(folder, greater_is_better=True)

    whole = tmp_path / "whole"
    whole.mkdir()
    states = states_after_kills(whole, lambda: run(whole))
    names = {frozenset(state) for state in states}
    for num_writes in count():
        folder = tmp_path / str(num_writes)
        folder.mkdir()
        left = state_after_full_disk(folder, lambda folder=folder: run(folder), num_writes)
        if left is None:
            break
        assert frozenset(left) in names
    assert num_writes > 20
    assert read_state(folder).keys() == states[-1].keys()
