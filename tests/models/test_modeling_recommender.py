import copy
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModel, BatchEncoding

import reference
from adapters import LowRankAdapter
from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ElasticModel, ItemIndex
from elastic_hf.baselines import (
    BERT4RecConfig,
    BERT4RecForSequentialRecommendation,
    SASRecConfig,
    SASRecForSequentialRecommendation,
)
from elastic_hf.models import catalogue
from elastic_hf.models.catalogue import CatalogueQuery
from elastic_hf.models.configuration_recommender import TRAINING_LOSSES, RecommenderConfig
from elastic_hf.models.modeling_recommender import (
    as_token_ids,
    evaluating,
    leave_out_special_tokens,
    validate_histories,
)
from factories import EVENT_FEATURES, elastic_model, event_features, histories, times
from launcher import TORCHRUN, launch


VOCAB_SIZE = 23  # 20 items
MODELS = {
    "elastic": (ElasticConfig, ElasticForSequentialRecommendation),
    "sasrec": (SASRecConfig, SASRecForSequentialRecommendation),
    "bert4rec": (BERT4RecConfig, BERT4RecForSequentialRecommendation),
}
every_model = pytest.mark.parametrize("model", MODELS, indirect=True)


def make_model(model_type="elastic", **settings):
    config_class, model_class = MODELS[model_type]
    if model_type == "elastic":
        settings = {"num_interest_experts": 5, "num_memory_subkeys": 4, "num_memory_heads": 2, **settings}
    torch.manual_seed(0)
    model = model_class(config_class(**{"vocab_size": VOCAB_SIZE, "hidden_size": 12, **settings})).eval()
    # Weights large enough for a difference to show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model(request):
    return make_model(getattr(request, "param", "elastic"))


@pytest.fixture
def input_ids():
    return torch.tensor([[0, 0, 3, 9, 4], [22, 5, 5, 17, 8]])


