"""Writes the tables of README.md and examples/README.md from the files in examples/results.

    python examples/render_results.py
"""

import json
import re
from pathlib import Path


EXAMPLES = Path(__file__).parent
DOCUMENTS = (EXAMPLES.parent / "README.md", EXAMPLES / "README.md")


def read_results(pattern: str) -> dict[str, dict]:
    """The results files that match, by name."""
    return {path.name: json.loads(path.read_text()) for path in sorted((EXAMPLES / "results").glob(pattern))}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def accuracy() -> str:
    """One row for each dataset."""
    header = ["dataset", "users / items / interactions", "length", "HR@10 / NDCG@10", "the same, seen items kept"]
    header += ["popularity", "best of epochs", "minutes", "hardware", "file"]
    rows = []
    for name, run in read_results("*-elastic.json").items():
        rows.append(
            [
                run["dataset"],
                f"{run['num_users']:,} / {run['num_items']:,} / {run['num_interactions']:,}",
                str(run["max_length"]),
                f"**{run['test_hr@10']:.4f} / {run['test_ndcg@10']:.4f}**",
                f"{run['test_hr@10_seen_kept']:.4f} / {run['test_ndcg@10_seen_kept']:.4f}",
                f"{run['popularity_hr@10']:.4f} / {run['popularity_ndcg@10']:.4f}",
                f"{run['best_epoch']:g} of {run['epochs']:g}",
                f"{run['train_seconds'] / 60:.0f}",
                run["hardware"],
                f"[{name}](RESULTS/{name})",
            ]
        )
    return table(header, rows)


def commands() -> str:
    """The command behind each run of run_seqrec.py."""
    runs = read_results("*-elastic*.json")
    return "\n\n".join(f"`results/{name}`:\n\n```bash\n{run['command']}\n```" for name, run in runs.items())


def lengths() -> str:
    """The embedded dataset, read at two lengths."""
    rows = []
    for run in read_results("synthetic-elastic-length*.json").values():
        scores = [f"{run[f'test_{metric}']:.4f}" for metric in ("hr@10", "ndcg@10", "hr@20", "ndcg@20")]
        rows.append([f"the last {run['max_length']} items", *scores, f"{run['popularity_ndcg@10']:.4f}"])
    return table(["the model reads", "HR@10", "NDCG@10", "HR@20", "NDCG@20", "popularity NDCG@10"], rows)


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
    for run in read_results("ml-100k-elastic.json").values():
        sample = run["sample"]
        parts = [f"The last items of user {sample['user_id']}:", *(f"    {title}" for title in sample["history"])]
        parts += ["Recommended:", *(f"{rank:4}  {title}" for rank, title in enumerate(sample["recommended"], start=1))]
        parts += [f"What came next: {sample['target']}"]
    return "```text\n" + "\n".join(parts) + "\n```"


TABLES = {function.__name__: function for function in (accuracy, commands, lengths, data, tokenizer, recommendations)}


def render(document: Path) -> str:
    """The document's text with every `<!-- results:NAME -->` block written anew."""
    folder = "results" if document.parent == EXAMPLES else "examples/results"

    def block(match: re.Match) -> str:
        content = TABLES[match[1]]().replace("RESULTS/", f"{folder}/")
        return f"<!-- results:{match[1]} -->\n{content}\n<!-- /results -->"

    return re.sub(r"<!-- results:(\w+) -->\n.*?<!-- /results -->", block, document.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(render(document))
