"""Trainings with FSDP2: what can be asked for, how the model is sharded, and checkpoints from with it and without."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, OPTIMIZER_NAME_BIN
from transformers.utils import SAFE_WEIGHTS_NAME


def check_sharding(args: TrainingArguments, accelerator: Accelerator) -> None:
    """
    Check what Accelerate has made of the arguments for FSDP, or of the configuration of `accelerate launch`.

    Raises:
        ValueError: If FSDP was asked for on a device where Accelerate would train whole copies of the model, or if a
            setting of it cannot be honoured; the message names it.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if args.world_size > 1 and (args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")):
            raise ValueError(
                f"fsdp must be off on {args.device.type}, where Accelerate shards no model but trains whole copies of "
                "it with DistributedDataParallel, found it on"
            )
        return
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version must be 2, found {plugin.fsdp_version}")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            "fsdp_state_dict_type must be FULL_STATE_DICT, since a model is saved as one that any process can load, "
            f"found {plugin.state_dict_type.name}"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be False, since each process evaluates the model before it is "
            "trained, found True"
        )
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise ValueError(
            "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP or NO_WRAP, since embeddings and head belong to no "
            "group of their own, found SIZE_BASED_WRAP"
        )


@contextmanager
def sharded_as_one(model: PreTrainedModel) -> Iterator[None]:
    """
    Have Accelerate shard the embeddings and the head with the whole model, by whose forward they are gathered.

    Of its own accord it puts them into a group that is gathered and given up around each call of the head. Losses and
    rankings call it for some users at a time, and take gradients in between.
    """
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings


def is_sharded(checkpoint: str) -> bool:
    """Tell whether a checkpoint is of a training with FSDP."""
    return Path(checkpoint, f"{FSDP_MODEL_NAME}.bin").exists()


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Load the weights of a checkpoint into a model, be either of them sharded or not."""
    weights = load_file(Path(checkpoint, SAFE_WEIGHTS_NAME))
    # Tied weights are stored once.
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: str) -> None:
    """Load the state of an optimizer from a checkpoint, be either of them sharded or not."""
    if is_sharded(checkpoint):
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME_BIN), weights_only=True)
    else:
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        state = _by_name(state, model, optimizer)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def _by_name(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The state of an optimizer that numbers its parameters, with their names instead."""
    names_of = {parameter: name for name, parameter in model.named_parameters()}
    names = [names_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {names[index]: of_parameter for index, of_parameter in state["state"].items()},
        "param_groups": [
            group | {"params": [names[index] for index in group["params"]]} for group in state["param_groups"]
        ],
    }
