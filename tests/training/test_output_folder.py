import os
import signal
import subprocess
import sys

import pytest

from elastic_hf.training import output_folder
from elastic_hf.training.output_folder import lock_output_dir, make_folder


HOLD = f"""
import runpy, sys, time
with runpy.run_path({output_folder.__file__!r})["lock_output_dir"](sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    make_folder(tmp_path / "a" / "b", "results_dir")
    assert (tmp_path / "a" / "b").is_dir() and not [*(tmp_path / "a" / "b").iterdir()]
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(ValueError, match=f"results_dir {folder} must be a folder that can be written to"):
            make_folder(folder, "results_dir")


def test_the_lock_ends_with_the_process_that_holds_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"output_dir {tmp_path} is in use by another run"):
            with lock_output_dir(tmp_path):
                pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with lock_output_dir(tmp_path):
        pass


def test_the_lock_can_be_taken_again_by_its_holder(tmp_path):
    with lock_output_dir(tmp_path):
        with lock_output_dir(str(tmp_path)):
            pass
            process = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True)
        assert process.returncode == 1 and "is in use by another run" in process.stderr
    with pytest.raises(KeyError), lock_output_dir(tmp_path):
        raise KeyError
    with lock_output_dir(tmp_path):
        pass
