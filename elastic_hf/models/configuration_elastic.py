"""Every hyperparameter of ELASTIC."""

import math

from huggingface_hub.dataclasses import strict

from .configuration_recommender import RecommenderConfig


@strict
class ElasticConfig(RecommenderConfig):
    r"""
    Configuration of [`ElasticModel`] and [`ElasticForSequentialRecommendation`]: the fields of
    [`RecommenderConfig`] and these.

    Args:
        num_hidden_layers (`int`, defaults to 2):
            Number N of reader layers, which run at one position per user in serving.
        num_attention_heads (`int`, defaults to 2):
            Heads H of linear dispatcher attention; must divide `hidden_size`.
        num_interest_experts (`int`, defaults to 16):
            Interest experts E of each head, which compress a history of any length and which all layers read.
        intermediate_size (`int`, defaults to 256):
            Width of the feed-forward block.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the feed-forward block.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings and of each residual branch.
        conv_kernel_size (`int`, defaults to 3):
            Items that the short causal depthwise convolution of the stream sees.
        stream_intermediate_size (`int`, defaults to 0):
            Width of a feed-forward block on the stream, 0 for none. No other block runs at every item of a history:
            this one makes encoding slower.
        num_memory_subkeys (`int`, *optional*):
            Sub-keys S per half of the interest memory, which then has S * S slots; 0 for no memory. Defaults to the
            smallest power of two with a slot for every item of the catalogue, 128 at most.
        num_memory_heads (`int`, defaults to 4):
            Independent queries to the memory, each with its own sub-keys.
        memory_top_k (`int`, defaults to 4):
            Slots R that each memory head retrieves.
        layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the layer norms.
    """

    model_type = "elastic"
    supports_timestamps = True
    supports_item_features = True
    supports_event_features = True

    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_interest_experts: int = 16
    intermediate_size: int = 256
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.2
    conv_kernel_size: int = 3
    stream_intermediate_size: int = 0
    num_memory_subkeys: int | None = None
    num_memory_heads: int = 4
    memory_top_k: int = 4
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        if self.num_memory_subkeys is None:
            num_items = max(self.vocab_size - self.num_special_tokens, 4)
            self.num_memory_subkeys = min(2 ** math.ceil(math.log2(num_items) / 2), 128)
        super().__post_init__(**kwargs)

    def validate_causal(self):
        """ELASTIC predicts the next item at every position."""
        if not self.is_causal:
            raise ValueError("is_causal must be True for elastic, found False (the paper's form is elastic_paper)")

    def validate_sizes(self):
        """Every size is positive."""
        self._validate_at_least(
            1,
            "num_hidden_layers",
            "num_attention_heads",
            "num_interest_experts",
            "intermediate_size",
            "conv_kernel_size",
        )
        self._validate_at_least(0, "stream_intermediate_size")
        self._validate_fractions("hidden_dropout")
        self._validate_heads()

    def validate_memory(self):
        """The slots asked for exist; 0 sub-keys are no memory."""
        self._validate_at_least(0, "num_memory_subkeys")
        self._validate_at_least(1, "num_memory_heads", "memory_top_k")
        if not self.num_memory_subkeys:
            return
        self._validate_multiple("hidden_size", "num_memory_heads", times=2)
        if self.memory_top_k > self.num_memory_subkeys**2:
            raise ValueError(
                f"memory_top_k asks for {self.memory_top_k} slots per memory head, "
                f"num_memory_subkeys={self.num_memory_subkeys} holds {self.num_memory_subkeys**2}"
            )


__all__ = ["ElasticConfig"]
