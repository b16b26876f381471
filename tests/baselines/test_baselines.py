"""What holds for every baseline: no leak, no trace of padding, the Auto classes, and enough capacity to learn."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, TrainingArguments

from elastic_hf import SequentialRecommendationCollator, SequentialRecommendationTrainer
from elastic_hf.baselines import common


PREFIX = {"is_causal": False, "training_objective": "prefix"}
MASKED = {"is_causal": False, "training_objective": "masked_item"}
SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 13,
}
HSTU = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
LRUREC = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "recurrent_size": 18,
    "intermediate_size": 20,
}
PAPER = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_interest_experts": 4,
    "intermediate_size": 20,
    "num_memory_subkeys": 5,
    "num_memory_heads": 2,
}
MODELS = {
    "elastic_paper prefix": ("elastic_paper", PAPER),
    "elastic_paper masked": ("elastic_paper", {**PAPER, **MASKED}),
    "elastic_paper without memory": ("elastic_paper", {**PAPER, "num_memory_subkeys": 0}),
    "sasrec": ("sasrec", SIZES),
    "sasrec modern": ("sasrec", {**SIZES, "hidden_act": "gelu", "attention_output": True, "residual_gate": True}),
    "bert4rec": ("bert4rec", SIZES),
    "gru4rec": ("gru4rec", {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2, "recurrent_size": 20}),
    "hstu": ("hstu", HSTU),
    "lrurec": ("lrurec", LRUREC),
    "linrec": ("linrec", SIZES),
    "linrec prefix": ("linrec", {**SIZES, **PREFIX}),
    "linrec masked": ("linrec", {**SIZES, **MASKED}),
    "lightsans prefix": ("lightsans", {**SIZES, "num_latent_interests": 4}),
    "lightsans masked": ("lightsans", {**SIZES, **MASKED, "num_latent_interests": 4}),
}
OTHER_FORMS = [
    *("elastic_paper masked", "elastic_paper without memory", "sasrec modern"),
    *("linrec prefix", "linrec masked", "lightsans masked"),
]
every_model = pytest.mark.parametrize(("model_type", "settings"), MODELS.values(), ids=MODELS.keys())


def make_model(model_type, settings, **changes):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **{**settings, **changes})).eval()
    # Weights large enough for a leak to show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_collator(config, max_length):
    return SequentialRecommendationCollator(
        pad_token_id=config.pad_token_id,
        mask_token_id=config.mask_token_id,
        max_length=max_length,
        objective=config.training_objective,
    )


@every_model
def test_no_prediction_has_seen_its_item(model_type, settings):
    """Of items that occur once, none reaches the vector that is trained to predict it, nor one before it."""
    model = make_model(model_type, settings)
    histories = [3 + np.random.default_rng(row).permutation(28)[:length] for row, length in enumerate((9, 4, 7))]
    batch = make_collator(model.config, 12)([{"input_ids": history} for history in histories])
    hidden_states = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    embeddings = model.get_input_embeddings().weight
    targets = (batch["labels"] >= 3).nonzero().tolist()
    assert len(targets) >= 3
    for row, t in targets:
        (gradient,) = torch.autograd.grad(hidden_states[row, t].square().sum(), embeddings, retain_graph=True)
        unseen = [int(batch["labels"][row, t])]
        if model.config.is_causal:
            unseen += batch["input_ids"][row, t + 1 :].tolist()
        assert (gradient[unseen] == 0).all()
        assert t == 0 or (gradient[batch["input_ids"][row, t - 1 : t + 1]] != 0).any()


@every_model
def test_padding_leaves_no_trace(model_type, settings):
    model = make_model(model_type, settings)
    input_ids = torch.randint(3, 31, (3, 7), generator=torch.Generator().manual_seed(1))
    padding = torch.randint(3, 31, (3, 4), generator=torch.Generator().manual_seed(2))
    attention_mask = torch.cat([torch.zeros_like(padding), torch.ones_like(input_ids)], dim=1)
    alone = model.model(input_ids).last_hidden_state
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = 5
    model(input_ids, labels=labels).loss.backward()
    weights = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [weight.grad.clone() for weight in weights]
    assert len(weights) >= len(list(model.parameters())) - 1  # the bias of a memory is balanced in training mode alone
    for filler in (torch.zeros_like(padding), padding):
        padded_ids = torch.cat([filler, input_ids], dim=1)
        padded = model.model(padded_ids, attention_mask).last_hidden_state
        torch.testing.assert_close(padded[:, 4:], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            model.get_user_embeddings(padded_ids, attention_mask),
            model.get_user_embeddings(input_ids),
            rtol=1e-4,
            atol=1e-5,
        )
        model.zero_grad()
        padded_labels = torch.cat([torch.full_like(padding, -100), labels], dim=1)
        model(padded_ids, attention_mask, labels=padded_labels).loss.backward()
        for weight, gradient in zip(weights, gradients, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5)


@every_model
def test_the_last_position_alone_is_the_last_of_all(model_type, settings):
    model = make_model(model_type, settings)
    input_ids = torch.randint(3, 31, (3, 7), generator=torch.Generator().manual_seed(1))
    input_ids[0, :3] = 0
    alone = model.model(input_ids, last_position_only=True).last_hidden_state
    torch.testing.assert_close(alone, model.model(input_ids).last_hidden_state[:, -1:])


@every_model
@pytest.mark.parametrize("name", ["timestamps", "request_timestamps"])
def test_times_are_refused_by_models_without_them(model_type, settings, name):
    model = make_model(model_type, settings)
    shape = (2, 5) if name == "timestamps" else (2,)
    times = {name: torch.full(shape, 7)}
    for method in (model, model.recommend, model.get_user_embeddings):
        with pytest.raises(ValueError, match=f"{name} must be None for a model with use_timestamps=False"):
            method(torch.full((2, 5), 4), **times)


@every_model
def test_only_hstu_reads_times(model_type, settings):
    if model_type == "hstu":
        assert AutoConfig.for_model(model_type, **settings, use_timestamps=True).use_timestamps
        return
    message = f"use_timestamps must be False for {model_type}, which reads no times, found True"
    with pytest.raises(StrictDataclassError, match=message):
        AutoConfig.for_model(model_type, **settings, use_timestamps=True)


@every_model
def test_saved_and_loaded_by_the_auto_classes(model_type, settings, tmp_path):
    model = make_model(model_type, settings)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    input_ids = torch.tensor([[0, 0, 3, 9, 4], [22, 5, 5, 17, 8]])
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert torch.equal(loaded.recommend(input_ids, top_k=5).token_ids, model.recommend(input_ids, top_k=5).token_ids)


class Opaque(nn.Module):
    """What an adapter or a quantised layer is to a model: a module that can be called, and no more."""

    def __init__(self, module):
        super().__init__()
        self._module = module

    def forward(self, *args, **kwargs):
        return self._module(*args, **kwargs)


@every_model
def test_no_weight_is_read_past_its_module(model_type, settings):
    model = make_model(model_type, settings).model
    input_ids = torch.tensor([[0, 0, 3, 9, 4], [22, 5, 5, 17, 8]])
    expected = model(input_ids).last_hidden_state
    replaced = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.GRU)
    names = [name for name, module in model.named_modules() if isinstance(module, replaced)]
    assert len(names) >= 4
    for name in names:
        model.set_submodule(name, Opaque(model.get_submodule(name)))
    assert torch.equal(model(input_ids).last_hidden_state, expected)


@every_model
def test_a_large_batch_is_encoded_a_few_rows_at_a_time(model_type, settings, monkeypatch):
    model = make_model(model_type, settings)
    input_ids = torch.randint(3, 31, (5, 7), generator=torch.Generator().manual_seed(1))
    input_ids[0, :3] = 0
    expected = model(input_ids).user_embeddings
    monkeypatch.setattr(common, "MAX_POSITIONS", 17)
    num_rows = []
    encode = model.model.encode
    monkeypatch.setattr(model.model, "encode", lambda ids, *args: num_rows.append(len(ids)) or encode(ids, *args))
    torch.testing.assert_close(model.get_user_embeddings(input_ids), expected)
    assert num_rows == [2, 2, 1]


@every_model
def test_hidden_states_are_returned(model_type, settings, monkeypatch):
    monkeypatch.setattr(common, "MAX_POSITIONS", 1)
    model = make_model(model_type, settings)
    input_ids = torch.tensor([[3, 9, 4, 6], [0, 7, 8, 5]])
    length = 5 if model.config.training_objective == "masked_item" else 4  # with the mask token
    with torch.no_grad():
        hidden_states = model(input_ids, output_hidden_states=True).hidden_states
    width = model.config.recurrent_size if model_type == "gru4rec" else 24
    assert [tuple(states.shape) for states in hidden_states] == [(2, length, 24), (2, length, width), (2, 1, 24)]
    for one, other in zip(hidden_states, model(input_ids, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(one, other)


@every_model
def test_weights_may_be_bfloat16(model_type, settings):
    model = make_model(model_type, settings).eval()
    input_ids = torch.tensor([[3, 9, 4, 6], [0, 7, 8, 5]])
    with torch.no_grad():
        expected = model.get_user_embeddings(input_ids)
        found = model.to(torch.bfloat16).get_user_embeddings(input_ids)
    torch.testing.assert_close(found.float(), expected.float(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["sasrec", "bert4rec"])
def test_every_position_has_a_key_that_it_attends_to(model_type, attention):
    # A kernel may return NaN for a position without one, and its gradients spoil the weights.
    model = make_model(model_type, SIZES)
    model.set_attn_implementation(attention)
    masks = []
    for layer in model.modules():
        if isinstance(layer, common.SelfAttention):
            layer.register_forward_pre_hook(lambda layer, inputs: masks.append(inputs[1]))
    model.model(torch.tensor([[3, 9, 4, 6], [0, 0, 8, 5]]))
    assert len(masks) == 2
    for mask in masks:
        is_open = mask if attention == "sdpa" else mask == 0
        assert is_open.any(dim=-1).all()
        assert not is_open[1, 0, 2:, :2].any()


@every_model
def test_attentions_are_returned_or_refused(model_type, settings):
    model = make_model(model_type, settings)
    input_ids = torch.tensor([[3, 9, 4, 6], [0, 7, 8, 5]])
    if model_type not in ("sasrec", "bert4rec"):
        with pytest.raises(ValueError, match=f"output_attentions must be False for {model_type}"):
            model(input_ids, output_attentions=True)
        return
    with pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager'.*found 'sdpa'"):
        model(input_ids, output_attentions=True)
    expected = model.model(input_ids).last_hidden_state
    model.set_attn_implementation("eager")
    output = model.model(input_ids, output_attentions=True)
    torch.testing.assert_close(output.last_hidden_state[input_ids > 0], expected[input_ids > 0])
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 3, 4, 4)] * 2
    for weights in output.attentions:
        torch.testing.assert_close(weights[1, :, 1:].sum(dim=-1), torch.ones(3, 3))
        assert (weights[1, :, 1:, 0] == 0).all()  # padding
        assert ((weights[0].triu(1) == 0).all()) == model.config.is_causal
    of_head = model(input_ids, output_attentions=True).attentions
    assert len(of_head) == 2 and of_head[-1].shape[2] == 1  # the last position alone


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        pytest.param(*model, id=name, marks=pytest.mark.long if name in OTHER_FORMS else ())
        for name, model in MODELS.items()
    ],
)
def test_overfits_50_users(model_type, settings, tmp_path):
    generator = np.random.default_rng(0)
    histories = [3 + generator.permutation(28)[: generator.integers(4, 9)] for _ in range(50)]
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **settings, hidden_dropout=0.0))
    collator = make_collator(model.config, 12)
    trainer = SequentialRecommendationTrainer(
        model,
        TrainingArguments(
            str(tmp_path),
            # Without positions it takes longer to tell a mask at the end from others.
            max_steps=1000 if settings is MODELS["elastic_paper masked"][1] else 400,
            per_device_train_batch_size=25,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        collator,
        train_dataset=Dataset.from_dict({"input_ids": histories}),
        eval_dataset=Dataset.from_dict(
            {"input_ids": [history[:-1] for history in histories], "target": [history[-1] for history in histories]}
        ),
    )
    trainer.train()
    assert trainer.evaluate()["eval_hr@1"] > 0.8
