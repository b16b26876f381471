import json
import math
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainingArguments

from adapters import LowRankAdapter
from elastic_hf.models import catalogue
from elastic_hf.models.item_tokenizer import ElasticItemTokenizer
from elastic_hf.training.trainer import SequentialRecommendationTrainer
from launcher import TORCHRUN, launch
from trainers import (
    MAX_LENGTH,
    NUM_ITEMS,
    NUM_USERS,
    evaluation_rows,
    losses,
    make_histories,
    make_model,
    make_trainer,
    train_rows,
    with_times,
)


def test_training_learns_and_keeps_the_best_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, load_best_model_at_end=True, num_train_epochs=4, save_total_limit=1)
    untrained = trainer.evaluate()["eval_ndcg@10"]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_ndcg@10" in log and log["step"] > 0]
    best = max(logs, key=lambda log: log["eval_ndcg@10"])
    assert best["eval_ndcg@10"] > 2 * untrained
    assert trainer.state.best_metric == best["eval_ndcg@10"]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
    assert trainer.evaluate()["eval_ndcg@10"] == best["eval_ndcg@10"]


@pytest.mark.parametrize(
    ("overrides", "least_hr"),
    [
        ({}, 0.95),
        ({"training_objective": "prefix"}, 0.95),
        ({"model_type": "linrec", "training_objective": "prefix", "is_causal": False}, 0.95),
        ({"model_type": "bert4rec"}, 0.5),  # one item in five is a target
    ],
    ids=["next item", "causal prefix", "bidirectional prefix", "masked item"],
)
def test_every_objective_overfits_50_users(tmp_path, overrides, least_hr):
    trainer = make_trainer(
        tmp_path,
        make_model(hidden_dropout=0.0, **overrides),
        histories=make_histories(50),
        learning_rate=1e-2,
        max_steps=400,
        eval_strategy="no",
        save_strategy="no",
    )
    trainer.train()
    assert trainer.evaluate()["eval_hr@1"] > least_hr


def test_early_stopping(tmp_path):
    trainer = make_trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(2)],
        load_best_model_at_end=True,
        learning_rate=0.0,  # the metric cannot get better
        num_train_epochs=10,
    )
    trainer.train()
    assert trainer.state.epoch == 3


