import json
import sys
from pathlib import Path

import numpy as np
import pytest

import breakdown


TINY = str(Path(__file__).parents[3] / "examples" / "elastic-tiny")


def test_each_user_is_in_one_group_with_the_paired_difference():
    values = np.array([3, 5, 5, 6, 10, 2_000, 1_500])
    ours = np.array([0.5, 1.0, 0.0, 1.0, 0.5, 0.25, 0.75])
    theirs = np.array([0.5, 0.0, 0.0, 0.0, 1.0, 0.25, 0.25])
    few, more, most = breakdown.group(values, ours, theirs)
    assert [(part["above"], part["up_to"], part["num_users"]) for part in (few, more, most)] == [
        (0, 5, 3),
        (5, 10, 2),
        (1_000, None, 2),
    ]
    assert few["ndcg@10"] == pytest.approx(0.5) and few["other_ndcg@10"] == pytest.approx(1 / 6)
    assert few["difference"] == pytest.approx(1 / 3) and few["standard_error"] == pytest.approx(1 / 3)
    assert more["difference"] == pytest.approx(0.25) and more["standard_error"] == pytest.approx(0.75)


def test_groups_make_up_the_mean_of_all_users(tmp_path, monkeypatch):
    monkeypatch.setattr(breakdown, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["breakdown.py", "--model", TINY, "--other_model", TINY])
    breakdown.main()
    found = json.loads((tmp_path / "breakdown-synthetic.json").read_text())
    trained = json.loads(Path(TINY, "all_results.json").read_text())
    for by in ("length", "popularity"):
        sizes = [part["num_users"] for part in found[by]]
        assert sum(sizes) == 700
        mean = np.average([part["ndcg@10"] for part in found[by]], weights=sizes)
        assert mean == pytest.approx(trained["test_ndcg@10"], abs=1e-4)
        assert all(part["difference"] == part["standard_error"] == 0 for part in found[by])
