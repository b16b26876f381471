"""Explanations as HTML: which items carried a recommendation, and which experts took the latest one."""

from html import escape

from elastic_hf.models.explanation_elastic import ElasticExplanation


MAX_ROWS = 8


def describe_contributions(explanation: ElasticExplanation, titles: list[str], recommended: str) -> str:
    """
    Return which items carried a recommendation, the largest contributions first, and how far back the model looked.

    Args:
        explanation ([`ElasticExplanation`]): Of one history, down to the recommended item.
        titles (`list[str]`): The titles of the history, oldest first.
        recommended (`str`): The title of the recommended item.
    """
    contributions = explanation.contributions[0, -1]  # (L,)
    largest = contributions.abs().max().clamp(min=1e-12)
    order = contributions.abs().argsort(descending=True)[:MAX_ROWS].tolist()
    rows = "".join(
        f"<tr><td>{escape(titles[item])}</td><td class='number'>{contributions[item]:+.2f}</td>"
        f"<td>{_bar(float(contributions[item] / largest))}</td></tr>"
        for item in order
    )
    rest = len(titles) - len(order)
    more = f"<p class='note'>and {rest:,} more, which carried less</p>" if rest else ""
    weights = explanation.item_weights[0, -1].mean(dim=0)  # (L,), of the last layer
    half = int((weights.flip(0).cumsum(0) < 0.5).sum()) + 1
    reach = f"Half of what the last layer read came from the latest {half:,} of {len(titles):,} items."
    table = f"<p>By how much its score would be lower without:</p><table aria-label='contributions'>{rows}</table>"
    return f"<h3>Why {escape(recommended)}?</h3>{table}{more}<p>{reach}</p>"


def describe_experts(explanation: ElasticExplanation) -> str:
    """Return the experts with the largest shares of the latest item, those that forget soonest first."""
    of_all, of_latest = explanation.assignments[0].mean(dim=1), explanation.assignments[0, :, -1]  # (H, E) each
    half_lives = explanation.half_lives
    order = of_latest.flatten().argsort(descending=True)[:MAX_ROWS]
    order = order[half_lives.flatten()[order].argsort()].tolist()
    rows = ""
    for head, expert in (divmod(index, half_lives.shape[1]) for index in order):
        share = float(of_latest[head, expert])
        rows += (
            f"<tr><td>{head + 1}.{expert + 1}</td><td class='number'>{half_lives[head, expert]:,.1f}</td>"
            f"<td class='number'>{share:.0%}</td><td>{_bar(share)}</td>"
            f"<td class='number'>{of_all[head, expert]:.0%}</td></tr>"
        )
    header = (
        "<tr><th>head.expert</th><th class='number'>half-life (items)</th><th class='number'>latest item</th><th></th>"
        "<th class='number'>all items</th></tr>"
    )
    return f"<h3>Which experts took the latest item?</h3><table aria-label='experts'>{header}{rows}</table>"


def _bar(share: float) -> str:
    """A bar for a share from -1 to 1."""
    side = "for" if share >= 0 else "against"
    return f"<div class='bar {side}' style='width:{abs(share):.1%}'></div>"
