import subprocess
import sys

import pytest

import elastic_hf
from elastic_hf.registry import MODELS


# What a machine with torch and transformers alone lacks.
OTHERS = (
    "accelerate",
    "datasets",
    "faiss",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "pandas",
    "polars",
    "pyarrow",
)


def run(code, missing=()):
    lack = f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
    result = subprocess.run([sys.executable, "-c", lack + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_models_need_torch_and_transformers_alone():
    code = """
import torch
import elastic_hf
from transformers import AutoConfig, AutoModel

from elastic_hf.registry import MODELS

for name in MODELS:
    model = AutoModel.from_config(AutoConfig.for_model(name, vocab_size=20, training_objective="prefix"))
    input_ids = torch.randint(3, 20, (2, 5))
    model(input_ids, labels=input_ids).loss.backward()
    print(name, *model.recommend(input_ids, top_k=3).token_ids.shape)
try:
    elastic_hf.ElasticItemTokenizer
except ImportError as error:
    print(error)
"""
    *lines, error = run(code, OTHERS).splitlines()
    assert len(lines) == len(MODELS) and all(line.endswith(" 2 3") for line in lines)
    assert "pyarrow" in error


def test_the_package_imports_what_it_is_asked_for():
    slow = ("datasets", "faiss", "matplotlib", "onnxruntime", "pandas", "polars", "transformers.trainer")
    found = f"print(*(name for name in {slow} if name in sys.modules))"
    assert run(f"import elastic_hf; {found}") == "\n"
    assert run(f"from elastic_hf import load_histories; {found}").split()[0] == "datasets"


def test_every_public_name_is_there():
    names = {}
    exec("from elastic_hf import *", names)
    assert set(elastic_hf.__all__) <= names.keys() and set(elastic_hf.__all__) <= set(dir(elastic_hf))
    with pytest.raises(ImportError, match="cannot import name 'ElasticTrainer' from 'elastic_hf'"):
        exec("from elastic_hf import ElasticTrainer")
