"""What of a folder is published: no user, no local path, unless that is asked for."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from elastic_hf import ElasticItemTokenizer
from elastic_hf.sharing.repository import files_to_publish
from factories import NUM_TOKENS, elastic_model


HOME = "/home/ada.lovelace"
USER = "ada@example.org"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    titles = [f"Product {i}" for i in range(NUM_TOKENS - 3)]
    ElasticItemTokenizer.from_items(titles, model_max_length=11).save_pretrained(folder)
    elastic_model().save_pretrained(folder)
    return folder


def run_results(seed, **changes):
    return {
        "model_type": "elastic",
        "dataset": f"{HOME}/shop.csv",
        "hub_dataset": None,
        "seed": seed,
        "command": f"{HOME}/bin/python run.py --train_file {HOME}/shop.csv --output_dir {HOME}/out",
        "resumed_from_checkpoint": f"{HOME}/out/checkpoint-7",
        "protocol": "leave_one_out, full ranking",
        "test_ndcg@10": 0.25,
        "test_hr@10": 0.5,
        "test_mrr@10": 0.125,
        **{f"test_{name}@10_seen_kept": 0.0625 for name in ("ndcg", "hr", "mrr")},
        "test_coverage@10": 0.75,
        "sample": {"user_id": USER, "history": ["Product 3"], "recommended": ["Product 4"], "target": "Product 5"},
        **changes,
    }


@pytest.fixture
def folder(whole, tmp_path):
    """As a run leaves it, with all that tells who ran it, and on whose data."""
    folder = shutil.copytree(whole, tmp_path / "out")
    (folder / "results").mkdir()
    for seed, name in ((42, "all_results.json"), (43, "results/shop-elastic-43.json")):
        (folder / name).write_text(json.dumps(run_results(seed)))
    (folder / "README.md").write_text(f"# Shop\n\n`{HOME}/shop.csv` of {USER}")
    for name in ("trainer_state.json", "training_args.bin", "checkpoint-7/trainer_state.json", "runs/events.out"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{HOME} {USER}")
    return folder


def published(folder, *args, **options):
    contents = {}
    for operation in files_to_publish(folder, *args, **options):
        with operation.as_file() as file:
            contents[operation.path_in_repo] = file.read()
    return contents


def test_nothing_personal_is_published(folder):
    contents = published(folder, "org/shop")
    for secret in (HOME, str(folder), str(Path.home()), USER):
        assert [name for name, content in contents.items() if secret.encode() in content] == []
    for name, seed in (("all_results.json", 42), ("results/shop-elastic-43.json", 43)):
        results = json.loads(contents[name])
        assert results["seed"] == seed and results["test_ndcg@10"] == 0.25 and results["dataset"] == "shop.csv"
        assert results["command"] == "python run.py --train_file shop.csv --output_dir out"
        assert not results.keys() & {"sample", "resumed_from_checkpoint"}
    assert "python run.py --train_file shop.csv --output_dir out" in contents["README.md"].decode()
    assert not [name for name in contents if "trainer_state" in name or name.endswith(".bin") or "events" in name]


def test_it_is_published_where_that_is_asked_for(folder):
    contents = published(folder, "org/shop", include_personal_data=True)
    for name in ("all_results.json", "results/shop-elastic-43.json"):
        assert contents[name] == (folder / name).read_bytes() and USER.encode() in contents[name]
    # The card is read by everyone, and does not.
    assert USER.encode() not in contents["README.md"] and HOME.encode() not in contents["README.md"]


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer_config.json"])
def test_a_path_in_a_text_of_the_user_is_refused_by_the_name_of_the_file(folder, name):
    (folder / "all_results.json").unlink()
    (folder / "README.md").write_text("# Shop\n")
    if name == "README.md":
        (folder / name).write_text(f"# Shop\n\nTrained on {HOME}/shop.csv.\n")
    else:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"name_or_path": f"{HOME}/out"}))
    with pytest.raises(ValueError, match=f"{name} must name no local path, found '{HOME}"):
        files_to_publish(folder, "org/shop")
    assert HOME.encode() in published(folder, "org/shop", include_personal_data=True)[name]


def test_a_path_in_the_header_of_the_weights_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "made_from": f"{HOME}/shop.csv"})
    with pytest.raises(ValueError, match="model.safetensors must name no local path"):
        files_to_publish(folder, "org/shop")


def test_a_card_that_names_the_folder_names_the_repository(folder):
    """As one does that a trainer has written."""
    (folder / "all_results.json").unlink()
    (folder / "README.md").write_text(f'# Shop\n\n    pipeline(model="{folder}")\n')
    contents = published(folder, "org/shop")
    assert contents["README.md"].decode() == '# Shop\n\n    pipeline(model="org/shop")\n'
    with pytest.raises(ValueError, match="README.md must name no local path"):
        files_to_publish(folder)


def test_results_without_anything_personal_are_published_as_they_are(folder):
    text = '{"model_type": "elastic",  "test_hr@10": 0.5}'
    (folder / "all_results.json").write_text(text)
    (folder / "results" / "shop-elastic-43.json").unlink()
    (folder / "README.md").write_text("# Shop\n")
    assert published(folder)["all_results.json"].decode() == text


def test_files_of_an_earlier_repository_are_replaced(folder):
    """A folder that was downloaded from the Hub holds the handler and the requirements of then."""
    (folder / "requirements.txt").write_text("elastic_hf==0.1.0\n")
    (folder / "handler.py").write_text("import elastic_hf\n")
    contents = published(folder, "org/shop")
    assert b"elastic_hf" not in contents["requirements.txt"] and b"import elastic_hf" not in contents["handler.py"]
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    assert published(folder, "org/shop") == contents
