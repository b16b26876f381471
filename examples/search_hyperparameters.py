#!/usr/bin/env python
"""
Searches the settings of a training with Optuna, through `Trainer.hyperparameter_search`: those that rank the
validation items best. The test items are not looked at.

    python examples/search_hyperparameters.py --num_trials 20
    python examples/search_hyperparameters.py examples/recipes/ml-100k-elastic.yaml --num_trials 50

All other arguments are those of `elastic-hf train`. What is tried stands in `suggest_training` and `suggest_model`.
Trials that fall behind the others after some epochs are stopped. They are kept in a file, `--study`: started again
with it, the search goes on. In the end it prints the command that trains with the best settings.
"""

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from copy import deepcopy

import optuna

from elastic_hf.commands.steps import set_up_process
from elastic_hf.commands.train import (
    make_config,
    make_model,
    make_run_name,
    make_trainer,
    read_command_line,
    read_data,
    training_rows,
)
from elastic_hf.results import SUFFIXES


def suggest_training(trial: optuna.Trial) -> dict:
    """Return arguments of the training to try."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 5e-4, 2e-2, log=True),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [8, 16, 32, 64]),
        "weight_decay": trial.suggest_categorical("weight_decay", [0.0, 0.01, 0.1]),
    }


def suggest_model(trial: optuna.Trial) -> dict:
    """Return fields of the configuration to try."""
    return {"hidden_dropout": trial.suggest_float("hidden_dropout", 0.0, 0.5, step=0.1)}


def search(argv: Sequence[str], num_trials: int, study: str) -> list[str]:
    """Try settings, and return the arguments of `elastic-hf train` with the best of them.

    Args:
        argv (`Sequence[str]`): Arguments of `elastic-hf train`.
        num_trials (`int`): How many settings are tried, beside those that the study has.
        study (`str`): SQLite file of the trials; it is made if it is not there.

    Raises:
        ValueError: if `argv` names a trained model.
    """
    model_args, data_args, training_args = read_command_line(argv)
    if model_args.model_name_or_path is not None:
        raise ValueError(f"model_name_or_path must be left out: every trial trains a new model, found {argv}")
    kept = {"storage": f"sqlite:///{study}", "study_name": make_run_name(model_args, data_args, training_args)}
    kept |= {"direction": "maximize", "load_if_exists": True}
    num_before = len(optuna.create_study(**kept).trials)
    training_args.save_strategy, training_args.load_best_model_at_end = "no", False
    training_args.early_stopping_patience = 0
    set_up_process(training_args)
    tokenizer, item_features, splits, counts = read_data(model_args, data_args, training_args)
    config = make_config(model_args, tokenizer, counts, training_args)
    metric = f"eval_ndcg@10{SUFFIXES[config.exclude_seen]}"

    def model_init(trial: optuna.Trial | None):
        tried = deepcopy(config)
        tried.update({} if trial is None else suggest_model(trial))
        return make_model(model_args, tried, item_features)

    with tempfile.TemporaryDirectory() as folder:
        training_args.output_dir = folder
        train_dataset = training_rows(splits["train"], tokenizer, config, training_args)
        trainer = make_trainer(model_init(None), tokenizer, train_dataset, splits["validation"], training_args)
        trainer.model_init = model_init
        best = trainer.hyperparameter_search(
            suggest_training,
            # A training ends with its best epoch.
            compute_objective=lambda _: max(log[metric] for log in trainer.state.log_history if metric in log),
            n_trials=num_trials,
            backend="optuna",
            sampler=optuna.samplers.TPESampler(seed=training_args.seed + num_before),  # not those of before again
            **kept,
        )
    print(f"\nTrial {best.run_id} is the best, with NDCG@10 {best.objective:.4f} on the validation items:")
    chosen = best.hyperparameters
    fields = [name for name in chosen if hasattr(config, name)]
    overrides = [f"{name}={chosen[name]:g}" for name in fields]
    if model_args.config_overrides:
        overrides.insert(0, model_args.config_overrides)
    arguments = [part for name in chosen if name not in fields for part in (f"--{name}", f"{chosen[name]:g}")]
    return [*argv, *arguments, "--config_overrides", ",".join(overrides)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_trials", type=int, default=20, help="Number of settings that are tried.")
    parser.add_argument("--study", default="trials.sqlite", help="SQLite file of the trials.")
    args, argv = parser.parse_known_args()
    print(f"elastic-hf train {shlex.join(search(argv, args.num_trials, args.study))}")


if __name__ == "__main__":
    main()
