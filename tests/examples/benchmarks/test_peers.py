import math

import polars as pl
import pytest

import peers


def write(folder, name, rows, schema):
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(folder / name)


def test_recommendations_of_both_sides_are_judged_by_the_rank_of_the_target(tmp_path):
    targets = [(user, 10 + user, 7, "test") for user in range(4)] + [(0, 99, 6, "validation")]
    write(tmp_path, peers.INTERACTIONS, targets, ["user_id", "item_id", "place", "split"])
    columns = ["user_id", "item_id", "score", "rank"]
    hits = [(0, 10, 0.5, 1), (1, 11, 0.5, 3), (2, 13, 0.5, 1), (3, 11, 0.5, 2)]
    write(tmp_path, peers.RECOMMENDED.format("elastic_hf"), hits, columns)
    write(tmp_path, peers.RECOMMENDED.format("peer"), hits[:1], columns)
    found = peers.measure(tmp_path)
    # The first two users' targets are found, at ranks 1 and 3; the others' are not.
    assert found["elastic_hf"]["hr@10"] == 2 / 4 and found["peer"]["hr@10"] == 1 / 4
    assert found["elastic_hf"]["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4)) / 4)
    assert found["elastic_hf"]["mrr@10"] == pytest.approx((1 + 1 / 3) / 4)
    assert found["peer"]["hr@10_standard_error"] == pytest.approx(1 / 4)


def test_both_sides_get_the_same_interactions_in_order(tmp_path, monkeypatch):
    rows = [(user, (user + 2 * step) % 11, step) for user in range(30) for step in range(6)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(tmp_path / "shop.csv")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    arguments = {"train_file": str(tmp_path / "shop.csv"), "dataset_name": "shop", "data_dir": None}
    peers.write_interactions(tmp_path, peers.argparse.Namespace(**arguments, timestamp_column=None))
    table = pl.read_parquet(tmp_path / peers.INTERACTIONS)
    assert sorted(table.select("user_id", "item_id", "place").rows()) == sorted(rows)
    last = table.filter(pl.col("place") >= 4).sort("user_id", "place")
    assert last["split"].to_list() == ["validation", "test"] * 30 and (table["split"] == "train").sum() == 120


def test_a_peer_that_was_trained_with_other_arguments_is_refused(tmp_path):
    args = peers.argparse.Namespace(**{name: 1 for name in peers.SETTINGS})
    assert not peers.is_trained(tmp_path, args)
    (tmp_path / peers.TRAINING).write_text(peers.json.dumps({"best_epoch": 7, **peers.settings_of_peer(args)}))
    assert peers.is_trained(tmp_path, args)
    args.seed = 2
    with pytest.raises(ValueError, match="folder .* must hold a peer trained with seed=2, found 1"):
        peers.is_trained(tmp_path, args)
