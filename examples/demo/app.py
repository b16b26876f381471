#!/usr/bin/env python
"""
A demonstration in the browser: search titles, build a history, and see with every click what is recommended, how long
that took, and why.

    python examples/demo/app.py
    python examples/demo/app.py --model_name_or_path examples/elastic-ml1m --titles_file ml-1m/movies.dat

It needs no network: the page asks for nothing from elsewhere, and nothing is reported.
"""

import argparse
import os
from functools import partial
from html import escape
from pathlib import Path


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr  # noqa: E402

import why  # noqa: E402
from titled_model import TOP_K, TitledModel, Visit  # noqa: E402


# In a clone it lies beside the demo's folder, in a Space within it.
FOLDERS = (Path(__file__).parent, Path(__file__).parents[1])
MODEL = next((str(folder / "elastic-tiny") for folder in FOLDERS if (folder / "elastic-tiny").is_dir()), None)
FOLLOWED = 50
SHOWN = 12
EXPLAINED = 100  # items of a history that is explained without being asked: the time grows with their square
FONTS = ("system-ui", "sans-serif")
CSS = """
.items { gap: 4px } button.item { justify-content: flex-start; text-align: left; font-weight: 400 }
.panel table { width: 100%; border: none; margin: 0 }
.panel tr, .panel td, .panel th { border: none; padding: 1px 6px }
.panel ol { margin: 0; padding-left: 2.5em } .panel .note { opacity: 0.7 }
.panel .number { text-align: right; font-variant-numeric: tabular-nums } .panel td:has(.bar) { width: 40% }
.panel .bar { height: 10px; border-radius: 2px }
.panel .for { background: #1f77b4 } .panel .against { background: #ff7f0e }
"""


class Demo:
    """
    What the page shows.

    Args:
        model ([`TitledModel`]): The model, and the titles of its items.
    """

    def __init__(self, model: TitledModel) -> None:
        self.model = model
        self.titles = model.titles

    def search(self, words: str) -> list:
        """Return the items that a search finds, and their buttons."""
        items = self.model.search(words)
        return [items, *self._buttons([self.titles[item] for item in items])]

    def show(self, visit: Visit, before: Visit) -> list:
        """Return a visit, the buttons that need items, and all that is shown of it, beside what was shown before."""
        moves = [_move(item, place, before) for place, item in enumerate(visit.recommended)]
        names = [f"{self.titles[item]}{move}" for item, move in zip(visit.recommended, moves, strict=True)]
        reasons = [f"Why {place + 1}?" for place in range(len(names))]
        needs_items = [gr.update(interactive=bool(visit.token_ids))] * 3
        texts = [self._history(visit), self._speed(visit)]
        is_short = len(visit.token_ids) <= EXPLAINED
        explained = self.explain(visit, 0) if is_short else ["<p class='note'>Click on a Why.</p>", ""]
        return [visit, *needs_items, *texts, *self._buttons(names), *self._buttons(reasons), *explained]

    def explain(self, visit: Visit, place: int) -> list[str]:
        """Return why the item at a place is recommended, and which experts took the latest item."""
        if place >= len(visit.recommended):
            return ["", ""]
        explanation, seconds = self.model.explain(visit, place)
        history = [self.titles[item] for item in visit.token_ids]
        reasons = why.describe_contributions(explanation, history, self.titles[visit.recommended[place]])
        experts = why.describe_experts(explanation)
        note = f"<p class='note'>Reading the history without each item took {1e3 * seconds:.0f} ms.</p>"
        return [f"{reasons}{note}", experts]

    def add_found(self, visit: Visit, items: list[int], place: int) -> list:
        """Add the item at a place of those that were found."""
        return self.show(self.model.read(visit, [items[place]]), visit)

    def add_recommended(self, visit: Visit, place: int) -> list:
        """Add the item that is recommended at a place."""
        return self.add_found(visit, visit.recommended, place)

    def follow(self, visit: Visit) -> list:
        """Add what is recommended first, many times over."""
        before = visit
        for _ in range(FOLLOWED):
            if visit.recommended:
                visit = self.model.read(visit, visit.recommended[:1])
        return self.show(visit, before)

    def undo(self, visit: Visit) -> list:
        """Take the latest item away."""
        return self.show(self.model.without_latest(visit), visit)

    def clear(self) -> list:
        """Begin anew."""
        return self.show(Visit(), Visit())

    def _buttons(self, labels: list[str]) -> list:
        hidden = [gr.update(visible=False)] * (TOP_K - len(labels))
        return [*(gr.update(value=label, visible=True) for label in labels), *hidden]

    def _history(self, visit: Visit) -> str:
        titles = [self.titles[item] for item in visit.token_ids]
        if not titles:
            return "<p class='note'>Nothing yet: click a title.</p>"
        rows = "".join(f"<li>{escape(title)}</li>" for title in titles[: -SHOWN - 1 : -1])
        rest = len(titles) - SHOWN
        more = f"<p class='note'>and {rest:,} before</p>" if rest > 0 else ""
        return f"<ol reversed start='{len(titles)}'>{rows}</ol>{more}"

    def _speed(self, visit: Visit) -> str:
        if not visit.token_ids:
            return "<p class='note'>The first click shows what comes next.</p>"
        return (
            f"<p>Reading item {len(visit.token_ids):,} and ranking {len(self.titles):,} took "
            f"<b>{1e3 * visit.seconds:.1f} ms</b>.</p>"
        )


