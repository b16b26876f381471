"""Writes the tables of README.md, examples/README.md and examples/results.md from the files in examples/results.

python examples/render_results.py
"""

import json
import re
import shlex
import statistics
from itertools import groupby
from pathlib import Path

from elastic_hf.model_card import mean_and_deviation, table


EXAMPLES = Path(__file__).parent
DOCUMENTS = (EXAMPLES.parent / "README.md", EXAMPLES / "README.md", EXAMPLES / "results.md")


def read_results(pattern: str) -> dict[str, dict]:
    """The results files that match, by name."""
    return {path.name: json.loads(path.read_text()) for path in sorted((EXAMPLES / "results").glob(pattern))}


def runs(pattern: str = "*.json") -> list[dict]:
    """The results of run_seqrec.py that match."""
    return [run for run in read_results(pattern).values() if "main_row" in run]


def accuracy_rows(chosen: list[dict], keys: tuple[str, ...]) -> list[list[str]]:
    """One row for all seeds of a setting, the best of each dataset first."""

    def setting(run: dict) -> tuple:
        return (run["dataset"], *(str(run[key]) for key in keys))

    rows = []
    for _, group in groupby(sorted(chosen, key=setting), key=setting):
        seeds = list(group)
        first, ndcg = seeds[0], [run["test_ndcg@10"] for run in seeds]
        row = [first["dataset"], *(str(first[key]) for key in keys)]
        row += [mean_and_deviation([run["test_hr@10"] for run in seeds]), f"**{mean_and_deviation(ndcg)}**"]
        row += [mean_and_deviation([run[f"test_{name}@10_seen_kept"] for run in seeds]) for name in ("hr", "ndcg")]
        row += [f"{len(seeds)}", f"{first['num_parameters']:,}"]
        row += [f"{statistics.mean(run.get('train_seconds', 0) for run in seeds) / 60:.0f}", first["hardware"]]
        rows.append((first["dataset"], -statistics.mean(ndcg), row))
    return [row for *_, row in sorted(rows, key=lambda entry: entry[:2])]


ACCURACY = ["HR@10", "NDCG@10", "HR@10, seen kept", "NDCG@10, seen kept", "seeds", "parameters", "minutes", "hardware"]


def accuracy() -> str:
    """The main table: one row for each dataset and model."""
    chosen = [run for run in runs() if run["main_row"]]
    keys = ("model_type", "max_length")
    return table(["dataset", "model", "length", *ACCURACY], accuracy_rows(chosen, keys))


def differences() -> str:
    """ELASTIC's NDCG@10 less each baseline's, and the standard error of that difference of two means over seeds."""
    values = {}
    for run in runs():
        if run["main_row"]:
            models = values.setdefault((run["dataset"], run["max_length"]), {})
            models.setdefault(run["model_type"], []).append(run["test_ndcg@10"])
    rows = []
    for (dataset, length), models in sorted(values.items()):
        repeated = [seeds for seeds in models.values() if len(seeds) > 1]
        degrees = sum(len(seeds) - 1 for seeds in repeated)
        ours = models.pop("elastic", [])
        for model, theirs in sorted(models.items() if ours else ()):
            difference = statistics.mean(ours) - statistics.mean(theirs)
            row = [dataset, str(length), model, f"{difference:+.4f}", f"{difference / statistics.mean(theirs):+.1%}"]
            if degrees:
                variance = sum(statistics.variance(seeds) * (len(seeds) - 1) for seeds in repeated) / degrees
                error = (variance / len(ours) + variance / len(theirs)) ** 0.5
                row += [f"{error:.4f}", f"{difference / error:.1f}"]
            else:
                row += ["one seed", ""]
            rows.append(row)
    return table(
        ["dataset", "length", "ELASTIC less", "NDCG@10", "relative", "standard error", "in standard errors"], rows
    )


def memory() -> str:
    """How much of the interest memory is alive."""
    rows = []
    for run in runs():
        if "memory_slots" in run:
            row = [run["dataset"], run["variant"] or "main row", str(run["seed"]), f"{run['memory_slots']:,}"]
            row += [f"{run['num_users']:,}", f"{run['memory_share_retrieved']:.1%}", f"{run['memory_entropy']:.3f}"]
            rows.append(row)
    header = ["dataset", "run", "seed", "slots", "test users", "slots retrieved for one of them", "evenness"]
    return table(header, sorted(rows))


def variants() -> str:
    """Ablations and other lengths: trained like the main rows, evaluated on the test items."""
    chosen = [run for run in runs() if not run["main_row"] and "test_ndcg@10" in run]
    keys = ("model_type", "variant", "max_length")
    return table(["dataset", "model", "variant", "length", *ACCURACY], accuracy_rows(chosen, keys))


def trials() -> str:
    """Every trial of the search, the best of each dataset and number of epochs first."""
    rows = []
    for run in runs("trials/*.json"):
        arguments = shlex.split(run["command"])
        overrides = dict(zip(arguments, arguments[1:], strict=False)).get("--config_overrides", "")
        training = run["training"]
        row = [run["dataset"], f"{training['epochs']:g}", run["model_type"], run["variant"], str(run["seed"])]
        row += [overrides.replace(",", ", "), f"{training['learning_rate']:g}", str(training["batch_size"])]
        row += ["yes" if run["split_into_windows"] else "no"]
        row += [f"{run['validation_hr@10']:.4f}", f"**{run['validation_ndcg@10']:.4f}**"]
        row += [f"{run['num_parameters']:,}", f"{run['train_seconds'] / 60:.0f}"]
        rows.append((run["dataset"], training["epochs"], -run["validation_ndcg@10"], row))
    header = ["dataset", "epochs", "model", "trial", "seed", "configuration", "learning rate", "batch", "windows"]
    header += ["validation HR@10", "validation NDCG@10", "parameters", "minutes"]
    return table(header, [row for *_, row in sorted(rows)])


