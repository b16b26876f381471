"""Pictures of a run, for its folder and its model card. They need matplotlib: `pip install "elastic_hf[examples]"`."""

import os

from matplotlib.figure import Figure


def plot_training_curve(log_history: list[dict], file: str | os.PathLike) -> None:
    """
    Draws the training loss and the validation NDCG@10 by epoch.

    Args:
        log_history (`list[dict]`):
            As `TrainerState.log_history`: entries with `epoch` and `loss` (nats per target), `eval_ndcg@10`, or both.
        file (`str` or `os.PathLike`): The picture, in the format of its suffix.

    Raises:
        `ValueError`: if no entry has a loss or a metric.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss_axis = figure.subplots()
    axes = {"loss": (loss_axis, "training loss (nats per target)", "tab:gray")}
    axes["eval_ndcg@10"] = (loss_axis.twinx(), "validation NDCG@10, seen items excluded", "tab:blue")
    if not any(key in log for log in log_history for key in axes):
        raise ValueError(f"log_history must have entries with {' or '.join(axes)}, found {len(log_history)} without")
    for key, (axis, label, color) in axes.items():
        points = [(log["epoch"], log[key]) for log in log_history if key in log]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, marker=".")
        axis.set_ylabel(label, color=color)
    loss_axis.set(xlabel="epoch", title="Training")
    figure.savefig(file, dpi=120)


def plot_expert_horizons(half_lives: list[list[float]], file: str | os.PathLike) -> None:
    """
    Draws how far back each interest expert of ELASTIC looks, one row of points for each head.

    Args:
        half_lives (nested `list` of shape `(num_heads, num_experts)`):
            Half-life of each expert, in items: after so many new items, what it has read counts half.
        file (`str` or `os.PathLike`): The picture, in the format of its suffix.

    Raises:
        `ValueError`: if there is no expert, or a half-life is not positive.
    """
    rows = {f"head {head}": experts for head, experts in enumerate(half_lives, start=1)}
    smallest = min((value for experts in rows.values() for value in experts), default=0.0)
    if not smallest > 0:
        raise ValueError(f"half_lives must hold positive numbers of items, found {smallest} as the smallest")
    figure = Figure(figsize=(7, 1.6 + 0.4 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for row, experts in enumerate(rows.values()):
        axis.plot(experts, [row] * len(experts), "o", color="tab:blue", alpha=0.5)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    largest = max(value for experts in rows.values() for value in experts)
    axis.set(xscale="log", xlim=(min(0.9, 0.9 * smallest), max(11, 1.1 * largest)))
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.grid(axis="x", alpha=0.3)
    axis.set_title("How far back the interest experts look")
    axis.set_xlabel("half-life of an expert (items after which what it has read counts half)")
    figure.savefig(file, dpi=120)


def plot_contributions(titles: list[str], contributions: list[float], file: str | os.PathLike) -> None:
    """
    Draws how much each item of a history carried one recommendation, the latest item at the bottom.

    Args:
        titles (`list[str]`): The items of the history, oldest first.
        contributions (`list[float]`):
            One for each of them, as `explain` of ELASTIC returns them: the part of the recommendation's score that
            goes with the item, to first order; negative where it spoke against it.
        file (`str` or `os.PathLike`): The picture, in the format of its suffix.

    Raises:
        `ValueError`: if there are no items, or not as many titles as contributions.
    """
    if not titles or len(titles) != len(contributions):
        raise ValueError(f"titles and contributions must be as many, found {len(titles)} and {len(contributions)}")
    figure = Figure(figsize=(7, 1.2 + 0.25 * len(titles)), layout="constrained")
    axis = figure.subplots()
    colors = ["tab:blue" if value >= 0 else "tab:orange" for value in contributions]
    axis.barh(range(len(titles)), contributions, color=colors)
    axis.set_yticks(range(len(titles)), titles)
    axis.set_ylim(len(titles) - 0.5, -0.5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(title="What carried the recommendation", xlabel="contribution of an item to the score")
    figure.savefig(file, dpi=120)
