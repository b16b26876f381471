import pytest
from huggingface_hub.errors import StrictDataclassError

from elastic_hf import ElasticConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "64", "hidden_size"),
        ("hidden_size", 0, "hidden_size must be at least 1, found 0"),
        ("num_attention_heads", 5, "multiple of num_attention_heads, found 64 and 5"),
        ("conv_kernel_size", 0, "conv_kernel_size must be at least 1, found 0"),
        ("stream_intermediate_size", -1, "stream_intermediate_size must be at least 0, found -1"),
        ("hidden_act", "gelo", "hidden_act must be one of .*gelu.*, found 'gelo'"),
        ("hidden_dropout", 1.5, "hidden_dropout must be between 0 and 1, found 1.5"),
        ("vocab_size", 3, "vocab_size must exceed num_special_tokens"),
        ("mask_token_id", 3, "mask_token_id must be between 0 and num_special_tokens - 1"),
        ("num_memory_heads", 5, "multiple of 2 \\* num_memory_heads, found 64 and 5"),
        ("num_memory_heads", 0, "num_memory_heads must be at least 1, found 0"),
        ("num_memory_subkeys", -1, "num_memory_subkeys must be at least 0, found -1"),
        ("memory_top_k", 0, "memory_top_k must be at least 1, found 0"),
        ("memory_top_k", 32**2 + 1, "memory_top_k asks for 1025 slots"),
        ("is_causal", False, "is_causal"),
        ("training_objective", "next", "training_objective must be one of"),
        ("training_objective", "masked_item", "needs is_causal=False"),
        ("training_loss", "ce", "training_loss must be one of"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        ElasticConfig(**{field: value})


@pytest.mark.parametrize(
    ("num_items", "num_subkeys"), [(1, 2), (4, 2), (5, 4), (56, 8), (1024, 32), (1025, 64), (10**4, 128), (10**7, 128)]
)
def test_the_memory_follows_the_catalogue(num_items, num_subkeys):
    assert ElasticConfig(vocab_size=num_items + 3).num_memory_subkeys == num_subkeys
    assert ElasticConfig(vocab_size=num_items + 3, num_memory_subkeys=0).num_memory_subkeys == 0


def test_the_papers_form_is_another_model():
    with pytest.raises(StrictDataclassError, match="elastic_paper"):
        ElasticConfig(is_causal=False, training_objective="prefix")


def test_round_trip(tmp_path):
    config = ElasticConfig(vocab_size=77, hidden_size=24, num_attention_heads=3, hidden_dropout=0, conv_kernel_size=4)
    config.save_pretrained(tmp_path)
    assert ElasticConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