def _move(item: int, place: int, before: Visit) -> str:
    """How a recommended item moved since the last click."""
    if item not in before.recommended:
        return "  · new" if before.recommended else ""
    rise = before.recommended.index(item) - place
    return f"  · {'▲' if rise > 0 else '▼'} {abs(rise)}" if rise else ""


def build(model: TitledModel) -> gr.Blocks:
    """Return the page."""
    demo = Demo(model)
    with gr.Blocks(title="ELASTIC: recommendations with every click") as page:
        gr.Markdown(
            "# Recommendations with every click\nPick titles. ELASTIC reads each on top of a state of fixed size, and "
            "ranks the whole catalogue anew."
        )
        visit, items = gr.State(Visit()), gr.State([])
        with gr.Row():
            with gr.Column(elem_classes="items", min_width=240):
                words = gr.Textbox(label="Search titles", placeholder="part of a title")
                found = [gr.Button("", size="sm", visible=False, elem_classes=["item", "found"]) for _ in range(TOP_K)]
            with gr.Column(elem_classes="items", min_width=240):
                gr.Markdown("### Comes next")
                names, reasons = [], []
                for _ in range(TOP_K):
                    with gr.Row(equal_height=True):
                        names.append(gr.Button("", size="sm", visible=False, scale=5, elem_classes=["item", "next"]))
                        reasons.append(gr.Button("", size="sm", visible=False, scale=1, min_width=70))
                speed = gr.HTML(elem_classes="panel")
                follow = gr.Button(f"Take the first one, {FOLLOWED} times", size="sm")
            with gr.Column(elem_classes="items", min_width=240):
                gr.Markdown("### Your history")
                history = gr.HTML(elem_classes="panel")
                with gr.Row():
                    undo, clear = gr.Button("Undo", size="sm"), gr.Button("Clear", size="sm")
        with gr.Row():
            explained = [gr.HTML(elem_classes="panel"), gr.HTML(elem_classes="panel")]
        shown = [visit, undo, clear, follow, history, speed, *names, *reasons, *explained]
        # One click after the other: none is lost between reading a visit and writing it.
        options = {"concurrency_id": "visit", "show_progress": "hidden", "api_visibility": "private"}
        # Words may be typed before the page listens to them: they are read once it does.
        page.load(demo.clear, None, shown, **options).then(demo.search, words, [items, *found], **options)
        words.change(demo.search, words, [items, *found], trigger_mode="always_last", **options)
        for place in range(TOP_K):
            found[place].click(partial(demo.add_found, place=place), [visit, items], shown, **options)
            names[place].click(partial(demo.add_recommended, place=place), visit, shown, **options)
            reasons[place].click(
                partial(demo.explain, place=place), visit, explained, **options | {"show_progress": "full"}
            )
        follow.click(demo.follow, visit, shown, **options)
        undo.click(demo.undo, visit, shown, **options)
        clear.click(demo.clear, None, shown, **options)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "Folder or Hub id of an ELASTIC model."
    parser.add_argument("--model_name_or_path", default=MODEL, required=MODEL is None, help=text)
    parser.add_argument("--titles_file", help="Titles of the items, such as MovieLens' movies.dat.")
    args = parser.parse_args()
    page = build(TitledModel(args.model_name_or_path, args.titles_file))
    theme = gr.themes.Soft(font=FONTS, font_mono=("monospace",))
    page.launch(theme=theme, css=CSS, share=False, footer_links=[])


if __name__ == "__main__":
    main()
