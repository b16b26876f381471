import math

import pytest
import torch

from elastic_hf import ElasticConfig, ElasticForSequentialRecommendation, ItemIndex
from elastic_hf.models import modeling_recommender
from elastic_hf.models.modeling_recommender import top_k_items


VOCAB_SIZE = 23  # 20 items


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ElasticConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=12,
        num_attention_heads=3,
        num_interest_experts=5,
        num_memory_subkeys=4,
        num_memory_heads=2,
    )
    return ElasticForSequentialRecommendation(config).eval()


@pytest.fixture
def input_ids():
    return torch.tensor([[0, 0, 3, 9, 4], [22, 5, 5, 17, 8]])


def sorted_by_hand(scores, allowed, top_k):
    """Token ids by falling score, one list per row."""
    return [
        sorted((i for i in range(len(row)) if i in ids), key=lambda i, r=row: -r[i])[:top_k]
        for row, ids in zip(scores.tolist(), allowed, strict=True)
    ]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_recommend_equals_sorting_the_logits(model, input_ids, exclude_seen, chunk, monkeypatch):
    monkeypatch.setattr(modeling_recommender, "MAX_SCORES", 2 * chunk)
    items = set(range(3, VOCAB_SIZE))
    allowed = [items - set(row) if exclude_seen else items for row in input_ids.tolist()]
    logits = model(input_ids).logits
    result = model.recommend(input_ids, top_k=9, exclude_seen=exclude_seen)
    assert result.token_ids.tolist() == sorted_by_hand(logits, allowed, 9)
    torch.testing.assert_close(result.scores, logits.gather(-1, result.token_ids))


def test_recommend_from_candidates(model, input_ids):
    candidates = torch.tensor([17, 4, 19, 3, 12, 6])
    logits = model(input_ids).logits
    result = model.recommend(input_ids, top_k=3, candidate_ids=candidates)
    allowed = [set(candidates.tolist()) - set(row) for row in input_ids.tolist()]
    assert result.token_ids.tolist() == sorted_by_hand(logits, allowed, 3)


@pytest.mark.parametrize("has_index", [False, True])
def test_recommend_leaves_out_what_was_seen_before_the_window(model, input_ids, has_index):
    """The model reads the last two items of the whole histories."""
    index = ItemIndex(model, num_clusters=2, num_probes=2) if has_index else None
    window = input_ids[:, -2:]
    allowed = [set(range(3, VOCAB_SIZE)) - set(row) for row in input_ids.tolist()]
    result = model.recommend(window, top_k=16, seen_ids=input_ids, index=index)
    assert result.token_ids.tolist() == sorted_by_hand(model(window).logits, allowed, 16)
    kept = model.recommend(window, top_k=20, seen_ids=input_ids, exclude_seen=False, index=index)
    assert kept.token_ids.sort().values.tolist() == [list(range(3, VOCAB_SIZE))] * 2


def test_recommend_holds_no_more_scores_than_stated(model, monkeypatch):
    """With room for two items per row at once, no tensor of scores is wider than two items and the best so far."""
    monkeypatch.setattr(modeling_recommender, "MAX_SCORES", 4)
    widest = 0
    topk = torch.Tensor.topk

    def watched(scores, *args, **kwargs):
        nonlocal widest
        widest = max(widest, scores.shape[-1])
        return topk(scores, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    top_k_items(torch.randn(2, 5), torch.randn(VOCAB_SIZE, 5), top_k=3)
    assert widest == 3 + 2


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([3, 4])}, r"input_ids must have shape .* found \(2,\)"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, r"history_length >= 1\), found \(1, 0\)"),
        ({"input_ids": torch.empty(0, 4, dtype=torch.long)}, "at least one history, found none"),
        ({"input_ids": torch.tensor([[3, 23]])}, r"vocab_size - 1 \(22\), found 3 to 23"),
        ({"input_ids": torch.tensor([[3, 4], [0, 0]])}, "row 1 does not"),
        ({"input_ids": torch.tensor([[3, 0]])}, "left padding"),
        ({"attention_mask": torch.ones(2, 4)}, r"shape of input_ids \(2, 5\), found \(2, 4\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * 2)}, "zeros, then ones"),
        ({"candidate_ids": torch.tensor([5, 5])}, "distinct"),
        ({"candidate_ids": torch.tensor([2, 5])}, "candidate_ids must be items, from 3 to 22, found 2 to 5"),
        ({"top_k": 0}, "top_k must be at least 1, found 0"),
        ({"seen_ids": torch.tensor([3, 4])}, r"seen_ids must have shape \(2, num_seen\), found \(2,\)"),
        ({"seen_ids": torch.tensor([[3, 4]])}, r"seen_ids must have shape \(2, num_seen\), found \(1, 2\)"),
        ({"seen_ids": torch.tensor([[3], [-1]])}, r"seen_ids must be between 0 .*22\), found -1 to 3"),
    ],
)
def test_recommend_names_what_is_wrong(model, input_ids, changes, message):
    with pytest.raises(ValueError, match=message):
        model.recommend(**{"input_ids": input_ids, "top_k": 2, **changes})


