"""Writes model_cards/ from the files in results/: a card, and its pictures, for each published checkpoint.

python examples/benchmarks/render_cards.py

A checkpoint whose run has no results file yet has no card.
"""

from pathlib import Path

from huggingface_hub import ModelCard

from elastic_hf.plots import plot_expert_horizons, plot_training_curve
from elastic_hf.sharing.model_card import make_model_card
from render_results import read_results


CARDS = Path(__file__).parents[2] / "model_cards"
NAMESPACE = "elastic-hf"

# The results file of the run behind each checkpoint.
CHECKPOINTS = {
    "elastic-ml1m": "ml-1m-elastic-42.json",
    "elastic-beauty": "beauty-elastic-42.json",
    "elastic-tiny": "synthetic-elastic-42-tiny.json",
}

# What each picture shows of the results.
PICTURES = {
    "training_curve": ("log_history", plot_training_curve),
    "expert_horizons": ("expert_half_lives", plot_expert_horizons),
}


def checkpoints() -> list[str]:
    """The checkpoints that have results."""
    results = read_results("*.json")
    return [name for name, file in CHECKPOINTS.items() if file in results]


def render(name: str) -> ModelCard:
    """The card of a checkpoint, beside all main rows of the same data and length."""
    results = read_results("*.json")
    run = results.pop(CHECKPOINTS[name])
    same = [
        file for file, other in results.items() if all(other.get(key) == run[key] for key in ("dataset", "max_length"))
    ]
    others = {file: results[file] for file in same if results[file]["main_row"]}
    return make_model_card(
        f"{NAMESPACE}/{name}",
        run,
        others,
        benchmark=results.get("benchmark-inference.json"),
        pictures={picture: f"{name}/{picture}.png" for picture, (key, _) in PICTURES.items() if run.get(key)},
        has_code=run["model_type"] == "elastic",
        license="mit",
    )


def main() -> None:
    for name in checkpoints():
        run = read_results(CHECKPOINTS[name])[CHECKPOINTS[name]]
        for picture, (key, plot) in PICTURES.items():
            if run.get(key):
                (CARDS / name).mkdir(parents=True, exist_ok=True)
                plot(run[key], CARDS / name / f"{picture}.png")
        render(name).save(CARDS / f"{name}.md")


if __name__ == "__main__":
    main()
