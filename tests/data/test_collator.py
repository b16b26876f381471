import numpy as np
import pytest
import torch

from elastic_hf.data.collator import OBJECTIVES, SequentialRecommendationCollator
from elastic_hf.models.configuration_recommender import TRAINING_OBJECTIVES


LONG, SHORT = [3, 4, 5, 6, 7, 8, 9], [13, 14, 15]


def collator(objective="next_item", max_length=5, **kwargs):
    return SequentialRecommendationCollator(
        pad_token_id=0, mask_token_id=2, max_length=max_length, objective=objective, **kwargs
    )


def rows(*histories, **columns):
    return [
        {"input_ids": history, **{name: values[i] for name, values in columns.items()}}
        for i, history in enumerate(histories)
    ]


@pytest.mark.parametrize("as_row", [list, np.array, torch.tensor])
def test_next_item_labels_are_aligned(as_row):
    batch = collator()(rows(as_row(LONG), as_row(SHORT)))
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8], [0, 0, 0, 13, 14]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9], [-100, -100, -100, 14, 15]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_batches_are_padded_to_their_longest_row():
    assert collator()(rows(SHORT, [3, 4]))["input_ids"].tolist() == [[13, 14], [0, 3]]


def test_masked_items():
    torch.manual_seed(0)
    histories = [list(range(3, 3 + n)) for n in (2, 40, 30, 1000)] * 20
    batch = collator("masked_item", max_length=40, mask_probability=0.3)(rows(*histories))
    recent = torch.tensor([[0] * (40 - min(40, len(h))) + h[-40:] for h in histories])
    is_masked = batch["labels"] != -100
    assert torch.equal(batch["attention_mask"], (recent != 0).long())
    assert torch.equal(batch["input_ids"], torch.where(is_masked, 2, recent))
    assert torch.equal(batch["labels"][is_masked], recent[is_masked])
    assert is_masked.any(1).all()
    assert not is_masked[recent == 0].any()
    assert 0.27 < is_masked.sum() / (recent != 0).sum() < 0.33


def test_a_row_without_a_masked_item_masks_its_last():
    batch = collator("masked_item", mask_probability=1e-12)(rows(LONG, SHORT))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [0, 0, 13, 14, 2]]
    assert batch["labels"].tolist() == [[-100] * 4 + [9], [-100] * 4 + [15]]


def test_prefixes_end_everywhere_and_predict_the_item_after_them():
    torch.manual_seed(0)
    batch = collator("prefix")(rows(*[LONG] * 200))
    assert (batch["labels"][:, :-1] == -100).all()
    assert batch["labels"][:, -1].unique().tolist() == LONG[1:]
    assert torch.equal(batch["input_ids"][:, -1] + 1, batch["labels"][:, -1])
    for tokens, label in zip(batch["input_ids"].tolist(), batch["labels"][:, -1].tolist(), strict=True):
        prefix = list(range(3, label))[-5:]
        assert tokens == [0] * (5 - len(prefix)) + prefix


def test_the_last_item_is_predicted_from_those_before_it():
    batch = collator("last_item")(rows(LONG, SHORT))
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8], [0, 0, 0, 13, 14]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100] * 4 + [9], [-100] * 4 + [15]]


@pytest.mark.parametrize("objective", ["masked_item", "prefix"])
def test_the_global_generator_decides_the_draw(objective):
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws += [collator(objective, max_length=50)(rows(*[list(range(3, 53))] * 4)) for _ in range(2)]
    first, second, again, _, other, _ = (draw["labels"] for draw in draws)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("objective", ["masked_item", "prefix"])
def test_processes_in_the_same_state_draw_differently(objective, monkeypatch):
    draws = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        draws.append(collator(objective, max_length=50)(rows(*[list(range(3, 53))] * 4))["labels"])
    assert not torch.equal(*draws)