ABLATIONS = {
    "e8": "the recipe",
    "e8-no-memory": "without interest memory",
    "e8-forget-none": "without forgetting",
    "e8-forget-fixed": "half-lives fixed at their initial values",
    "e8-conv0": "without convolution",
    "e8-bidirectional-prefix": "bidirectional, trained on prefixes",
    "e8-bidirectional-cloze": "bidirectional, trained on masked items",
    "e8-bidirectional-static": "the same with static experts instead of the memory's",
}


def ablation() -> str:
    """What ELASTIC loses without its parts, from the trials of the same 8 epochs."""
    values = {}
    for run in runs("trials/ml-1m-elastic-*-e8*.json"):
        if run["variant"] in ABLATIONS:
            values.setdefault(run["variant"], []).append(run)
    rows = []
    for variant, label in ABLATIONS.items():
        seeds = values.get(variant, [])
        if seeds:
            ndcg = statistics.mean(run["validation_ndcg@10"] for run in seeds)
            recipe = statistics.mean(run["validation_ndcg@10"] for run in values["e8"])
            row = [label, mean_and_deviation([run["validation_hr@10"] for run in seeds])]
            row += [mean_and_deviation([run["validation_ndcg@10"] for run in seeds])]
            row += [f"{ndcg - recipe:+.4f}", str(len(seeds)), f"{seeds[0]['num_parameters']:,}"]
            rows.append([*row, f"{statistics.mean(run['train_seconds'] for run in seeds) / 60:.0f}"])
    header = ["ELASTIC", "validation HR@10", "validation NDCG@10", "difference", "seeds", "parameters", "minutes"]
    return table(header, rows)


def commands() -> str:
    """The command behind each run of run_seqrec.py."""
    return "\n".join(
        f"- `{name}`: `{run['command']}`" for name, run in read_results("*.json").items() if "protocol" in run
    )


def lengths() -> str:
    """Models that read less or more of the histories, and what an epoch costs, its evaluation included."""
    chosen = [run for run in runs() if (run["variant"] or "").startswith("length")]
    rows = []
    for run in sorted(chosen, key=lambda run: (run["dataset"], run["model_type"], run["max_length"])):
        row = [run["dataset"], run["model_type"], f"{run['max_length']:,}"]
        row += [f"{run[f'test_{metric}']:.4f}" for metric in ("hr@10", "ndcg@10")]
        row += [f"{run['popularity_ndcg@10']:.4f}", f"{run['epochs']:g}"]
        rows.append([*row, f"{run['train_seconds'] / run['epochs']:.0f}"])
    header = ["dataset", "model", "items read", "HR@10", "NDCG@10", "popularity NDCG@10", "epochs"]
    return table([*header, "seconds per epoch"], rows)


def data() -> str:
    """How long 20 million interactions take to become split histories."""
    rows = []
    for run in read_results("benchmark-data.json").values():
        rows = [
            [name, f"{run['num_rows']:,}", f"{run[name]['seconds']:.1f}", f"{run[name]['peak_memory_gb']:.2f}"]
            for name in ("parquet", "csv")
        ]
    return table(["file", "rows", "seconds", "peak memory (GB)"], rows)


def tokenizer() -> str:
    """Item ids to token ids, by Arrow and by calling the tokenizer."""
    rows = []
    for run in read_results("benchmark-tokenizer.json").values():
        for kind in ("integer", "string"):
            rates = [str(run[kind][f"{path}_million_items_per_second"]) for path in ("arrow", "call")]
            rows.append([kind, *rates, str(run[kind]["ratio"])])
    header = ["item ids", "`encode_histories` (million items/s)", "`tokenizer(...)` (million items/s)", "ratio"]
    return table(header, rows)


def recommendations() -> str:
    """The first recommendations of the MovieLens-100k run."""
    parts = []
    for run in runs("ml-100k-elastic-42.json"):
        sample = run["sample"]
        parts = [f"The last items of user {sample['user_id']}:", *(f"    {title}" for title in sample["history"])]
        parts += ["Recommended:", *(f"{rank:4}  {title}" for rank, title in enumerate(sample["recommended"], start=1))]
        parts += [f"What came next: {sample['target']}"]
    return "```text\n" + "\n".join(parts) + "\n```"


TABLES = {
    function.__name__: function
    for function in (
        accuracy,
        differences,
        variants,
        memory,
        trials,
        ablation,
        commands,
        lengths,
        data,
        tokenizer,
        recommendations,
    )
}


def render(document: Path) -> str:
    """The document's text with every `<!-- results:NAME -->` block written anew."""

    def block(match: re.Match) -> str:
        return f"<!-- results:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- /results -->"

    return re.sub(r"<!-- results:(\w+) -->\n.*?<!-- /results -->", block, document.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(render(document))