def test_gradient_accumulation_changes_nothing(tmp_path):
    arguments = dict(train_sampling_strategy="random", num_train_epochs=2, optim="sgd", learning_rate=0.5)
    trainers = [
        make_trainer(
            tmp_path,
            make_model(hidden_dropout=0.0),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=16 // batch_size,
            **arguments,
        )
        for batch_size in (16, 4)
    ]
    start = make_model(hidden_dropout=0.0).model.embed_tokens.weight
    for trainer in trainers:
        trainer.train()
    assert losses(trainers[0]) == pytest.approx(losses(trainers[1]), abs=2e-4)
    weights = [trainer.model.model.embed_tokens.weight for trainer in trainers]
    assert (weights[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_bfloat16(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, save_strategy="no")
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.predict(trainer.eval_dataset).predictions[0].min() >= 1


def test_dataloader_workers(tmp_path):
    trainers = [
        make_trainer(tmp_path / str(n), make_model(hidden_dropout=0.0), dataloader_num_workers=n, num_train_epochs=1)
        for n in (0, 2)
    ]
    for trainer in trainers:
        trainer.train()
    assert losses(trainers[0]) == losses(trainers[1])


def test_a_stream_trains_and_is_evaluated_as_its_rows_are(tmp_path):
    whole = make_trainer(tmp_path, eval_strategy="no", save_strategy="no", max_steps=4)
    streams = [dataset.to_iterable_dataset() for dataset in (whole.train_dataset, whole.eval_dataset)]
    trainer = SequentialRecommendationTrainer(
        whole.model, whole.args, whole.data_collator, train_dataset=streams[0], eval_dataset=streams[1]
    )
    before = whole.model.lm_head.weight.clone()
    assert trainer.train().global_step == 4 and not torch.equal(whole.model.lm_head.weight, before)
    assert trainer.evaluate()["eval_ndcg@10"] == whole.evaluate()["eval_ndcg@10"]


def test_stock_arguments_warn_of_nothing(tmp_path):
    """On a processor, PyTorch warns of every data loader whose memory is to be pinned."""
    trainer = make_trainer(tmp_path, use_cpu=False, num_train_epochs=1)
    assert trainer.args.dataloader_pin_memory
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
        trainer.predict(evaluation_rows(make_histories()))
    assert [str(warning.message) for warning in found] == []
    assert trainer.args.dataloader_pin_memory


def test_evaluation_is_the_same_for_any_batch_size(tmp_path):
    trainers = [
        make_trainer(tmp_path, per_device_eval_batch_size=batch_size, eval_accumulation_steps=2)
        for batch_size in (1, 7, 64, 1000)
    ]
    predictions = [trainer.predict(trainer.eval_dataset).predictions for trainer in trainers]
    ranks, top_ids = predictions[0]
    assert ranks.shape == (NUM_USERS, 2) and top_ids.shape == (NUM_USERS, 20)
    for other_ranks, other_top_ids in predictions[1:]:
        np.testing.assert_array_equal(other_ranks, ranks)
        np.testing.assert_array_equal(other_top_ids, top_ids)


def test_ranks_and_recommendations_agree(tmp_path):
    """The target stands in the list of recommendations at its rank, and the list holds nothing seen."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    prediction = trainer.predict(trainer.eval_dataset)
    ranks, top_ids = prediction.predictions
    np.testing.assert_array_equal(prediction.label_ids, trainer.eval_dataset["target"][:])
    num_hits = 0
    for row, (rank, _), recommended in zip(trainer.eval_dataset, ranks, top_ids, strict=True):
        assert not set(row["input_ids"]) & set(recommended.tolist())
        if rank <= 20:
            num_hits += 1
            assert recommended[rank - 1] == row["target"]
        else:
            assert row["target"] not in recommended
    assert num_hits > NUM_USERS / 2


def test_seen_items_beyond_the_window_are_excluded_too(tmp_path):
    *history, a, b, c, d, e = range(3, NUM_ITEMS + 3)
    assert len(history) > 2 * MAX_LENGTH
    ranks, top_ids = make_trainer(tmp_path).predict(evaluation_rows([[*history, e]])).predictions
    assert sorted(top_ids[0, :5]) == [a, b, c, d, e]
    assert (top_ids[0, 5:] == -1).all()
    assert top_ids[0, ranks[0, 0] - 1] == e


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_users_who_alternate_among_few_items_are_recommended_these(tmp_path, exclude_seen):
    """Each of 60 users goes around four items: only a model that keeps what was seen can tell what comes next."""
    firsts = np.random.default_rng(0).integers(3, NUM_ITEMS - 1, size=60)
    histories = [[int(first) + step % 4 for step in range(14)] for first in firsts]
    model = make_model(exclude_seen=exclude_seen, hidden_dropout=0.0)
    trainer = make_trainer(tmp_path, model, histories=histories, num_train_epochs=15, learning_rate=2e-2)
    trainer.train()
    rows = evaluation_rows(histories)
    prediction = trainer.predict(rows)
    ranks, top_ids = prediction.predictions
    is_seen = [[top in row for top in tops] for row, tops in zip(rows["input_ids"], top_ids[:, :4], strict=True)]
    assert (ranks[:, 0] == NUM_ITEMS).all()  # the targets were all seen
    if exclude_seen:
        assert not np.any(is_seen)
    else:
        assert np.mean(is_seen) > 0.5 and prediction.metrics["test_hr@10_seen_kept"] > 0.9
        top_1 = top_ids[:, 0] == np.array(rows["target"])
        assert (ranks[top_1, 1] == 1).all()
        found = model.recommend(torch.tensor(rows["input_ids"]), top_k=4).token_ids
        assert found.tolist() == top_ids[:, :4].tolist()


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_a_constant_or_nan_scorer_has_no_hits(tmp_path, value):
    model = make_model()
    torch.nn.init.constant_(model.get_output_embeddings().weight, value)
    metrics = make_trainer(tmp_path, model).evaluate()
    hits = [metrics[f"eval_{name}@20{suffix}"] for name in ("hr", "ndcg", "mrr") for suffix in ("", "_seen_kept")]
    assert hits == [0] * 6


def test_evaluation_scores_a_few_users_at_once_and_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "MAX_SCORES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(catalogue, "MIN_ROWS", 9)
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=25)
    scored = []
    trainer.model.lm_head.register_forward_hook(lambda module, args, scores: scored.append(len(scores)))
    assert "eval_coverage@10" in trainer.evaluate()
    batches = [catalogue.NUM_PROBES, 9, 9, 7]
    assert scored == [*batches * 3, catalogue.NUM_PROBES, 9, 9, 4]


def test_unknown_items_in_a_history_change_no_metric(tmp_path):
    histories = make_histories(20)
    with_unknown = [[1, *history[:-1], 1, history[-1]] for history in histories]  # [UNK] is 1
    trainer = make_trainer(tmp_path)
    expected, found = (trainer.predict(evaluation_rows(rows)).predictions for rows in (histories, with_unknown))
    short = [len(history) < MAX_LENGTH - 2 for history in histories]
    assert any(short)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one[short], other[short])


def test_an_adapter_of_the_head_is_trained_and_evaluated(tmp_path):
    model = make_model(tie_word_embeddings=False)
    plain_head = model.lm_head
    model.lm_head = LowRankAdapter(plain_head, rank=4)
    weights = [model.lm_head.up.weight, model.lm_head.down.weight]
    before = [weight.clone() for weight in weights]
    trainer = make_trainer(tmp_path, model, save_strategy="no", num_train_epochs=1)
    trainer.train()
    assert not any(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    adapted = trainer.predict(trainer.eval_dataset).predictions
    model.lm_head = plain_head
    assert not np.array_equal(trainer.predict(trainer.eval_dataset).predictions[0], adapted[0])
    with torch.no_grad():
        plain_head.weight += weights[0] @ weights[1]
    merged = trainer.predict(trainer.eval_dataset).predictions
    for one, other in zip(adapted, merged, strict=True):
        assert (one == other).mean() > 0.99


# Times


def timed_histories(num_users=200):
    """Items that go on by 7 after an hour and by 11 after a day, and when they came."""
    generator = np.random.default_rng(0)
    histories, seconds = [], []
    for _ in range(num_users):
        is_long = generator.random(generator.integers(9, 14)) < 0.5
        items = generator.integers(NUM_ITEMS) + np.cumsum(np.where(is_long, 11, 7))
        histories.append((items % NUM_ITEMS + 3).tolist())
        seconds.append((1_700_000_000 + np.cumsum(np.where(is_long, 86_400, 3600))).tolist())
    return histories, seconds


@pytest.mark.parametrize("model_type", ["elastic", pytest.param("hstu", marks=pytest.mark.long)])
def test_a_model_that_is_told_when_predicts_what_depends_on_it(tmp_path, model_type):
    histories, seconds = timed_histories()
    model = make_model(
        model_type,
        use_timestamps=True,
        exclude_seen=False,
        hidden_dropout=0.0,
        **({"intermediate_size": 24} if model_type == "elastic" else {"max_position_embeddings": MAX_LENGTH}),
    )
    trainer = make_trainer(tmp_path, model, histories=histories, num_train_epochs=1)
    rows = trainer.train_dataset.remove_columns("timestamps")
    trainer.train_dataset = rows.add_column("timestamps", [row[:-2] for row in seconds])
    users = trainer.eval_dataset.remove_columns(["timestamps", "target_timestamp"])
    users = users.add_column("timestamps", [row[:-1] for row in seconds])
    users = users.add_column("target_timestamp", [row[-1] for row in seconds])
    trainer.args.num_train_epochs = 40
    trainer.args.eval_strategy = "no"
    trainer.train()
    told = trainer.evaluate(users)
    trainer.data_collator = replace(trainer.data_collator, know_request=False)
    untold = trainer.evaluate(users)
    assert told["eval_hr@1_seen_kept"] > 0.9 > 0.7 > untold["eval_hr@1_seen_kept"]
    assert untold["eval_hr@5_seen_kept"] > 0.8


def test_the_columns_of_times_are_checked_at_the_door(tmp_path):
    model = make_model(use_timestamps=True)
    rows = train_rows(make_histories())
    timed = with_times(rows, make_histories())
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    tokenizer = ElasticItemTokenizer.from_items(range(NUM_ITEMS), MAX_LENGTH)
    trainer = SequentialRecommendationTrainer(model, arguments, train_dataset=timed, processing_class=tokenizer)
    assert trainer.data_collator.use_timestamps
    with pytest.raises(ValueError, match="train_dataset must have the column timestamps for a model with use_time"):
        SequentialRecommendationTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    users = with_times(evaluation_rows(make_histories()), make_histories())
    with pytest.raises(ValueError, match="eval_dataset must have the columns timestamps and target_timestamp"):
        SequentialRecommendationTrainer(
            model,
            arguments,
            train_dataset=timed,
            eval_dataset=users.remove_columns("target_timestamp"),
            processing_class=tokenizer,
        )


def test_a_model_without_times_does_not_fetch_them(tmp_path):
    """The columns are there, as for each source with times."""
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    expected = trainer.evaluate()
    timed = with_times(trainer.eval_dataset, make_histories())
    trainer.train_dataset = with_times(trainer.train_dataset, make_histories())
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader(timed)):
        assert not {"timestamps", "target_timestamp"} & {*loader.dataset.column_names}
        assert "timestamps" not in next(iter(loader))
    assert trainer.evaluate(timed)["eval_ndcg@10"] == expected["eval_ndcg@10"]
    trainer.train()


# Features of events


@pytest.mark.parametrize(
    "model_type", ["elastic", *(pytest.param(name, marks=pytest.mark.long) for name in ("hstu", "sasrec"))]
)
def test_a_model_that_reads_a_feature_of_each_event_predicts_what_depends_on_it(tmp_path, model_type):
    """Items that go on by 11 after a like and by 7 after none; the last event's feature is read, too."""
    generator = np.random.default_rng(0)
    histories, likes = [], []
    for _ in range(200):
        liked = generator.random(generator.integers(9, 14)) < 0.5
        steps = np.concatenate([[0], np.where(liked, 11, 7)[:-1]])
        histories.append(((generator.integers(NUM_ITEMS) + steps.cumsum()) % NUM_ITEMS + 3).tolist())
        likes.append((1.0 + liked).tolist())
    sizes = {"intermediate_size": 24} if model_type == "elastic" else {"max_position_embeddings": MAX_LENGTH}
    scores = {}
    for event_features in ({}, {"liked": 2}):
        config = {"event_features": event_features, "exclude_seen": False, "hidden_dropout": 0.0, **sizes}
        model = make_model(model_type, **config)
        trainer = make_trainer(
            tmp_path / str(len(event_features)),
            model,
            histories=histories,
            num_train_epochs=30,
            eval_strategy="no",
            save_strategy="no",
            events={"liked": likes},
        )
        trainer.train()
        scores[len(event_features)] = trainer.evaluate()["eval_hr@1_seen_kept"]
    assert scores[1] > 0.9 > 0.7 > scores[0]


def test_event_columns_are_checked_at_the_door(tmp_path):
    histories = make_histories()
    rows = train_rows(histories)
    rated = rows.add_column("rating", [[1.0] * len(items) for items in rows["input_ids"]])
    tokenizer = ElasticItemTokenizer.from_items(
        range(NUM_ITEMS), MAX_LENGTH, Dataset.from_dict({"rating": [[1, 2, 3, 4, 5]]})
    )
    model = make_model(event_features=tokenizer.event_features)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    options = {"train_dataset": rated, "processing_class": tokenizer}
    trainer = SequentialRecommendationTrainer(model, arguments, **options)
    assert trainer.data_collator.event_features == ["rating"]
    assert next(iter(trainer.get_train_dataloader()))["event_features"].shape[2] == 1
    with pytest.raises(
        ValueError, match="train_dataset must have the column rating for a model with event_features={'r"
    ):
        SequentialRecommendationTrainer(model, arguments, **{**options, "train_dataset": rows})
    with pytest.raises(
        ValueError, match="eval_dataset must have the column rating for a model with event_features={'ra"
    ):
        SequentialRecommendationTrainer(model, arguments, **options, eval_dataset=evaluation_rows(histories))
    with pytest.raises(ValueError, match="event_features of the model must be those of the tokenizer, .*, found {}"):
        SequentialRecommendationTrainer(make_model(), arguments, **options)


def test_evaluation_rows_need_a_target(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="target"):
        trainer.evaluate(trainer.train_dataset)


def test_own_metrics_and_several_evaluation_sets(tmp_path):
    trainer = make_trainer(tmp_path)
    rows = evaluation_rows(make_histories())
    metrics = trainer.evaluate({"first": rows.select(range(5)), "rest": rows.select(range(5, NUM_USERS))})
    assert {"eval_first_ndcg@10", "eval_rest_ndcg@10"} <= metrics.keys()
    trainer.compute_metrics = lambda prediction: {"median_rank": np.median(prediction.predictions[0][:, 0])}
    assert trainer.evaluate()["eval_median_rank"] > 1


def make_unequal_histories():
    generator = np.random.default_rng(0)
    lengths = np.minimum(4 + generator.lognormal(1.5, 1.0, size=640).astype(int), 500)
    return [list(range(3, 3 + length % NUM_ITEMS)) + [3] * (length - length % NUM_ITEMS) for length in lengths]


def padding_share(trainer):
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def test_grouping_by_length_saves_padding(tmp_path):
    strategies = {
        "random": {},
        "group_by_length": {},
        "batch_rebalance": dict(per_device_train_batch_size=8, gradient_accumulation_steps=8),
    }
    shares = {
        strategy: padding_share(
            make_trainer(tmp_path, histories=make_unequal_histories(), train_sampling_strategy=strategy, **arguments)
        )
        for strategy, arguments in strategies.items()
    }
    assert shares["random"] > 0.5
    assert shares["group_by_length"] < 0.15
    assert shares["batch_rebalance"] < 0.25


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_grouped_batches_cover_the_data_in_a_new_order_each_epoch(tmp_path, strategy):
    orders = []
    for seed in (1, 2):
        trainer = make_trainer(tmp_path, train_sampling_strategy=strategy, seed=seed)
        loader = trainer.get_train_dataloader()
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            orders.append([row[row != -100].tolist() for batch in loader for row in batch["labels"]])
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    first, second, first_again, of_another_seed = orders[:4]
    assert first == first_again
    assert first != second
    assert first != of_another_seed


def test_rebalanced_steps_are_those_of_a_random_order(tmp_path):
    trainer = make_trainer(
        tmp_path,
        histories=make_unequal_histories(),
        train_sampling_strategy="batch_rebalance",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
    )
    sampler = trainer._get_train_sampler()
    order = torch.randperm(640, generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    batches = list(sampler)
    assert len(batches) == 80
    for step, start in enumerate(range(0, 640, 64)):
        rows = batches[8 * step : 8 * step + 8]
        assert sorted(sum(rows, [])) == sorted(order[start : start + 64])
        widths = [max(sampler.lengths[row] for row in batch) for batch in rows]
        assert max(map(len, rows)) > 8 and len(rows[widths.index(max(widths))]) < 8  # short histories share a batch


def test_histories_longer_than_the_window_count_as_equally_long(tmp_path):
    """Otherwise users who fill the window would be sorted by what the model does not see."""
    trainer = make_trainer(tmp_path)
    lengths = trainer._get_train_sampler().lengths
    assert lengths == [min(len(row) - 1, MAX_LENGTH) for row in trainer.train_dataset["input_ids"]]
    # The same for a selection, whose rows are not the table's.
    selection = trainer.train_dataset.select([5, 2, 90])
    assert trainer._get_train_sampler(selection).lengths == [lengths[i] for i in (5, 2, 90)]


def test_weight_decay_spares_norms_biases_experts_and_slots(tmp_path):
    trainer = make_trainer(tmp_path, make_model(tie_word_embeddings=False), weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed, spared = (
        {names[id(parameter)] for group in groups for parameter in group["params"] if group["weight_decay"] == decay}
        for decay in (0.1, 0.0)
    )
    assert decayed | spared == set(names.values())
    assert {"model.layers.0.feed_forward.up.weight", "model.embed_tokens.weight", "lm_head.weight"} <= decayed
    assert {"model.experts.log_half_life", "model.layers.1.retrieval.memory.values.weight"} <= spared
    assert not [name for name in decayed if "norm" in name or "bias" in name]


def test_model_card_tells_the_best_checkpoint_and_no_more(tmp_path):
    trainer = make_trainer(tmp_path, load_best_model_at_end=True)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "## Results" not in card and "epochs" not in card
    trainer.train()
    trainer.create_model_card(model_name="toy", dataset="walks", license="mit", tags="test")
    card = (tmp_path / "README.md").read_text()
    assert "# toy" in card and "trained on walks:" in card and "license: mit" in card and "- test" in card
    assert f"**walks**: {NUM_ITEMS} items." in card and "| epochs | 3 |" in card
    best = next(log for log in trainer.state.log_history if log.get("eval_ndcg@10") == trainer.state.best_metric)
    assert f"| NDCG@10 | {best['eval_ndcg@10']:.4f} | {best['eval_ndcg@10_seen_kept']:.4f} |" in card
    assert f"epoch {best['epoch']:g}, the one with the best NDCG@10 on the evaluation dataset" in card
    assert "fine-tuned" not in card and "None" not in card and "base_model" not in card and "test items" not in card


def test_model_card_tells_the_results_of_the_whole_run_where_there_are_some(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.hub_model_id = "org/toy"
    trainer.evaluate()
    results = {"dataset": "walks", "protocol": "leave_one_out, full ranking", "max_length": MAX_LENGTH}
    metrics = [f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in (1, 5, 10, 20)]
    results |= {f"test_{key}{suffix}": 0.125 for key in metrics for suffix in ("", "_seen_kept")}
    results |= {f"popularity_{key}{suffix}": 0.0625 for key in metrics for suffix in ("", "_seen_kept")}
    results |= {"test_coverage@10": 0.5, "popularity_coverage@10": 0.25}
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| NDCG@10 | 0.1250 | 0.1250 |" in card and "| popularity | 1 | 0.0625 |" in card
    assert "Leave-one-out" in card and 'model="org/toy"' in card and "# toy" in card

    # Transformers has a file of the same name for the metrics that a script saves.
    trainer.save_metrics("all", {"train_loss": 1.5})
    trainer.create_model_card()
    assert "on the evaluation dataset:" in (tmp_path / "README.md").read_text()


def test_without_a_collator_the_tokenizer_is_needed(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="processing_class"):
        SequentialRecommendationTrainer(make_model(), arguments)


@pytest.mark.parametrize("num_items", [NUM_ITEMS - 1, NUM_ITEMS + 1])
def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, num_items):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    tokenizer = ElasticItemTokenizer.from_items(range(num_items), MAX_LENGTH)
    with pytest.raises(ValueError, match=f"must be that of the tokenizer, {num_items + 3}, found {NUM_ITEMS + 3}"):
        SequentialRecommendationTrainer(make_model(), arguments, processing_class=tokenizer)
    fitting = ElasticItemTokenizer.from_items(range(NUM_ITEMS), MAX_LENGTH)
    SequentialRecommendationTrainer(make_model(), arguments, processing_class=fitting)


def run_everything(output_dir, num_processes):
    """An evaluation, then a training run; what must not depend on the number of processes."""
    trainer = make_trainer(
        output_dir,
        make_model(hidden_dropout=0.0),
        histories=make_histories(96),
        per_device_train_batch_size=16 // num_processes,
        per_device_eval_batch_size=7,
        train_sampling_strategy="random",
        optim="sgd",  # Adam's first steps turn rounding into whole steps
        learning_rate=0.5,
        ddp_find_unused_parameters=False,
        num_train_epochs=2,
        save_strategy="no",
    )
    assert trainer.args.world_size == num_processes
    prediction = trainer.predict(evaluation_rows(make_histories()))
    ranks, top_ids = (array.tolist() for array in prediction.predictions)
    trainer.train()
    # Grouped by length, the processes' batches of a step are different halves of a group.
    trainer.train_dataset = train_rows(make_histories(640, longest=20))
    trainer.args.train_sampling_strategy = "group_by_length"
    loader = trainer.get_train_dataloader()
    loader.set_epoch(1)
    # Dropout and padding move the processes' generators apart.
    torch.rand(trainer.args.process_index)
    sizes = torch.tensor([[batch["attention_mask"].sum(), batch["input_ids"].shape[1]] for batch in loader])
    num_inputs, widths = trainer.accelerator.gather(sizes[None]).unbind(-1)  # (num_processes, num_steps) each
    if trainer.is_world_process_zero():
        result = {
            "ranks": ranks,
            "top_ids": top_ids,
            "metrics": {key: value for key, value in prediction.metrics.items() if "@" in key},
            "losses": losses(trainer),
            "num_inputs": num_inputs.sum().item(),
            "widths": widths.amax(dim=0).tolist(),
        }
        Path(output_dir, "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    wrapped = weakref.ref(trainer.model_wrapped)
    trainer.end()
    assert num_processes == 1 or wrapped() is None, "the process group outlives the trainer's end"


def test_two_processes_do_what_one_does(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    run_everything(tmp_path / "one", 1)
    launch(TORCHRUN, __file__, tmp_path / "two", 2)
    one, two = (json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("one", "two"))
    assert len(one["ranks"]) == NUM_USERS
    assert one["ranks"] == two["ranks"]
    assert one["top_ids"] == two["top_ids"]
    assert one["metrics"] == two["metrics"]
    assert one["losses"] == pytest.approx(two["losses"], abs=2e-4)
    assert one["num_inputs"] == two["num_inputs"]
    assert one["widths"] == two["widths"]


if __name__ == "__main__":
    run_everything(sys.argv[1], int(sys.argv[2]))