def set_chunks(monkeypatch, rows):
    monkeypatch.setattr(catalogue, "MAX_SCORES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(catalogue, "MIN_ROWS", rows)


# recommend


@every_model
@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("rows", [1, 1000])
def test_recommend_equals_sorting_the_logits(model, input_ids, exclude_seen, rows, monkeypatch):
    set_chunks(monkeypatch, rows)
    items = set(range(3, VOCAB_SIZE))
    allowed = [items - set(row) if exclude_seen else items for row in input_ids.tolist()]
    logits = model(input_ids).logits
    result = model.recommend(input_ids, top_k=9, exclude_seen=exclude_seen)
    assert result.token_ids.tolist() == reference.best_items(logits, allowed, 9)
    torch.testing.assert_close(result.scores, logits.gather(-1, result.token_ids))


@every_model
@pytest.mark.parametrize("has_index", [False, True])
def test_recommend_follows_the_models_own_setting_unless_told_otherwise(model, input_ids, has_index):
    index = ItemIndex(model, num_clusters=2, num_probes=2) if has_index else None
    for own in (True, False):
        model.config.exclude_seen = own
        for told in (None, True, False):
            found = model.recommend(input_ids, top_k=16, exclude_seen=told, index=index)
            expected = model.recommend(input_ids, top_k=16, exclude_seen=own if told is None else told)
            assert torch.equal(found.token_ids, expected.token_ids)
    assert (model.recommend(input_ids, top_k=20).token_ids.sort().values == torch.arange(3, VOCAB_SIZE)).all()
    with pytest.raises(ValueError, match="exclude_seen must be True, False or None, found 'no'"):
        model.recommend(input_ids, exclude_seen="no")


@every_model
def test_recommend_from_candidates(model, input_ids):
    candidates = torch.tensor([17, 4, 19, 3, 12, 6])
    logits = model(input_ids).logits
    result = model.recommend(input_ids, top_k=3, candidate_ids=candidates)
    allowed = [set(candidates.tolist()) - set(row) for row in input_ids.tolist()]
    assert result.token_ids.tolist() == reference.best_items(logits, allowed, 3)


@pytest.mark.parametrize("has_index", [False, True])
def test_recommend_leaves_out_what_was_seen_before_the_window(model, input_ids, has_index):
    """The model reads the last two items of the whole histories."""
    index = ItemIndex(model, num_clusters=2, num_probes=2) if has_index else None
    window = input_ids[:, -2:]
    allowed = [set(range(3, VOCAB_SIZE)) - set(row) for row in input_ids.tolist()]
    result = model.recommend(window, top_k=16, seen_ids=input_ids, index=index)
    assert result.token_ids.tolist() == reference.best_items(model(window).logits, allowed, 16)
    kept = model.recommend(window, top_k=20, seen_ids=input_ids, exclude_seen=False, index=index)
    assert kept.token_ids.sort().values.tolist() == [list(range(3, VOCAB_SIZE))] * 2


def test_special_tokens_are_never_recommended(model, input_ids):
    with torch.no_grad():
        model.lm_head.weight[:3] = 100 * model.get_user_embeddings(input_ids)[:1]
    assert model(input_ids).logits[0].argmax() < 3
    assert model.recommend(input_ids, top_k=16).token_ids.min() >= 3


@pytest.mark.parametrize("top_k", [17, 18])
def test_more_than_the_catalogue_holds_is_an_error(model, input_ids, top_k):
    """Row 0 has seen 3 of the 20 items, row 1 has seen 4 (one of them twice)."""
    if top_k == 17:
        with pytest.raises(ValueError, match="top_k=17 asks for more than the 16 items left to recommend in row 1"):
            model.recommend(input_ids, top_k=top_k)
        assert model.recommend(input_ids[:1], top_k=top_k).token_ids.shape == (1, 17)
    else:
        with pytest.raises(ValueError, match="in row 0"):
            model.recommend(input_ids[:1], top_k=top_k)
    with pytest.raises(ValueError, match=r"number of candidate items \(20\), found 21"):
        model.recommend(input_ids, top_k=21, exclude_seen=False)


@every_model
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([3, 4])}, r"input_ids must have shape .* found \(2,\)"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, r"history_length >= 1\), found \(1, 0\)"),
        ({"input_ids": torch.empty(0, 4, dtype=torch.long)}, "at least one history, found none"),
        ({"input_ids": torch.tensor([[3, 23]])}, r"vocab_size - 1 \(22\), found 3 to 23"),
        ({"input_ids": torch.tensor([[3, 4], [0, 0]])}, "must hold an item in each row, found none in row 1"),
        ({"input_ids": torch.tensor([[3, 4], [1, 2]])}, "must hold an item in each row, found none in row 1"),
        ({"input_ids": torch.tensor([[3, 0]])}, "input_ids must be padded on the left .* in row 0"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.long)}, r"shape of input_ids \(2, 5\), found \(2, 4\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * 2)}, "attention_mask must be padded on the left"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask must be of bool or an integer type, found torch.float"),
        ({"candidate_ids": torch.tensor([5, 5])}, "distinct"),
        ({"candidate_ids": torch.tensor([2, 5])}, "candidate_ids must be items, from 3 to 22, found 2 to 5"),
        ({"candidate_ids": torch.tensor([7])}, r"number of candidate items \(1\), found 2"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, found 0"),
        ({"top_k": 1.5}, "top_k must be an integer of at least 1, found 1.5"),
        ({"seen_ids": torch.tensor([3, 4])}, r"seen_ids must have shape \(2, num_seen\), found \(2,\)"),
        ({"seen_ids": torch.tensor([[3, 4]])}, r"seen_ids must have shape \(2, num_seen\), found \(1, 2\)"),
        ({"seen_ids": torch.tensor([[3], [-1]])}, "seen_ids must be token ids, from 0 to 22, found -1 to 3"),
        ({"seen_ids": [[3], [-1]], "exclude_seen": False}, "found -1 to 3"),
    ],
)
def test_recommend_names_what_is_wrong(model, input_ids, changes, message):
    with pytest.raises(ValueError, match=message):
        model.recommend(**{"input_ids": input_ids, "top_k": 2, **changes})


