import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from elastic_hf import results


def test_the_commit_is_that_of_the_package_and_not_of_a_repository_around_it(tmp_path):
    if (Path(results.__file__).parents[1] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", results.git_commit())
    shutil.copy(results.__file__, tmp_path / "installed.py")
    (tmp_path / "notes.txt").write_text("a shop")
    author = ["-c", "user.name=ada", "-c", "user.email=ada@localhost"]
    for command in (["init"], ["add", "notes.txt"], [*author, "commit", "-m", "Add notes"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location("installed", tmp_path / "installed.py")
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    assert installed.git_commit() is None
