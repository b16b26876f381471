import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, HfArgumentParser

import elastic_hf
from elastic_hf import ElasticItemTokenizer, ElasticModel, plots
from elastic_hf.baselines import HSTUConfig
from elastic_hf.commands import evaluate, train
from elastic_hf.commands.arguments import (
    DataArguments,
    ModelArguments,
    SeqRecTrainingArguments,
    read_arguments,
)
from elastic_hf.commands.steps import describe_protocol
from elastic_hf.sharing.model_card import render_model_card
from elastic_hf.sharing.privacy import without_personal_data
from faults import PAGE, read_state, state_after_full_disk, states_after_kills, write_state
from launcher import RECIPES, TORCHRUN, accelerate_launch, launch


ROOT = Path(elastic_hf.__file__).parents[1]
MODULE = ("-m", "elastic_hf", "train")
NUM_USERS, NUM_ITEMS = 40, 30
TINY = "hidden_size=16,intermediate_size=16,num_interest_experts=4,num_memory_subkeys=6,num_hidden_layers=1"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with interactions in `shop.csv` and titles in `titles.csv`."""
    folder = tmp_path_factory.mktemp("shop")
    generator = np.random.default_rng(0)
    starts, lengths = generator.integers(NUM_ITEMS, size=NUM_USERS), generator.integers(8, 20, size=NUM_USERS)
    users = np.repeat(np.arange(NUM_USERS), lengths)
    steps = np.concatenate([np.arange(length) for length in lengths])
    items = (starts[users] + 7 * steps) % NUM_ITEMS
    columns = {"customer": users, "product": items, "when": 1_700_000_000 + steps}
    columns |= {"stars": 1 + items % 5, "paid": [None if item % 3 == 0 else item / 4 for item in items.tolist()]}
    pl.DataFrame(columns).write_csv(folder / "shop.csv")
    catalogue = np.arange(NUM_ITEMS)
    pl.DataFrame({"item_id": catalogue, "title": [f"Product no. {i}" for i in catalogue]}).write_csv(
        folder / "titles.csv"
    )
    return folder


def arguments_for(shop, output_dir, **changes):
    arguments = {
        "train_file": str(shop / "shop.csv"),
        "items_file": str(shop / "titles.csv"),
        "user_column": "customer",
        "item_column": "product",
        "timestamp_column": "when",
        "cache_dir": str(shop / "cache"),
        "k_core": 3,
        "max_length": 10,
        "config_overrides": TINY,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "output_dir": str(output_dir),
        **changes,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def command_line(arguments):
    values = {name: value if isinstance(value, list) else [value] for name, value in arguments.items()}
    return [part for name in values for part in (f"--{name}", *map(str, values[name]))]


def run(argv):
    """Run the command in this process and return what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train.main([str(part) for part in argv])
    return output.getvalue()


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory):
    """The output folder, the results and the standard output of one whole run."""
    output_dir = tmp_path_factory.mktemp("finished") / "shop-elastic"
    results_dir = output_dir.parent / "copies"
    output = run(command_line(arguments_for(shop, output_dir, results_dir=str(results_dir), report_to="tensorboard")))
    results = json.loads((output_dir / "all_results.json").read_text())
    assert json.loads((results_dir / "shop-elastic-42.json").read_text()) == results
    return output_dir, results, output


def describe(results, metric):
    return f"{results[metric]:.4f} ± {results[f'{metric}_standard_error']:.4f}"


def test_results(finished):
    _, results, _ = finished
    assert results["model_type"] == "elastic" and results["seed"] == 42 and results["max_length"] == 10
    assert results["num_users"] == NUM_USERS and results["num_items"] == NUM_ITEMS
    assert results["protocol"] == "leave_one_out, full ranking"
    assert "variant" not in results and results["main_row"] is True
    assert results["config"]["hidden_size"] == 16 and results["training"]["batch_size"] == 8
    assert results["epochs"] == 2 and results["best_epoch"] in (1, 2) and not results["stopped_early"]
    assert results["memory_slots"] == 36 and 0 < results["memory_share_retrieved"] <= 1
    assert 0 < results["memory_entropy"] <= 1
    assert 0 < results["test_popularity_percentile@10"] < 1 and 0 < results["test_popularity_percentile_target"] < 1
    assert 0 <= results["test_head_share@10"] <= 1 and 0 <= results["test_head_share_target"] <= 1
    assert results["k_core"] == 3 and "hub_dataset" not in results
    assert [log["epoch"] for log in results["log_history"] if "loss" in log] == [1, 2]
    assert [log["epoch"] for log in results["log_history"] if "eval_ndcg@10" in log] == [1, 2]
    assert results["training"]["metric_for_best_model"] == "ndcg@10"
    assert 0 < results["train_seconds"] <= results["total_seconds"]
    assert results["command"].startswith("elastic-hf train ") and "--max_length 10" in results["command"]
    for prefix in ("validation", "test", "popularity"):
        for name in ("hr", "ndcg", "mrr"):
            for k in (1, 5, 10, 20):
                assert 0 <= results[f"{prefix}_{name}@{k}_seen_kept"] <= 1
                assert 0 <= results[f"{prefix}_{name}@{k}"] <= 1
    assert {"hardware", "num_parameters", "torch_version", "transformers_version", "elastic_hf_version"} <= {*results}


@pytest.mark.long
def test_a_run_is_one_run_of_trackio(shop, tmp_path):
    """With the metrics of its training and its test, without those of popularity, and without a warning."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    arguments = arguments_for(shop, tmp_path / "run", report_to="trackio", project="shop")
    command = [sys.executable, *MODULE, *command_line(arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0 and "warning" not in process.stderr.lower(), process.stderr
    names = """
