import sys

import polars as pl
import pytest
from transformers import AutoModel, TrainerState


@pytest.mark.long
def test_two_workers_train_one_model(ray_cluster, tmp_path, monkeypatch, capsys):
    """60 histories in batches of 8 by two processes are 4 steps, and the model recommends."""
    train_on_ray = pytest.importorskip("train_on_ray", reason="needs Ray Train")
    rows = [(user, (user + 3 * place) % 37, place) for user in range(60) for place in range(12)]
    pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").write_csv(tmp_path / "shop.csv")
    monkeypatch.chdir(tmp_path)
    arguments = ["--train_file", "shop.csv", "--output_dir", "trained", "--num_train_epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["train_on_ray.py", *arguments])
    train_on_ray.main()
    assert "'eval_ndcg@10': " in capsys.readouterr().out
    assert TrainerState.load_from_json("trained/checkpoint-4/trainer_state.json").global_step == 4
    model = AutoModel.from_pretrained("trained")
    assert model.recommend([[3, 4, 5]], top_k=2).token_ids.shape == (1, 2)
    (reported,) = (tmp_path / "trained" / "ray_train").glob("checkpoint_*/checkpoint/model.safetensors")
    assert reported.read_bytes() == (tmp_path / "trained" / "model.safetensors").read_bytes()
