import json
import sys

import pytest

import load_test


pytest.importorskip("fastapi")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["load_test.py", *arguments])
    load_test.main()


@pytest.mark.long
def test_each_level_is_measured_with_each_store(tmp_path, monkeypatch, redis_url):
    """A few users of a small catalogue, some seconds: all that they ask is answered."""
    output = tmp_path / "results.json"
    sizes = ["--num_users", "7", "--history_length", "3", "--num_items", "300"]
    run(monkeypatch, *sizes, "--clients", "1", "3", "--seconds", "1", "1", "--output", str(output))
    results = json.loads(output.read_text())
    assert (results["num_users"], results["history_length"]) == (7, 3)
    assert [(row["store"], row["clients"]) for row in results["rows"]] == [
        ("SQLite", 1),
        ("Redis", 1),
        ("SQLite", 3),
        ("Redis", 3),
    ]
    for row in results["rows"]:
        assert row["errors"] == 0 and row["first_errors"] == [] and row["seconds"] >= 1
        assert len(row["resident_bytes"]) == load_test.SAMPLES and min(row["resident_bytes"]) > 0
        kinds = [row["events"], row["recommendations"]]
        assert all(kind["requests"] >= 1 and 0 < kind["p50_seconds"] <= kind["p99_seconds"] for kind in kinds)


def test_every_level_has_its_seconds(monkeypatch):
    with pytest.raises(ValueError, match="seconds must be 2 numbers, one for each level, found 3"):
        run(monkeypatch, "--clients", "1", "2")