import trackio
(run,) = trackio.Api().runs("shop")
assert run.config["hidden_size"] == 16, run.config
print(run.name)
"""
    found = subprocess.run([sys.executable, "-c", names], env=environment, capture_output=True, text=True)
    assert found.stdout == "shop-elastic-42\n", found.stderr
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    for name in ("eval/ndcg@10", "test/ndcg@10"):
        command = ["-m", "trackio.cli", "get", "metric", "--project", "shop", "--run", "shop-elastic-42"]
        found = subprocess.run(
            [sys.executable, *command, "--metric", name, "--json"], env=environment, capture_output=True, text=True
        )
        values = [value["value"] for value in json.loads(found.stdout)["values"]]
        assert len(values) == (2 if name.startswith("eval") else 1)
    assert values == [pytest.approx(results["test_ndcg@10"])]


def test_output_folder(finished):
    output_dir, results, _ = finished
    names = {path.name for path in output_dir.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "items.parquet", "README.md"} <= names
    for picture in ("training_curve.png", "expert_horizons.png"):
        assert (output_dir / picture).read_bytes().startswith(b"\x89PNG")
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".tmp"))]
    assert list(output_dir.rglob("events.out.tfevents*"))

    tokenizer, model = AutoTokenizer.from_pretrained(output_dir), AutoModel.from_pretrained(output_dir)
    inputs = tokenizer([[1, 8, 15]], is_split_into_words=True, return_tensors="pt")
    recommended = model.recommend(**inputs, top_k=3).token_ids
    assert all(title.startswith("Product no. ") for title in tokenizer.convert_ids_to_titles(recommended)[0])
    # All interactions but the two targets of each user.
    assert sum(tokenizer.items["count"].to_pylist()) == results["num_interactions"] - 2 * NUM_USERS


def test_the_card_is_of_this_run_and_its_snippet_runs(finished, capsys):
    output_dir, results, _ = finished
    card = (output_dir / "README.md").read_text()
    assert str(render_model_card(output_dir, str(output_dir))) == card
    excluded, kept = (describe(results, f"test_ndcg@10{suffix}") for suffix in ("", "_seen_kept"))
    assert f"| NDCG@10 | {excluded} | {kept} |" in card
    assert f"best NDCG@10 on the validation items: {results['validation_ndcg@10']:.4f}" in card
    assert f"{NUM_USERS} users, {NUM_ITEMS} items, {results['num_interactions']} interactions" in card
    assert f"popularity percentile {results['test_popularity_percentile@10']:.2f}" in card
    assert "](training_curve.png)" in card and "](expert_horizons.png)" in card
    assert without_personal_data(results)["command"] in card and "None" not in card
    ((snippet, printed),) = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", card, flags=re.DOTALL)
    capsys.readouterr()
    exec(snippet)
    assert capsys.readouterr().out == printed and printed.count("Product no. ") == 3


def test_expert_half_lives_are_those_of_the_model(finished):
    output_dir, results, _ = finished
    log_half_life = AutoModel.from_pretrained(output_dir).model.experts.log_half_life.detach()
    half_lives = torch.tensor(results["expert_half_lives"])
    assert half_lives.shape == (2, 4)
    torch.testing.assert_close(half_lives, 1 + log_half_life.exp(), atol=5e-3, rtol=0)


def test_what_is_printed(finished):
    _, results, output = finished
    line = next(line for line in output.splitlines() if line.startswith("NDCG@10 "))
    cells = [
        cell for suffix in ("", "_seen_kept") for cell in (f"test_ndcg@10{suffix}", f"popularity_ndcg@10{suffix}")
    ]
    shown = [describe(results, cell) if cell.startswith("test") else f"{results[cell]:.4f}" for cell in cells]
    assert " ".join(line.split()[1:]) == " ".join(shown)
    assert "when the targets came" not in output
    recommended = output.split("Recommended:\n")[1].splitlines()[:10]
    assert [line.split()[0] for line in recommended] == [str(rank) for rank in range(1, 11)]
    assert all("Product no. " in line for line in recommended)


@pytest.mark.parametrize(
    ("settings", "name", "protocol"),
    [
        ({}, "beauty-sasrec-42-wide", "leave_one_out, full ranking"),
        ({"validation_users": 7}, "beauty-sasrec-42-sampled-wide", "leave_one_out, sampled validation, full ranking"),
        ({"split": "temporal"}, "beauty-sasrec-42-temporal-wide", "temporal, full ranking"),
    ],
)
def test_results_and_runs_are_named_by_how_the_data_are_split(settings, name, protocol):
    data_args = DataArguments(train_file="data/beauty.txt", **settings)
    training_args = SeqRecTrainingArguments(variant="wide", use_cpu=True)
    assert train.make_run_name(ModelArguments("sasrec"), data_args, training_args) == name
    assert data_args.protocol == protocol


def test_runs_of_models_that_read_times_are_named():
    data_args = DataArguments(train_file="data/beauty.txt", validation_users=7)
    training_args = SeqRecTrainingArguments(variant="wide", use_cpu=True)
    name = train.make_run_name(ModelArguments("hstu", use_timestamps=True), data_args, training_args)
    assert name == "beauty-hstu-42-sampled-timed-wide"
    config = HSTUConfig(use_timestamps=True)
    expected = "leave_one_out, sampled validation, full ranking, target times given"
    assert describe_protocol(data_args, config) == expected
    assert describe_protocol(data_args, HSTUConfig()) == data_args.protocol


@pytest.fixture(scope="module")
def timed(shop, tmp_path_factory):
    """The output folder, the results and the standard output of a run of a model that reads times."""
    output_dir = tmp_path_factory.mktemp("timed") / "shop-timed"
    output = run(command_line(arguments_for(shop, output_dir, use_timestamps=True, split_into_windows=True)))
    return output_dir, json.loads((output_dir / "all_results.json").read_text()), output


def test_a_run_with_times(timed):
    """Both figures are in the results: with the times of the targets told, and not."""
    output_dir, results, output = timed
    described = describe(results, "untimed_ndcg@10")
    assert f"The model was told when the targets came; without, its NDCG@10 is {described}.\n" in output
    assert results["protocol"] == "leave_one_out, full ranking, target times given"
    assert results["config"]["use_timestamps"] is True and results["config"]["request_dropout"] == 0.3
    names = {name.removeprefix("test_") for name in results if name.startswith("test_") and "@" in name}
    names = {name for name in names if name.startswith(("hr@", "ndcg@", "mrr@"))}
    assert len(names) == 3 * 4 * 2 * 2 and all(0 <= results[f"untimed_{name}"] <= 1 for name in names)
    assert any(results[f"untimed_{name}"] != results[f"test_{name}"] for name in names)
    experts = AutoModel.from_pretrained(output_dir).model.experts
    half_lives = torch.tensor(results["expert_half_lives_seconds"])
    torch.testing.assert_close(half_lives, experts.half_lives_seconds.detach(), rtol=1e-3, atol=0.01)
    assert (output_dir / "expert_horizons.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_of_a_model_that_reads_times_runs(timed, capsys):
    output_dir, results, _ = timed
    card = (output_dir / "README.md").read_text()
    assert "is told when each target came" in card
    assert f"Without that time its NDCG@10 on the test items is {results['untimed_ndcg@10']:.4f}." in card
    ((snippet, printed),) = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", card, flags=re.DOTALL)
    assert '"timestamps": [' in snippet and '"now": ' in snippet
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out == printed and printed.count("Product no. ") == 3
    example = results["example"]["history"]
    assert example.keys() == {"history", "timestamps", "now"} and len(example["timestamps"]) == len(example["history"])


def test_evaluate_gives_the_metrics_of_a_run_with_times(shop, timed, tmp_path):
    output_dir, results, _ = timed
    arguments = arguments_for(shop, None, model_name_or_path=output_dir, output_file=tmp_path / "metrics.json")
    unread = ("output_dir", "config_overrides", "num_train_epochs", "per_device_train_batch_size", "max_length")
    evaluate.main(command_line({name: value for name, value in arguments.items() if name not in unread}))
    found = json.loads((tmp_path / "metrics.json").read_text())
    metrics = {name for name in results if "@" in name}
    assert {name: found[name] for name in metrics} == {name: results[name] for name in metrics}
    assert found["protocol"] == results["protocol"]


@pytest.fixture(scope="module")
def featured(shop, tmp_path_factory):
    """The output folder, the results and the standard output of a run of a model that reads features of events."""
    output_dir = tmp_path_factory.mktemp("featured") / "shop-featured"
    changes = {"event_columns": ["stars", "paid"], "split_into_windows": True, "max_length": 5}
    output = run(command_line(arguments_for(shop, output_dir, **changes)))
    return output_dir, json.loads((output_dir / "all_results.json").read_text()), output


def test_a_run_with_features_of_events(shop, featured, tmp_path):
    output_dir, results, _ = featured
    assert results["protocol"] == "leave_one_out, full ranking, events with paid and stars"
    assert results["config"]["event_features"] == {"paid": 0, "stars": 5}
    assert AutoModel.from_pretrained(output_dir).config.event_features == {"paid": 0, "stars": 5}
    columns = ElasticItemTokenizer.from_pretrained(output_dir).event_columns
    assert columns["stars"] == {"categories": [1, 2, 3, 4, 5]} and columns["paid"].keys() == {"mean", "deviation"}
    arguments = arguments_for(shop, None, model_name_or_path=output_dir, output_file=tmp_path / "metrics.json")
    unread = ("output_dir", "config_overrides", "num_train_epochs", "per_device_train_batch_size", "max_length")
    arguments = {name: value for name, value in arguments.items() if name not in unread}
    evaluate.main(command_line(arguments))
    found = json.loads((tmp_path / "metrics.json").read_text())
    metrics = {name for name in results if "@" in name}
    assert {name: found[name] for name in metrics} == {name: results[name] for name in metrics}
    assert found["protocol"] == results["protocol"]
    with pytest.raises(ValueError, match="event_columns must be those of .*, paid, stars, found stars"):
        evaluate.main(command_line({**arguments, "event_columns": ["stars"]}))


def test_the_card_of_a_model_that_reads_features_of_events_runs(featured, capsys):
    output_dir, results, _ = featured
    card = (output_dir / "README.md").read_text()
    assert "The model reads, with each item of a history, paid and stars of its event" in card
    ((snippet, printed),) = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", card, flags=re.DOTALL)
    assert '"stars": [5, 5, 5],' in snippet
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out == printed and printed.count("Product no. ") == 3


def test_runs_of_models_that_read_features_of_events_are_named():
    data_args = DataArguments(train_file="data/beauty.txt", event_columns=["rating", "action"])
    training_args = SeqRecTrainingArguments(variant="wide", use_cpu=True)
    name = train.make_run_name(ModelArguments("sasrec"), data_args, training_args)
    assert name == "beauty-sasrec-42-with-action-rating-wide"


def test_models_that_read_no_features_of_events_refuse_them(shop, tmp_path):
    arguments = arguments_for(shop, tmp_path / "run", model_type="gru4rec", event_columns=["stars"])
    arguments["config_overrides"] = "hidden_size=16"
    with pytest.raises(ValueError, match="event_features must be empty for gru4rec, which reads none, found stars"):
        run(command_line(arguments))


@pytest.mark.parametrize(
    ("split_into_prefixes", "message"),
    [
        (False, "train_dataset must have the column timestamps for a model with use_timestamps=True"),
        (True, "histories must have the columns input_ids, timestamps, found "),
    ],
)
def test_a_source_without_times_is_refused_for_a_model_that_reads_them(shop, tmp_path, split_into_prefixes, message):
    (tmp_path / "lines.txt").write_text("".join(f"{user} {item}\n" for user in range(9) for item in range(5)))
    changes = {"train_file": str(tmp_path / "lines.txt"), "split_into_prefixes": split_into_prefixes}
    arguments = arguments_for(shop, tmp_path / "run", use_timestamps=True, **changes)
    for name in ("items_file", "user_column", "item_column", "timestamp_column"):
        del arguments[name]
    with pytest.raises(ValueError, match=message):
        run(command_line(arguments))


@pytest.fixture(scope="module")
def cafes(tmp_path_factory):
    """A folder with `shop.csv`, in which every user goes around three items."""
    folder = tmp_path_factory.mktemp("cafes")
    users, steps = np.repeat(np.arange(NUM_USERS), 12), np.tile(np.arange(12), NUM_USERS)
    items = (7 * users + steps % 3) % NUM_ITEMS
    pl.DataFrame({"customer": users, "product": items, "when": 1_700_000_000 + steps}).write_csv(folder / "shop.csv")
    return folder


def test_where_users_come_back_everything_follows_one_setting(cafes, tmp_path, caplog):
    changes = {"items_file": None, "num_train_epochs": 12, "learning_rate": 2e-2, "validation_users": 30}
    with caplog.at_level("INFO"):
        output = run(command_line(arguments_for(cafes, tmp_path, **changes)))
    assert "exclude_seen=False: 100.0% of the validation targets were seen before" in caplog.text
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["protocol"] == "leave_one_out, sampled validation, full ranking"
    assert results["num_seen_targets"] == results["num_validation_users"] == 30 and results["num_test_users"] == 40
    assert results["config"]["exclude_seen"] is False and results["config"]["mask_seen_in_loss"] is False
    assert results["training"]["metric_for_best_model"] == "ndcg@10_seen_kept"
    logs = {log["epoch"]: log["eval_ndcg@10_seen_kept"] for log in results["log_history"] if "loss" not in log}
    assert logs[results["best_epoch"]] == max(logs.values()) == pytest.approx(results["validation_ndcg@10_seen_kept"])
    assert results["test_hr@20"] == 0 and results["test_hr@10_seen_kept"] > 0.9
    assert output.count("NDCG@10 seen kept ") == 12
    header, line = (next(line for line in output.splitlines() if word in line) for word in ("test users", "HR@10 "))
    assert header.index("seen items kept") < header.index("seen items excluded")
    line = next(line for line in output.splitlines() if line.startswith("HR@10 "))
    assert line.split()[1:4] == describe(results, "test_hr@10_seen_kept").split()
    sample = results["sample"]
    assert {*sample["recommended"][:3]} == {*sample["history"]}
    card = (tmp_path / "README.md").read_text()
    assert "had had 100% of the validation targets before" in card and "of 30 users, drawn at random" in card
    assert "| metric | seen items kept | seen items excluded |" in card

    model = AutoModel.from_pretrained(tmp_path)
    assert not model.config.exclude_seen and model.config.mask_seen_in_loss is None
    popular = results["example"]["history"]
    pipe = elastic_hf.SequentialRecommendationPipeline(model, AutoTokenizer.from_pretrained(tmp_path), device="cpu")
    assert [item["item"] for item in results["example"]["recommended"]] == [
        item["item"] for item in pipe(popular, top_k=3, exclude_seen=False)
    ]


@pytest.mark.parametrize(
    ("num_seen_targets", "overrides", "exclude_seen", "masks_seen"),
    [
        (19, None, True, True),
        (20, None, False, False),
        (20, "exclude_seen=True", True, True),
        (19, "exclude_seen=False,hidden_size=32", False, False),
        (20, "mask_seen_in_loss=True", False, True),
        (19, "mask_seen_in_loss=False", True, False),
    ],
)
def test_whether_seen_items_are_kept_is_inferred_unless_it_is_said(
    num_seen_targets, overrides, exclude_seen, masks_seen
):
    tokenizer = elastic_hf.ElasticItemTokenizer.from_items(range(NUM_ITEMS), model_max_length=10)
    counts = {"num_seen_targets": num_seen_targets, "num_validation_users": 100}
    model_args, training_args = (
        ModelArguments("elastic", config_overrides=overrides),
        SeqRecTrainingArguments(use_cpu=True),
    )
    config = train.make_config(model_args, tokenizer, counts, training_args)
    assert (config.exclude_seen, config.masks_seen) == (exclude_seen, masks_seen)


def test_a_checkpoint_whose_loss_was_set_by_name_is_gone_on_from(finished, tmp_path):
    tokenizer, config = AutoTokenizer.from_pretrained(finished[0]), AutoConfig.from_pretrained(finished[0])
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((finished[0] / "config.json").read_text())
    del settings["exclude_seen"]
    (tmp_path / "config.json").write_text(json.dumps(settings | {"mask_seen_in_loss": True}))
    train.check_checkpoint(str(tmp_path), config, tokenizer)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"mask_seen_in_loss": False}))
    with pytest.raises(ValueError, match="was trained with another mask_seen_in_loss: choose another output_dir"):
        train.check_checkpoint(str(tmp_path), config, tokenizer)


def test_a_trained_model_keeps_its_own_setting(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    counts = {"num_seen_targets": 100, "num_validation_users": 100}
    model_args, training_args = (
        ModelArguments(model_name_or_path=str(finished[0])),
        SeqRecTrainingArguments(use_cpu=True),
    )
    assert train.make_config(model_args, tokenizer, counts, training_args).exclude_seen


def test_nothing_is_overwritten(shop, finished):
    output_dir, _, _ = finished
    before = (output_dir / "all_results.json").read_bytes()
    with pytest.raises(ValueError, match="already holds a finished run"):
        run(command_line(arguments_for(shop, output_dir)))
    assert (output_dir / "all_results.json").read_bytes() == before


def test_a_model_of_another_origin_is_not_overwritten(shop, finished, tmp_path):
    shutil.copy(finished[0] / "model.safetensors", tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"output_dir {tmp_path} must hold no model of another origin"):
            run(command_line(arguments_for(shop, tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_second_run_in_the_same_folder_is_refused(shop, tmp_path):
    holder = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print(); input()"
    )
    lock = str(tmp_path / ".lock")
    process = subprocess.Popen(
        [sys.executable, "-c", holder, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    with pytest.raises(ValueError, match=f"output_dir {tmp_path} is in use by another run"):
        run(command_line(arguments_for(shop, tmp_path)))
    process.communicate("\n")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("missing", ["README.md", "expert_horizons.png", "copies/shop-elastic-42.json"])
def test_what_is_made_from_the_results_is_made_again(shop, finished, tmp_path, monkeypatch, missing):
    shutil.copytree(finished[0].parent, tmp_path / "run")
    (output_dir,) = (tmp_path / "run").glob("shop-*")
    file = tmp_path / "run" / missing if "/" in missing else output_dir / missing
    whole = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(train, "run", None)
    command = command_line(arguments_for(shop, output_dir, results_dir=str(tmp_path / "run" / "copies")))
    output = run(command)
    assert file.exists() and (missing == "README.md" or file.read_bytes() == whole)
    assert "NDCG@10" in output and f"Results: {output_dir / 'all_results.json'}" in output
    with pytest.raises(ValueError, match="already holds a finished run"):
        run(command)


def test_a_run_trained_further_removes_the_results_of_the_shorter_one(shop, finished, tmp_path, monkeypatch):
    output_dir = shutil.copytree(finished[0], tmp_path / "run")
    (checkpoint,) = output_dir.glob("checkpoint-10")
    monkeypatch.setattr(train, "validate", lambda *args: 1 / 0)
    changes = {"num_train_epochs": 3, "resume_from_checkpoint": str(checkpoint)}
    with pytest.raises(ZeroDivisionError):
        run(command_line(arguments_for(shop, output_dir, **changes)))
    assert not (output_dir / "all_results.json").exists() and not (output_dir / "README.md").exists()
    assert (output_dir / "model.safetensors").read_bytes() != (finished[0] / "model.safetensors").read_bytes()


def test_an_interrupted_run_goes_on(shop, finished, tmp_path):
    output_dir, results, _ = finished
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(checkpoints[0], tmp_path / checkpoints[0].name)
    # A file with the arguments does what the command line does, and what follows it changes some of them.
    arguments_file = tmp_path / "arguments.json"
    arguments_file.write_text(json.dumps(arguments_for(shop, "elsewhere", num_train_epochs=7)))
    run([arguments_file, "--num_train_epochs", 2, "--output_dir", tmp_path])
    resumed = json.loads((tmp_path / "all_results.json").read_text())
    assert resumed["resumed_from_checkpoint"] == str(tmp_path / checkpoints[0].name)
    same = [key for key in results if "@" in key] + ["epochs", "steps", "train_loss", "log_history"]
    assert {key: resumed[key] for key in same} == {key: results[key] for key in same}
    assert 0 < resumed["train_seconds"] <= resumed["total_seconds"]
    expected, found = (load_file(folder / "model.safetensors") for folder in (output_dir, tmp_path))
    assert all((expected[name] == found[name]).all() for name in expected)


def test_evaluate_gives_the_metrics_of_the_run(shop, finished, tmp_path, capsys):
    output_dir, results, output = finished
    arguments = arguments_for(shop, None, model_name_or_path=output_dir, output_file=tmp_path / "metrics.json")
    unread = ("output_dir", "config_overrides", "num_train_epochs", "per_device_train_batch_size", "max_length")
    evaluate.main(command_line({name: value for name, value in arguments.items() if name not in unread}))
    found = json.loads((tmp_path / "metrics.json").read_text())
    metrics = {name for name in results if "@" in name or name.endswith("_target")}
    assert {name: found[name] for name in metrics} == {name: results[name] for name in metrics}
    assert capsys.readouterr().out.strip() in output


def test_a_trained_model_is_evaluated_again_from_yaml(shop, finished, tmp_path):
    output_dir, results, _ = finished
    arguments_file = tmp_path / "arguments.yaml"
    arguments = arguments_for(
        shop, tmp_path / "again", config_overrides=None, model_name_or_path=str(output_dir), do_predict=True
    )
    arguments_file.write_text(json.dumps(arguments))  # JSON is YAML
    run([arguments_file])
    again = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert {key for key in again if "@" in key} == {key for key in results if "@" in key and "validation" not in key}
    assert again["test_ndcg@10"] == results["test_ndcg@10"]
    assert not (tmp_path / "again" / "model.safetensors").exists()


@pytest.mark.parametrize(("capabilities", "num_warnings"), [({}, 1), ({"avx512_bf16": True}, 0)])
def test_bfloat16_without_instructions_for_it_is_said(shop, tmp_path, monkeypatch, caplog, capabilities, num_warnings):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    run(command_line(arguments_for(shop, tmp_path / "run", bf16=True, num_train_epochs=1)))
    assert sum("bf16" in record.message for record in caplog.records) == num_warnings


@pytest.mark.parametrize(
    "recipe", sorted(set(RECIPES.glob("*.yaml")) - set(RECIPES.glob("accelerate-*"))), ids=lambda path: path.stem
)
def test_a_recipe_names_its_dataset_and_a_model_that_exists(recipe):
    parser = HfArgumentParser((ModelArguments, DataArguments, SeqRecTrainingArguments))
    arguments = read_arguments([str(recipe), "--seed", "7", "--bf16", "false"])
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments)
    assert recipe.stem == f"{data_args.dataset_name}-{model_args.model_type}"
    assert training_args.seed == 7 and training_args.results_dir == "examples/benchmarks/results"
    config = AutoConfig.for_model(model_args.model_type)
    if model_args.config_overrides:
        config.update_from_string(model_args.config_overrides)
    config.validate()


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("elastic_paper", "hidden_size=16,num_memory_subkeys=6,num_interest_experts=8"),
        ("sasrec", "hidden_size=16"),
        ("lightsans", "hidden_size=16,training_objective=masked_item"),
        ("popularity", None),
    ],
)
def test_a_baseline(shop, finished, tmp_path, monkeypatch, model_type, overrides):
    monkeypatch.chdir(tmp_path)
    arguments = arguments_for(shop, "", config_overrides=overrides, model_type=model_type, seed=7, variant="short")
    del arguments["output_dir"]
    run(command_line(arguments | {"results_dir": "results"}))
    results = json.loads((tmp_path / "results" / f"shop-{model_type}-7-short.json").read_text())
    assert results["model_type"] == model_type
    assert results["variant"] == "short" and results["main_row"] is False
    popularity = {key: value for key, value in finished[1].items() if key.startswith("popularity_")}
    assert {key: results[key] for key in popularity} == popularity
    if model_type == "popularity":
        assert all(results[key.replace("popularity", "test")] == value for key, value in popularity.items())
    model = AutoModel.from_pretrained(tmp_path / "outputs" / f"shop-{model_type}-7-short")
    assert model.config.model_type == model_type
    positions = {"sasrec": 10, "lightsans": 11}
    assert getattr(model.config, "max_position_embeddings", None) == positions.get(model_type)
    assert results.get("memory_slots") == (36 if model_type == "elastic_paper" else None)


def test_a_run_on_all_prefixes(shop, tmp_path):
    arguments = arguments_for(shop, tmp_path, model_type="elastic_paper", split_into_prefixes=True)
    arguments["config_overrides"] = "hidden_size=16,num_memory_subkeys=6,num_interest_experts=8"
    run(command_line(arguments))
    results = json.loads((tmp_path / "all_results.json").read_text())
    num_rows = results["num_interactions"] - 3 * results["num_users"]  # not the first, nor the two held out
    assert results["split_into_prefixes"] is True and results["split_into_windows"] is False
    assert results["steps"] == 2 * -(-num_rows // 8)
    assert "| all prefixes of the histories | yes |" in (tmp_path / "README.md").read_text()


def test_a_causal_model_is_trained_on_all_prefixes_at_their_last_position(shop, tmp_path, monkeypatch):
    """No objective is named; the layers never run at the other positions."""
    lasts = set()
    forward = ElasticModel.forward

    def spy(self, *args, **kwargs):
        lasts.add(kwargs["last_position_only"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ElasticModel, "forward", spy)
    run(command_line(arguments_for(shop, tmp_path, split_into_prefixes=True, num_train_epochs=1)))
    results = json.loads((tmp_path / "all_results.json").read_text())
    num_rows = results["num_interactions"] - 3 * results["num_users"]
    assert results["steps"] == -(-num_rows // 8) and lasts == {True}
    assert results["config"]["training_objective"] == "prefix" and results["split_into_prefixes"] is True
    assert AutoConfig.from_pretrained(tmp_path).training_objective == "prefix"


@pytest.mark.parametrize("model_type", ["elastic", "hstu"])
@pytest.mark.parametrize("split_into_prefixes", [True, False])
def test_prefixes_are_trained_on_with_times_and_features_of_events(shop, tmp_path, model_type, split_into_prefixes):
    """All of them, or one of each history at random."""
    overrides = TINY if model_type == "elastic" else "hidden_size=16,num_hidden_layers=1"
    changes = {"use_timestamps": True, "event_columns": ["stars", "paid"], "model_type": model_type, "max_length": 5}
    changes |= {"split_into_prefixes": split_into_prefixes, "num_train_epochs": 1}
    changes["config_overrides"] = overrides + ("" if split_into_prefixes else ",training_objective=prefix")
    run(command_line(arguments_for(shop, tmp_path, **changes)))
    results = json.loads((tmp_path / "all_results.json").read_text())
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.training_objective == "prefix" and config.use_timestamps
    assert config.event_features == {"paid": 0, "stars": 5}
    num_rows = results["num_interactions"] - 3 * NUM_USERS if split_into_prefixes else NUM_USERS
    assert results["steps"] == -(-num_rows // 8)
    assert results["untimed_ndcg@10"] is not None and results["protocol"].endswith("events with paid and stars")


@pytest.mark.parametrize(
    ("model_type", "overrides", "positions"),
    [
        ("sasrec", None, 10),
        ("bert4rec", "hidden_size=32", 10),
        ("linrec", "is_causal=False", 10),
        ("gru4rec", "hidden_size=32,training_objective=prefix", None),
    ],
)
def test_prefixes_set_the_objective_of_new_models(model_type, overrides, positions):
    """Which needs no position for a mask."""
    tokenizer = ElasticItemTokenizer.from_items(range(NUM_ITEMS), model_max_length=10)
    counts = {"num_seen_targets": 0, "num_validation_users": 100}
    training_args = SeqRecTrainingArguments(split_into_prefixes=True, use_cpu=True)
    config = train.make_config(
        ModelArguments(model_type, config_overrides=overrides), tokenizer, counts, training_args
    )
    assert config.training_objective == "prefix"
    assert getattr(config, "max_position_embeddings", None) == positions


def test_prefixes_set_the_objective_of_a_model_that_is_trained_further(shop, finished, tmp_path):
    """And of none that is evaluated alone, which may read a mask at the end."""
    changes = {"config_overrides": None, "model_name_or_path": str(finished[0]), "num_train_epochs": 1}
    run(command_line(arguments_for(shop, tmp_path, split_into_prefixes=True, **changes)))
    assert AutoConfig.from_pretrained(tmp_path).training_objective == "prefix"
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    training_args = SeqRecTrainingArguments(split_into_prefixes=True, do_eval=True, use_cpu=True)
    config = train.make_config(ModelArguments(model_name_or_path=str(finished[0])), tokenizer, {}, training_args)
    assert config.training_objective == "next_item"


@pytest.mark.parametrize("further", [{}, {"model_name_or_path": "trained"}])
@pytest.mark.parametrize("objective", ["next_item", "masked_item"])
def test_another_objective_than_that_of_prefixes_is_refused_before_data_are_read(further, objective):
    arguments = {"split_into_prefixes": True, "train_file": "none", "output_dir": "none", "use_cpu": True, **further}
    overrides = f"hidden_size=16,training_objective={objective},num_negatives=3"
    with pytest.raises(ValueError, match=f"split_into_prefixes needs training_objective='prefix', .*'{objective}' in"):
        train.read_command_line(command_line({**arguments, "config_overrides": overrides}))


@pytest.mark.parametrize(
    ("launcher", "module"),
    [
        pytest.param(TORCHRUN, MODULE, marks=pytest.mark.long),
        pytest.param(accelerate_launch("ddp"), MODULE, marks=pytest.mark.long),
        (accelerate_launch("fsdp2"), ("-m", "launcher")),
    ],
    ids=["torchrun", "accelerate", "FSDP2"],
)
def test_two_processes(shop, finished, tmp_path, launcher, module):
    arguments = arguments_for(shop, tmp_path / "two", num_train_epochs=1, split_into_windows=True)
    output = launch(launcher, *module, *command_line(arguments))
    results = json.loads((tmp_path / "two" / "all_results.json").read_text())
    assert results["split_into_windows"] is True
    assert results["num_processes"] == 2 and results["command"].startswith("torchrun --nproc_per_node 2")
    assert results["command"].endswith(" --fsdp") == (module != MODULE)
    assert output.count("Recommended:") == 1
    assert results["expert_half_lives"] and results["memory_slots"] == 36
    # The data and the baseline do not depend on the number of processes.
    popularity = [key for key in results if key.startswith("popularity_")]
    assert {key: results[key] for key in popularity} == {key: finished[1][key] for key in popularity}


def test_a_run_that_is_pushed_ends_with_its_results(shop, tmp_path, hub):
    arguments = arguments_for(shop, tmp_path / "out", push_to_hub=True, hub_model_id="ada/shop")
    run(command_line(arguments | {"hub_strategy": "end", "num_train_epochs": 1}))
    files = hub.files("ada/shop")
    for name in ("model.safetensors", "training_curve.png"):
        assert files[name] == (tmp_path / "out" / name).read_bytes()
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert json.loads(files["all_results.json"]) == without_personal_data(results)
    card = render_model_card(tmp_path / "out", "ada/shop", has_code=True)
    assert files["README.md"].decode() == str(card) and "trust_remote_code=True" in str(card)
    assert "modeling_elastic.py" in files and "training_args.bin" not in files

    # Had it been killed before its card, the same command would write the same one and publish the same files.
    written = (tmp_path / "out" / "README.md").read_bytes()
    (tmp_path / "out" / "README.md").unlink()
    run(command_line(arguments | {"hub_strategy": "end", "num_train_epochs": 1}))
    assert (tmp_path / "out" / "README.md").read_bytes() == written
    assert hub.files("ada/shop") == files
    (tmp_path / "out" / "README.md").unlink()
    del arguments["hub_model_id"]
    run(command_line(arguments | {"hub_strategy": "end", "num_train_epochs": 1}))
    assert hub.files("ada/out").keys() == files.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "sasrec5"}, "model_type must be one of elastic, .*sasrec, found 'sasrec5'"),
        ({"do_eval": True}, "set model_name_or_path"),
        ({"hub_token": "hf_secret"}, "hub_token would be written into the results"),
        ({"config_overrides": "hidden_sise=16"}, "hidden_sise"),
        ({"config_overrides": "vocab_size=16"}, "vocab_size must be the tokenizer's"),
        ({"config_overrides": "training_loss=mse"}, "training_loss must be one of"),
        ({"item_column": "article"}, "article"),
        ({"resume_from_checkpoint": "no-run"}, "resume_from_checkpoint must be a whole checkpoint, found no-run: "),
        (
            {"split_into_windows": True, "split_into_prefixes": True},
            "cut in different places, found both",
        ),
    ],
)
def test_bad_arguments_are_named(shop, tmp_path, changes, message):
    arguments_file = tmp_path / "arguments.json"
    arguments_file.write_text(json.dumps(arguments_for(shop, tmp_path / "out", **changes)))
    with pytest.raises(ValueError, match=message):
        run([arguments_file])
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_checkpoint_of_another_run_is_refused(shop, finished, tmp_path):
    checkpoint = next(finished[0].glob("checkpoint-*"))
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    with pytest.raises(ValueError, match="was trained with another hidden_dropout"):
        run(command_line(arguments_for(shop, tmp_path, config_overrides=TINY + ",hidden_dropout=0.4")))


def test_a_folder_that_cannot_be_written_is_named_before_training(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run", None)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="output_dir .*file.* must be a folder that can be written to"):
        run(command_line(arguments_for(shop, tmp_path / "file")))
    with pytest.raises(ValueError, match="results_dir .*file.* must be a folder that can be written to"):
        run(command_line(arguments_for(shop, tmp_path / "out", results_dir=str(tmp_path / "file"))))


def test_a_run_without_evaluations(shop, tmp_path, caplog):
    output = run(command_line(arguments_for(shop, tmp_path, eval_strategy="no", num_train_epochs=1)))
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert "best_epoch" not in results and not results["stopped_early"]
    assert re.search(r"^epoch 1/1  loss \d\.\d+$", output, flags=re.MULTILINE)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = ("a metric over fewer than 500", "not using 'stars'")
    assert [warning for warning in warnings if not any(part in warning for part in expected)] == []


def test_a_training_that_diverges_writes_no_results(shop, tmp_path):
    with pytest.raises(FloatingPointError, match="the loss at step .* must be finite, found nan: .* learning_rate 1e"):
        run(command_line(arguments_for(shop, tmp_path, learning_rate=1e9)))
    assert not (tmp_path / "all_results.json").exists() and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", []),
        ("# nothing\n", []),
        ("user_column: null\nseed: 7\n", ["--seed", "7"]),
        (
            "config_overrides:\nbf16: false\nitems_file: títulos.csv\n",
            ["--bf16", "false", "--items_file", "títulos.csv"],
        ),
        ("\ufeffreport_to: [tensorboard, wandb]\n", ["--report_to", "tensorboard", "wandb"]),
    ],
)
def test_recipes(tmp_path, monkeypatch, text, arguments):
    (tmp_path / "recipe.yaml").write_bytes(text.encode())
    monkeypatch.setattr("locale.getpreferredencoding", lambda *args: "ascii")
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    recipe = str(tmp_path / "recipe.yaml")
    assert read_arguments([recipe, "--max_length", "10"]) == [*arguments, "--max_length", "10"]


@pytest.mark.parametrize(("text", "found"), [("- a\n", "list"), ("seed", "str"), ("7", "int")])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, text, found):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"recipe.yaml must hold arguments as `name: value`, found a {found}"):
        read_arguments([str(tmp_path / "recipe.yaml")])


def test_titles_that_the_locale_has_no_letters_for(shop, finished, tmp_path, monkeypatch):
    titles = [f"Nº {item} “ö”" for item in range(NUM_ITEMS)]
    pl.DataFrame({"item_id": range(NUM_ITEMS), "title": titles}).write_csv(tmp_path / "titles.csv")
    arguments = arguments_for(
        shop, tmp_path / "out", items_file=str(tmp_path / "titles.csv"), num_train_epochs=1, save_strategy="no"
    )
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    train.main(command_line(arguments | {"eval_strategy": "no"}))
    assert b"N? " in printed.getvalue() and printed.getvalue().isascii()


# Faults


def start(shop, folder):
    """Run in two folders of a folder."""
    changes = {"results_dir": str(folder / "copies"), "num_train_epochs": 1}
    changes |= {"save_strategy": "no", "eval_strategy": "no"}
    return run(command_line(arguments_for(shop, folder / "out", **changes)))


def outcome(folder):
    """Return what must not depend on the faults that a run has met."""
    results = json.loads((folder / "out" / "all_results.json").read_text())
    assert json.loads((folder / "copies" / "shop-elastic-42.json").read_text()) == results
    assert (folder / "out" / "README.md").read_text() == str(render_model_card(folder / "out", str(folder / "out")))
    weights = {name: weight.tolist() for name, weight in load_file(folder / "out" / "model.safetensors").items()}
    changing = {"command", "train_seconds", "total_seconds"}
    return {key: value for key, value in results.items() if key not in changing}, weights, read_state(folder).keys()


@pytest.fixture
def figures_without_matplotlib(monkeypatch):
    def draw(figures, stream, **options):
        stream.write(bytes(3 * PAGE))

    monkeypatch.setattr(plots, "plot_training_curve", draw)
    monkeypatch.setattr(plots, "plot_expert_horizons", draw)


def test_a_killed_run_ends_with_the_results_of_a_whole_one(shop, tmp_path, figures_without_matplotlib):
    whole = tmp_path / "whole"
    whole.mkdir()
    *states, last = states_after_kills(whole, lambda: start(shop, whole))
    expected = outcome(whole)
    assert len(states) > 25
    for state in states:
        again = write_state(state, tmp_path / "again")
        start(shop, again)
        assert outcome(again) == expected
    with pytest.raises(ValueError, match="already holds a finished run"):
        start(shop, write_state(last, tmp_path / "again"))
    assert read_state(tmp_path / "again") == last


@pytest.mark.long
def test_a_run_that_finds_the_disk_full_ends_when_it_has_space(shop, tmp_path, figures_without_matplotlib):
    start(shop, tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    for num_writes in count():
        folder = tmp_path / str(num_writes)
        folder.mkdir()
        if state_after_full_disk(folder, lambda folder=folder: start(shop, folder), num_writes) is None:
            break
        start(shop, folder)
        assert outcome(folder) == expected
    assert num_writes > 10
    assert outcome(folder) == expected
