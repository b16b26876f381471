import json
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import polars as pl
import psutil
import pytest

import render_results
import run_scoring
import score_users
from scoring import score_here


@pytest.fixture
def here(monkeypatch):
    """Run the script, and the other side, in this process and without Ray."""
    monkeypatch.setattr(run_scoring, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(run_scoring.torch, "set_num_threads", lambda num_threads: None)

    def run_script(args, source, output, *more, kill=False):
        command = ["score_users.py", "--input", str(source), "--output", str(output), "--num_partitions", "3", *more]
        command += ["--model", str(args.folder / "model"), "--top_k", str(args.top_k)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command)
            patch.setattr(score_users, "score_users", score_here)
            patch.setattr(score_users, "ray_cluster", lambda *args: nullcontext())
            score_users.main()
        num_users = pl.read_parquet(output / run_scoring.PARTS)["user_id"].n_unique()
        measured = {"seconds": 2.0, "users_per_second": num_users / 2, "num_users": num_users}
        measured |= {"peak_bytes": 3e9, "peak_worker_bytes": 1e9}
        return measured | ({"workers_killed": 1} if kill else {})

    monkeypatch.setattr(run_scoring, "run_script", run_script)


def test_both_sides_recommend_the_same(here, tmp_path, monkeypatch):
    arguments = {"num_users": [40, 60], "length": [9], "num_items": [50], "top_k": [7], "num_compared": [15]}
    arguments |= {"share_of_users": [0.5], "folder": [tmp_path], "output": [tmp_path / "benchmark-scoring.json"]}
    command = [str(part) for name, values in arguments.items() for part in (f"--{name}", *values)]
    monkeypatch.setattr(sys, "argv", ["run_scoring.py", *command])
    run_scoring.main()
    results = json.loads((tmp_path / "benchmark-scoring.json").read_text())
    assert [row["num_users"] for row in results["rows"]] == [40, 60]
    assert [row["ray"]["num_users"] for row in results["rows"]] == [40, 60]
    single, states = results["rows"][0]["one_process"], results["states"]
    for compared, num_users in (
        (single["compared"], 15),
        (results["beside_recommend"], 15),
        (states["day_beside_whole_histories"], 15),
    ):
        assert compared["share_of_equal_items"] > 0.99 and compared["largest_score_difference"] < 1e-4
        assert compared["num_users"] == num_users and compared["rows"] == compared["rows_found"] == 7 * num_users
    assert results["killed"]["files"] == results["killed"]["files_of_equal_bytes"] == 3
    assert states["day"]["num_users"] == 20 and states["state_bytes"] > 40 * 8_840

    monkeypatch.setattr(render_results, "RESULTS", tmp_path)
    assert "| 60 | ray | 2 | 30 |" in render_results.scoring()
    checks = render_results.scoring_checks()
    assert "| beside `elastic-hf recommend` | 15 | 100.0000% |" in checks and "3 of 3 files" in checks


def test_differences_are_found():
    wanted = pl.DataFrame({"user_id": [1, 1, 2, 2], "rank": [1, 2, 1, 2], "item_id": [5, 6, 7, 8], "score": [4.0] * 4})
    other = wanted.with_columns(item_id=pl.Series([5, 6, 7, 9]), score=pl.Series([4.0, 4.5, 4.0, 4.0]))
    found = run_scoring.compare(other, wanted)
    assert found["num_users"] == 2
    assert found["share_of_equal_items"] == 0.75 and found["largest_score_difference"] == 0.5
    assert run_scoring.compare(other[:3], wanted)["share_of_equal_items"] == 0.75
    assert run_scoring.compare(pl.concat([other, other[:1]]), wanted)["rows_found"] == 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads the shares of memory that Linux keeps")
def test_a_worker_is_killed_once_and_memory_is_followed():
    with subprocess.Popen([run_scoring.WORKER, "600"], executable=shutil.which("sleep")) as process:
        watch = run_scoring.Watch(psutil.Process(process.pid), lambda: True)
        watch.start()
        assert process.wait(timeout=60) == -signal.SIGKILL
        watch.join(timeout=60)
    assert watch.num_killed == 1 and watch.peak_bytes >= watch.peak_worker_bytes > 0
