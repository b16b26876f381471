"""`elastic-hf export`: write a trained recommender as ONNX programs, to serve it without PyTorch.

    elastic-hf export --model_name_or_path outputs/shop --output_dir outputs/shop-onnx

`history.onnx` takes `input_ids` and `attention_mask` of shape (batch, length), 1 for items and 0 for the padding on
the left, and returns `logits`, the scores of every token as the next item. `step.onnx`, of ELASTIC, takes the new
items of each user and the user's state as well (`recurrent_state`, `conv_state`, `num_items`: zeros for a new user),
and returns the logits and the next state, whose size does not depend on the length of the history. Batch and length
are free. States are of one model: `step.onnx` names it in its metadata, as `model_digest`. `items.parquet` and
`tokenizer.json` lie in the same folder.

Of a model with `use_timestamps` both programs also take `timestamps`, of shape (batch, length), and
`request_timestamps`, of shape (batch,), in Unix seconds as float64: when the items came, and for which moment to
recommend, or -1. The state then holds `last_timestamps` as well, -1 for a new user. Of a model with `event_features`
both take `event_features`, of shape (batch, length, features), float32: the categories and standardised numbers of
`event_columns` in `tokenizer_config.json`, in alphabetical order.

Each program is run by ONNX Runtime on histories of several lengths before the command ends, and must give PyTorch's
logits to 1e-5, and its states to 1e-5 of their largest value.
"""

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from ..models.cache_elastic import TENSORS, ElasticCache
from ..training.output_folder import make_folder


try:
    import onnxruntime
    import onnxscript  # noqa: F401, by which PyTorch writes ONNX programs
except ImportError as error:
    raise ImportError("elastic-hf export needs ONNX: pip install onnx onnxruntime onnxscript") from error


# Inputs whose second axis is the length of the histories.
HISTORIES = ("input_ids", "attention_mask", "timestamps", "event_features")


class History(nn.Module):
    """Whole histories, and what else `names` says, to scores."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


class Step(nn.Module):
    """New items and states, in the order of `names`, to scores and the next states."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        state = {name: given.pop(name) for name in TENSORS if name in given}
        cache = ElasticCache(**state, model_digest=self.model.model.digest())
        outputs = self.model(**given, cache=cache, use_cache=True)
        return outputs.logits, *outputs.cache.tensors.values()


def make_inputs(model: nn.Module, batch_size: int, length: int, with_state: bool) -> dict[str, Tensor]:
    """Random histories, the first with padding where it is long enough, with times and event features for a
    model that reads them, and states of users who have read some."""
    config = model.config
    generator = torch.Generator().manual_seed(length)
    num_before = 9
    items = torch.randint(
        config.num_special_tokens, config.vocab_size, (batch_size, num_before + length), generator=generator
    )
    attention_mask = torch.ones(batch_size, length, dtype=torch.long)
    attention_mask[0, : length // 3] = 0
    inputs = {"input_ids": items[:, num_before:], "attention_mask": attention_mask}
    before = {"input_ids": items[:, :num_before]}
    if config.use_timestamps:
        # From a second to some days between two events.
        pauses = 10 ** (6 * torch.rand(batch_size, num_before + length + 1, generator=generator, dtype=torch.double))
        seconds = 1.7e9 + pauses.cumsum(dim=1)
        inputs |= {"timestamps": seconds[:, num_before:-1], "request_timestamps": seconds[:, -1]}
        before["timestamps"] = seconds[:, :num_before]
    if config.event_features:
        sizes = torch.tensor([*config.event_features.values()])
        draws = torch.rand(batch_size, num_before + length, len(sizes), generator=generator)
        features = torch.where(sizes > 0, (draws * (sizes + 1)).floor(), draws)
        inputs["event_features"], before["event_features"] = features[:, num_before:], features[:, :num_before]
    if with_state:
        with torch.no_grad():
            inputs |= model(**before, use_cache=True).cache.tensors
    return inputs


def export(model: nn.Module, file: Path, with_state: bool, model_digest: str | None = None) -> nn.Module:
    """Write one program, check it, and return what it was made from."""
    inputs = make_inputs(model, 2, 70, with_state)
    names = [*inputs]
    results = ["logits", *(f"next_{name}" for name in names if name in TENSORS)]
    program = (Step if with_state else History)(model, names).eval()
    axes = [{0: Dim.AUTO, 1: Dim.AUTO} if name in HISTORIES else {0: Dim.AUTO} for name in names]
    exported = torch.onnx.export(
        program,
        tuple(inputs.values()),
        input_names=names,
        output_names=results,
        dynamic_shapes=(tuple(axes),),
        dynamo=True,
        verbose=False,
    )
    if with_state:
        exported.model.metadata_props["model_digest"] = model_digest or model.model.digest()
    exported.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file)
    for batch_size, length in ((1, 1), (3, 2), (2, 64), (5, 130), (1, 5000)):
        inputs = make_inputs(model, batch_size, length, with_state)
        with torch.no_grad():
            expected = program(*inputs.values())
        found = session.run(results, {name: value.numpy() for name, value in inputs.items()})
        for name, wanted, value in zip(results, expected if with_state else [expected], found, strict=True):
            # A state adds up what it has read: its sums grow with the history, and so does their rounding.
            scale = 1.0 if name == "logits" else max(1.0, float(wanted.abs().max()))
            message = f"{file.name}: {name}"
            np.testing.assert_allclose(value, wanted.numpy(), atol=1e-5 * scale, rtol=0, err_msg=message)
    return program


def main(argv: Sequence[str]) -> None:
    """Export a model, and compare the programs with it."""
    args = parse_arguments(argv)
    make_folder(args.output_dir, "output_dir")
    if any(args.output_dir.iterdir()):
        raise ValueError(f"output_dir must be empty or not exist, found files in {args.output_dir}")
    model = AutoModel.from_pretrained(args.model_name_or_path, revision=args.revision).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, revision=args.revision)
    programs, digest = {"history.onnx": False}, None
    if model.config.model_type == "elastic":
        programs["step.onnx"], digest = True, model.model.digest()
    if model.config.item_features is not None:
        model = model.without_item_features()
    # What the exporter does without is its own affair: the programs are compared with the model.
    for library in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    for name, with_state in tqdm(programs.items(), desc="Exporting", unit="program"):
        export(model, args.output_dir / name, with_state, digest)
        tqdm.write(f"{args.output_dir / name}: {(args.output_dir / name).stat().st_size:,} bytes")
    tokenizer.save_pretrained(args.output_dir)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="elastic-hf export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of a trained model.")
    parser.add_argument("--revision", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the programs.")
    return parser.parse_args(argv)
