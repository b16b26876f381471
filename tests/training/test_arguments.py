import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from elastic_hf.data.collator import SequentialRecommendationCollator
from elastic_hf.models.item_tokenizer import ElasticItemTokenizer
from elastic_hf.training.trainer import SequentialRecommendationTrainer
from trainers import MAX_LENGTH, NUM_ITEMS, evaluation_rows, make_histories, make_model, make_trainer, train_rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({name: 0}, f"{name} must be at least 1, found 0")
            for name in (
                "per_device_train_batch_size",
                "per_device_eval_batch_size",
                "gradient_accumulation_steps",
                "eval_accumulation_steps",
            )
        ),
        ({"num_train_epochs": -2}, "num_train_epochs must be at least 0, found -2"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, .*found 0.1"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number, found inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, found nan"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches must be True"),
        ({"eval_use_gather_object": True}, "eval_use_gather_object must be False"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": None, "greater_is_better": None},
            "metric_for_best_model must be .* such as 'ndcg@10', found 'loss', the default: evaluations .* no loss",
        ),
        ({"metric_for_best_model": "ndcg@100"}, "metric_for_best_model must be .*, found 'ndcg@100'$"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": None},
            "metric_for_best_model must be .*, found 'loss'",
        ),
        ({"save_strategy": "best", "eval_strategy": "no"}, "eval_strategy must be .* with save_strategy 'best'"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "hub_strategy must be 'end' or 'every_save'"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 98}, "dataloader_drop_last must be False"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **arguments)


def test_the_metric_of_one_of_several_evaluation_sets(tmp_path):
    rows = evaluation_rows(make_histories())
    sets = {"first": rows.select(range(5)), "rest": rows.select(range(5, 97))}

    def trainer(metric):
        arguments = TrainingArguments(
            str(tmp_path), eval_strategy="epoch", metric_for_best_model=metric, use_cpu=True, num_train_epochs=1
        )
        return SequentialRecommendationTrainer(
            make_model(),
            arguments,
            train_dataset=train_rows(make_histories()),
            eval_dataset=sets,
            processing_class=ElasticItemTokenizer.from_items(range(NUM_ITEMS), MAX_LENGTH),
        )

    with pytest.raises(ValueError, match="such as 'first_ndcg@10', found 'ndcg@10'"):
        trainer("ndcg@10")
    trainer("eval_rest_hr@5")


def test_metrics_of_the_users_own(tmp_path):
    options = {
        "compute_metrics": lambda prediction: {"median_rank": float(np.median(prediction.predictions[0][:, 0]))}
    }
    with pytest.raises(ValueError, match="metric_for_best_model must be .*, found 'loss'"):
        make_trainer(tmp_path, options=options, metric_for_best_model="loss")
    make_trainer(
        tmp_path,
        options=options,
        metric_for_best_model="median_rank",
        greater_is_better=False,
        load_best_model_at_end=True,
        num_train_epochs=1,
    ).train()


@pytest.mark.parametrize(("schedule", "factor"), [("reduce_lr_on_plateau", 0.5), ("greedy", 0.95)])
@pytest.mark.parametrize(("greater_is_better", "shrinks"), [(True, False), (False, True)])
def test_schedules_that_follow_a_metric_follow_its_direction(tmp_path, schedule, factor, greater_is_better, shrinks):
    scores = iter([0.1, 0.2, 0.3, 0.4])
    trainer = make_trainer(
        tmp_path,
        options={"compute_metrics": lambda prediction: {"score": next(scores)}},
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs={"patience": 0, "factor": factor, "min_lr": 0.0, "max_lr": 0.005}
        if schedule == "greedy"
        else {"patience": 0, "factor": factor},
        metric_for_best_model="score",
        greater_is_better=greater_is_better,
        num_train_epochs=4,
        save_strategy="no",
    )
    trainer.train()
    last = trainer.optimizer.param_groups[0]["lr"]
    assert last == pytest.approx(0.005 * factor**3 if shrinks else 0.005)


def test_users_are_never_dropped_from_the_metrics(tmp_path):
    batches = dict(per_device_train_batch_size=32, per_device_eval_batch_size=32)
    trainers = [make_trainer(tmp_path, dataloader_drop_last=drop_last, **batches) for drop_last in (False, True)]
    kept, dropped = (trainer.predict(trainer.eval_dataset).predictions[0] for trainer in trainers)
    np.testing.assert_array_equal(kept, dropped)
    assert len(dropped) == 97
    assert [len(trainer.get_train_dataloader()) for trainer in trainers] == [4, 3]


def test_the_stock_trainer_gives_logits_to_metrics(tmp_path):
    """Its rows have no target: the last label is ranked."""
    model, histories = make_model(), make_histories()
    rows = train_rows(histories)

    def hit_rate(prediction):
        labels = np.array([row[row != -100][-1] for row in prediction.label_ids])
        return {"hr@1": (prediction.predictions.argmax(1) == labels).mean()}

    stock = Trainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=True, num_train_epochs=6, learning_rate=1e-2, save_strategy="no"),
        SequentialRecommendationCollator(0, 2, MAX_LENGTH),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=hit_rate,
    )
    stock.train()
    metrics = stock.evaluate()
    model.eval()
    inputs = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row[-MAX_LENGTH - 1 : -1]) for row in rows["input_ids"]], batch_first=True, padding_side="left"
    )
    expected = model(inputs).logits.argmax(1) == torch.tensor([row[-1] for row in rows["input_ids"]])
    assert metrics["eval_hr@1"] == pytest.approx(expected.double().mean().item()) and metrics["eval_hr@1"] > 0.1
    assert metrics["eval_loss"] > 0


def test_a_model_init_needs_no_collator(tmp_path):
    tokenizer = ElasticItemTokenizer.from_items(range(NUM_ITEMS), MAX_LENGTH)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, save_strategy="no", report_to="none")
    data = dict(train_dataset=train_rows(make_histories()), processing_class=tokenizer)
    trainer = SequentialRecommendationTrainer(None, arguments, model_init=lambda: make_model("bert4rec"), **data)
    assert trainer.data_collator.objective == "masked_item" and trainer.data_collator.max_length == MAX_LENGTH
    trainer.train()
    with pytest.raises(ValueError, match="vocab_size of the model must be that of the tokenizer, 64, found 50"):
        SequentialRecommendationTrainer(None, arguments, model_init=lambda: make_model(vocab_size=50), **data)
    with pytest.raises(ValueError, match="without a data_collator both model"):
        SequentialRecommendationTrainer(None, arguments, **data)