def test_nan_scores_are_an_error(model, input_ids):
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        model.recommend(input_ids, top_k=3)


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.int,
        lambda ids: ids.numpy().astype(np.uint8),
    ],
)
def test_token_ids_may_be_lists_and_arrays(model, input_ids, convert):
    candidates, seen = torch.tensor([3, 9, 5, 21, 20]), torch.tensor([[5, 0], [0, 21]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    expected = model.recommend(input_ids, mask, 2, candidate_ids=candidates, seen_ids=seen)
    found = model.recommend(
        convert(input_ids), convert(mask), 2, candidate_ids=convert(candidates), seen_ids=convert(seen)
    )
    assert torch.equal(found.token_ids, expected.token_ids)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (BatchEncoding({"input_ids": [[3]]}), r"found a BatchEncoding with input_ids: .* recommend\(\*\*batch\)"),
        ([[3, 4], [5]], "lists of one length .padded on the left., found a list"),
        ([["3"]], "found a list"),
        (None, "found a NoneType"),
        ([[3.0]], "ids must be integers, found torch.float32"),
        (np.array([[True]]), "found torch.bool"),
    ],
)
def test_what_is_no_token_ids_is_refused(token_ids, message):
    with pytest.raises(ValueError, match=message):
        as_token_ids("ids", token_ids, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_low_precision_are_told_apart(model, dtype):
    """In these types some of 503 scores are equal."""
    torch.manual_seed(0)
    model = make_model(vocab_size=503).to(dtype)
    input_ids = torch.randint(3, 503, (4, 9))
    logits, result = model(input_ids).logits, model.recommend(input_ids, top_k=400)
    assert logits.dtype == dtype and max(len(row.unique()) for row in logits) < 503
    assert result.scores.dtype == torch.float32 and (result.scores.diff() < 0).all()
    users = model.get_user_embeddings(input_ids).float()
    expected = reference.best_items(
        users @ model.lm_head.weight.float().T, [set(range(3, 503)) - set(row) for row in input_ids.tolist()], 400
    )
    assert result.token_ids.tolist() == expected


# Histories


@every_model
@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize(
    ("input_ids", "attention_mask", "message"),
    [
        (torch.zeros(5, dtype=torch.long), None, r"input_ids must have shape \(batch_size, history_length >= 1\)"),
        (torch.zeros(2, 0, dtype=torch.long), None, r"input_ids must have shape \(batch_size, history_length >= 1\)"),
        (torch.tensor([[3.0]]), None, "input_ids must be a tensor of token ids .* found torch.float32"),
        ([[3]], None, "input_ids must be a tensor of token ids .* found list"),
        (torch.tensor([[3, 23]]), None, r"input_ids must be between 0 and vocab_size - 1 \(22\), found 3 to 23"),
        (torch.tensor([[-1, 3]]), None, "found -1 to 3"),
        (torch.tensor([[3, 4], [5, 0]]), None, "input_ids must be padded on the left .* found padding .* in row 1"),
        (torch.tensor([[3, 0, 5]]), None, "found padding after an item in row 0"),
        (torch.tensor([[3, 4]]), torch.tensor([[1, 0]]), "attention_mask must be padded on the left .* in row 0"),
        (torch.tensor([[3, 4]]), torch.tensor([[0, 2]]), "attention_mask must be 0 or 1, found 0 to 2"),
        (torch.tensor([[3, 4]]), torch.tensor([[0.0, 1.0]]), "attention_mask must be of bool or an integer type"),
        (torch.tensor([[3, 4]]), torch.tensor([[1]]), r"attention_mask must have the shape of input_ids \(1, 2\)"),
        (torch.tensor([[3, 4]]), [[1, 1]], r"attention_mask must have the shape .* found list"),
    ],
)
def test_forward_names_what_is_wrong(model, input_ids, attention_mask, message, has_labels):
    labels = torch.full_like(input_ids, 3) if has_labels and isinstance(input_ids, torch.Tensor) else None
    for function in (model, model.model):
        with pytest.raises(ValueError, match=message):
            function(input_ids, attention_mask, **({"labels": labels} if function is model else {}))


def test_valid_histories_give_their_items():
    config = RecommenderConfig(vocab_size=VOCAB_SIZE)
    input_ids = torch.tensor([[0, 0, 3], [5, 1, 4], [0, 0, 0]])
    assert validate_histories(input_ids, None, config).tolist() == [[False, False, True], [True] * 3, [False] * 3]
    mask = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]])
    for of_type in (torch.bool, torch.int32, torch.uint8, torch.long):
        found = validate_histories(input_ids, mask.to(of_type), config)
        assert found.dtype == torch.bool and torch.equal(found, mask.bool())
    assert validate_histories(input_ids[:0], mask[:0], config).shape == (0, 3)


@pytest.mark.parametrize("labels", [torch.ones(2, 4, dtype=torch.long), [[3]]])
def test_forward_names_a_wrong_shape_of_labels(model, input_ids, labels):
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids \(2, 5\), found"):
        model(input_ids, labels=labels)


@every_model
def test_unknown_items_change_nothing(model):
    """[UNK] is 1: nothing was learned of what it stands for."""
    with_unknown = torch.tensor([[1, 1, 9, 1, 4, 1], [0, 0, 0, 1, 8, 17]])
    alone = torch.tensor([[0, 0, 0, 0, 9, 4], [0, 0, 0, 0, 8, 17]])
    expected, found = model.recommend(alone, top_k=5), model.recommend(with_unknown, top_k=5)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(model(with_unknown).logits, model(alone).logits)
    torch.testing.assert_close(model.get_user_embeddings(with_unknown), model.get_user_embeddings(alone))
    query = CatalogueQuery(4, seen_ids=with_unknown, target_ids=torch.tensor([5, 6]))
    outputs = [model(ids, query=query) for ids in (with_unknown, alone)]
    assert torch.equal(outputs[0].ranks, outputs[1].ranks)
    assert torch.equal(outputs[0].token_ids, outputs[1].token_ids)
    assert not torch.allclose(model.model(with_unknown).last_hidden_state, model.model(alone).last_hidden_state)


