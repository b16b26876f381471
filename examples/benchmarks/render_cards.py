"""Write model_cards/, a card and its figures for each published checkpoint, and the cards of those in examples/.

python examples/benchmarks/render_cards.py
"""

from pathlib import Path

from huggingface_hub import ModelCard

from elastic_hf.plots import figures_of, plot_results
from elastic_hf.results import RunResults
from elastic_hf.sharing.model_card import make_model_card, render_model_card
from elastic_hf.sharing.trial import load_pipeline, recommend_example
from render_results import read_results


EXAMPLES = Path(__file__).parents[1]
CARDS = EXAMPLES.parent / "model_cards"
# Where the checkpoints are published, and the tag of the version that the cards are about.
NAMESPACE = "elastic-hf"
TAG = "v1"

# What a run shares with those that a card compares it with.
SETTING = ("dataset", "protocol", "max_length")

# The results file of the run behind each checkpoint.
CHECKPOINTS = {
    "elastic-ml1m": "ml-1m-elastic-42-stream256.json",
    "elastic-tiny": "synthetic-elastic-42-tiny.json",
}


def render(name: str) -> ModelCard:
    """Return the card of a checkpoint, beside all main rows of the same data, protocol and length.

    Its example is made by the checkpoint where that is in `examples/`.
    """
    results = read_results("*.json")
    run = results.pop(CHECKPOINTS[name])
    others = {
        file: RunResults.from_dict(other, file)
        for file, other in results.items()
        if other.get("main_row") and all(other.get(key) == run[key] for key in SETTING)
    }
    run = RunResults.from_dict(run, CHECKPOINTS[name])
    folder = EXAMPLES / name
    return make_model_card(
        f"{NAMESPACE}/{name}",
        run,
        others,
        benchmark=results.get("benchmark-inference.json"),
        figures={figure: f"{name}/{figure}.png" for figure in figures_of(run)},
        example=recommend_example(load_pipeline(folder)) if folder.is_dir() else None,
        has_code=run.model_type == "elastic",
        revision=TAG,
        license="mit",
    )


def main() -> None:
    for name, file in CHECKPOINTS.items():
        plot_results(RunResults.from_dict(read_results(file)[file], file), CARDS / name)
        render(name).save(CARDS / f"{name}.md")
        folder = EXAMPLES / name
        if folder.is_dir():
            render_model_card(folder, f"examples/{name}", license="mit").save(folder / "README.md")


if __name__ == "__main__":
    main()
