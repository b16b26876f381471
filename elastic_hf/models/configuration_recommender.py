"""What every recommender here is configured by: the catalogue, the head and the training."""

import math
from dataclasses import field, fields

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


TRAINING_OBJECTIVES = ("next_item", "masked_item", "prefix")
ITEM_FEATURE_SIZES = {"categories": ("size", "length"), "number": ("size",), "vector": ("size",)}
TRAINING_LOSSES = ("full_softmax", "sampled_softmax", "gbce", "bce")
# What else a history of the pipeline holds, beside the features of its events.
HISTORY_KEYS = ("history", "timestamps", "now")


@strict
class RecommenderConfig(PreTrainedConfig):
    r"""
    Fields that all recommenders share; each model's configuration adds its own.

    Args:
        vocab_size (`int`, defaults to 1000):
            Number of token ids: the special tokens, then one id per item.
        hidden_size (`int`, defaults to 64):
            Width D of item embeddings and user embeddings.
        is_causal (`bool`, defaults to `True`):
            `True`: position t reads items up to t, so that one pass trains every position. `False`: every position
            reads the whole history.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights of embeddings and linear layers.
        training_objective (`str`, defaults to `"next_item"`):
            `"next_item"`: every position predicts the next item (causal only); `"masked_item"`: masked items are
            predicted from both sides, and a mask token is appended at inference; `"prefix"`: the last position of a
            random prefix predicts the item after it.
        training_loss (`str`, defaults to `"full_softmax"`):
            `"full_softmax"`, `"sampled_softmax"`, `"gbce"` or `"bce"`, see `losses.py`.
        exclude_seen (`bool`, defaults to `True`):
            Leave the items of a history out of what is recommended after it, unless a call says otherwise: by
            `recommend`, by the pipeline and in the evaluation. Set it to `False` where users come back to items.
        mask_seen_in_loss (`bool`, *optional*):
            Leave the items that a position has read out of its loss, but for its target. Defaults to `exclude_seen`.
        num_negatives (`int`, defaults to 256):
            Uniform negatives: one set per batch for the sampled softmax, one set per position for gBCE and BCE. Not
            read by the full softmax.
        gbce_calibration (`float`, defaults to 0.75):
            Calibration t of gBCE, from 0 (BCE) to 1 (as confident as a full softmax).
        use_timestamps (`bool`, defaults to `False`):
            Read when events happened and when a recommendation is asked for, by models that can.
        request_dropout (`float`, defaults to 0.3):
            With `use_timestamps`: the share of training histories whose requests have no time, so that the model can
            do without.
        item_features (`dict`, *optional*):
            What items are beside their ids, by models that can read it: for each column its `kind` (`"categories"`,
            `"number"` or `"vector"`) and `size`, as [`ElasticItemTokenizer.learn_item_features`] returns them.
        item_id_dropout (`float`, defaults to 0.2):
            With `item_features`: how often an item's id is left out in training, so that its features alone can stand
            for it, as they do for new items.
        num_added_items (`int`, defaults to 0):
            The last items of the catalogue, which `add_items` has added and no training has seen.
        event_features (`dict[str, int]`, defaults to none):
            What events carry beside their items and times, in alphabetical order, by models that can read it: the
            number of categories of each event column, or 0 for a column of numbers.
        num_special_tokens (`int`, defaults to 3):
            The first token ids, which are no items: padding, unknown, mask.
        pad_token_id (`int`, defaults to 0):
            Padding token, on the left of a batch.
        mask_token_id (`int`, defaults to 2):
            Mask token of the `"masked_item"` objective.
        tie_word_embeddings (`bool`, defaults to `True`):
            Score items with their input embeddings.
    """

    supports_timestamps = False
    supports_item_features = False
    supports_event_features = False
    keys_to_ignore_at_inference = ["hidden_states", "attentions", "user_embeddings", "cache"]

    vocab_size: int = 1000
    hidden_size: int = 64
    is_causal: bool = True
    initializer_range: float = 0.02
    training_objective: str = "next_item"
    training_loss: str = "full_softmax"
    exclude_seen: bool = True
    mask_seen_in_loss: bool | None = None
    num_negatives: int = 256
    gbce_calibration: float | int = 0.75
    use_timestamps: bool = False
    request_dropout: float | int = 0.3
    item_features: dict | None = None
    item_id_dropout: float | int = 0.2
    num_added_items: int = 0
    event_features: dict[str, int] = field(default_factory=dict)
    num_special_tokens: int = 3
    pad_token_id: int = 0
    mask_token_id: int = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if not __name__.startswith("transformers_modules"):
            # The pipeline of this package is registered: without it Transformers would ask to trust the repository's.
            kwargs.pop("custom_pipelines", None)
        self.event_features = dict(sorted(self.event_features.items()))  # as config.json is sorted
        super().__post_init__(**kwargs)

    @property
    def masks_seen(self) -> bool:
        """Whether the loss leaves out what was read."""
        return self.exclude_seen if self.mask_seen_in_loss is None else self.mask_seen_in_loss

    def validate_numbers(self):
        """Numbers are finite and not negative."""
        for known in fields(self):
            value = getattr(self, known.name)
            if isinstance(value, float) and not 0 <= value < math.inf:
                raise ValueError(f"{known.name} must be a finite number of at least 0, found {value}")

    def validate_tokens(self):
        """Special tokens come first and leave room for items."""
        if self.vocab_size <= self.num_special_tokens:
            raise ValueError(
                f"vocab_size must exceed num_special_tokens ({self.num_special_tokens}), found {self.vocab_size}"
            )
        for name in ("pad_token_id", "mask_token_id"):
            token_id = getattr(self, name)
            if not 0 <= token_id < self.num_special_tokens:
                raise ValueError(
                    f"{name} must be between 0 and num_special_tokens - 1 ({self.num_special_tokens - 1}), "
                    f"found {token_id}"
                )

    def validate_activation(self):
        """The activation, of models that have one to choose, is one that Transformers knows."""
        hidden_act = getattr(self, "hidden_act", "gelu")
        if hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}, found {hidden_act!r}")

    def validate_training(self):
        """Objective and loss exist, and the answer does not leak."""
        self._validate_at_least(1, "hidden_size", "num_negatives")
        self._validate_fractions("gbce_calibration", "request_dropout", "item_id_dropout")
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

    def validate_timestamps(self):
        """Only some models read times, and only where positions predict the next event."""
        if not self.use_timestamps:
            return
        if not self.supports_timestamps:
            raise ValueError(f"use_timestamps must be False for {self.model_type}, which reads no times, found True")
        self._validate_predicts_next("use_timestamps")

    def validate_item_features(self):
        """Only some models read features, each of which has a kind and a size."""
        self._validate_at_least(0, "num_added_items")
        if self.item_features is None:
            return
        if not self.supports_item_features:
            raise ValueError(f"item_features must be None for {self.model_type}, which reads none, found some")
        if not self.tie_word_embeddings:
            raise ValueError("item_features need tie_word_embeddings=True, found False")
        if not self.item_features:
            raise ValueError("item_features must name a feature or be None, found {}")
        for name, feature in self.item_features.items():
            sizes = ITEM_FEATURE_SIZES.get(feature.get("kind"), ())
            if {*feature} != {"kind", *sizes} or not all(
                type(feature[size]) is int and feature[size] > 0 for size in sizes
            ):
                raise ValueError(
                    f"item_features[{name!r}] must have a kind among {', '.join(ITEM_FEATURE_SIZES)}, a size of at "
                    f"least 1 and, of categories, a length of at least 1, found {feature}"
                )

    def validate_event_features(self):
        """Only some models read features of events, and only where positions predict the next event."""
        for name, size in self.event_features.items():
            if name in HISTORY_KEYS:
                raise ValueError(f"event_features must not be called {', '.join(HISTORY_KEYS)}, found {name!r}")
            if size < 0:
                raise ValueError(f"event_features[{name!r}] must be a number of categories, or 0, found {size}")
        if not self.event_features:
            return
        names = ", ".join(self.event_features)
        if not self.supports_event_features:
            raise ValueError(f"event_features must be empty for {self.model_type}, which reads none, found {names}")
        self._validate_predicts_next("event_features")

    def _validate_predicts_next(self, name: str):
        if self.training_objective == "masked_item":
            raise ValueError(f"{name} needs training_objective='next_item' or 'prefix', found 'masked_item'")

    def _validate_at_least(self, smallest: int, *names: str):
        for name in names:
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, found {getattr(self, name)}")

    def _validate_fractions(self, *names: str):
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, found {getattr(self, name)}")

    def _validate_multiple(self, name: str, of: str, times: int = 1):
        if getattr(self, name) % (times * getattr(self, of)) != 0:
            factor = "" if times == 1 else f"{times} * "
            raise ValueError(
                f"{name} must be a multiple of {factor}{of}, found {getattr(self, name)} and {getattr(self, of)}"
            )

    def _validate_heads(self):
        self._validate_multiple("hidden_size", "num_attention_heads")


__all__ = ["RecommenderConfig"]
