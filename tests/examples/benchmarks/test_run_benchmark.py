import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import run_benchmark
from elastic_hf.models.catalogue import CatalogueQuery
from test_imports import OTHERS


ROOT = Path(__file__).parents[3]
ALL = [name for name in run_benchmark.MODELS if not name.endswith(run_benchmark.PROGRAMS)]
CHECKPOINTED = [name for name in ALL if name.endswith("checkpointed")]
SMALL = {
    "inference": ["--lengths", "5", "70", "--batch_sizes", "3", "2", "--models", *ALL],
    "training": ["--lengths", "5", "70", "--batch_sizes", "2", "--models", *ALL],
    "memory": ["--lengths", "5", "70", "--batch_sizes", "2", "--default_lengths", "9", "--models", *CHECKPOINTED],
    "profile": ["--length", "70", "--num_operators", "3"],
    "streaming": ["--lengths", "3", "80"],
    "events": ["--length", "40", "--batch_size", "2", "--lengths", "5", "70", "--append_repetitions", "1"],
    "onnx": ["--lengths", "5"],
    "quantization": ["--lengths", "5", "70", "--num_users", "9"],
    "added-items": ["--num_items", "40", "90", "--num_new_items", "7"],
    "memory-bank": ["--num_subkeys", "0", "8", "--length", "70"],
    "catalogue": ["--num_items", "40", "90", "--length", "7", "--batch_size", "3", "--num_users", "2"],
    "distributed": ["--num_items", "3000", "--length", "7", "--batch_size", "2"],
}


def arguments(subject, output):
    few = [] if subject in ("added-items", "catalogue", "distributed", "quantization") else ["--num_items", "40"]
    if subject not in ("added-items", "memory", "distributed"):
        few += ["--repetitions", "1", "--warmup", "1"]
    return [subject, *SMALL[subject], *few, "--output", str(output)]


def measure(subject, output, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *arguments(subject, output), *more])
    run_benchmark.main()
    results = json.loads(output.read_text())
    assert results["benchmark"] == subject and results["threads"] >= 1 and results["hardware"]
    return results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("subject", ["inference", "training", "memory"])
def test_every_model_is_measured_at_every_length(subject, dtype, tmp_path, monkeypatch):
    results = measure(subject, tmp_path / "results.json", monkeypatch, "--dtype", dtype)
    assert results["dtype"] == dtype
    rows = [(row["pass"], row["length"], row["batch_size"]) for row in results["rows"]]
    if subject == "memory":
        passes = [(name, length, 2) for length in (5, 70) for name in ("inference", "training")]
        assert rows == [*passes, ("training, defaults", 9, 1)]
    else:
        sizes = [3, 2] if subject == "inference" else [2, 2]
        assert rows == [(subject, length, size) for length, size in zip((5, 70), sizes, strict=True)]
    for row in results["rows"]:
        measured = row["peak_bytes" if subject == "memory" else "seconds"]
        if row["pass"] == "training, defaults":
            assert list(measured) == ["elastic"]
        elif row["pass"] == "training":
            assert list(measured) == (CHECKPOINTED if subject == "memory" else ALL)
        else:
            assert list(measured) == ([] if subject == "memory" else [n for n in ALL if n not in CHECKPOINTED])
        assert all(value > 0 for value in measured.values())


