"""Transformers' own tests of models, from the source distribution of the installed version: no wheel holds them."""

import hashlib
import importlib
import io
import json
import sys
import tarfile
import urllib.request
from pathlib import Path, PurePosixPath
from types import ModuleType

import transformers
from huggingface_hub import cached_assets_path

from elastic_hf.data.cache import move_folder, temporary_folder


INDEX = "https://pypi.org/simple/transformers/"
PACKAGE = "transformers_tests"

# Marks of these tests that pytest has to know.
MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "slow",
    "torch_compile_test",
)

# What the distribution lacks and its tests import: no model here generates text, and export has tests of its own.
LACKING = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "dtype": "float16",
            "architectures": ["SomeModel"],
            "id2label": {0: "bought", 1: "viewed"},
            "label2id": {"bought": 0, "viewed": 1},
            "problem_type": "regression",
        }
    },
}


def import_tests(*names: str) -> list[ModuleType]:
    """Import modules of Transformers' tests, which are fetched once and then lie in the Hub library's cache of assets.

    Raises:
        OSError: if they are not in the cache, and PyPI cannot be reached or has no such version.
        ValueError: if PyPI sends another file than it states.
    """
    folder = cached_assets_path("elastic_hf", "transformers", transformers.__version__)
    if not (folder / PACKAGE).is_dir():
        archive = download(f"transformers-{transformers.__version__}.tar.gz")
        with temporary_folder(folder) as temporary:
            unpack_tests(archive, temporary / PACKAGE)
            move_folder(temporary / PACKAGE, folder / PACKAGE)
    for name, attributes in LACKING.items():
        module = sys.modules.setdefault(f"{PACKAGE}.{name}", ModuleType(name))
        vars(module).update(attributes)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]


def download(name: str) -> bytes:
    """Return a file of PyPI, checked against the SHA-256 that the index states."""
    request = urllib.request.Request(INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        files = {file["filename"]: file for file in json.load(response)["files"]}
    if name not in files:
        raise FileNotFoundError(f"{INDEX} has no {name}")
    url, expected = files[name]["url"], files[name]["hashes"]["sha256"]
    with urllib.request.urlopen(url, timeout=60) as response:
        content = response.read()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{url}: expected SHA-256 {expected}, found {found}")
    return content


def unpack_tests(archive: bytes, folder: Path) -> None:
    """Write the modules right in the `tests` of a source distribution into a folder, as a package."""
    folder.mkdir()
    (folder / "__init__.py").touch()
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            path = PurePosixPath(member.name)
            if member.isfile() and path.match("*/tests/*.py") and len(path.parts) == 3:
                (folder / path.name).write_bytes(files.extractfile(member).read())
