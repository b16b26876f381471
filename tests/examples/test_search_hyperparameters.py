import polars as pl
import pytest

from elastic_hf.commands import train
from elastic_hf.commands.train import read_command_line


optuna = pytest.importorskip("optuna", reason="the search needs Optuna")

import render_outputs  # noqa: E402
import search_hyperparameters  # noqa: E402


TINY = "hidden_size=8,intermediate_size=8,num_interest_experts=4,num_memory_subkeys=6,num_hidden_layers=1"


@pytest.fixture
def arguments(tmp_path):
    render_outputs.fill(tmp_path)
    named = {"train_file": tmp_path / "shop.csv", "user_column": "customer", "item_column": "sku", "use_cpu": True}
    named |= {"timestamp_column": "time", "num_train_epochs": 2, "max_length": 9, "config_overrides": TINY}
    named |= {"cache_dir": tmp_path / "cache"}
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


def test_the_best_on_the_validation_items_is_chosen(arguments, tmp_path, monkeypatch, capsys):
    """The test items are not there; started again, the search goes on with other settings."""
    tokenize = train.tokenize

    def without_test_items(*args):
        splits = tokenize(*args)
        splits.pop("test")
        return splits

    monkeypatch.setattr(train, "tokenize", without_test_items)
    file = tmp_path / "trials.sqlite"
    for num_trials in (2, 1):
        command = search_hyperparameters.search(arguments, num_trials, str(file))
    study = optuna.load_study(study_name="shop-elastic-42", storage=f"sqlite:///{file}")
    assert len(study.trials) == 3 and len({trial.params["learning_rate"] for trial in study.trials}) == 3
    for trial in study.trials:
        assert trial.value == max(trial.intermediate_values.values()) and len(trial.intermediate_values) == 2
    best = max(study.trials, key=lambda trial: trial.value)
    assert f"Trial {best.number} is the best, with NDCG@10 {best.value:.4f}" in capsys.readouterr().out

    model_args, data_args, training_args = read_command_line(command)
    assert data_args.max_length == 9
    assert training_args.learning_rate == pytest.approx(best.params["learning_rate"], rel=1e-5)
    assert training_args.per_device_train_batch_size == best.params["per_device_train_batch_size"]
    assert training_args.weight_decay == best.params["weight_decay"]
    assert model_args.config_overrides == f"{TINY},hidden_dropout={best.params['hidden_dropout']:g}"


def test_settings_are_tried(arguments, tmp_path, monkeypatch):
    """Those of the model and those of the training."""
    trained = []
    suggest = optuna.trial.FixedTrial(
        {"learning_rate": 0.01, "per_device_train_batch_size": 16, "weight_decay": 0.1, "hidden_dropout": 0.4}
    )

    class Trainer(train.SequentialRecommendationTrainer):
        def train(self, *args, **kwargs):
            kwargs["trial"] = suggest
            output = super().train(*args, **kwargs)
            trained.append((self.args.learning_rate, self.args.weight_decay, self.model.config.hidden_dropout))
            trained.append((self.model.model.dropout.p, self.state.max_steps))
            return output

    monkeypatch.setattr(train, "SequentialRecommendationTrainer", Trainer)
    search_hyperparameters.search(arguments, 1, str(tmp_path / "trials.sqlite"))
    assert trained == [(0.01, 0.1, 0.4), (0.4, 2 * 4)]


def test_trials_train_what_the_command_does(arguments, tmp_path, monkeypatch):
    """With the features of items, and all that the collator is told."""
    known = pl.read_csv(tmp_path / "shop.csv")["sku"].unique()
    pl.DataFrame({"item_id": known, "brand": ["a", "b"] * (len(known) // 2) + ["a"] * (len(known) % 2)}).write_parquet(
        tmp_path / "items.parquet"
    )
    trainers, models = [], []

    def noted(made, make):
        return lambda *args: made.append(make(*args)) or made[-1]

    monkeypatch.setattr(search_hyperparameters, "make_trainer", noted(trainers, train.make_trainer))
    monkeypatch.setattr(search_hyperparameters, "make_model", noted(models, train.make_model))
    more = ["--items_file", str(tmp_path / "items.parquet"), "--item_features", "brand", "--mask_probability", "0.7"]
    command = search_hyperparameters.search([*arguments, *more], 1, str(tmp_path / "trials.sqlite"))
    assert [trainer.data_collator.mask_probability for trainer in trainers] == [0.7]
    for model in models:
        assert model.model.item_features.features[0].encoded[3:].unique().tolist() == [1, 2]
    assert len(models) > 1
    assert command[: len(arguments) + len(more)] == [*arguments, *more]


def test_a_trained_model_is_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match="model_name_or_path must be left out"):
        search_hyperparameters.search([*arguments, "--model_name_or_path", "here"], 1, str(tmp_path / "t.sqlite"))
