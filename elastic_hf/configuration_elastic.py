"""Every hyperparameter of ELASTIC."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


TRAINING_OBJECTIVES = ("next_item", "masked_item", "prefix")
TRAINING_LOSSES = ("full_softmax", "sampled_softmax", "gbce", "bce")


@strict
class ElasticConfig(PreTrainedConfig):
    r"""
    Configuration of [`ElasticModel`] and [`ElasticForSequentialRecommendation`].

    Args:
        vocab_size (`int`, defaults to 1000):
            Number of token ids: the special tokens, then one id per item.
        hidden_size (`int`, defaults to 64):
            Width D of item embeddings and user embeddings.
        num_hidden_layers (`int`, defaults to 2):
            Number of layers.
        num_attention_heads (`int`, defaults to 2):
            Heads H of linear dispatcher attention; must divide `hidden_size`.
        num_interest_experts (`int`, defaults to 16):
            Interest experts E into which a history of any length is compressed.
        intermediate_size (`int`, defaults to 256):
            Width of the feed-forward block.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the feed-forward block.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings and of each residual branch.
        is_causal (`bool`, defaults to `True`):
            `True`: position t reads items up to t, so that one pass trains every position. `False`: the paper's layer,
            in which every position reads the whole history.
        conv_kernel_size (`int`, defaults to 3):
            Items seen by the short causal depthwise convolution in front of the attention; 0 for none.
        max_position_embeddings (`int`, defaults to 0):
            Number of learned absolute positions; 0 for none. A history may be longer than that only where there are
            none.
        num_memory_subkeys (`int`, defaults to 64):
            Sub-keys S per half of the interest memory, which then has M = S * S slots; 0 for no memory.
        num_memory_heads (`int`, defaults to 2):
            Independent queries to the memory, each with its own sub-keys.
        memory_top_k (`int`, defaults to 8):
            Slots R that each memory head retrieves per position (causal mode; the bidirectional mode retrieves its
            `num_interest_experts` experts).
        layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the layer norms.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights of embeddings and linear layers.
        training_objective (`str`, defaults to `"next_item"`):
            `"next_item"`: every position predicts the next item (causal only); `"masked_item"`: masked items are
            predicted from both sides, and a mask token is appended at inference; `"prefix"`: the last position of a
            random prefix predicts the item after it.
        training_loss (`str`, defaults to `"full_softmax"`):
            `"full_softmax"`, `"sampled_softmax"`, `"gbce"` or `"bce"`, see `loss.py`.
        num_negatives (`int`, defaults to 256):
            Uniform negatives: one set per batch for the sampled softmax, one set per position for gBCE and BCE. Not
            read by the full softmax.
        gbce_calibration (`float`, defaults to 0.75):
            Calibration t of gBCE, from 0 (BCE) to 1 (as confident as a full softmax).
        num_special_tokens (`int`, defaults to 3):
            The first token ids, which are no items: padding, unknown, mask.
        pad_token_id (`int`, defaults to 0):
            Padding token, on the left of a batch.
        mask_token_id (`int`, defaults to 2):
            Mask token of the `"masked_item"` objective.
        tie_word_embeddings (`bool`, defaults to `True`):
            Score items with their input embeddings.
    """

    model_type = "elastic"
    keys_to_ignore_at_inference = ["hidden_states", "user_embeddings"]

    vocab_size: int = 1000
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_interest_experts: int = 16
    intermediate_size: int = 256
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.2
    is_causal: bool = True
    conv_kernel_size: int = 3
    max_position_embeddings: int = 0
    num_memory_subkeys: int = 64
    num_memory_heads: int = 2
    memory_top_k: int = 8
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    training_objective: str = "next_item"
    training_loss: str = "full_softmax"
    num_negatives: int = 256
    gbce_calibration: float | int = 0.75
    num_special_tokens: int = 3
    pad_token_id: int | None = 0
    mask_token_id: int | None = 2
    tie_word_embeddings: bool = True

    def validate_sizes(self):
        """Every size is positive, or not negative where 0 turns a part off."""
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_interest_experts",
            "intermediate_size",
            "num_memory_heads",
            "memory_top_k",
            "num_negatives",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("conv_kernel_size", "max_position_embeddings", "num_memory_subkeys"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")
        for name in ("hidden_dropout", "gbce_calibration"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, found {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, "
                f"found {self.hidden_size} and {self.num_attention_heads}"
            )

    def validate_tokens(self):
        """Special tokens come first and leave room for items."""
        if self.vocab_size <= self.num_special_tokens:
            raise ValueError(
                f"vocab_size must exceed num_special_tokens ({self.num_special_tokens}), found {self.vocab_size}"
            )
        for name in ("pad_token_id", "mask_token_id"):
            token_id = getattr(self, name)
            if token_id is None or not 0 <= token_id < self.num_special_tokens:
                raise ValueError(
                    f"{name} must be between 0 and num_special_tokens - 1 ({self.num_special_tokens - 1}), "
                    f"found {token_id}"
                )

    def validate_memory(self):
        """The slots asked for exist."""
        if self.num_memory_subkeys == 0:
            return
        if self.hidden_size % (2 * self.num_memory_heads) != 0:
            raise ValueError(
                "hidden_size must be a multiple of 2 * num_memory_heads, "
                f"found {self.hidden_size} and {self.num_memory_heads}"
            )
        if self.is_causal:
            name, retrieved = "memory_top_k", self.memory_top_k
        else:
            name, retrieved = "num_interest_experts", self.num_interest_experts
            if retrieved % self.num_memory_heads != 0:
                raise ValueError(
                    "num_interest_experts must be a multiple of num_memory_heads when is_causal=False, "
                    f"found {retrieved} and {self.num_memory_heads}"
                )
            retrieved //= self.num_memory_heads
        if retrieved > self.num_memory_subkeys**2:
            raise ValueError(
                f"{name} asks for {retrieved} slots per memory head, "
                f"num_memory_subkeys={self.num_memory_subkeys} holds {self.num_memory_subkeys**2}"
            )

    def validate_training(self):
        """Objective and loss exist, and the answer does not leak."""
        if self.training_objective not in TRAINING_OBJECTIVES:
            raise ValueError(
                f"training_objective must be one of {TRAINING_OBJECTIVES}, found {self.training_objective!r}"
            )
        if self.training_loss not in TRAINING_LOSSES:
            raise ValueError(f"training_loss must be one of {TRAINING_LOSSES}, found {self.training_loss!r}")
        if self.training_objective == "next_item" and not self.is_causal:
            raise ValueError(
                "training_objective='next_item' needs is_causal=True: every position of a bidirectional model has "
                "seen the item it should predict. Use 'prefix' or 'masked_item'."
            )
        if self.training_objective == "masked_item" and self.is_causal:
            raise ValueError("training_objective='masked_item' reads both sides and needs is_causal=False")


__all__ = ["ElasticConfig"]
