import sys

import numpy as np
import onnxruntime
import pytest
import torch

import export_onnx
from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticItemTokenizer


SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_interest_experts": 6,
    "intermediate_size": 20,
    "num_memory_subkeys": 5,
    "num_memory_heads": 2,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A causal model, and the folder of its programs, which the command has compared with PyTorch."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    model = ElasticForSequentialRecommendation(ElasticConfig(**SIZES)).eval()
    model.save_pretrained(folder / "model")
    ElasticItemTokenizer.from_items([f"item {i}" for i in range(28)], model_max_length=50).save_pretrained(
        folder / "model"
    )
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "programs")]
        patch.setattr(sys, "argv", ["export_onnx.py", *arguments])
        export_onnx.main()
        with pytest.raises(ValueError, match="output_dir must be empty or not exist"):
            export_onnx.main()
    return model, folder / "programs"


def test_the_folder_serves_without_pytorch(exported):
    _, folder = exported
    names = {file.name for file in folder.iterdir()}
    assert {"history.onnx", "step.onnx", "tokenizer.json", "items.parquet"} <= names


def test_steps_are_the_whole_history(exported):
    """A user's items one at a time from the empty state, and all of them at once."""
    model, folder = exported
    history = torch.randint(3, 31, (1, 7), generator=torch.Generator().manual_seed(0)).numpy()
    whole = onnxruntime.InferenceSession(folder / "history.onnx")
    step = onnxruntime.InferenceSession(folder / "step.onnx")
    state = {
        "states": np.zeros((1, 2, 3, 6, 17), np.float32),
        "convolution": np.zeros((1, 2, 2, 24), np.float32),
        "num_items": np.zeros(1, np.int64),
    }
    for t in range(7):
        inputs = {"input_ids": history[:, t : t + 1], "attention_mask": np.ones((1, 1), np.int64), **state}
        logits, *after = step.run(None, inputs)
        state = dict(zip(state, after, strict=True))
    (expected,) = whole.run(None, {"input_ids": history, "attention_mask": np.ones_like(history)})
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert state["num_items"].tolist() == [7]


def test_a_program_that_differs_is_refused(exported, tmp_path, monkeypatch):
    model, _ = exported
    program = export_onnx.History(model)
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *args: [run(*args)[0] + 1e-3])
    with pytest.raises(AssertionError, match="history.onnx: logits"):
        export_onnx.export(program, tmp_path / "history.onnx", with_state=False)
