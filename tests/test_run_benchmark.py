import json
import sys

import pytest

import run_benchmark


SMALL = {
    "inference": ["--lengths", "5", "70", "--sides", "elastic", "elastic, bidirectional", "sasrec, naive"],
    "training": ["--lengths", "5", "70", "--sides", "elastic", "elastic, checkpointed", "sasrec, sdpa"],
    "memory": ["--lengths", "5", "70", "--sides", "elastic", "lightsans"],
    "profile": ["--length", "70", "--num_operators", "3"],
    "streaming": ["--lengths", "3", "80"],
    "onnx": ["--lengths", "5"],
    "memory-bank": ["--num_subkeys", "0", "8", "--length", "70"],
    "catalogue": ["--num_items", "40", "90", "--length", "7", "--batch_size", "3", "--num_users", "2"],
}


@pytest.mark.parametrize("subject", SMALL)
def test_every_benchmark_measures_its_sides(subject, tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    few = [] if subject == "catalogue" else ["--num_items", "40"]
    if subject != "memory":
        few += ["--repetitions", "1", "--warmup", "1"]
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", subject, *SMALL[subject], *few, "--output", str(output)])
    run_benchmark.main()
    results = json.loads(output.read_text())
    assert results["benchmark"] == subject and results["threads"] >= 1 and results["hardware"]
    if subject in ("inference", "training", "memory"):
        sides = SMALL[subject][4:]
        key = "peak_bytes" if subject == "memory" else "seconds"
        passes = ["inference", "training"] if subject == "memory" else [subject]
        assert [(row["pass"], row["length"]) for row in results["rows"]] == [
            (name, length) for length in (5, 70) for name in passes
        ]
        assert all(list(row[key]) == sides and min(row[key].values()) > 0 for row in results["rows"])
        assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    elif subject == "streaming":
        assert list(results["seconds"]) == ["3", "80"] and results["bytes_per_user"] == 17_672
    elif subject == "onnx":
        assert [(row["program"], row["length"]) for row in results["rows"]] == [("history", 5), ("step", 1)]
        assert all(list(row["seconds"]) == ["pytorch", "onnxruntime"] for row in results["rows"])
    elif subject == "profile":
        assert [(row["pass"], row["side"]) for row in results["rows"]] == [
            (name, side) for name in ("inference", "training") for side in ("elastic", "sasrec, sdpa")
        ]
        assert all(len(row["operators"]) == 3 and 0 < row["operators"][0]["share"] < 1 for row in results["rows"])
    elif subject == "memory-bank":
        assert [list(row["seconds"]) for row in results["rows"]] == [["0", "64"]] * 2
    else:
        assert [row["num_items"] for row in results["rows"]] == [40, 90]
        assert all(0 < row["index_recall@10"] <= 1 for row in results["rows"])


def test_operations_are_those_of_the_products():
    """Two projections of (3, 5) by (5, 7) and (7, 2): 2 * 3 * 5 * 7 + 2 * 3 * 7 * 2 operations."""
    import torch

    hidden, first, second = torch.randn(3, 5), torch.randn(5, 7), torch.randn(7, 2)
    assert run_benchmark.count_operations(lambda: hidden @ first @ second) == 294
