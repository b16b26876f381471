from collections import Counter

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError

from elastic_hf.baselines.popularity import PopularityConfig, PopularityForSequentialRecommendation


VOCAB_SIZE = 23  # 20 items


def new_model(**changes):
    return PopularityForSequentialRecommendation(PopularityConfig(vocab_size=VOCAB_SIZE, **changes)).eval()


@pytest.fixture
def histories():
    """Item i occurs i times, in histories of different lengths with special tokens and an empty one among them."""
    items = torch.arange(3, VOCAB_SIZE).repeat_interleave(torch.arange(3, VOCAB_SIZE))
    items = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(0))].tolist()
    return [items[:1], [], [0, 0, 1, 2], items[1:90], items[90:]]


@pytest.fixture
def model(histories):
    return new_model().count_items(histories)


def counted(histories):
    counts = Counter(token_id for history in histories for token_id in history)
    return [counts[token_id] if token_id >= 3 else 0 for token_id in range(VOCAB_SIZE)]


def test_counts_are_those_of_a_counter(model, histories):
    assert model.lm_head.weight.flatten().tolist() == counted(histories)
    again = model.count_items(histories[3:4])
    assert again is model
    assert model.lm_head.weight.flatten().tolist() == counted(histories[3:4])


@pytest.mark.parametrize("chosen", [None, [4, 3, 0]], ids=["all", "some"])
@pytest.mark.parametrize("format", [None, "numpy", "torch"])
def test_a_dataset_is_counted_in_any_format(histories, format, chosen):
    dataset = Dataset.from_dict({"user_id": list("abcde"), "input_ids": histories}).with_format(format)
    if chosen is not None:
        dataset, histories = dataset.select(chosen), [histories[i] for i in chosen]
    assert new_model().count_items(dataset).lm_head.weight.flatten().tolist() == counted(histories)


def test_everybody_gets_the_most_frequent_items_they_have_not_seen(model):
    input_ids = torch.tensor([[0, 0, 3, 22, 4], [20, 5, 5, 21, 8]])
    result = model.recommend(input_ids, top_k=4)
    assert result.token_ids.tolist() == [[21, 20, 19, 18], [22, 19, 18, 17]]
    assert result.scores.tolist() == [[21, 20, 19, 18], [22, 19, 18, 17]]
    result = model.recommend(input_ids, top_k=20, exclude_seen=False)
    assert result.token_ids.tolist() == [list(range(22, 2, -1))] * 2


def test_the_user_vector_is_one(model):
    input_ids = torch.tensor([[0, 0, 3, 9, 4], [22, 5, 5, 17, 8]])
    assert torch.equal(model.model(input_ids).last_hidden_state, torch.ones(2, 5, 1))
    assert torch.equal(model.model(input_ids, last_position_only=True).last_hidden_state, torch.ones(2, 1, 1))
    assert torch.equal(model(input_ids).user_embeddings, torch.ones(2, 1))
    assert model.double()(input_ids).logits.dtype == torch.float64


def test_there_are_no_hidden_states(model):
    with pytest.raises(ValueError, match="output_hidden_states must be False for popularity"):
        model(torch.tensor([[3, 9]]), output_hidden_states=True)


@pytest.mark.parametrize("training_loss", ["full_softmax", "sampled_softmax", "gbce", "bce"])
def test_there_is_a_loss_and_its_gradient(training_loss):
    model = new_model(training_loss=training_loss)
    labels = torch.tensor([[-100, 9, 4, 5], [5, 17, 8, 22]])
    loss = model(torch.tensor([[0, 3, 9, 4], [5, 5, 17, 8]]), labels=labels).loss
    loss.backward()
    assert loss.isfinite() and model.lm_head.weight.grad.isfinite().all()


def test_a_round_trip_keeps_the_counts(model, histories, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PopularityForSequentialRecommendation.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight.flatten().tolist() == counted(histories)
    assert loaded.get_user_embeddings(torch.tensor([[3]])).tolist() == [[1]]


def test_nothing_is_counted_at_first():
    assert (new_model().lm_head.weight == 0).all()


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([[3, 23]], r"token ids must be between 0 and vocab_size - 1 \(22\), found 3 to 23"),
        ([[3, -1]], "found -1 to 3"),
        ([[3, None]], "found nan to nan"),
        ([[3, 4.5]], "histories must be lists of token ids, found list<.*double>"),
        ([3, 4], "histories must be lists of token ids, found int64"),
        (["34"], "histories must be lists of token ids, found string"),
        ([], "histories must be lists of token ids, found null"),
        (Dataset.from_dict({"input_ids": [[3]]}).select([]), "histories must hold at least one token id, found none"),
        (Dataset.from_dict({"items": [[3]]}), r"histories must have the column input_ids, found \['items'\]"),
    ],
)
def test_count_items_names_what_is_wrong(histories, message):
    with pytest.raises(ValueError, match=message):
        new_model().count_items(histories)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 2, "hidden_size must be 1 for popularity, found 2"),
        ("tie_word_embeddings", True, "tie_word_embeddings must be False for popularity, found True"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        PopularityConfig(**{field: value})