def test_unknown_items_after_a_cache_change_nothing(model):
    cache = model(torch.tensor([[3, 9, 4], [5, 5, 17]]), use_cache=True).cache
    with_unknown = model(torch.tensor([[8, 1, 7], [1, 6, 1]]), cache=cache, use_cache=True)
    alone = model(torch.tensor([[8, 7], [0, 6]]), cache=cache, use_cache=True)
    torch.testing.assert_close(with_unknown.logits, alone.logits)
    torch.testing.assert_close(with_unknown.cache.recurrent_state, alone.cache.recurrent_state)
    assert torch.equal(with_unknown.cache.num_items, alone.cache.num_items)
    with pytest.raises(ValueError, match="that goes on from the cache, found special tokens alone in row 1"):
        model(torch.tensor([[8, 1], [1, 2]]), cache=cache)


def test_special_tokens_are_left_out():
    input_ids = torch.tensor([[1, 5, 2, 6], [3, 4, 5, 6], [8, 0, 3, 1]])
    attention_mask = torch.tensor([[True, True, True, True], [False, True, True, True], [False, True, True, True]])
    timestamps = 10 * input_ids + torch.arange(4)
    features = torch.stack([timestamps, -timestamps], dim=-1).float()
    config = ElasticConfig(event_features={"price": 0, "weight": 0})
    ids, mask, *of_items = leave_out_special_tokens(input_ids, attention_mask, config, timestamps, features)
    assert [row[of_row].tolist() for row, of_row in zip(ids, mask, strict=True)] == [[5, 6], [4, 5, 6], [3]]
    expected = [[51, 63], [41, 52, 63], [32]]
    for values in (of_items[0], of_items[1][..., 0], -of_items[1][..., 1]):
        assert [row[of_row].tolist() for row, of_row in zip(values, mask, strict=True)] == expected
    assert (mask.int().diff(dim=1) >= 0).all()
    plain = ElasticConfig()
    assert leave_out_special_tokens(input_ids, attention_mask, plain)[2:] == (None, None)
    with pytest.raises(ValueError, match=r"timestamps must have the shape of input_ids \(3, 4\), found \(3, 3\)"):
        leave_out_special_tokens(input_ids, attention_mask, plain, timestamps[:, 1:])
    with pytest.raises(ValueError, match=r"event_features \(price, weight\) must be a floating tensor of shape"):
        leave_out_special_tokens(input_ids, attention_mask, config, timestamps, features[:, 1:])
    items = torch.tensor([[0, 3], [4, 5]])
    ids, mask, seconds, _ = leave_out_special_tokens(items, items != 0, plain, 10 * items)
    assert ids is items and torch.equal(seconds, 10 * items)


# Training


