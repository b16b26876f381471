"""Trainings on two processes of the processor, as `accelerate launch` starts them with the repository's recipes.

Accelerate shards a model on accelerators only. What it calls there is `torch.distributed.fsdp.fully_shard`, which any
device with a process group has: [`on_accelerators`] has it do the same on a processor. As a program, this file is
`elastic-hf train` on such accelerators.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

import elastic_hf
from elastic_hf.commands import train


ROOT = Path(elastic_hf.__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def accelerate_launch(recipe):
    """What starts programs as `accelerate launch` does, on a free port."""
    config = str(RECIPES / f"accelerate-{recipe}.yaml")
    return ("-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0")


def launch(launcher, *program):
    """Run a program in two processes, and return what it prints."""
    process = subprocess.run(
        [sys.executable, *launcher, *map(str, program)],
        capture_output=True,
        text=True,
        timeout=1_800,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def on_accelerators(monkeypatch):
    """Have Accelerate take the processes of processors for those of accelerators."""
    set_up = TrainingArguments.__post_init__

    def set_up_on_accelerators(args):
        set_up(args)
        assert PartialState().distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    monkeypatch.setattr(TrainingArguments, "__post_init__", set_up_on_accelerators)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        on_accelerators(patch)
        train.main(sys.argv[1:])
