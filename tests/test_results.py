import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from elastic_hf import results
from elastic_hf.results import RunResults


def test_what_is_written_is_read_again_and_what_is_unknown_is_not_written(tmp_path):
    known = RunResults("elastic", seed=7, stopped_early=False, config={"hidden_size": 16}, metrics={"test_hr@10": 0.0})
    known.write(tmp_path / "all_results.json")
    assert RunResults.read(tmp_path / "all_results.json") == known
    expected = {"model_type": "elastic", "seed": 7, "stopped_early": False, "config": {"hidden_size": 16}}
    assert results.read_json(tmp_path / "all_results.json") == expected | {"test_hr@10": 0.0}


def test_the_mask_of_the_loss_in_old_results_is_not_taken_for_what_is_recommended():
    assert RunResults("sasrec", config={"exclude_seen": False}).exclude_seen
    assert not RunResults("sasrec", config={"exclude_seen": False, "mask_seen_in_loss": False}).exclude_seen
    assert RunResults("sasrec").suffix == "" and RunResults("sasrec", config={"mask_seen_in_loss": False}).exclude_seen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must have a model_type, found nothing"),
        ('{"seed": 7}', "must have a model_type, found seed"),
        ("[]", "must hold a JSON object, found list"),
        (
            '{"model_type": "elastic", "colour": "blue"}',
            "must hold the fields of RunResults and metrics, found colour",
        ),
        ('{"model_type": "elastic", "test_hr@10": true}', "must hold .* metrics, found test_hr@10"),
        ('{"model_type": "elastic", "test_hr@10": NaN}', "found the number NaN"),
        ('{"model_type"', "must hold JSON"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, text, message):
    file = tmp_path / "all_results.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file} {message}" if "NaN" not in text else message):
        RunResults.read(file)


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