@pytest.mark.parametrize("objective", ["next_item", "masked_item", "prefix", "last_item"])
def test_evaluation_rows_keep_the_whole_history(objective):
    batch = collator(objective)(rows(LONG, [13], target=[np.int32(30), np.int32(31)]))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [0, 0, 0, 0, 13]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 0, 1]]
    assert batch["target_ids"].tolist() == [30, 31]
    assert batch["seen_ids"].tolist() == [LONG, [0] * 6 + [13]]
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "next"}, "objective must be one of .*'prefix'.*, found 'next'"),
        ({"max_length": 0}, "max_length"),
        ({"mask_probability": 0}, "mask_probability"),
        ({"mask_probability": 1.5}, "mask_probability"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        collator(**arguments)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (rows(LONG, [3]), "at least 2 items, found one of 1"),
        (rows(LONG, [], target=[3, 4]), "at least 1 item"),
        (rows(LONG) + rows(LONG, target=[3]), "found 1 of 2"),
    ],
)
def test_bad_rows_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        collator()(features)


# Times

WHEN, WHEN_SHORT = [10, 20, 30, 40, 50, 60, 70], [5, 6, 6]


@pytest.mark.parametrize("as_row", [list, np.array, torch.tensor])
def test_training_batches_say_when_items_and_labels_came(as_row):
    features = rows(as_row(LONG), as_row(SHORT), timestamps=[as_row(WHEN), as_row(WHEN_SHORT)])
    batch = collator(use_timestamps=True)(features)
    assert batch["timestamps"].tolist() == [[20, 30, 40, 50, 60], [0, 0, 0, 5, 6]]
    assert batch["request_timestamps"].tolist() == [[30, 40, 50, 60, 70], [-1, -1, -1, 6, 6]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    plain = collator()(features)
    assert plain.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(torch.equal(batch[name], plain[name]) for name in plain)


def test_timestamps_keep_their_fractions():
    features = rows(SHORT, [3, 4], timestamps=[[1.7e9 + 0.25, 1.7e9 + 1, 1.7e9 + 2.5], [8.5, 9.5]])
    batch = collator(use_timestamps=True)(features)
    assert batch["timestamps"].dtype == batch["request_timestamps"].dtype == torch.float64
    assert batch["timestamps"].tolist() == [[1.7e9 + 0.25, 1.7e9 + 1], [0, 8.5]]
    assert batch["request_timestamps"].tolist() == [[1.7e9 + 1, 1.7e9 + 2.5], [-1, 9.5]]


def test_evaluation_batches_say_when_items_came_and_the_target_if_it_may_be_known():
    features = rows(LONG, [13], target=[30, 31], timestamps=[WHEN, [8]], target_timestamp=[np.int64(75), 8])
    told = collator(use_timestamps=True)(features)
    assert told["timestamps"].tolist() == [[30, 40, 50, 60, 70], [0, 0, 0, 0, 8]]
    assert told["request_timestamps"].tolist() == [75, 8]
    fractions = rows([13], target=[31], timestamps=[[8]], target_timestamp=[8.75])
    assert collator(use_timestamps=True)(fractions)["request_timestamps"].tolist() == [8.75]
    assert told["seen_ids"].tolist() == [LONG, [0] * 6 + [13]]
    without = rows(LONG, [13], target=[30, 31], timestamps=[WHEN, [8]])
    for some in (features, without):
        untold = collator(use_timestamps=True, know_request=False)(some)
        assert untold["request_timestamps"].tolist() == [-1, -1]
        assert torch.equal(untold["timestamps"], told["timestamps"])
    assert collator()(features).keys() == {"input_ids", "attention_mask", "target_ids", "seen_ids"}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (rows(LONG, SHORT), "with use_timestamps a row must have timestamps, found input_ids"),
        (rows(LONG, target=[3]), "with use_timestamps a row must have timestamps, found input_ids, target"),
        (
            rows(LONG, SHORT, timestamps=[WHEN, WHEN]),
            "timestamps must be as many as the items of a history, 3 in row 1, found 7",
        ),
        (
            rows(SHORT, LONG, timestamps=[WHEN_SHORT[1:], WHEN]),
            "timestamps must be as many as the items of a history, 3 in row 0, found 2",
        ),
        (
            rows(SHORT, target=[3], timestamps=[WHEN_SHORT]),
            "with know_request=True a row must have a target_timestamp, found input_ids, target, timestamps",
        ),
    ],
)
def test_bad_times_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        collator(use_timestamps=True)(features)