@pytest.mark.parametrize("mask_seen_in_loss", [True, False])
@pytest.mark.parametrize("model", ["elastic", "bert4rec"], indirect=True)
def test_loss_is_the_mean_over_targets_or_over_what_the_trainer_counted(model, input_ids, mask_seen_in_loss):
    """Of what a position has read, itself included, only its target is in its softmax, if seen items are masked."""
    model.config.mask_seen_in_loss = mask_seen_in_loss
    labels = torch.tensor([[-100, -100, 9, 4, 5], [5, 5, 17, 8, 0]])  # padding is no target
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    logits = model.lm_head(model.model(input_ids, attention_mask).last_hidden_state)
    read_ids = input_ids * attention_mask
    total = 0
    for row in range(2):
        for t in range(5):
            if labels[row, t] < 3:
                continue
            scored = range(3, VOCAB_SIZE)
            if mask_seen_in_loss:
                last_read = t if model.config.is_causal else 4
                scored = reference.items_in_loss(read_ids, row, last_read, int(labels[row, t]), scored)
            total = total + logits[row, t, list(scored)].logsumexp(dim=-1) - logits[row, t, labels[row, t]]
    torch.testing.assert_close(model(input_ids, attention_mask, labels=labels).loss, total / 7)
    loss = model(input_ids, attention_mask, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(loss, total / 10)
    torch.testing.assert_close(model(input_ids, attention_mask, labels=labels).logits, logits[:, -1])
    assert model.train()(input_ids, labels=labels).logits is None


@pytest.mark.parametrize("mask_seen_in_loss", [True, False])
@pytest.mark.parametrize("training_loss", TRAINING_LOSSES)
@pytest.mark.parametrize("model_type", ["elastic", "bert4rec"])
def test_every_loss_scores_items_that_were_not_seen(model_type, training_loss, mask_seen_in_loss):
    """The rows of special tokens get no gradient, nor those of items that were seen and are no target."""
    model = make_model(
        model_type,
        training_loss=training_loss,
        num_negatives=500,
        tie_word_embeddings=False,
        mask_seen_in_loss=mask_seen_in_loss,
    )
    labels = torch.tensor([[-100, -100, 8, 3, -100]])
    model(torch.tensor([[13, 3, 9, 4, 5]]), labels=labels).loss.backward()
    without_gradient = (model.lm_head.weight.grad == 0).all(dim=-1).nonzero()[:, 0].tolist()
    seen = []
    if mask_seen_in_loss:  # a causal model has not read 4 when it predicts 8, and 3 is a target
        seen = [9, 13] if model_type == "elastic" else [4, 5, 9, 13]
    assert without_gradient == [0, 1, 2, *seen]


@pytest.mark.parametrize("training_loss", TRAINING_LOSSES)
def test_the_loss_follows_exclude_seen(training_loss, input_ids):
    labels = torch.tensor([[-100, -100, 9, 4, 5], [5, 5, 17, 8, 0]])
    found = {}
    for exclude_seen in (True, False):
        for mask in (None, True, False):
            settings = {"exclude_seen": exclude_seen, "mask_seen_in_loss": mask, "training_loss": training_loss}
            model = make_model(num_negatives=500, **settings)
            torch.manual_seed(1)  # of the negatives
            found[exclude_seen, mask] = model(input_ids, labels=labels).loss.item()
    assert found[True, None] == found[True, True] == found[False, True]
    assert found[False, None] == found[False, False] == found[True, False]
    assert found[True, None] < found[False, None]


@pytest.mark.parametrize("training_loss", TRAINING_LOSSES)
def test_labels_beyond_the_vocabulary_are_refused(training_loss, input_ids):
    model = make_model(training_loss=training_loss)
    with pytest.raises(ValueError, match=r"labels must be below vocab_size \(23\), found 23"):
        model(input_ids, labels=torch.full_like(input_ids, VOCAB_SIZE))


def test_tied_embeddings_have_one_dense_gradient_from_histories_and_sampled_softmax():
    settings = {"training_loss": "sampled_softmax", "num_negatives": 5}
    tied, untied = make_model(**settings), make_model(**settings, tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        torch.manual_seed(1)
        model(torch.tensor([[3, 9, 4, 5]]), labels=torch.tensor([[9, 4, 5, -100]])).loss.backward()
    embeddings = (tied.lm_head, untied.lm_head, untied.get_input_embeddings())
    gradients = [embedding.weight.grad for embedding in embeddings]
    assert all(gradient.layout == torch.strided for gradient in gradients)
    torch.testing.assert_close(gradients[0], gradients[1] + gradients[2])


@pytest.mark.parametrize("training_loss", TRAINING_LOSSES)
def test_a_batch_without_targets_has_zero_loss(input_ids, training_loss):
    model = make_model(training_loss=training_loss)
    loss = model(input_ids, labels=torch.full_like(input_ids, -100)).loss
    loss.backward()
    assert loss.item() == 0 and (model.lm_head.weight.grad == 0).all()


def test_what_forward_cannot_combine_is_refused(model, input_ids):
    sasrec, cache = make_model("sasrec"), model(input_ids, use_cache=True).cache
    for arguments in ({"use_cache": True}, {"cache": cache}):
        with pytest.raises(ValueError, match="cache and use_cache must not be given to SASRecForSequential"):
            sasrec(input_ids, **arguments)
    for arguments in ({"use_cache": True}, {"cache": cache}, {"query": CatalogueQuery(2)}):
        with pytest.raises(ValueError, match="labels must not be given with cache, use_cache or query"):
            model(input_ids, labels=input_ids, **arguments)
    with pytest.raises(ValueError, match=r"target_ids must have shape \(2,\), found \(1,\)"):
        model(input_ids, query=CatalogueQuery(target_ids=torch.tensor([3])))


# One forward for all


@every_model
def test_forward_answers_queries(model, input_ids):
    query = CatalogueQuery(4, seen_ids=input_ids, target_ids=torch.tensor([5, 6]))
    output, logits = model(input_ids, query=query), model(input_ids).logits
    assert output.logits is None and output.loss is None
    expected = model.recommend(input_ids, top_k=4)
    assert torch.equal(output.token_ids, expected.token_ids)
    embeddings = [states.double() for states in (output.user_embeddings, model.lm_head.weight)]
    ranks = reference.rank_targets(*embeddings, query.target_ids, input_ids, 3)
    assert output.ranks.tolist() == ranks
    nothing = model(input_ids, query=CatalogueQuery())
    assert set(nothing.keys()) == {"user_embeddings"}
    torch.testing.assert_close(model.lm_head(nothing.user_embeddings), logits)
    torch.testing.assert_close(model.get_user_embeddings(input_ids), nothing.user_embeddings)


def test_user_embeddings_do_not_score_the_catalogue(model, input_ids, monkeypatch):
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("scored the catalogue"))
    assert model.get_user_embeddings(input_ids).shape == (2, 12)


@every_model
def test_every_inference_calls_the_model(model, input_ids):
    """Wrappers that work around forward, such as sharding and offloading, take part."""
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(module))
    model.recommend(input_ids, top_k=2)
    model.recommend(input_ids, top_k=2, index=ItemIndex(model, 2, 2))
    model.get_user_embeddings(input_ids)
    assert len(calls) == 3


