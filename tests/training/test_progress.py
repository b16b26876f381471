import pytest
from transformers import TrainerCallback

from elastic_hf.training.progress import EvaluationLines, ProgressBar
from trainers import evaluation_rows, make_histories, make_model, make_trainer


def test_one_line_per_evaluation(tmp_path, capsys):
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    trainer.train()
    trainer.evaluate()
    lines = capsys.readouterr().out.splitlines()
    logs = trainer.state.log_history
    losses = [log["loss"] for log in logs if "loss" in log]
    first, second = [log for log in logs if "eval_ndcg@10" in log][:2]
    assert second["eval_ndcg@10"] > first["eval_ndcg@10"]
    assert lines == [
        f"epoch {epoch}/2  loss {loss:.4g}  NDCG@10 {log['eval_ndcg@10']:.4f} (best)  HR@10 {log['eval_hr@10']:.4f}"
        for epoch, loss, log in zip((1, 2), losses, (first, second), strict=True)
    ]


def test_a_line_has_the_metrics_that_count(tmp_path, capsys):
    model = make_model(exclude_seen=False)
    trainer = make_trainer(tmp_path, model, num_train_epochs=1, metric_for_best_model="ndcg@10_seen_kept")
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "eval_ndcg@10" in log]
    ndcg, hit_rate = log["eval_ndcg@10_seen_kept"], log["eval_hr@10_seen_kept"]
    line = capsys.readouterr().out.strip()
    assert line.endswith(f"  NDCG@10 seen kept {ndcg:.4f} (best)  HR@10 seen kept {hit_rate:.4f}")
    assert line.count("NDCG@10") == 1


def test_what_is_not_the_best_is_not_called_so(tmp_path, capsys):
    trainer = make_trainer(tmp_path, learning_rate=0.0, num_train_epochs=2, metric_for_best_model="mrr@5")
    trainer.train()
    first, second = capsys.readouterr().out.splitlines()
    assert "  MRR@5 " in first and first.count("(best)") == 1 and first.index("(best)") < first.index("NDCG@10")
    assert "(best)" not in second and second.startswith("epoch 2/2  loss ")


def test_a_training_without_evaluations_prints_its_losses(tmp_path, capsys):
    arguments = dict(eval_strategy="no", save_strategy="no", logging_strategy="steps", logging_steps=2)
    make_trainer(tmp_path, max_steps=5, **arguments).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["step 2/5  loss", "step 4/5  loss"]


def test_other_metrics_and_several_sets(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path,
        options={"compute_metrics": lambda prediction: {"median_rank": 4.5}},
        metric_for_best_model="median_rank",
        greater_is_better=False,
        num_train_epochs=1,
    )
    trainer.train()
    assert capsys.readouterr().out.endswith("  median rank 4.5000 (best)\n")
    trainer = make_trainer(tmp_path / "two", metric_for_best_model=None, num_train_epochs=1)
    rows = evaluation_rows(make_histories())
    trainer.eval_dataset = {"new": rows.select(range(5)), "old": rows.select(range(5, 97))}
    trainer.train()
    first, second = capsys.readouterr().out.splitlines()
    assert "loss" in first and "new NDCG@10" in first and "new HR@10" in first
    assert "old NDCG@10" in second and "loss" not in second


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_bars_and_callbacks_of_the_users_own(tmp_path, disable_tqdm):
    class Own(TrainerCallback):
        pass

    trainer = make_trainer(tmp_path, callbacks=[Own()], disable_tqdm=disable_tqdm)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Own in kinds and EvaluationLines in kinds
    assert (ProgressBar in kinds) != disable_tqdm
    assert not {"PrinterCallback", "ProgressCallback"} & {kind.__name__ for kind in kinds}
