import json
import math
from dataclasses import fields

import pytest
from huggingface_hub.errors import StrictDataclassError

from elastic_hf import ElasticConfig
from elastic_hf.baselines import GRU4RecConfig, SASRecConfig
from elastic_hf.registry import MODELS


CONFIGS = [model.config_class for model_type, model in MODELS.items() if model_type != "popularity"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5])
@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_number_must_be_finite_and_not_negative(config_class, value):
    defaults = config_class()
    names = [field.name for field in fields(defaults) if isinstance(getattr(defaults, field.name), float)]
    assert {"initializer_range", "gbce_calibration", "hidden_dropout"} <= set(names)
    assert ("layer_norm_eps" in names) == (config_class is not GRU4RecConfig)
    for name in names:
        with pytest.raises(StrictDataclassError, match=f"{name} must be a finite number of at least 0, found {value}"):
            config_class(**{name: value})


def test_a_file_with_a_broken_number_is_refused(tmp_path):
    config = SASRecConfig()
    config.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "layer_norm_eps": math.nan}))
    with pytest.raises(StrictDataclassError, match="layer_norm_eps must be a finite number of at least 0, found nan"):
        SASRecConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 3}, r"vocab_size must exceed num_special_tokens \(3\), found 3"),
        ({"pad_token_id": 3}, r"pad_token_id must be between 0 and num_special_tokens - 1 \(2\), found 3"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, found 0"),
        ({"gbce_calibration": 2}, "gbce_calibration must be between 0 and 1, found 2"),
        ({"training_loss": "hinge"}, "training_loss must be one of .* found 'hinge'"),
        ({"training_objective": "last"}, "training_objective must be one of .* found 'last'"),
        ({"request_dropout": 2}, "request_dropout must be between 0 and 1, found 2"),
        ({"use_timestamps": True}, "use_timestamps must be False for sasrec, which reads no times, found True"),
        ({"event_features": {"now": 3}}, "event_features must not be called history, timestamps, now, found 'now'"),
        (
            {"event_features": {"rating": -1}},
            r"event_features\['rating'\] must be a number of categories, or 0, found -1",
        ),
        ({"event_features": {"rating": "5"}}, "event_features"),
        ({"event_features": ["rating"]}, "event_features"),
        ({"exclude_seen": None}, "exclude_seen"),
        ({"mask_seen_in_loss": "no"}, "mask_seen_in_loss"),
    ],
)
def test_what_no_model_can_be_is_refused(settings, message):
    with pytest.raises(StrictDataclassError, match=message):
        SASRecConfig(**settings)


def test_the_loss_follows_exclude_seen_unless_it_is_set():
    assert SASRecConfig().exclude_seen and SASRecConfig().masks_seen
    config = SASRecConfig(exclude_seen=False)
    assert not config.masks_seen
    config.exclude_seen = True
    assert config.masks_seen
    assert SASRecConfig(exclude_seen=False, mask_seen_in_loss=True).masks_seen
    assert not SASRecConfig(mask_seen_in_loss=False).masks_seen


def test_the_setting_is_saved_and_a_file_without_it_leaves_seen_items_out(tmp_path):
    ElasticConfig(exclude_seen=False).save_pretrained(tmp_path)
    loaded = ElasticConfig.from_pretrained(tmp_path)
    assert not loaded.exclude_seen and loaded.mask_seen_in_loss is None and not loaded.masks_seen
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["exclude_seen"]
    for mask in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({**settings, "mask_seen_in_loss": mask}))
        old = ElasticConfig.from_pretrained(tmp_path)
        assert old.exclude_seen and old.masks_seen is mask


@pytest.mark.parametrize("model_type", MODELS)
def test_some_models_read_times_and_only_where_positions_predict_the_next_event(model_type):
    config_class = MODELS[model_type].config_class
    assert config_class().use_timestamps is False
    assert config_class.supports_timestamps == (model_type in ("elastic", "hstu"))
    if config_class.supports_timestamps:
        for objective in ("next_item", "prefix"):
            assert config_class(use_timestamps=True, training_objective=objective).use_timestamps
        message = "use_timestamps needs training_objective='next_item' or 'prefix', found 'masked_item'"
        with pytest.raises(StrictDataclassError, match=message):
            config_class(use_timestamps=True, training_objective="masked_item")


@pytest.mark.parametrize("model_type", MODELS)
def test_some_models_read_features_of_events(model_type, tmp_path):
    config_class = MODELS[model_type].config_class
    assert config_class().event_features == {}
    assert config_class.supports_event_features == (model_type in ("elastic", "hstu", "sasrec"))
    if not config_class.supports_event_features:
        message = f"event_features must be empty for {model_type}, which reads none, found price, rating"
        with pytest.raises(StrictDataclassError, match=message):
            config_class(event_features={"rating": 5, "price": 0})
        return
    config_class(event_features={"rating": 5, "price": 0}, training_objective="prefix").save_pretrained(tmp_path)
    assert [*config_class.from_pretrained(tmp_path).event_features.items()] == [("price", 0), ("rating", 5)]
    message = "event_features needs training_objective='next_item' or 'prefix', found 'masked_item'"
    with pytest.raises(StrictDataclassError, match=message):
        config_class(event_features={"rating": 5}, training_objective="masked_item")


@pytest.mark.parametrize("model_type", MODELS)
def test_models_that_read_times_or_features_of_events_are_causal(model_type):
    config_class = MODELS[model_type].config_class
    for settings in ({"use_timestamps": True}, {"event_features": {"rating": 5}}):
        with pytest.raises(StrictDataclassError):
            config_class(is_causal=False, training_objective="prefix", **settings)