@every_model
def test_tuples_as_the_configured_output_change_no_recommendation(model, input_ids):
    expected = model.recommend(input_ids, top_k=3)
    model.config.return_dict = False
    assert isinstance(model(input_ids), tuple)
    assert torch.equal(model.recommend(input_ids, top_k=3).token_ids, expected.token_ids)


@pytest.mark.parametrize("training_loss", ["full_softmax", "sampled_softmax"])
def test_a_compiled_model_trains_and_recommends_the_same(input_ids, training_loss):
    model = make_model("sasrec", training_loss=training_loss)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager")
    labels = torch.tensor([[-100, -100, 9, 4, 5], [5, 5, 17, 8, 12]])
    for trained in (model, compiled):
        torch.manual_seed(1)
        trained(input_ids, labels=labels).loss.backward()
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    expected, found = model.recommend(input_ids, top_k=3), compiled.recommend(input_ids, top_k=3)
    assert torch.equal(found.token_ids, expected.token_ids)


def test_masked_item_models_append_their_mask_token():
    model = make_model("bert4rec")
    history, appended = torch.tensor([[3, 4]]), torch.tensor([[3, 4, 2]])
    expected = model.model(appended).last_hidden_state[:, -1] @ model.lm_head.weight.T
    torch.testing.assert_close(model(history).logits, expected)
    torch.testing.assert_close(model.get_user_embeddings(history), model(history).user_embeddings)


# Heads that are more than a linear layer


@every_model
def test_an_adapter_of_the_head_recommends_and_trains(model, input_ids):
    plain = model.recommend(input_ids, top_k=9, exclude_seen=False)
    model.lm_head = LowRankAdapter(model.lm_head)
    logits = model(input_ids).logits
    result = model.recommend(input_ids, top_k=9, exclude_seen=False)
    assert result.token_ids.tolist() == reference.best_items(logits, [range(3, VOCAB_SIZE)] * 2, 9)
    assert not torch.equal(result.token_ids, plain.token_ids)
    candidates = torch.tensor([17, 4, 19, 3, 12, 6])
    result = model.recommend(input_ids, top_k=3, exclude_seen=False, candidate_ids=candidates)
    assert result.token_ids.tolist() == reference.best_items(logits, [candidates.tolist()] * 2, 3)
    labels = torch.tensor([[-100, -100, 9, 4, 5], [5, 5, 17, 8, 12]])
    model(input_ids, labels=labels).loss.backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (model.lm_head.up, model.lm_head.down))
    with pytest.raises(ValueError, match="lm_head must be a plain .* for ItemIndex, .* found adapters.LowRankAdapter"):
        ItemIndex(model)
    for training_loss in ("sampled_softmax", "gbce", "bce"):
        model.config.training_loss = training_loss
        with pytest.raises(ValueError, match=rf"lm_head must be a plain .* for training_loss='{training_loss}'"):
            model(input_ids, labels=labels)


@every_model
@pytest.mark.filterwarnings("ignore")  # of what is to become of quantisation in PyTorch
def test_a_quantised_model_recommends_what_its_logits_say(model, input_ids):
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    logits = quantised(input_ids).logits
    assert not torch.equal(logits, model(input_ids).logits)
    result = quantised.recommend(input_ids, top_k=9, exclude_seen=False)
    assert result.token_ids.tolist() == reference.best_items(logits, [range(3, VOCAB_SIZE)] * 2, 9)
    quantised.config.training_loss = "full_softmax"
    with pytest.raises(ValueError, match="lm_head must pass gradients on to train with the full softmax"):
        quantised(input_ids, labels=input_ids)


@every_model
def test_an_offloaded_model_recommends_the_same(model, input_ids):
    accelerate = pytest.importorskip("accelerate")
    query = CatalogueQuery(3, seen_ids=input_ids, target_ids=torch.tensor([5, 6]))
    expected = model.recommend(input_ids, top_k=4), model(input_ids, query=query)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.is_meta
    assert torch.equal(model.recommend(input_ids, top_k=4).token_ids, expected[0].token_ids)
    assert torch.equal(model.recommend(input_ids.tolist(), top_k=4).token_ids, expected[0].token_ids)
    assert torch.equal(model(input_ids, query=query).ranks, expected[1].ranks)


