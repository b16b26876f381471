import numpy as np
import polars as pl
import pytest

from elastic_hf.__main__ import main
from elastic_hf.results import RunResults
from interactions import write


NUM_USERS, NUM_ITEMS = 40, 30
TINY = "hidden_size=16,intermediate_size=16,num_interest_experts=4,num_memory_subkeys=6,num_hidden_layers=1"


@pytest.fixture
def logs(tmp_path):
    """A folder of two files of interactions with ratings."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(NUM_USERS), 12)
    steps = np.tile(np.arange(12), NUM_USERS)
    items = (generator.integers(NUM_ITEMS, size=NUM_USERS)[users] + 7 * steps) % NUM_ITEMS
    rows = pl.DataFrame({"customer": users, "product": items, "when": 1_700_000_000 + steps, "rating": items % 5})
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs" / "1.csv", rows[:300])
    write(tmp_path / "logs" / "2.csv", rows[300:])
    return tmp_path / "logs"


def test_what_is_prepared_is_trained_on_as_the_files_are(logs, tmp_path, capsys):
    columns = ["--user_column", "customer", "--item_column", "product", "--timestamp_column", "when"]
    events, prepared = ["--event_columns", "rating"], str(tmp_path / "prepared")
    assert main(["prepare", "--train_file", str(logs), "--output_dir", prepared, *columns, *events]) == 0
    assert "num_rows: 480" in capsys.readouterr().out
    cache = ["--cache_dir", str(tmp_path / "cache")]
    training = ["--use_cpu", "True", "--max_steps", "3", "--max_length", "10", "--config_overrides", TINY]
    training += ["--dataset_name", "shop", "--eval_strategy", "no", "--save_strategy", "no", *events, *cache]
    table = pl.DataFrame({"item_id": range(NUM_ITEMS), "price": range(NUM_ITEMS), "title": ["A title"] * NUM_ITEMS})
    features = ["--item_features", "price", "--items_file", str(write(tmp_path / "items.parquet", table))]
    runs = {}
    for name, source in (
        ("files", [str(logs), *columns]),
        ("prepared", [prepared]),
        ("featured", [prepared, *features]),
    ):
        folder = str(tmp_path / name)
        assert main(["train", "--train_file", *source, *training, "--output_dir", folder]) == 0
        runs[name] = RunResults.read(tmp_path / name / "all_results.json")
    assert [*runs.pop("featured").config["item_features"]] == ["price"]
    for key in ("num_rows", "num_train_users", "num_items", "metrics", "train_loss", "config"):
        assert getattr(runs["prepared"], key) == getattr(runs["files"], key)


def test_a_training_with_other_settings_is_refused(logs, tmp_path, capsys):
    prepared = str(tmp_path / "prepared")
    columns = ["--user_column", "customer", "--item_column", "product", "--timestamp_column", "when"]
    assert main(["prepare", "--train_file", str(logs), "--output_dir", prepared, *columns, "--k_core", "3"]) == 0
    run = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "True"]
    assert main(["train", "--train_file", prepared, *run]) == 1
    assert "k_core must be 3, with which" in capsys.readouterr().err
    assert main(["prepare", "--train_file", str(logs), "--output_dir", prepared, *columns]) == 1
    assert "output_dir must be a folder that is empty or does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["output_dir", "cache_dir"])
def test_a_folder_that_cannot_be_written_to_is_named(logs, tmp_path, capsys, field):
    (tmp_path / "file").write_text("")
    folders = {"output_dir": tmp_path / "prepared", field: tmp_path / "file" / "prepared"}
    arguments = [str(part) for name, folder in folders.items() for part in (f"--{name}", folder)]
    assert main(["prepare", "--train_file", str(logs), *arguments]) == 1
    assert f"{field} {tmp_path / 'file'}" in capsys.readouterr().err
