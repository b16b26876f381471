import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from elastic_hf import ElasticCache, ElasticItemTokenizer
from elastic_hf.commands import export
from factories import EVENT_FEATURES, NUM_TOKENS, elastic_model, event_features, featured_model, item_table


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "timed and featured"])
def exported(request, tmp_path_factory):
    """A model, and the folder of its programs, which the command has compared with PyTorch."""
    folder = tmp_path_factory.mktemp("onnx")
    model = elastic_model(use_timestamps=request.param, event_features=EVENT_FEATURES if request.param else {})
    model.save_pretrained(folder / "model")
    tokenizer = ElasticItemTokenizer.from_items([f"item {i}" for i in range(NUM_TOKENS - 3)], model_max_length=50)
    tokenizer.save_pretrained(folder / "model")
    arguments = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "programs")]
    command = [sys.executable, "-m", "elastic_hf", "export", *arguments]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert not re.search("warning|deprecated|skipp", process.stderr, flags=re.IGNORECASE), process.stderr
    with pytest.raises(ValueError, match="output_dir must be empty or not exist"):
        export.main(arguments)
    return model, folder / "programs"


def test_the_folder_serves_without_pytorch(exported):
    _, folder = exported
    names = {file.name for file in folder.iterdir()}
    assert {"history.onnx", "step.onnx", "tokenizer.json", "items.parquet"} <= names


def test_steps_are_the_whole_history(exported):
    """A user's items one at a time from the empty state, and all of them at once."""
    model, folder = exported
    history = torch.randint(3, NUM_TOKENS, (1, 7), generator=torch.Generator().manual_seed(0))
    events = {}
    if model.config.use_timestamps:
        timestamps = torch.tensor([[10, 10, 4000, 1e5, 1e8, 1.7e9, 1.7e9 + 0.5]], dtype=torch.double)
        events = {"timestamps": timestamps, "request_timestamps": timestamps[:, -1] + 86_400}
        events["event_features"] = event_features(batch_size=1, padding=0)
    step = onnxruntime.InferenceSession(folder / "step.onnx")
    cache = ElasticCache.empty(model, 1)
    assert step.get_modelmeta().custom_metadata_map["model_digest"] == cache.model_digest == model.model.digest()
    state = {name: tensor.numpy() for name, tensor in cache.tensors.items()}
    given = {"input_ids": history, "attention_mask": torch.ones_like(history), **events}
    assert {value.name for value in step.get_inputs()} == given.keys() | state.keys()
    assert [value.name for value in step.get_outputs()] == ["logits", *(f"next_{name}" for name in state)]
    for i in range(7):
        new = {name: (value[:, i : i + 1] if value.ndim > 1 else value).numpy() for name, value in given.items()}
        logits, *values = step.run(None, new | state)
        state = dict(zip(state, values, strict=True))
    with torch.no_grad():
        expected = model(history, use_cache=True, **events)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-5)
    for name, tensor in expected.cache.tensors.items():
        np.testing.assert_allclose(state[name], tensor, rtol=1e-4, atol=1e-4)
    whole = onnxruntime.InferenceSession(folder / "history.onnx")
    (logits,) = whole.run(None, {name: value.numpy() for name, value in given.items()})
    np.testing.assert_allclose(logits, expected.logits, atol=1e-5)


@pytest.mark.parametrize(
    "exported",
    [pytest.param(False, id="plain"), pytest.param(True, id="timed and featured", marks=pytest.mark.long)],
    indirect=True,
)
def test_a_program_that_differs_is_refused(exported, tmp_path, monkeypatch):
    model, _ = exported
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *args: [run(*args)[0] + 1e-3])
    with pytest.raises(AssertionError, match="history.onnx: logits"):
        export.export(model, tmp_path / "history.onnx", with_state=False)


@pytest.mark.long
def test_programs_of_a_model_with_features_take_its_states_and_stay_valid_when_it_grows(tmp_path):
    model, tokenizer = featured_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export.main(["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "programs")])
    step = onnxruntime.InferenceSession(tmp_path / "programs" / "step.onnx")
    model.add_items(tokenizer, item_table([5, 6], seed=1))
    assert step.get_modelmeta().custom_metadata_map["model_digest"] == model.model.digest()
    input_ids = torch.randint(3, NUM_TOKENS, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids[:, :-1], use_cache=True).cache
        expected = model(input_ids).logits[:, :NUM_TOKENS]
    new = {"input_ids": input_ids[:, -1:], "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    logits = step.run(["logits"], {name: value.numpy() for name, value in (new | cache.tensors).items()})[0]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    new["input_ids"] = torch.tensor([[NUM_TOKENS], [3]])
    with pytest.raises(Exception, match="indices element out of data bounds|out of bounds"):
        step.run(["logits"], {name: value.numpy() for name, value in (new | cache.tensors).items()})