@pytest.mark.parametrize("shape", [(5,), (2, 0)])
def test_forward_names_an_empty_or_flat_history(model, shape):
    with pytest.raises(ValueError, match=r"input_ids must have shape \(batch_size, history_length >= 1\)"):
        model(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_forward_names_a_wrong_shape(model, input_ids, name):
    with pytest.raises(ValueError, match=rf"{name} must have the shape of input_ids \(2, 5\), found \(2, 4\)"):
        model(input_ids, **{name: torch.ones(2, 4, dtype=torch.long)})


def test_nan_scores_are_an_error(model, input_ids):
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        model.recommend(input_ids, top_k=3)


def test_masked_item_models_append_their_mask_token():
    torch.manual_seed(0)
    config = ElasticConfig(
        vocab_size=VOCAB_SIZE, is_causal=False, training_objective="masked_item", num_memory_subkeys=4
    )
    model = ElasticForSequentialRecommendation(config).eval()
    history, appended = torch.tensor([[3, 4]]), torch.tensor([[3, 4, 2]])
    expected = model.model(appended).last_hidden_state[:, -1] @ model.lm_head.weight.T
    torch.testing.assert_close(model(history).logits, expected)
    torch.testing.assert_close(model.get_user_embeddings(history), model(history).user_embeddings)


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_loss_is_the_mean_over_targets_or_over_what_the_trainer_counted(model, input_ids, exclude_seen, is_causal):
    """Of what a position has read, itself included, only its target is in its softmax, if seen items are excluded."""
    model.config.exclude_seen = exclude_seen
    model.config.is_causal = is_causal
    labels = torch.tensor([[-100, -100, 9, 4, 5], [5, 5, 17, 8, 0]])  # padding is no target
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    logits = model.lm_head(model.model(input_ids, attention_mask).last_hidden_state)
    total = 0
    for row in range(2):
        for t in range(5):
            if labels[row, t] < 3:
                continue
            read = slice(0, t + 1) if is_causal else slice(0, 5)
            seen = set(input_ids[row, read][attention_mask[row, read] == 1].tolist()) if exclude_seen else set()
            scored = [item for item in range(3, VOCAB_SIZE) if item not in seen or item == labels[row, t]]
            total = total + logits[row, t, scored].logsumexp(dim=-1) - logits[row, t, labels[row, t]]
    torch.testing.assert_close(model(input_ids, attention_mask, labels=labels).loss, total / 7)
    loss = model(input_ids, attention_mask, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(loss, total / 10)
    assert model(input_ids, labels=labels).logits is None


@pytest.mark.parametrize("training_loss", ["sampled_softmax", "gbce", "bce"])
def test_sampled_losses_score_items_only(training_loss, monkeypatch):
    """Every negative and target is an item: the special tokens' rows get no gradient."""
    torch.manual_seed(0)
    config = ElasticConfig(
        vocab_size=VOCAB_SIZE, training_loss=training_loss, num_negatives=50, tie_word_embeddings=False
    )
    model = ElasticForSequentialRecommendation(config)
    labels = torch.tensor([[9, 4, 5, -100]])
    model(torch.tensor([[3, 9, 4, 5]]), labels=labels).loss.backward()
    gradient = model.lm_head.weight.grad.abs().sum(dim=-1)
    assert (gradient[:3] == 0).all() and (gradient[3:] > 0).any()


def test_tied_embeddings_have_one_dense_gradient_from_histories_and_sampled_softmax():
    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB_SIZE, "training_loss": "sampled_softmax", "num_negatives": 5}
    tied = ElasticForSequentialRecommendation(ElasticConfig(**settings)).eval()
    untied = ElasticForSequentialRecommendation(ElasticConfig(**settings, tie_word_embeddings=False)).eval()
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        torch.manual_seed(1)
        model(torch.tensor([[3, 9, 4, 5]]), labels=torch.tensor([[9, 4, 5, -100]])).loss.backward()
    embeddings = (tied.lm_head, untied.lm_head, untied.get_input_embeddings())
    gradients = [embedding.weight.grad for embedding in embeddings]
    assert all(gradient.layout == torch.strided for gradient in gradients)
    torch.testing.assert_close(gradients[0], gradients[1] + gradients[2])


def test_a_batch_without_targets_has_zero_loss(model, input_ids):
    assert model(input_ids, labels=torch.full_like(input_ids, -100)).loss.item() == 0
