"""Figures of a run, for its folder and its model card, and of a recommendation."""

import os
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from textwrap import fill
from typing import BinaryIO

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .results import SUFFIXES, RunResults


# Characters of a title on one line.
TITLE_WIDTH = 36
HEADING_WIDTH = 60
# Seconds of the ticks of an axis of times.
DURATIONS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "month": 2_629_746, "year": 31_556_952}


def figures_of(results: RunResults) -> dict[str, Callable[[str | os.PathLike | BinaryIO], None]]:
    """Return what draws each figure of a run, by its name."""
    figures = {}
    if results.log_history:
        figures["training_curve"] = partial(
            plot_training_curve,
            results.log_history,
            best_epoch=results.best_epoch,
            popularity=results.metrics.get(f"popularity_ndcg@10{results.suffix}"),
            exclude_seen=results.exclude_seen,
        )
    if results.expert_half_lives:
        figures["expert_horizons"] = partial(
            plot_expert_horizons, results.expert_half_lives, half_lives_seconds=results.expert_half_lives_seconds
        )
    return figures


def plot_results(results: RunResults, folder: str | os.PathLike) -> None:
    """
    Draw the figures of a run, each as a PNG image of its name in [`figures_of`].

    Args:
        results ([`RunResults`]): What is known of the run.
        folder (`str` or `os.PathLike`): Where the images go; it is made if there is something to draw.
    """
    for name, draw in figures_of(results).items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        draw(Path(folder, f"{name}.png"))


