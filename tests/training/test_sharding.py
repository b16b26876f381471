"""FSDP2: what it trains is what one process trains."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from transformers import AutoModel

from elastic_hf.training.sharding import check_sharding
from launcher import accelerate_launch, launch, on_accelerators
from trainers import evaluation_rows, losses, make_histories, make_model, make_trainer


HISTORIES = [[5, 12, 19, 26], [40, 47, 54, 61]]
# What two processes may differ by from one: they add up the same numbers in another order.
TOLERANCE = 1e-4


def make(output_dir, num_processes, **arguments):
    return make_trainer(
        output_dir,
        make_model(hidden_dropout=0.0),
        histories=make_histories(96),
        per_device_train_batch_size=16 // num_processes,
        per_device_eval_batch_size=7,
        train_sampling_strategy="random",
        adam_epsilon=0.1,  # else rounding turns into whole steps where gradients are near 0
        learning_rate=0.1,
        num_train_epochs=2,
        load_best_model_at_end=True,
        **arguments,
    )


def everything(trainer, checkpoint=None):
    """What must not depend on the number of processes, nor on how they hold the model."""
    rows = evaluation_rows(make_histories())
    untrained = trainer.predict(rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    model, histories = trainer.model, torch.tensor(HISTORIES)
    slots = model.get_retrieved_slots(histories)
    slots_again = model.get_retrieved_slots(histories)
    assert torch.equal(slots, slots_again)
    trained = trainer.predict(rows)
    return {
        "untrained_ranks": untrained.predictions[0].tolist(),
        "ranks": trained.predictions[0].tolist(),
        "metrics": {key: value for key, value in trained.metrics.items() if "@" in key},
        "losses": losses(trainer),
        "slots": slots.tolist(),
        "token_ids": model.recommend(histories, top_k=5).token_ids.tolist(),
        "scores": model.recommend(histories, top_k=5).scores.tolist(),
    }


def assert_same(result, expected):
    for name in ("losses", "scores"):
        torch.testing.assert_close(
            torch.tensor(result.pop(name)), torch.tensor(expected[name]), rtol=TOLERANCE, atol=TOLERANCE
        )
    assert result == {name: value for name, value in expected.items() if name in result}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder and the results of a training in one process."""
    folder = tmp_path_factory.mktemp("one")
    return folder, everything(make(folder, 1))


def sharded_trainings(one, two):
    """One of two processes: a whole training, the same resumed, and the training of one process resumed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        on_accelerators(monkeypatch)
        results = []
        for output_dir, checkpoint in ((two, None), (two, "checkpoint-6"), (one, "checkpoint-6")):
            trainer = make(output_dir, 2)
            assert trainer.args.world_size == 2 and trainer.is_fsdp_enabled
            results.append(everything(trainer, None if checkpoint is None else str(Path(output_dir, checkpoint))))
            with pytest.raises(ValueError, match="model must be whole to be explained"):
                trainer.model.explain(torch.tensor(HISTORIES))
            weight = trainer.optimizer.state_dict()["state"][0]["exp_avg"]
            assert 2 * len(weight.to_local()) == len(weight)
            trainer.save_model(str(two / "saved"))
            if trainer.is_world_process_zero() and checkpoint is None:
                shutil.copytree(two, two.parent / "whole")
            trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            (two / "results.json").write_text(json.dumps(results))
        trainer.accelerator.wait_for_everyone()
        trainer.end()


def test_fsdp2_does_what_one_process_does_and_each_goes_on_where_the_other_stopped(one, tmp_path):
    folder, expected = one
    (tmp_path / "two").mkdir()
    shutil.copytree(folder, tmp_path / "one")
    launch(accelerate_launch("fsdp2"), __file__, tmp_path / "one", tmp_path / "two")
    for result in json.loads((tmp_path / "two" / "results.json").read_text()):
        assert_same(result, expected)
    # Back in one process.
    whole = tmp_path / "whole"
    saved = AutoModel.from_pretrained(tmp_path / "two" / "saved")
    assert saved.recommend(HISTORIES, top_k=5).token_ids.tolist() == expected["token_ids"]
    weights = [load_file(path / "checkpoint-12" / "model.safetensors") for path in (folder, whole)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=TOLERANCE, atol=TOLERANCE)
    assert_same(everything(make(whole, 1), str(whole / "checkpoint-6")), expected)


def fsdp(**settings):
    """The arguments and the accelerator of a training with FSDP2."""
    settings = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False} | settings
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**settings))
    args = SimpleNamespace(world_size=2, fsdp=True, device=torch.device("cuda"))
    return args, SimpleNamespace(state=state)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("fsdp_version", 1, "fsdp_version must be 2, found 1"),
        (
            "state_dict_type",
            "SHARDED_STATE_DICT",
            "fsdp_state_dict_type must be FULL_STATE_DICT, .* SHARDED_STATE_DICT",
        ),
        ("cpu_ram_efficient_loading", True, "fsdp_cpu_ram_efficient_loading must be False, .* found True"),
        ("auto_wrap_policy", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP or NO_WRAP"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(monkeypatch, setting, value, expected):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the plugin sets for good
    check_sharding(*fsdp())
    with pytest.raises(ValueError, match=expected):
        check_sharding(*fsdp(**{setting: value}))


def test_a_processor_on_which_nothing_would_be_sharded_is_named(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    args = SimpleNamespace(world_size=2, fsdp=None, device=torch.device("cpu"))
    accelerator = SimpleNamespace(state=SimpleNamespace())
    check_sharding(args, accelerator)
    with pytest.raises(ValueError, match="fsdp must be off on cpu"):
        check_sharding(SimpleNamespace(**{**vars(args), "fsdp": True}), accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp must be off on cpu"):
        check_sharding(args, accelerator)
    check_sharding(SimpleNamespace(**{**vars(args), "world_size": 1}), accelerator)


if __name__ == "__main__":
    sharded_trainings(*map(Path, sys.argv[1:]))
