"""What is distributed is what the repository holds, and what is pinned is pinned once."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import elastic_hf


ROOT = Path(__file__).parents[1]
BUILD = """
import os, sys
import setuptools.build_meta as backend

sys.path.insert(0, os.getcwd())
getattr(backend, sys.argv[1])(sys.argv[2])
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Names of the files in the repository, in the source distribution and in the wheel, made from a copy."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("not in a git repository, which tells what belongs to the project")
    tracked = {name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()}
    folder = tmp_path_factory.mktemp("distributions")
    for name in tracked:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "copy" / name).write_bytes((ROOT / name).read_bytes())
    for form in ("build_sdist", "build_wheel"):
        command = [sys.executable, "-c", BUILD, form, folder]
        subprocess.run(command, cwd=folder / "copy", check=True, capture_output=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return tracked, source, set(archive.namelist())


def test_the_source_distribution_holds_every_file(distributions):
    tracked, source, _ = distributions
    assert tracked - source == {".gitignore"}


def test_the_wheel_holds_the_package_alone(distributions):
    tracked, _, wheel = distributions
    package = {name for name in tracked if name.startswith("elastic_hf/")}
    assert "elastic_hf/py.typed" in package
    assert {name for name in wheel if ".dist-info/" not in name} == package


def test_the_tests_are_about_the_package_beside_them():
    """Whichever is installed: they read the files of the repository around the package, too."""
    assert Path(elastic_hf.__file__).parents[1] == ROOT


def test_one_version_of_ruff_and_of_the_package():
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in local["hooks"]:
        assert hook["additional_dependencies"] == [f"ruff=={pins['ruff']}"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == elastic_hf.__version__


def test_what_the_package_imports_is_installed_with_it():
    """But for FAISS, ONNX, Redis and sentence-transformers, which are asked for by name where they are missing."""
    imported = set()
    for path in (ROOT / "elastic_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            imported |= {name.split(".")[0] for name in names}
    imported -= sys.stdlib_module_names | {"faiss", "onnxruntime", "onnxscript", "redis", "sentence_transformers"}
    (required,) = re.findall(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), flags=re.DOTALL)
    distributions = packages_distributions()
    found = {re.sub("[-_.]+", "-", distributions[name][0]).lower() for name in imported}
    assert {"matplotlib", "pyyaml", "torch"} <= found <= set(re.findall(r'"([\w-]+)>=', required))


def test_every_extra_is_pinned():
    pins = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split()}
    wanted = re.findall(r'"([\w-]+)>=', (ROOT / "setup.py").read_text())
    assert len(wanted) > 20 and set(wanted) <= pins
