"""What a run found, as its results file holds it, and what all results files say about where they were measured."""

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO


RESULTS_FILE = "all_results.json"
CUTOFFS = (1, 5, 10, 20)
FEW_USERS = 500  # metrics of fewer are mostly chance
# Of the metrics, by whether the items seen are excluded from the ranking.
SUFFIXES = {True: "", False: "_seen_kept"}


@dataclass
class RunResults:
    """
    The results of a run of `elastic-hf train`. What is unknown is `None`, and not in the file.

    Attributes:
        model_type (`str`): The model, as in [`~registry.MODELS`].
        seed (`int`): Seed of the run.
        variant (`str`): Name of an ablation, a trial or another length; a run without one is a row of the main table.
        main_row (`bool`): Whether it has none.
        dataset (`str`): Name of the data, or the file that they were read from.
        hub_dataset (`str`): Their id, where they come from the Hub.
        protocol (`str`): How the data were split and the catalogue ranked.
        k_core (`int`): Fewest interactions of each user and item.
        num_rows, num_users, num_items, num_interactions, num_duplicates, num_filtered, num_filtered_users (`int`):
            As `counts` of [`~data.histories.Histories`].
        num_train_users, num_validation_users, num_test_users, num_seen_targets (`int`): As there.
        num_parameters (`int`): Weights of the model.
        max_length (`int`): Number of most recent items that the model sees.
        split_into_windows (`bool`): Whether longer histories were trained on in windows, and not the latest one alone.
        split_into_prefixes (`bool`): Whether each prefix of a history was trained on, and not one at random.
        config (`dict`): The configuration's own fields.
        training (`dict`): As [`~training.trainer.SequentialRecommendationTrainer.training_settings`] returns it.
        epochs (`float`), steps (`int`): How long it was trained.
        best_epoch (`float`): Epoch of the chosen checkpoint.
        stopped_early (`bool`): Whether it ended before its last epoch.
        resumed_from_checkpoint (`str`): The checkpoint it last went on from.
        train_loss (`float`): Mean over all steps, in nats per target.
        train_seconds, total_seconds (`float`): Time of the training with its evaluations, and of the whole run.
        log_history (`list[dict]`):
            The loss and the validation NDCG@10 by epoch, with seen items excluded or kept as the model recommends.
        metrics (`dict[str, float]`):
            By `<on>_<metric>`, where `<on>` is `validation`, `test`, `untimed` (on the test items, by a model that
            reads times and is not told when they came), `popularity` (that of popularity on the test items) or `eval`,
            and the metric is one of [`~training.metrics.ranking_metrics`], its `_standard_error` over the users, or
            one of [`~training.metrics.popularity_bias`]. In the file they stand beside the rest.
        memory_slots (`int`): Slots of the interest memory.
        memory_share_retrieved (`float`): Share of them that is retrieved for at least one test user.
        memory_entropy (`float`): Entropy of the retrievals, 1 where all slots are retrieved equally often.
        expert_half_lives (`list[list[float]]`):
            After how many items what an expert has read counts half, by head and expert.
        expert_half_lives_seconds (`list[list[float]]`):
            Of a model that reads times: after how many seconds without an item it does.
        example (`dict`): As [`~sharing.trial.recommend_example`] returns it.
        sample (`dict`): A test user, the recommendations and what came next; it is never published.
        git_commit (`str`): Commit of the package, with `-dirty` where a file was changed since.
        command (`str`): What makes the run again.
        hardware (`str`), num_processes (`int`): What it ran on.
        python_version, torch_version, transformers_version, elastic_hf_version (`str`): What it ran with.
    """

    model_type: str
    seed: int | None = None
    variant: str | None = None
    main_row: bool | None = None
    dataset: str | None = None
    hub_dataset: str | None = None
    protocol: str | None = None
    k_core: int | None = None
    num_rows: int | None = None
    num_users: int | None = None
    num_items: int | None = None
    num_interactions: int | None = None
    num_duplicates: int | None = None
    num_filtered: int | None = None
    num_filtered_users: int | None = None
    num_train_users: int | None = None
    num_validation_users: int | None = None
    num_test_users: int | None = None
    num_seen_targets: int | None = None
    num_parameters: int | None = None
    max_length: int | None = None
    split_into_windows: bool | None = None
    split_into_prefixes: bool | None = None
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    epochs: float | None = None
    steps: int | None = None
    best_epoch: float | None = None
    stopped_early: bool | None = None
    resumed_from_checkpoint: str | None = None
    train_loss: float | None = None
    train_seconds: float | None = None
    total_seconds: float | None = None
    log_history: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    memory_slots: int | None = None
    memory_share_retrieved: float | None = None
    memory_entropy: float | None = None
    expert_half_lives: list[list[float]] | None = None
    expert_half_lives_seconds: list[list[float]] | None = None
    example: dict[str, Any] | None = None
    sample: dict[str, Any] | None = None
    git_commit: str | None = None
    command: str | None = None
    hardware: str | None = None
    num_processes: int | None = None
    python_version: str | None = None
    torch_version: str | None = None
    transformers_version: str | None = None
    elastic_hf_version: str | None = None

    @property
    def exclude_seen(self) -> bool:
        """Whether the model leaves seen items out of what it recommends."""
        # Results from before there was `mask_seen_in_loss` call the loss's mask `exclude_seen`.
        return self.config.get("exclude_seen", True) or "mask_seen_in_loss" not in self.config

    @property
    def suffix(self) -> str:
        """That of the metrics which count: with seen items excluded or kept, as the model recommends."""
        return SUFFIXES[self.exclude_seen]

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str = "results") -> "RunResults":
        """Return the results that [`to_dict`] made a dictionary of; `name` is what errors call it.

        Raises:
            ValueError: If there is no `model_type`, or a value that is neither a field nor a metric.
        """
        if not isinstance(values, dict) or not values.get("model_type"):
            found = ", ".join(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{name} must have a model_type, found {found or 'nothing'}")
        fields = {known.name for known in dataclasses.fields(cls)} - {"metrics"}
        metrics = {key: value for key, value in values.items() if key not in fields}
        for key, value in metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must hold the fields of RunResults and metrics, found {key}")
        return cls(**{key: value for key, value in values.items() if key in fields}, metrics=metrics)

    @classmethod
    def read(cls, file: Path) -> "RunResults":
        """Return the results in a file.

        Raises:
            ValueError: As [`read_json`] and [`from_dict`].
        """
        return cls.from_dict(read_json(file), str(file))

    def to_dict(self) -> dict[str, Any]:
        """Return all that is known, the metrics beside the rest."""
        known = {key: value for key, value in vars(self).items() if value is not None and value not in ({}, [])}
        return {key: value for key, value in known.items() if key != "metrics"} | self.metrics

    def write(self, file: Path) -> None:
        """Write the whole file, as [`write_json`] does."""
        write_json(file, self.to_dict())


def processor() -> str:
    """Return the processor's model name and PyTorch's widest instructions on it, such as `AMD EPYC (AVX512)`."""
    import torch

    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def git_commit() -> str | None:
    """Return the commit of this package, `-dirty` if a file was changed since; None outside its repository."""

    def git(*arguments: str) -> str:
        command, folder = ["git", *arguments], Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie in another repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_machine(num_processes: int) -> dict[str, Any]:
    """Return the hardware of a run and the versions of its software, as fields of [`RunResults`]."""
    import torch
    import transformers

    from .version import __version__

    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{processor()}, {torch.get_num_threads()} threads per process"
    return {
        "hardware": hardware,
        "num_processes": num_processes,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "elastic_hf_version": __version__,
    }


@contextmanager
def written_whole(file: Path) -> Iterator[BinaryIO]:
    """Open a file to write to that takes the place of `file` when it is whole, and leaves it as it was otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    with open(temporary, "wb") as stream:
        yield stream
    os.replace(temporary, file)


def write_json(file: Path, results: dict) -> None:
    """Write the whole file, or leave an older one as it was.

    Raises:
        ValueError: If a number is not finite, which JSON has no word for.
    """
    text = format_json(results, str(file))
    with written_whole(file) as stream:
        stream.write(text)


def format_json(values: dict, name: str) -> bytes:
    """Return the bytes of a JSON file; `name` is what errors call it.

    Raises:
        ValueError: as [`write_json`].
    """
    try:
        return f"{json.dumps(values, indent=2, allow_nan=False)}\n".encode()
    except ValueError as error:
        raise ValueError(f"{name} must hold finite numbers: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: if there is none, or if a number in it is not finite.
    """
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """Return the object that the bytes of a JSON file hold; `name` is what errors call the file.

    Raises:
        ValueError: as [`read_json`].
    """
    try:
        contents = json.loads(text.decode(), parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{name} must hold JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{name} must hold a JSON object, found {type(contents).__name__}")
    return contents


def _refuse_constant(name: str) -> None:
    raise ValueError(f"found the number {name}")