def test_naive_attention_and_compilation_end_at_some_length(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    models = ["elastic", "elastic, compiled", "sasrec, naive"]
    only = ["--models", *models, "elastic, CUDA graph", "--longest_naive", "5", "--compiled_lengths", "5"]
    results = measure("inference", tmp_path / "results.json", monkeypatch, *only)
    assert [list(row["seconds"]) for row in results["rows"]] == [models, ["elastic"]]
    assert [type(module).__name__ for module in compiled] == ["ElasticModel"]


def test_batch_sizes_go_with_the_lengths(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch_sizes must be 1 or 2 numbers, found 3"):
        measure("training", tmp_path / "results.json", monkeypatch, "--batch_sizes", "1", "2", "3")


@pytest.mark.long
def test_other_benchmarks(tmp_path, monkeypatch):
    """Each writes what it is asked for."""
    streaming = measure("streaming", tmp_path / "streaming.json", monkeypatch)
    assert list(streaming["seconds"]) == ["3", "80"] and streaming["bytes_per_user"] == 8_840
    onnx = measure("onnx", tmp_path / "onnx.json", monkeypatch)
    assert [(row["program"], row["length"]) for row in onnx["rows"]] == [("history", 5), ("step", 1)]
    assert all(list(row["seconds"]) == ["pytorch", "onnxruntime"] for row in onnx["rows"])
    profile = measure("profile", tmp_path / "profile.json", monkeypatch)
    assert [(row["pass"], row["model"]) for row in profile["rows"]] == [
        (name, model) for name in ("inference", "training") for model in ("elastic", "sasrec, sdpa")
    ]
    assert all(len(row["operators"]) == 3 and 0 < row["operators"][0]["share"] < 1 for row in profile["rows"])
    bank = measure("memory-bank", tmp_path / "bank.json", monkeypatch)
    assert [list(row["seconds"]) for row in bank["rows"]] == [["0", "64"]] * 2
    catalogue = measure("catalogue", tmp_path / "catalogue.json", monkeypatch)
    assert [row["num_items"] for row in catalogue["rows"]] == [40, 90]
    assert all(0 < row["index_recall@10"] <= 1 for row in catalogue["rows"])


def test_each_kind_of_event_is_measured(tmp_path, monkeypatch):
    results = measure("events", tmp_path / "events.json", monkeypatch)
    kinds = ["ids", "times", "features", "times and features"]
    assert list(results["encoding_seconds"]) == kinds
    assert list(results["append_seconds"]) == [f"{kind}, {num_events}" for kind in kinds for num_events in (5, 70)]


def test_scores_stay_when_items_are_added(tmp_path, monkeypatch):
    results = measure("added-items", tmp_path / "added.json", monkeypatch)
    assert [row["num_items"] for row in results["rows"]] == [40, 90] and results["num_new_items"] == 7
    assert all(row["old_scores_are_the_same"] for row in results["rows"])


@pytest.mark.long
def test_quantized_programs_rank_the_test_items(tmp_path, monkeypatch):
    """Those in float32 as the model does, those in int8 nearly so, in less room."""
    results = measure("quantization", tmp_path / "quantization.json", monkeypatch)
    history, step = results["rows"]
    assert [history["program"], step["program"]] == ["history", "step"] and results["num_users"] == 9
    assert list(history["seconds"]) == ["5", "70"] and list(step["seconds"]) == ["1"]
    assert all(row["bytes"]["int8"] < 0.7 * row["bytes"]["float32"] for row in results["rows"])

    folder = ROOT / "examples" / "elastic-tiny"
    model = AutoModel.from_pretrained(folder).eval()
    gains = []
    for read, seen, target in run_benchmark.read_test_users(str(folder), 9):
        query = CatalogueQuery(seen_ids=torch.tensor([seen]), target_ids=torch.tensor([target]))
        with torch.no_grad():
            rank = model(torch.tensor([read]), query=query).ranks[0, 0].item()
        gains.append(1 / math.log2(1 + rank) if rank <= 10 else 0)
    assert len({*gains}) > 2
    assert history["metrics"]["float32"]["ndcg@10"] == pytest.approx(sum(gains) / 9, abs=1e-3)
    assert history["metrics"]["int8"]["ndcg@10"] == pytest.approx(sum(gains) / 9, abs=0.1)


@pytest.mark.long
def test_two_processes_hold_half_of_a_sharded_model_each(tmp_path, monkeypatch):
    rows = measure("distributed", tmp_path / "distributed.json", monkeypatch)["rows"]
    assert [(row["model"], row["optimizer"]) for row in rows] == list(run_benchmark.HOLDINGS)
    whole, factored, sharded = rows
    table = 3003 * 64 * 4
    for name, tables in (("weights_bytes", 1), ("optimizer_bytes", 2)):
        assert whole[name] > tables * table
        assert sharded[name] == pytest.approx(whole[name] / 2, rel=0.01)
    assert factored["optimizer_bytes"] < whole["optimizer_bytes"] / 20
    assert all(row["peak_bytes"] > row["weights_bytes"] + row["optimizer_bytes"] for row in rows)


@pytest.mark.parametrize(
    "subject", ["inference", *(pytest.param(name, marks=pytest.mark.long) for name in ("training", "memory"))]
)
def test_models_are_measured_with_torch_and_transformers_alone(subject, tmp_path):
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({OTHERS!r}))
sys.argv = {["run_benchmark.py", *arguments(subject, tmp_path / "results.json")]!r}
runpy.run_path({str(ROOT / "examples" / "benchmarks" / "run_benchmark.py")!r}, run_name="__main__")
"""
    environment = {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "results.json").read_text())["rows"]


def test_results_of_a_gpu_have_files_of_their_own():
    names = [
        run_benchmark.output_file("inference", *variant).name
        for variant in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16"))
    ]
    assert names == [f"benchmark-inference{suffix}.json" for suffix in ("", "-cuda", "-cuda-bfloat16")]


def test_a_fresh_process_is_another_one():
    assert run_benchmark.in_fresh_process(os.getpid) != os.getpid()


def test_files_are_measured(tmp_path, monkeypatch):
    """In this process, which spares the start of eight others."""
    monkeypatch.setattr(run_benchmark, "in_fresh_process", lambda function, *args: function(*args))
    output = tmp_path / "benchmark-data.json"
    settings = ["--num_rows", "3000", "5000", "--longest_in_memory", "3000", "--quantities", "memory"]
    command = ["run_benchmark.py", "data", *settings, "--folder", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    run_benchmark.main()
    results = json.loads(output.read_text())
    assert results["quantities"] == ["memory"]
    rows = {(row.pop("route"), row.pop("file"), row["num_rows"]): row for row in results["rows"]}
    assert [*rows] == [
        ("load_histories", "parquet", 3000),
        ("prepare_histories", "parquet", 3000),
        ("load_histories", "csv", 3000),
        ("prepare_histories", "csv", 3000),
        ("prepare_histories", "parquet", 5000),
    ]
    assert all(row.pop("peak_memory_gb") > 0 and "seconds" not in row for row in rows.values())
    in_memory, on_disk, *_ = rows.values()
    assert in_memory == on_disk and in_memory["num_interactions"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
