import threading

import pytest
import torch

from elastic_hf.models import explanation_elastic
from elastic_hf.models.event_time import pauses_before
from factories import elastic_model, histories, times


def model_and_history(use_timestamps):
    """A model and what it is given of histories, to be asked at their last positions."""
    model = elastic_model(use_timestamps=use_timestamps).double()
    input_ids, attention_mask = histories()
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if use_timestamps:
        timestamps, request_timestamps = times()
        batch |= {"timestamps": timestamps, "request_timestamps": request_timestamps[:, -1]}
    return model, batch


def test_an_explanation_shares_out_each_item_and_each_reading():
    model = elastic_model()
    input_ids, attention_mask = histories()
    explanation = model.explain(input_ids, attention_mask, top_k=5)
    assert explanation.half_lives.shape == (3, 6) and explanation.half_lives.min() >= 1
    assert explanation.assignments.shape == (3, 3, 7, 6) and explanation.item_weights.shape == (3, 2, 3, 7)
    is_item = attention_mask[:, None, None].bool().expand(-1, 2, 3, -1)
    torch.testing.assert_close(explanation.assignments.sum(dim=-1), is_item[:, 0].float())
    torch.testing.assert_close(explanation.item_weights.sum(dim=-1), torch.ones(3, 2, 3))
    assert (explanation.item_weights[~is_item] == 0).all() and (explanation.item_weights[is_item] > 0).all()
    assert torch.equal(explanation.token_ids, model.recommend(input_ids, attention_mask, top_k=5).token_ids)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("use_timestamps", [False, True])
def test_item_weights_are_those_of_the_values_that_the_last_position_reads(use_timestamps):
    """With them, the values of the items add up to what the attention of the first layer reads."""
    model, batch = model_and_history(use_timestamps)
    explanation = model.explain(**batch, top_k=1)
    base = model.model
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        events = {}
        if use_timestamps:
            timestamps = batch["timestamps"].nan_to_num()
            events = {"timestamps": timestamps, "pauses": pauses_before(timestamps, mask)}
        embeddings = base.embed(batch["input_ids"], **events)
        stream, _ = base.to_stream(embeddings, mask)
        value_weight = torch.stack([head.weight.view(2, 2, 8, 24)[:, 1] for head in base.key_value])  # (H, N, K, D)
        values = torch.einsum("bld,hnkd->bnhlk", stream, value_weight)
        expected = (explanation.item_weights[..., None] * values).sum(dim=-2).flatten(2)  # (B, N, D)
    read = []
    attention = base.layers[0].attention
    attention.output.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0][:, 0]))
    # silu(100) = 100
    attention.gate.register_forward_hook(lambda module, inputs, output: torch.full_like(output, 100))
    with torch.no_grad():
        base(**batch, last_position_only=True)
    torch.testing.assert_close(read[0] / 100, expected[:, 0])


@pytest.mark.parametrize("limit", [1, 40, 10_000])
@pytest.mark.parametrize("use_timestamps", [False, True])
def test_contributions_are_what_the_scores_lose_without_an_item(use_timestamps, limit, monkeypatch):
    """One history of 7 items, one of 5 and one of 1 item, which leaves nothing to read but padding."""
    monkeypatch.setitem(explanation_elastic.MAX_POSITIONS, "cpu", limit)
    model, batch = model_and_history(use_timestamps)
    batch["attention_mask"][2, :-1] = 0
    explanation = model.explain(**batch, top_k=4)
    assert explanation.contributions.shape == (3, 4, 7)
    for user, mask in enumerate(batch["attention_mask"].bool()):
        row = {name: values[user : user + 1] for name, values in batch.items()}
        whole = model(**row).logits[0, explanation.token_ids[user]]
        for t in range(7):
            rest = [other for other in range(7) if other != t]
            without = {name: values[:, rest] if values.dim() == 2 else values for name, values in row.items()}
            expected = whole - model(**without).logits[0, explanation.token_ids[user]] if mask[t] else 0 * whole
            torch.testing.assert_close(explanation.contributions[user, :, t], expected)


def test_every_item_carries_something():
    """The stream is normalised: to first order, no item but the last would count."""
    explanation = elastic_model().explain(*histories(batch_size=1, padding=0), top_k=2)
    assert (explanation.contributions.abs() > 1e-4).all()


def test_bfloat16_weights_are_explained_in_float32():
    explanation = elastic_model().to(torch.bfloat16).explain(*histories(), top_k=2)
    assert explanation.half_lives.dtype == explanation.item_weights.dtype == torch.float32
    torch.testing.assert_close(explanation.item_weights.sum(dim=-1), torch.ones(3, 2, 3))


def test_a_model_in_training_mode_is_explained_as_it_answers():
    model = elastic_model(hidden_dropout=0.5)
    expected = model.explain(*histories(), top_k=2)
    model.train()
    for _ in range(2):
        explanation = model.explain(*histories(), top_k=2)
        torch.testing.assert_close(explanation.contributions, expected.contributions)
    assert all(module.training for module in model.modules())


def test_unknown_items_are_not_explained():
    input_ids, attention_mask = histories()
    input_ids[1, 3] = 1
    with pytest.raises(ValueError, match="must hold items alone where they are explained, found the special token 1"):
        elastic_model().explain(input_ids, attention_mask)


@pytest.mark.parametrize("method", ["recommend", "get_user_embeddings", "explain"])
def test_threads_do_not_get_each_others_answers(method):
    """One thread explains and looks up slots all the time, while another asks for another user."""
    model = elastic_model()
    one, other = histories(12, batch_size=1, padding=0)[0], histories(9, batch_size=2, padding=0)[0][1:]

    def ask():
        answer = getattr(model, method)(other)
        return [value for value in (answer if isinstance(answer, tuple) else [answer])]

    expected = ask()
    stop = threading.Event()

    def explain():
        while not stop.is_set():
            model.explain(one, top_k=3)
            model.get_retrieved_slots(one)

    thread = threading.Thread(target=explain)
    thread.start()
    try:
        for _ in range(100):
            for found, wanted in zip(ask(), expected, strict=True):
                torch.testing.assert_close(found, wanted)
    finally:
        stop.set()
        thread.join()
