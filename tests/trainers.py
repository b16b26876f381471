"""Tiny trainings: histories that walk through a catalogue, models for them, and trainers."""

import numpy as np
from datasets import Dataset
from transformers import AutoConfig, AutoModel, TrainingArguments, set_seed

from elastic_hf.data.collator import SequentialRecommendationCollator
from elastic_hf.training.trainer import SequentialRecommendationTrainer


NUM_ITEMS, NUM_USERS, MAX_LENGTH = 61, 97, 20


def make_histories(num_users=NUM_USERS, longest=40, seed=0):
    """Histories that walk through the catalogue in steps of 7: easy to learn."""
    generator = np.random.default_rng(seed)
    starts = generator.integers(NUM_ITEMS, size=num_users)
    lengths = generator.integers(4, longest + 1, size=num_users)
    return [
        ((start + 7 * np.arange(length)) % NUM_ITEMS + 3).tolist()
        for start, length in zip(starts, lengths, strict=True)
    ]


def train_rows(histories):
    return Dataset.from_dict(
        {"user_id": [f"user {i}" for i in range(len(histories))], "input_ids": [h[:-2] for h in histories]}
    )


def evaluation_rows(histories):
    return Dataset.from_dict({"input_ids": [h[:-1] for h in histories], "target": [h[-1] for h in histories]})


def with_times(rows, histories):
    """Rows with the times of their items, an hour apart, and of their targets."""
    seconds = [[1_700_000_000 + 3600 * i for i in range(len(history))] for history in histories]
    lengths = [len(items) for items in rows["input_ids"]]
    rows = rows.add_column("timestamps", [row[:length] for row, length in zip(seconds, lengths, strict=True)])
    if "target" not in rows.column_names:
        return rows
    targets = [row[length] for row, length in zip(seconds, lengths, strict=True)]
    return rows.add_column("target_timestamp", targets)


def make_model(model_type="elastic", **overrides):
    config = dict(vocab_size=NUM_ITEMS + 3, hidden_size=16, intermediate_size=24)
    if model_type == "elastic":
        config |= dict(num_interest_experts=5, num_memory_subkeys=6, num_memory_heads=1, memory_top_k=4)
    set_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(model_type, **{**config, **overrides}))


def with_events(rows, name, values):
    """Rows with a column of features of their events, whose values are as many as the items of each whole history."""
    lengths = [len(items) for items in rows["input_ids"]]
    return rows.add_column(name, [row[:length] for row, length in zip(values, lengths, strict=True)])


def make_trainer(output_dir, model=None, callbacks=None, histories=None, options=None, events=None, **arguments):
    defaults = dict(
        use_cpu=True,
        per_device_train_batch_size=16,
        num_train_epochs=3,
        learning_rate=5e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        metric_for_best_model="ndcg@10",
        greater_is_better=True,
        train_sampling_strategy="group_by_length",
        disable_tqdm=True,
    )
    histories = make_histories() if histories is None else histories
    model = make_model() if model is None else model
    config, datasets = model.config, [train_rows(histories), evaluation_rows(histories)]
    if config.use_timestamps:
        datasets = [with_times(rows, histories) for rows in datasets]
    for name, values in (events or {}).items():
        datasets = [with_events(rows, name, values) for rows in datasets]
    return SequentialRecommendationTrainer(
        model,
        TrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments}),
        SequentialRecommendationCollator(
            0,
            2,
            MAX_LENGTH,
            objective=config.training_objective,
            use_timestamps=config.use_timestamps,
            event_features=[*config.event_features],
        ),
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        callbacks=callbacks,
        **(options or {}),
    )


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
