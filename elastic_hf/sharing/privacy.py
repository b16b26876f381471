"""What the world may read of a run: no user, no history and no folder of the machine that it ran on."""

import re
import shlex
from typing import Any


# Texts, tables and lists of results files that are about the model and the data as a whole. Whatever else is not a
# number stays at home, such as the sample: a user's id, history and next item.
PUBLIC_KEYS = frozenset(
    [
        *("model_type", "variant", "config", "training", "log_history", "example"),
        *("expert_half_lives", "expert_half_lives_seconds"),
        *("dataset", "hub_dataset", "protocol", "command", "git_commit", "hardware"),
        *("python_version", "torch_version", "transformers_version", "elastic_hf_version"),
        *("benchmark", "device", "dtype", "versions", "rows"),
    ]
)
# Absolute paths of any system, from a home folder or as an address; no part of a word, of a web address or of a link.
LOCAL_PATH = re.compile(
    r"""(?<![\w/:.~<\\-])(?<!\]\()(?:/[\w.~-]+/|~\w*/|[A-Za-z]:[\\/](?!/)|\\\\(?=\w)|file:/)[^\s"'`<>|,;)\]}]*"""
)


def without_personal_data(results: dict[str, Any]) -> dict[str, Any]:
    """
    Return what everyone may read of a results file: its numbers, and the texts, tables and lists in `PUBLIC_KEYS`.
    Paths become the names of their files, in commands all but those of this package's `examples/`.
    """
    public = {}
    for key, value in results.items():
        is_number = isinstance(value, bool | int | float | None) and not key.startswith(("user", "target"))
        if is_number or key in PUBLIC_KEYS:
            public[key] = _without_paths(value)
    hub_dataset = results.get("hub_dataset")
    if isinstance(results.get("dataset"), str) and results["dataset"] != hub_dataset:
        public["dataset"] = _name(results["dataset"])
    if isinstance(results.get("command"), str):
        public["command"] = _without_folders(results["command"], hub_dataset)
    return public


def find_local_path(text: str) -> str | None:
    """Return the first absolute path in a text, None if there is none."""
    match = LOCAL_PATH.search(text)
    return match and match[0]


def _without_paths(value: Any) -> Any:
    """Nested results with the names of files in place of absolute paths."""
    if isinstance(value, dict):
        return {key: _without_paths(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_without_paths(element) for element in value]
    if not isinstance(value, str):
        return value
    # A path with spaces is one where it is the whole text.
    return _name(value) if LOCAL_PATH.match(value) else LOCAL_PATH.sub(lambda match: _name(match[0]), value)


def _without_folders(command: str, hub_dataset: str | None) -> str:
    """A command with the names of files in place of all paths."""
    try:
        arguments = shlex.split(command)
    except ValueError:  # quotes that are not closed
        arguments = command.split()
    return shlex.join(
        "".join(
            part if part == hub_dataset or part.startswith("examples/") else _name(part)
            for part in re.split("([=,])", argument)
        )
        for argument in arguments
    )


def _name(path: str) -> str:
    """The last part of a path."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
