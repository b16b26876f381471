"""What is personal in results, whatever wrote them."""

import json

import pytest

from elastic_hf.sharing.privacy import find_local_path, without_personal_data


def test_no_user_is_shown():
    results = {
        "model_type": "elastic",
        "test_ndcg@10": 0.25,
        "main_row": True,
        "variant": None,
        "config": {"hidden_size": 16},
        "expert_half_lives": [[2.0]],
        "expert_half_lives_seconds": [[60.0]],
        "sample": {"user_id": "ada@example.org", "history": ["Alien"], "recommended": ["Heat"], "target": "Kes"},
        "first_user": "ada@example.org",
        "user_ids": ["ada@example.org"],
        "target": "Kes",
        "user_id": 17,
        "target_id": 4,
    }
    public = without_personal_data(results)
    keys = ("model_type", "test_ndcg@10", "main_row", "variant", "config")
    keys += ("expert_half_lives", "expert_half_lives_seconds")
    assert public == {key: results[key] for key in keys}


@pytest.mark.parametrize(
    ("dataset", "public"),
    [
        ("/home/ada/clients/shop.csv", "shop.csv"),
        ("clients/acme/shop.csv", "shop.csv"),
        ("../shop/", "shop"),
        (r"C:\Users\ada\shop.csv", "shop.csv"),
        ("ml-1m", "ml-1m"),
    ],
)
def test_a_file_is_told_by_its_name(dataset, public):
    assert without_personal_data({"dataset": dataset, "hub_dataset": None})["dataset"] == public


def test_a_dataset_of_the_hub_keeps_its_id():
    command = "python examples/run_seqrec.py --dataset_name org/clicks"
    results = {"dataset": "org/clicks", "hub_dataset": "org/clicks", "command": command}
    assert without_personal_data(results) == results


@pytest.mark.parametrize(
    ("command", "public"),
    [
        (
            "python examples/run_seqrec.py examples/recipes/ml-1m-elastic.yaml --seed 43 --learning_rate 1e-3",
            "python examples/run_seqrec.py examples/recipes/ml-1m-elastic.yaml --seed 43 --learning_rate 1e-3",
        ),
        (
            "/home/ada/venv/bin/python /srv/run.py --train_file=/home/ada/shop.csv --items_file ~/titles.csv",
            "python run.py --train_file=shop.csv --items_file titles.csv",
        ),
        (
            "python run.py --train_file '/home/ada/my shop/log of May.csv' --output_dir ../acme/out",
            "python run.py --train_file 'log of May.csv' --output_dir out",
        ),
        (
            "python run.py --config_overrides hidden_size=16,training_loss=bce --output_dir file:///home/ada/out/",
            "python run.py --config_overrides hidden_size=16,training_loss=bce --output_dir out",
        ),
        ("python run.py --title 'never closed --train_file /home/ada/shop.csv", None),
    ],
)
def test_commands_keep_the_names_of_files(command, public):
    found = without_personal_data({"command": command})["command"]
    assert "ada" not in found
    if public is not None:
        assert found == public


def test_other_texts_hold_no_absolute_path_at_any_depth():
    results = {
        "training": {"schedule": ["linear", {"file": "/home/ada/a b/c.json"}]},
        "hardware": "CPU of /mnt/x/y, 2",
    }
    public = without_personal_data(results)
    assert public == {"training": {"schedule": ["linear", {"file": "c.json"}]}, "hardware": "CPU of y, 2"}
    json.dumps(public)


@pytest.mark.parametrize(
    "path", ["/home/ada/out", "~/out", "~ada/out", r"C:\Users\ada", "C:/Users/ada", r"\\server\share", "file:///srv/x"]
)
def test_absolute_paths_are_found(path):
    for text in (path, f'model = load("{path}")', f"see `{path}`.", f"({path})", f"--output_dir={path}"):
        assert find_local_path(text).startswith(path), text


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/a/b, http://example.org/~ada/b and s3://bucket/key",
        "[a link](/org/model/tree/main) and <br/>",
        "org/model, examples/run_seqrec.py, ./out, ../out",
        "items/s, and/or, 1/2, a / b, km/h, 3:4, n/a",
        '@misc{a, author = {M\\"uller}, doi = {10.1145/2827872}}',
    ],
)
def test_what_is_no_path_is_not_taken_for_one(text):
    assert find_local_path(text) is None