def shard_and_recommend():
    """One of two processes: what a sharded model answers must be what it answered before."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    input_ids = torch.randint(3, VOCAB_SIZE, (4, 12), generator=torch.Generator().manual_seed(0))
    query = CatalogueQuery(3, seen_ids=input_ids, target_ids=torch.tensor([5, 6, 7, 8]))
    labels = input_ids.roll(-1, 1)
    for model_type in MODELS:
        model = make_model(model_type)
        expected = model.recommend(input_ids, top_k=3), model(input_ids, query=query)
        expected_users = model.get_user_embeddings(input_ids)
        model(input_ids, labels=labels).loss.backward()
        gradient = model.lm_head.weight.grad
        model.zero_grad()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(input_ids, labels=labels).loss.backward()
        torch.testing.assert_close(model.lm_head.weight.grad.full_tensor(), gradient)
        assert torch.equal(model.recommend(input_ids, top_k=3).token_ids, expected[0].token_ids)
        assert torch.equal(model(input_ids, query=query).ranks, expected[1].ranks)
        torch.testing.assert_close(model.get_user_embeddings(input_ids), expected_users)
        candidates = model.recommend(input_ids, top_k=1, exclude_seen=False, candidate_ids=[5, 9, 13])
        assert candidates.token_ids.shape == (4, 1)
        # Whole again for the forward of its own, the head cannot give its gradients away.
        model = make_model(model_type, tie_word_embeddings=False)
        expected = model.recommend(input_ids, top_k=3)
        for module in (*model.model.layers, model.lm_head, model):
            fully_shard(module, mesh=mesh)
        assert torch.equal(model.recommend(input_ids, top_k=3).token_ids, expected.token_ids)
        with pytest.raises(ValueError, match="lm_head must hold its trainable weights whole"):
            model(input_ids, labels=labels)
    check_slots(mesh, input_ids)
    dist.destroy_process_group()


def check_slots(mesh, input_ids):
    """What reads layers other than by their forward gathers them, each time."""
    model = make_model("elastic")
    slots = model.get_retrieved_slots(input_ids)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    model.recommend(input_ids, top_k=3)
    for _ in range(2):
        assert torch.equal(model.get_retrieved_slots(input_ids), slots)
        assert not any(type(weight) is torch.nn.Parameter for weight in model.parameters())
    with pytest.raises(ValueError, match="model must be whole to be explained"):
        model.explain(input_ids)


@pytest.mark.long
def test_a_sharded_model_recommends_the_same():
    launch(TORCHRUN, __file__)


# Evaluation mode


@every_model
def test_a_model_in_training_mode_recommends_as_in_evaluation_mode(model, input_ids):
    expected = model.recommend(input_ids, top_k=5)
    users = model.get_user_embeddings(input_ids)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert any(modes) and not all(modes)
    for _ in range(3):
        assert torch.equal(model.recommend(input_ids, top_k=5).token_ids, expected.token_ids)
        assert torch.equal(model.get_user_embeddings(input_ids), users)
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="padded"):
        model.get_user_embeddings(torch.tensor([[3, 0]]))
    assert [module.training for module in model.modules()] == modes
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)  # forward itself keeps its mode


def test_threads_that_leave_early_do_not_bring_dropout_back(model, input_ids):
    model.train()
    with evaluating(model):
        thread = threading.Thread(target=model.recommend, args=(input_ids,), kwargs={"top_k": 2})
        thread.start()
        thread.join()
        assert not any(module.training for module in model.modules())
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied.lm_head.weight, model.lm_head.weight)
    assert all(module.training for module in model.modules())


def test_threads_recommend_the_same(model, input_ids):
    expected = model.recommend(input_ids, top_k=5).token_ids
    model.train()
    found = []

    def recommend():
        found.extend(model.recommend(input_ids, top_k=5).token_ids for _ in range(50))

    threads = [threading.Thread(target=recommend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200 and all(torch.equal(token_ids, expected) for token_ids in found)
    assert all(module.training for module in model.modules())


# Files


@every_model
def test_a_file_that_lacks_a_tensor_is_refused(model, tmp_path):
    state = model.state_dict()
    name = next(name for name in state if "layers.0" in name)
    model.save_pretrained(tmp_path, state_dict={key: state[key] for key in state if key != name})
    with pytest.raises(ValueError, match=rf"must hold every tensor of {type(model).__name__}, found no {name} "):
        type(model).from_pretrained(tmp_path)
    loaded, loading_info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(loading_info["missing_keys"]) == {name} and type(loaded) is type(model)


def test_base_model_and_head_load_each_other(input_ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "head")
    ElasticModel.from_pretrained(tmp_path / "head").save_pretrained(tmp_path / "base")
    loaded = ElasticForSequentialRecommendation.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    untied = make_model(tie_word_embeddings=False)
    untied.model.save_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match="found no lm_head.weight"):
        ElasticForSequentialRecommendation.from_pretrained(tmp_path / "untied")


@every_model
def test_token_ids_that_are_no_items_are_not_added(model, input_ids):
    with pytest.raises(ValueError, match="pad_to_multiple_of must be None, .* found 8"):
        model.resize_token_embeddings(24, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match=r"new_num_tokens must exceed num_special_tokens \(3\), found 3"):
        model.resize_token_embeddings(3)
    assert model.config.vocab_size == VOCAB_SIZE
    model.resize_token_embeddings(25)
    assert model.config.vocab_size == model.lm_head.out_features == 25
    recommended = model.recommend(input_ids, top_k=22, exclude_seen=False).token_ids
    assert recommended.sort().values.tolist() == [list(range(3, 25))] * 2


# Prefixes


@pytest.mark.parametrize("model_type", ["elastic", "sasrec"])
def test_prefixes_are_read_at_their_last_position_alone(model_type, monkeypatch):
    model = make_model(model_type, training_objective="prefix")
    input_ids = torch.tensor([[0, 0, 4, 5, 6], [0, 7, 8, 9, 4], [3, 5, 9, 6, 7]])
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = torch.tensor([9, 5, 20])
    calls = []
    forward = type(model.model).forward

    def spy(self, *args, **kwargs):
        calls.append(kwargs["last_position_only"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", spy)
    model(input_ids, labels=labels).loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    everywhere = model.model(input_ids, last_position_only=False).last_hidden_state
    loss = model.loss(everywhere, input_ids, labels)
    torch.testing.assert_close(model(input_ids, labels=labels).loss, loss)
    loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert calls == [True, False, True]
    labels[1, 3] = 4  # a label of another position
    model(input_ids, labels=labels)
    assert calls[-1] is False


def prefix_batch(model):
    """Rows of a time, three features and a label at the last position alone, for a model that reads what it reads."""
    input_ids, attention_mask = histories()
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = torch.tensor([9, 5, 20])
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if model.config.use_timestamps:
        batch["timestamps"], batch["request_timestamps"] = times()
    if model.config.event_features:
        batch["event_features"] = event_features()
    return batch, labels


@pytest.mark.parametrize("request_dropout", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("model_type", "reads"),
    [
        ("elastic", {"use_timestamps": True}),
        ("elastic", {"event_features": EVENT_FEATURES}),
        ("elastic", {"use_timestamps": True, "event_features": EVENT_FEATURES}),
        ("hstu", {"use_timestamps": True, "event_features": EVENT_FEATURES}),
        ("sasrec", {"event_features": EVENT_FEATURES}),
    ],
)
def test_the_last_position_of_prefixes_reads_times_and_features_as_all_positions_do(
    model_type, reads, request_dropout
):
    """Loss and gradients, in training mode, with the same requests dropped."""
    torch.manual_seed(0)
    settings = {"training_objective": "prefix", "hidden_dropout": 0.0, "request_dropout": request_dropout, **reads}
    if model_type == "elastic":
        model = elastic_model(num_memory_subkeys=0, **settings).double()
    else:
        sizes = {"vocab_size": 31, "hidden_size": 12, "max_position_embeddings": 13}
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes, **settings)).double()
    model.train()
    batch, labels = prefix_batch(model)
    torch.manual_seed(2)
    found = model(**batch, labels=labels).loss
    found_gradients = torch.autograd.grad(found, [*model.parameters()], allow_unused=True)
    torch.manual_seed(2)
    everywhere = model.model(**batch, last_position_only=False).last_hidden_state
    assert everywhere.shape[1] == labels.shape[1]
    expected = model.loss(everywhere, batch["input_ids"], labels)
    gradients = torch.autograd.grad(expected, [*model.parameters()], allow_unused=True)
    torch.testing.assert_close(found, expected)
    for (name, weight), one, other in zip(model.named_parameters(), found_gradients, gradients, strict=True):
        one, other = (torch.zeros_like(weight) if gradient is None else gradient for gradient in (one, other))
        torch.testing.assert_close(one, other, msg=name)
    if model.config.use_timestamps:
        requests = torch.cat(
            [batch["request_timestamps"][:, :-1], batch["request_timestamps"][:, -1:] + 90_000], dim=1
        )
        torch.manual_seed(2)
        later = model(**batch | {"request_timestamps": requests}, labels=labels).loss
        assert torch.equal(later, found) == (request_dropout == 1)


def test_the_requests_of_prefixes_have_the_shape_of_the_items():
    model = elastic_model(training_objective="prefix", use_timestamps=True)
    batch, labels = prefix_batch(model)
    for wrong in (batch["request_timestamps"][:, -1], 3):
        with pytest.raises(ValueError, match=r"request_timestamps must have the shape of input_ids \(3, 7\), found"):
            model(**batch | {"request_timestamps": wrong}, labels=labels)
    del batch["request_timestamps"]
    unknown = model(**batch, labels=labels).loss
    requests = torch.full_like(batch["timestamps"], -1)
    assert torch.equal(model(**batch, request_timestamps=requests, labels=labels).loss, unknown)


if __name__ == "__main__":
    shard_and_recommend()