@pytest.mark.parametrize("name", ["use_timestamps", "event_features"])
def test_times_and_features_of_events_are_for_the_next_item_alone(name):
    with pytest.raises(
        ValueError, match=f"{name} needs an objective that predicts the next item, found 'masked_item'"
    ):
        collator("masked_item", **{name: True if name == "use_timestamps" else ["rating"]})


# Features of events

RATINGS, PRICES = [[1.0, 2, 3, 4, 5, 0, 7], [6.0, 7, 8]], [[0.5, -1, 0, 0, 2, 3, 4], [9.0, -9, 1]]


@pytest.mark.parametrize("as_row", [list, np.array, torch.tensor])
def test_batches_hold_the_features_of_what_is_read_and_of_nothing_after(as_row):
    columns = {"rating": [*map(as_row, RATINGS)], "price": [*map(as_row, PRICES)]}
    read = collator(event_features=["price", "rating"])
    batch = read(rows(LONG, SHORT, **columns))
    prices, ratings = batch["event_features"].unbind(dim=-1)
    assert batch["event_features"].dtype == torch.float32 and batch["event_features"].is_contiguous()
    assert ratings.tolist() == [[2, 3, 4, 5, 0], [0, 0, 0, 6, 7]]
    assert prices.tolist() == [[-1, 0, 0, 2, 3], [0, 0, 0, 9, -9]]
    evaluated = read(rows(LONG, SHORT, target=[30, 31], **columns))
    prices, ratings = evaluated["event_features"].unbind(dim=-1)
    assert ratings.tolist() == [[3, 4, 5, 0, 7], [0, 0, 6, 7, 8]]
    assert prices.tolist() == [[0, 0, 2, 3, 4], [0, 0, 9, -9, 1]]
    assert "event_features" not in collator()(rows(LONG, SHORT, **columns))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (rows(LONG, SHORT), "with event_features a row must have rating, found input_ids"),
        (
            rows(LONG, SHORT, rating=[RATINGS[0], RATINGS[1][:2]]),
            "rating must be as many as the items of a history, 3 in row 1, found 2",
        ),
    ],
)
def test_bad_features_of_events_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        collator(event_features=["rating"])(features)


def test_the_last_item_is_predicted_from_the_times_and_features_of_those_before_it():
    """And from when it came itself."""
    features = rows(LONG, SHORT, timestamps=[WHEN, WHEN_SHORT], rating=RATINGS)
    batch = collator("last_item", use_timestamps=True, event_features=["rating"])(features)
    assert batch["labels"].tolist() == [[-100] * 4 + [9], [-100] * 4 + [15]]
    assert batch["timestamps"].tolist() == [[20, 30, 40, 50, 60], [0, 0, 0, 5, 6]]
    assert batch["request_timestamps"].tolist() == [[30, 40, 50, 60, 70], [-1, -1, -1, 6, 6]]
    assert batch["event_features"][..., 0].tolist() == [[2, 3, 4, 5, 0], [0, 0, 0, 6, 7]]


def test_random_prefixes_are_cut_with_their_times_and_features():
    """Of items that can be told from them: nothing of the label is read but when it came."""
    columns = {"timestamps": [[10 * item for item in LONG]] * 200, "rating": [[item / 2 for item in LONG]] * 200}
    features = rows(*[LONG] * 200, **columns)
    torch.manual_seed(0)
    batch = collator("prefix", use_timestamps=True, event_features=["rating"])(features)
    torch.manual_seed(0)
    plain = collator("prefix")(features)
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    input_ids, labels = batch["input_ids"], batch["labels"][:, -1]
    assert labels.unique().tolist() == LONG[1:]
    assert torch.equal(batch["timestamps"], 10 * input_ids)
    assert torch.equal(batch["request_timestamps"][:, -1], 10 * labels)
    nexts = torch.where(input_ids[:, :-1] == 0, -1, 10 * input_ids[:, 1:])
    assert torch.equal(batch["request_timestamps"][:, :-1], nexts)
    assert torch.equal(batch["event_features"][..., 0], input_ids / 2)


def test_the_objectives_are_those_of_the_models_and_that_of_prefixes():
    assert OBJECTIVES == (*TRAINING_OBJECTIVES, "last_item")
