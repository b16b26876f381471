"""Transformers' own tests of models, on every model of the registry in tiny."""

import copy
import os
import unittest
from dataclasses import fields
from fnmatch import fnmatchcase
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import transformers_suite
from elastic_hf import SequentialRecommendationCollator
from elastic_hf.registry import MODELS


if os.environ.get("ELASTIC_HF_TRANSFORMERS_SUITE") != "1":
    pytest.skip("takes minutes: ELASTIC_HF_TRANSFORMERS_SUITE=1 asks for it", allow_module_level=True)
try:
    common, training, configuration = transformers_suite.import_tests(
        "test_modeling_common", "test_training_mixin", "test_configuration_common"
    )
except OSError as error:
    pytest.skip(f"Transformers' tests cannot be fetched from PyPI: {error}", allow_module_level=True)

pytestmark = pytest.mark.transformers_suite

# Of every configuration, as far as it has these fields.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 31,
    "num_interest_experts": 8,
    "num_memory_subkeys": 5,
    "num_memory_heads": 2,
}

# What is tested: the models of the registry and other forms of them, by the names of their test cases.
FORMS = {
    model.__name__.removesuffix("ForSequentialRecommendation"): (model_type, {})
    for model_type, model in MODELS.items()
}
FORMS |= {
    "Popularity": ("popularity", {"hidden_size": 1}),
    "ElasticWithoutMemory": ("elastic", {"num_memory_subkeys": 0}),
    "ElasticPaperWithoutMemory": ("elastic_paper", {"num_memory_subkeys": 0}),
}

# Classes and their tests, as patterns, that do not go together, and why. Transformers skips others of its own accord.
DO_NOT_APPLY = {
    "*.test_eager_matches_sdpa_inference_*_pad_right*": "histories are padded on the left",
    "*.test_resize_tokens_embeddings": "it pads the vocabulary, and the padding would be recommended",
    "ElasticForSequentialRecommendation.test_hidden_states_output": "its layers run at the last position alone",
    "BERT4RecForSequentialRecommendation.test_hidden_states_output": "it reads one more token, the mask",
    "BERT4RecForSequentialRecommendation.test_attention_outputs": "it reads one more token, the mask",
    "PopularityModel.*": "it has no weights",
    "Popularity*.test_base_model_prefix_loads_base_weights": "its base model has no weights",
    "Popularity*.test_correct_missing_keys": "its base model has no weights",
    "Popularity*.test_batching_equivalence": "it has no hidden states",
    "Popularity*.test_hidden_states_output": "it has no hidden states",
    "Popularity*.test_model_outputs_equivalence": "it has no hidden states",
    "Popularity*.test_retain_grad_hidden_states_attentions": "it has no hidden states",
    "Popularity*.test_model_get_set_embeddings": "it does not read the items",
    "Popularity*.test_resize_embeddings_untied": "it does not read the items",
    "Popularity*.test_training_overfit": "it counts instead of being trained",
}


class ModelTester:
    """What Transformers' tests ask of a model: a tiny configuration, its sizes, and a batch."""

    is_training = True
    batch_size = 7
    seq_length = 9

    def __init__(self, config_class, changes):
        self.config_class = config_class
        names = {field.name for field in fields(config_class)}
        self.settings = {name: size for name, size in SIZES.items() if name in names} | changes
        vars(self).update(self.settings)

    def get_config(self):
        # The implementation that holds the attentions, where there are any.
        return self.config_class(**self.settings, attn_implementation="eager")

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        num_items = config.vocab_size - config.num_special_tokens
        input_ids = config.num_special_tokens + common.ids_tensor([self.batch_size, self.seq_length], num_items)
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class ModelTests(common.ModelTesterMixin, training.TrainingTesterMixin):
    """Transformers' tests, for a base model and its head."""

    form: str
    test_can_init_all_missing_weights_before_2023 = True  # as which it takes every file without a date
    training_overfit_learning_rate = 1e-2

    def setUp(self):
        model_type, changes = FORMS[self.form]
        self.head_class = MODELS[model_type]
        self.has_attentions = "attentions" in (self.head_class._can_record_outputs or {})
        self.model_tester = ModelTester(self.head_class.config_class, changes)
        with torch.device("meta"):
            base_class = type(self.head_class(self.model_tester.get_config()).base_model)
        reasons = {model_class: self.why_not(model_class) for model_class in (base_class, self.head_class)}
        self.all_model_classes = [model_class for model_class, reason in reasons.items() if reason is None]
        if not self.all_model_classes:
            self.skipTest(reasons[self.head_class])
        # The models that have no loss.
        base_models = patch.dict(MODEL_MAPPING_NAMES, {model_type: base_class.__name__})
        base_models.start()
        self.addCleanup(base_models.stop)

    def why_not(self, model_class):
        """Return why this test does not apply to a class, None if it does."""
        name = f"{model_class.__name__}.{self._testMethodName}"
        return next((reason for pattern, reason in DO_NOT_APPLY.items() if fnmatchcase(name, pattern)), None)

    def test_config(self):
        settings = self.model_tester.settings
        properties = [name for name in ("hidden_size", "num_hidden_layers") if name in settings]
        configuration.ConfigTester(
            self, self.head_class.config_class, common_properties=properties, **settings
        ).run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = copy.deepcopy(inputs_dict)
        if return_labels and model_class is self.head_class:
            inputs_dict["labels"] = inputs_dict["input_ids"].roll(-1, dims=1)
        return inputs_dict

    def _get_trainable_model_class(self):
        return self.head_class

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        config = self.model_tester.get_config()
        collator = SequentialRecommendationCollator(
            pad_token_id=config.pad_token_id,
            mask_token_id=config.mask_token_id,
            max_length=self.model_tester.seq_length,
            objective=config.training_objective,
        )
        items = np.arange(config.num_special_tokens, vocab_size)
        return collator([{"input_ids": items[10 * row : 10 * row + 8]} for row in range(batch_size)])


for form in FORMS:
    globals()[f"{form}Test"] = type(f"{form}Test", (ModelTests, unittest.TestCase), {"form": form})
