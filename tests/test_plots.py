import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from elastic_hf.plots import plot_contributions, plot_expert_horizons, plot_training_curve


@pytest.fixture
def figures(monkeypatch):
    """The figures in the order in which they are saved."""
    saved, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def points(axis):
    return [list(zip(*line.get_data(), strict=True)) for line in axis.get_lines()]


def test_training_curve_has_each_epoch_once_on_labelled_axes(figures, tmp_path):
    logs = [{"epoch": 1.0, "loss": 5.0, "step": 7}, {"epoch": 1.0, "eval_ndcg@10": 0.1}]
    logs += [{"epoch": 2.0, "loss": 4.0, "eval_ndcg@10": 0.2}, {"train_runtime": 3.0, "epoch": 2.0}]
    plot_training_curve(logs, tmp_path / "curve.png")
    loss_axis, metric_axis = figures[0].axes
    assert points(loss_axis) == [[(1.0, 5.0), (2.0, 4.0)]] and points(metric_axis) == [[(1.0, 0.1), (2.0, 0.2)]]
    assert loss_axis.get_xlabel() == "epoch" and "nats" in loss_axis.get_ylabel()
    assert "NDCG@10" in metric_axis.get_ylabel()
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_expert_horizons_show_every_expert_of_every_head(figures, tmp_path):
    half_lives = [[2.0, 3.0, 500.0], [5.0, 6.0, 1025.0]]
    plot_expert_horizons(half_lives, tmp_path / "horizons.png")
    (axis,) = figures[0].axes
    assert [[x for x, _ in row] for row in points(axis)] == half_lives
    assert [label.get_text() for label in axis.get_yticklabels()] == ["head 1", "head 2"]
    assert axis.get_xscale() == "log" and axis.get_xlabel().startswith("half-life of an expert (items")
    assert (tmp_path / "horizons.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="log_history must have entries with loss or eval_ndcg@10, found 1 without"):
        plot_training_curve([{"epoch": 1.0}], tmp_path / "curve.png")
    with pytest.raises(ValueError, match="half_lives must hold positive numbers"):
        plot_expert_horizons([], tmp_path / "horizons.png")
    with pytest.raises(ValueError, match="found -2.0 as the smallest"):
        plot_expert_horizons([[3.0, -2.0]], tmp_path / "horizons.png")
    assert not list(tmp_path.iterdir())


def test_the_package_does_not_need_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import elastic_hf, elastic_hf.sharing.model_card"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_contributions_are_drawn_for_each_title(tmp_path):
    plot_contributions(["Heat", "Fargo", "Alien"], [0.5, -0.25, 1.0], tmp_path / "contributions.png")
    assert (tmp_path / "contributions.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must be as many, found 1 and 2"):
        plot_contributions(["Heat"], [0.5, 1.0], tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
