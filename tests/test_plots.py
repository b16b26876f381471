import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from elastic_hf.plots import figures_of, plot_contributions, plot_expert_horizons, plot_results, plot_training_curve
from elastic_hf.results import RunResults


ROOT = Path(__file__).parents[1]


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


def test_training_curve_marks_the_chosen_epoch_and_popularity(figures, tmp_path):
    logs = [{"epoch": 1.0, "loss": 5.0, "eval_ndcg@10": 0.1}, {"epoch": 2.0, "loss": 4.0, "eval_ndcg@10": 0.05}]
    plot_training_curve(logs, tmp_path / "curve.png", best_epoch=1.0, popularity=0.025)
    _, metric_axis = figures[0].axes
    curve, epoch, popularity = metric_axis.get_lines()
    assert list(curve.get_ydata()) == [0.1, 0.05]
    assert set(epoch.get_xdata()) == {1.0} and set(popularity.get_ydata()) == {0.025}
    (legend,) = figures[0].legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["chosen epoch: 1", "popularity: 0.0250, on the test items"]
    plot_training_curve(logs, tmp_path / "curve.png")
    assert not figures[1].legends and len(figures[1].axes[1].get_lines()) == 1


def test_the_training_curve_is_of_the_metric_that_counts(figures, tmp_path):
    log_history = [{"epoch": 1.0, "eval_ndcg@10": 0.1, "eval_ndcg@10_seen_kept": 0.3}]
    metrics = {"popularity_ndcg@10": 0.02, "popularity_ndcg@10_seen_kept": 0.04}
    for exclude_seen in (True, False):
        config = {"exclude_seen": exclude_seen, "mask_seen_in_loss": exclude_seen}
        plot_results(RunResults("elastic", config=config, log_history=log_history, metrics=metrics), tmp_path)
    for figure, ndcg, popularity, words in zip(figures, (0.1, 0.3), (0.02, 0.04), ("excluded", "kept"), strict=True):
        axis = figure.axes[1]
        assert [line.get_ydata()[0] for line in axis.get_lines()] == [ndcg, popularity]
        assert axis.get_ylabel() == f"validation NDCG@10, seen items {words}"


def test_results_are_drawn_as_far_as_they_are_there(figures, tmp_path):
    log_history = [{"epoch": 1.0, "loss": 5.0}, {"epoch": 3.0, "eval_ndcg@10": 0.1}]
    results = RunResults(
        "elastic",
        log_history=log_history,
        best_epoch=3.0,
        expert_half_lives=[[2.0]],
        metrics={"popularity_ndcg@10": 0.02},
    )
    plot_results(results, tmp_path / "new")
    assert {file.stem for file in (tmp_path / "new").iterdir()} == {*figures_of(results)}
    assert [*figures_of(results)] == ["training_curve", "expert_horizons"]
    assert [set(line.get_xdata()) for line in figures[0].axes[1].get_lines()[1:2]] == [{3.0}]
    plot_results(RunResults("elastic"), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_expert_horizons_show_every_expert_of_every_head(figures, tmp_path):
    half_lives = [[2.0, 3.0, 500.0], [5.0, 6.0, 1025.0]]
    plot_expert_horizons(half_lives, tmp_path / "horizons.png")
    (axis,) = figures[0].axes
    assert [[x for x, _ in row] for row in points(axis)] == half_lives
    assert [label.get_text() for label in axis.get_yticklabels()] == ["head 1", "head 2"]
    assert axis.get_xscale() == "log" and axis.get_xlabel().startswith("half-life of an expert (items")
    assert (tmp_path / "horizons.png").read_bytes().startswith(b"\x89PNG")


def test_expert_horizons_show_seconds_below_items(figures, tmp_path):
    half_lives, seconds = [[2.0, 3.0, 500.0], [5.0, 6.0, 1025.0]], [[60.0, 7e4, 9e5], [61.0, 3.6e3, 4e7]]
    results = RunResults("elastic", expert_half_lives=half_lives, expert_half_lives_seconds=seconds)
    plot_results(results, tmp_path)
    above, below = figures[0].axes
    assert [[x for x, _ in row] for row in points(above)] == half_lives
    assert [[x for x, _ in row] for row in points(below)] == seconds
    labels = dict(zip(below.get_xticks(), (label.get_text() for label in below.get_xticklabels()), strict=True))
    assert labels[60] == "minute" and labels[86_400] == "day" and below.get_xscale() == "log"
    assert below.get_xlim()[0] < 60 and below.get_xlim()[1] > 4e7
    assert "time without an item" in below.get_xlabel()
    with pytest.raises(ValueError, match="half_lives_seconds must hold positive numbers of seconds, found -1.0"):
        plot_expert_horizons(half_lives, tmp_path / "horizons.png", [[-1.0]])


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
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})


def test_contributions_are_drawn_for_each_title(figures, tmp_path):
    plot_contributions(["Heat", "Fargo", "Alien"], [0.5, -0.25, 1.0], tmp_path / "contributions.png", "Brazil")
    assert (tmp_path / "contributions.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = figures[0].axes
    assert [bar.get_width() for bar in axis.patches] == [0.5, -0.25, 1.0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Heat", "Fargo", "Alien"]
    assert figures[0].get_suptitle() == "What carried Brazil"
    with pytest.raises(ValueError, match="must be as many, found 1 and 2"):
        plot_contributions(["Heat"], [0.5, 1.0], tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_long_titles_are_wrapped_and_nothing_is_cut_off(figures, tmp_path):
    """Titles are no mathematics, and every label has room of its own inside the image."""
    title = "The Assassination of Jesse James by the Coward Robert Ford, for $5 and no _more_ than $6 (2007)"
    titles = ["Heat", title, "M", title, title, "Kes"]
    plot_contributions(titles, [0.5, -0.25, 1.0, 0.75, 0.125, 0.0], tmp_path / "contributions.png", title)
    (figure,) = figures
    labels = figure.axes[0].get_yticklabels()
    assert [" ".join(label.get_text().split()) for label in labels] == titles
    assert max(label.get_text().count("\n") for label in labels) >= 2
    assert " ".join(figure.get_suptitle().split()) == f"What carried {title}" and "\n" in figure.get_suptitle()
    figure.draw_without_rendering()  # at the figure's own resolution again
    boxes = [label.get_window_extent() for label in labels]
    for higher, lower in zip(boxes, boxes[1:], strict=False):
        assert higher.y0 > lower.y1
    for box in (*boxes, figure._suptitle.get_window_extent()):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
