"""`elastic-hf export`: write a trained recommender as ONNX programs, to serve it without PyTorch.

    elastic-hf export --model_name_or_path outputs/shop --output_dir outputs/shop-onnx

`history.onnx` takes `input_ids` and `attention_mask` of shape (batch, length), 1 for items and 0 for the padding on
the left, and returns `logits`, the scores of every token as the next item. `step.onnx`, of ELASTIC, takes the new
items of each user and the user's state as well (`recurrent_state`, `conv_state`, `num_items`: zeros for a new user),
and returns the logits and the next state, whose size does not depend on the length of the history. Batch and length
are free. States are of one model: `step.onnx` names it in its metadata, as `model_digest`. `items.parquet` and
`tokenizer.json` lie in the same folder.

Each program is run by ONNX Runtime on histories of several lengths before the command ends, and must give PyTorch's
logits to 1e-5, and its states to 1e-5 of their largest value.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoModel, AutoTokenizer

from ..models.cache_elastic import TENSORS, ElasticCache
from ..training.output_folder import make_folder


try:
    import onnxruntime
    import onnxscript  # noqa: F401, by which PyTorch writes ONNX programs
except ImportError as error:
    raise ImportError("elastic-hf export needs ONNX: pip install onnx onnxruntime onnxscript") from error


class History(nn.Module):
    """Whole histories to scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask).logits


class Step(nn.Module):
    """New items and states to scores and the next states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        cache = ElasticCache(*state, model_digest=self.model.model.digest())
        outputs = self.model(input_ids, attention_mask, cache=cache, use_cache=True)
        return outputs.logits, *tensors(outputs.cache)


def tensors(cache: ElasticCache) -> tuple[Tensor, ...]:
    return tuple(getattr(cache, name) for name in TENSORS)


def make_inputs(model: nn.Module, batch_size: int, length: int, with_state: bool) -> tuple[Tensor, ...]:
    """Random histories, the first with padding where it is long enough, and states of users who have read some."""
    config = model.config
    generator = torch.Generator().manual_seed(length)
    input_ids = torch.randint(config.num_special_tokens, config.vocab_size, (batch_size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, : length // 3] = 0
    if not with_state:
        return input_ids, attention_mask
    before = torch.randint(config.num_special_tokens, config.vocab_size, (batch_size, 9), generator=generator)
    with torch.no_grad():
        cache = model(before, use_cache=True).cache
    return input_ids, attention_mask, *tensors(cache)


def export(program: nn.Module, file: Path, with_state: bool) -> None:
    """Write one program and check it."""
    names = ["input_ids", "attention_mask", *(TENSORS if with_state else ())]
    results = ["logits", *(f"next_{name}" for name in TENSORS if with_state)]
    program.eval()
    inputs = make_inputs(program.model, 2, 70, with_state)
    shapes = [{0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO}]
    if with_state:
        shapes.append(tuple({0: Dim.AUTO} for _ in TENSORS))
    exported = torch.onnx.export(
        program,
        inputs,
        input_names=names,
        output_names=results,
        dynamic_shapes=tuple(shapes),
        dynamo=True,
        verbose=False,
    )
    if with_state:
        exported.model.metadata_props["model_digest"] = program.model.model.digest()
    exported.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file)
    for batch_size, length in ((1, 1), (3, 2), (2, 64), (5, 130), (1, 5000)):
        inputs = make_inputs(program.model, batch_size, length, with_state)
        with torch.no_grad():
            expected = program(*inputs)
        found = session.run(results, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        for name, wanted, value in zip(results, expected if with_state else [expected], found, strict=True):
            # A state adds up what it has read: its sums grow with the history, and so does their rounding.
            scale = 1.0 if name == "logits" else max(1.0, float(wanted.abs().max()))
            message = f"{file.name}: {name}"
            np.testing.assert_allclose(value, wanted.numpy(), atol=1e-5 * scale, rtol=0, err_msg=message)


def main(argv: Sequence[str]) -> None:
    """Export a model, and compare the programs with it."""
    args = parse_arguments(argv)
    make_folder(args.output_dir, "output_dir")
    if any(args.output_dir.iterdir()):
        raise ValueError(f"output_dir must be empty or not exist, found files in {args.output_dir}")
    model = AutoModel.from_pretrained(args.model_name_or_path, revision=args.revision).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, revision=args.revision)
    programs = {"history.onnx": (History(model), False)}
    if model.config.model_type == "elastic":
        programs["step.onnx"] = (Step(model), True)
    for name, (program, with_state) in programs.items():
        export(program, args.output_dir / name, with_state)
        print(f"{args.output_dir / name}: {(args.output_dir / name).stat().st_size:,} bytes")
    tokenizer.save_pretrained(args.output_dir)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="elastic-hf export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of a trained model.")
    parser.add_argument("--revision", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the programs.")
    return parser.parse_args(argv)