def plot_training_curve(
    log_history: list[dict],
    file: str | os.PathLike | BinaryIO,
    best_epoch: float | None = None,
    popularity: float | None = None,
    exclude_seen: bool = True,
) -> None:
    """
    Draw the training loss and the validation NDCG@10 by epoch.

    Args:
        log_history (`list[dict]`):
            As `TrainerState.log_history`: entries with `epoch` and `loss` (nats per target), `eval_ndcg@10`, or both;
            `eval_ndcg@10_seen_kept` where seen items are not excluded.
        file (`str`, `os.PathLike` or `BinaryIO`): The image, in the format of its suffix, or PNG.
        best_epoch (`float`, *optional*): Epoch of the chosen checkpoint, which is marked.
        popularity (`float`, *optional*):
            NDCG@10 of recommending what is popular, on the test items: the line to be above.
        exclude_seen (`bool`, defaults to `True`): Whether the NDCG@10 is with seen items excluded, or kept.

    Raises:
        ValueError: if no entry has a loss or a metric.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss_axis = figure.subplots()
    metric_axis = loss_axis.twinx()
    axes = {"loss": (loss_axis, "training loss (nats per target)", "tab:gray")}
    label = f"validation NDCG@10, seen items {'excluded' if exclude_seen else 'kept'}"
    axes[f"eval_ndcg@10{SUFFIXES[exclude_seen]}"] = (metric_axis, label, "tab:blue")
    if not any(key in log for log in log_history for key in axes):
        raise ValueError(f"log_history must have entries with {' or '.join(axes)}, found {len(log_history)} without")
    for key, (axis, label, color) in axes.items():
        points = [(log["epoch"], log[key]) for log in log_history if key in log]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, marker=".")
        axis.set_ylabel(label, color=color)
    if best_epoch is not None:
        label = f"chosen epoch: {best_epoch:g}"
        metric_axis.axvline(best_epoch, color="tab:green", linestyle="--", label=label)
    if popularity is not None:
        label = f"popularity: {popularity:.4f}, on the test items"
        metric_axis.axhline(popularity, color="tab:orange", linestyle=":", label=label)
    if metric_axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    loss_axis.set(xlabel="epoch", title="Training")
    figure.savefig(file, dpi=120)


def plot_expert_horizons(
    half_lives: list[list[float]],
    file: str | os.PathLike | BinaryIO,
    half_lives_seconds: list[list[float]] | None = None,
) -> None:
    """
    Draw how far back each interest expert of ELASTIC looks, one row of points for each head.

    Args:
        half_lives (nested `list` of shape `(num_heads, num_experts)`):
            Half-life of each expert, in items: after so many new items, what it has read counts half.
        file (`str`, `os.PathLike` or `BinaryIO`): The image, in the format of its suffix, or PNG.
        half_lives_seconds (nested `list` of the same shape, *optional*):
            Of a model that reads times: after so many seconds without an item it does. They are drawn below.

    Raises:
        ValueError: if there is no expert, or a half-life is not positive.
    """
    panels = [("half_lives", half_lives, "items")]
    if half_lives_seconds is not None:
        panels.append(("half_lives_seconds", half_lives_seconds, "seconds"))
    for name, heads, unit in panels:
        smallest = min((value for experts in heads for value in experts), default=0.0)
        if not smallest > 0:
            raise ValueError(f"{name} must hold positive numbers of {unit}, found {smallest} as the smallest")
    figure = Figure(figsize=(7, (1.6 + 0.4 * len(half_lives)) * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (_, heads, _) in zip(axes, panels, strict=True):
        for row, experts in enumerate(heads):
            axis.plot(experts, [row] * len(experts), "o", color="tab:blue", alpha=0.5)
        axis.set_yticks(range(len(heads)), [f"head {head}" for head in range(1, len(heads) + 1)])
        axis.set_ylim(len(heads) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.grid(axis="x", alpha=0.3)
    values = [value for experts in half_lives for value in experts]
    axes[0].set_xlim(min(0.9, 0.9 * min(values)), max(11, 1.1 * max(values)))
    axes[0].xaxis.set_major_formatter("{x:,g}")
    axes[0].set_title("How far back the interest experts look")
    axes[0].set_xlabel("half-life of an expert (items after which what it has read counts half)")
    if half_lives_seconds is not None:
        axes[1].set_xticks(list(DURATIONS.values()), list(DURATIONS))
        axes[1].xaxis.set_minor_locator(NullLocator())
        axes[1].set_xlabel("half-life of an expert (time without an item after which it counts half)")
    figure.savefig(file, dpi=120)


def plot_contributions(
    titles: list[str], contributions: list[float], file: str | os.PathLike, recommended: str | None = None
) -> None:
    """
    Draw how much each item of a history carried one recommendation, the latest item at the bottom.

    Args:
        titles (`list[str]`): The items of the history, oldest first. Long titles take several lines.
        contributions (`list[float]`):
            One for each of them, as `explain` of ELASTIC returns them: by how much the recommendation's score would
            be lower without the item; negative where it spoke against it.
        file (`str`, `os.PathLike` or `BinaryIO`): The image, in the format of its suffix, or PNG.
        recommended (`str`, *optional*): Title of the recommended item, for the heading.

    Raises:
        ValueError: if there are no items, or not as many titles as contributions.
    """
    if not titles or len(titles) != len(contributions):
        raise ValueError(f"titles and contributions must be as many, found {len(titles)} and {len(contributions)}")
    labels = [fill(title, TITLE_WIDTH) for title in titles]
    heading = "What carried the recommendation" if recommended is None else f"What carried {recommended}"
    heading = fill(heading, HEADING_WIDTH)
    heights = [label.count("\n") + 1 for label in labels]
    bottoms = list(accumulate(heights))
    figure = Figure(figsize=(7, 1.2 + 0.25 * (bottoms[-1] + heading.count("\n"))), layout="constrained")
    axis = figure.subplots()
    colors = ["tab:blue" if value >= 0 else "tab:orange" for value in contributions]
    middles = [bottom - height / 2 for bottom, height in zip(bottoms, heights, strict=True)]
    axis.barh(middles, contributions, color=colors)
    # Without mathematics: a title may hold dollars.
    axis.set_yticks(middles, labels, parse_math=False)
    axis.set_ylim(bottoms[-1], 0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("contribution of an item to the score")
    figure.suptitle(heading, parse_math=False)
    figure.savefig(file, dpi=120)
