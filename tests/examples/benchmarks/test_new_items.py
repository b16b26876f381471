import json

import numpy as np
import polars as pl
import pytest

import new_items


NUM_USERS, NUM_ITEMS = 60, 50


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the script writes of users who walk through items whose titles say where these are."""
    folder = tmp_path_factory.mktemp("walks")
    users, steps = np.repeat(np.arange(NUM_USERS), 9), np.tile(np.arange(9), NUM_USERS)
    items = (3 * users + steps) % NUM_ITEMS
    log = {"user_id": users, "item_id": items, "timestamp": steps}
    pl.DataFrame(log).write_parquet(folder / "interactions.parquet")
    attributes = [[item % 5, 5 + item % 3] for item in range(NUM_ITEMS)]
    frame = pl.DataFrame({"item_id": range(NUM_ITEMS), "attributes": attributes})
    frame.write_parquet(folder / "items.parquet")
    angles = 2 * np.pi * np.arange(NUM_ITEMS) / NUM_ITEMS
    vectors = [[np.sin(angle), np.cos(angle), 0.5] for angle in angles]
    frame = pl.DataFrame({"item_id": range(NUM_ITEMS), "vector": vectors})
    frame.reverse().write_parquet(folder / "title_vectors.parquet")
    recipe = {"model_type": "elastic", "train_file": str(folder / "interactions.parquet"), "k_core": 0}
    recipe |= {"max_length": 8, "split_into_windows": True, "cache_dir": str(folder / "cache"), "use_cpu": True}
    sizes = "hidden_size=16,intermediate_size=16,num_interest_experts=4,num_memory_subkeys=6,exclude_seen=True"
    recipe |= {"config_overrides": sizes, "num_train_epochs": 1, "disable_tqdm": True, "seed": 7}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    arguments = ["--recipe", str(folder / "recipe.json"), "--output", str(folder / "out.json")]
    new_items.main(["--num_train_epochs", "2", "--id_scales", "0", "1.5", *arguments])
    return json.loads((folder / "out.json").read_text())


def test_a_tenth_of_the_items_is_new(results):
    assert (results["num_items"], results["num_new_items"]) == (45, 5)
    assert results["num_new_targets"] + results["num_trained_targets"] == NUM_USERS
    assert results["num_new_targets"] > 0
    assert results["config"]["item_features"]["vector"] == {"kind": "vector", "size": 2}
    assert results["seed"] == 7 and results["training"]["epochs"] == 2


def test_every_model_is_measured_where_it_can_be(results):
    assert {name: {*targets} for name, targets in results["results"].items()} == {
        "nearest titles": {"new", "trained"},
        "ids, trained items": {"trained"},
        "features, trained items": {"trained"},
        "features, all items, id_scale 0": {"new", "trained"},
        "features, all items, id_scale 1.5": {"new", "trained"},
    }
    # The next item is the second nearest to the last one: none but those before it is nearer.
    assert results["results"]["nearest titles"]["new"]["hr@10"] == 1
    assert results["results"]["nearest titles"]["trained"]["hr@10"] == 1
    for of_model in results["results"].values():
        for of_targets in of_model.values():
            assert 0 <= of_targets["hr@10"] <= 1 and of_targets["hr@10_standard_error"] >= 0
