"""What a repository on the Hub holds: a model, all that loads it, and what was measured. Nothing pickled."""

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd
from safetensors import safe_open

from ..models.configuration_elastic import ElasticConfig
from ..models.item_tokenizer import ITEM_FEATURES_FILE, ElasticItemTokenizer
from ..models.modeling_elastic import ElasticForSequentialRecommendation
from ..models.pipeline import SequentialRecommendationPipeline
from ..results import RESULTS_FILE, read_json
from .model_card import FIGURES, TEMPLATES, render_model_card
from .privacy import find_local_path, without_personal_data
from .trial import MODEL_FILES, check_files, load_pipeline, recommend_example


# All that is ever published of a folder, beside the figures of a card.
REQUIRED_FILES = (*MODEL_FILES, "README.md")
CONFIGURATIONS = ("config.json", "tokenizer_config.json")
RESULTS_FILES = (RESULTS_FILE, "results/*.json")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What a repository of ELASTIC holds beside that, so that it needs public packages alone: the model's code, the handler
# of Inference Endpoints, and the packages that they import. These files are copied, never imported.
CODE_FOLDER = Path(__file__).parents[1] / "models"
CODE_FILES = (*CODE_FOLDER.glob("[!_]*.py"), TEMPLATES / "handler.py", TEMPLATES / "requirements.txt")


def files_to_publish(
    folder: str | Path,
    repo_id: str | None = None,
    license: str | None = None,
    *,
    tag: str | None = None,
    include_personal_data: bool = False,
) -> list[CommitOperationAdd]:
    """
    Return what [`publish`] makes of a folder, after loading its model and trying it once.

    No network is needed, and the folder is only read.

    Args:
        folder (`str` or `Path`):
            An output folder of `elastic-hf train`, or of [`SequentialRecommendationTrainer`].
        repo_id, license, tag, include_personal_data:
            As in [`publish`]. Without a `repo_id` no card is rendered: the folder's own is taken.

    Returns:
        `list[CommitOperationAdd]`: `path_in_repo` and content of each file. For ELASTIC these hold its code, too, and
        `config.json` and `tokenizer_config.json` say where it is. The baselines are loaded by this package alone.

    Raises:
        ValueError: if a file is missing, is not what its name says, does not belong to the others or names a local
            path. The message names the file.
    """
    folder = Path(folder)
    check_files(folder, REQUIRED_FILES)
    pipeline = load_pipeline(folder)
    has_code = pipeline.model.config.model_type == ElasticConfig.model_type
    contents: dict[str, Path | bytes] = {name: folder / name for name in REQUIRED_FILES}
    if pipeline.model.config.item_features is not None:
        contents[ITEM_FEATURES_FILE] = folder / ITEM_FEATURES_FILE
    contents |= {f"{name}.png": folder / f"{name}.png" for name in FIGURES if _is_image(folder / f"{name}.png")}
    if not include_personal_data:
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            _refuse_local_path(folder / "model.safetensors", str(weights.metadata()))
    contents |= _results(folder, include_personal_data)
    contents |= {name: _public_text(folder / name, include_personal_data) for name in CONFIGURATIONS}
    if repo_id is not None and RESULTS_FILE in contents:
        example = recommend_example(pipeline)
        card = render_model_card(folder, repo_id, license=license, has_code=has_code, revision=tag, example=example)
        contents["README.md"] = str(card).encode()
    elif license is not None:
        raise ValueError(f"license is written into a card made from all_results.json, found none in {folder}")
    else:
        # A card that a trainer wrote names the folder as where the model is.
        places = {f'"{folder}"': f'"{repo_id}"'} if repo_id is not None else {}
        contents["README.md"] = _public_text(folder / "README.md", include_personal_data, places)
    if has_code:
        contents |= {file.name: file for file in CODE_FILES} | _configurations_with_code(folder)
    return [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]


def _is_image(file: Path) -> bool:
    """Whether there is such a file, which must be a PNG image then."""
    if not file.is_file():
        return False
    with file.open("rb") as image:
        if image.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            raise ValueError(f"{file} must be a PNG image, found another file")
    return True


def _results(folder: Path, include_personal_data: bool) -> dict[str, Path | bytes]:
    """The results files, as they are where they hold nothing personal."""
    contents = {}
    for file in (file for pattern in RESULTS_FILES for file in sorted(folder.glob(pattern))):
        results = read_json(file)
        public = results if include_personal_data else without_personal_data(results)
        contents[file.relative_to(folder).as_posix()] = file if public == results else _as_json(public)
    return contents


def _public_text(file: Path, include_personal_data: bool, replacements: dict[str, str] | None = None) -> bytes:
    """The bytes of a text, which must name no local path."""
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be text in UTF-8, found {error}") from error
    for old, new in (replacements or {}).items():
        text = text.replace(old, new)
    if not include_personal_data:
        _refuse_local_path(file, text)
    return text.encode()


def _refuse_local_path(file: Path, text: str) -> None:
    path = find_local_path(text)
    if path is not None:
        raise ValueError(f"{file} must name no local path, found {path!r} (include_personal_data=True publishes it)")


def _configurations_with_code(folder: Path) -> dict[str, bytes]:
    """The two configurations with the entries by which Transformers finds the classes in a repository."""
    impl = _name_in_repository(SequentialRecommendationPipeline)
    model_code = {
        "auto_map": {
            "AutoConfig": _name_in_repository(ElasticConfig),
            "AutoModel": _name_in_repository(ElasticForSequentialRecommendation),
        },
        "custom_pipelines": {"sequential-recommendation": {"impl": impl, "pt": ["AutoModel"], "type": "text"}},
    }
    # The first of the two would be a tokenizer in Python.
    tokenizer_code = {"auto_map": {"AutoTokenizer": [None, _name_in_repository(ElasticItemTokenizer)]}}
    code = {"config.json": model_code, "tokenizer_config.json": tokenizer_code}
    return {name: _as_json(read_json(folder / name) | entries) for name, entries in code.items()}


def _name_in_repository(cls: type) -> str:
    return f"{cls.__module__.split('.')[-1]}.{cls.__name__}"


def _as_json(contents: dict) -> bytes:
    return (json.dumps(contents, indent=2) + "\n").encode()
