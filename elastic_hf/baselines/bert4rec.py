"""BERT4Rec (Sun et al. 2019, "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from
Transformer")."""

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from .common import (
    SELF_ATTENTIONS,
    BaselineForSequentialRecommendation,
    BaselineModel,
    BaselinePreTrainedModel,
    ItemEmbeddings,
    PostNormLayer,
    SelfAttention,
    TransformerConfig,
)


@strict
class BERT4RecConfig(TransformerConfig):
    r"""
    Configuration of [`BERT4RecModel`] and [`BERT4RecForSequentialRecommendation`]: the fields of
    [`RecommenderConfig`], with `is_causal=False` and `training_objective="masked_item"` by default, and these.

    Args:
        num_hidden_layers (`int`, defaults to 2):
            Number of Transformer layers.
        num_attention_heads (`int`, defaults to 2):
            Attention heads; must divide `hidden_size`.
        intermediate_size (`int`, defaults to 256):
            Width of the point-wise feed-forward network.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings and of each residual branch.
        max_position_embeddings (`int`, defaults to 201):
            Number of learned absolute positions: the longest history that can be read, and one for the mask token
            that is appended at inference.
        layer_norm_eps (`float`, defaults to 1e-12):
            Epsilon of the layer norms.
    """

    model_type = "bert4rec"

    is_causal: bool = False
    training_objective: str = "masked_item"

    def validate_causal(self):
        """BERT4Rec reads both sides of a masked item."""
        if self.is_causal:
            raise ValueError("is_causal must be False for bert4rec, found True")


class BERT4RecPreTrainedModel(BaselinePreTrainedModel):
    config: BERT4RecConfig
    config_class = BERT4RecConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["PostNormLayer"]
    _can_record_outputs = {"hidden_states": PostNormLayer, "attentions": SELF_ATTENTIONS}


class BERT4RecModel(BaselineModel, BERT4RecPreTrainedModel):
    """
    Item embeddings and positions, Transformer layers and the output layer: token ids to a vector at each position.

    The scores of equation 7, GELU(h W^P + b^P) E^T + b^O, are split in two: this model ends with the GELU, and the
    head multiplies with the item embeddings E. The bias b^O of each item is left out, as in all models here. The sum
    of item and position embeddings is normed, as in BERT.
    """

    def __init__(self, config: BERT4RecConfig):
        super().__init__(config)
        self.embeddings = ItemEmbeddings(config)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            PostNormLayer(config, SelfAttention(config, has_output_projection=True))
            for _ in range(config.num_hidden_layers)
        )
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def encode(self, input_ids: Tensor, attention_mask: Tensor, last_position_only: bool) -> Tensor:
        hidden_states = self.dropout(self.embedding_norm(self.embeddings(input_ids)))
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, last_position_only and i == last, mask)
        return F.gelu(self.output(hidden_states))


class BERT4RecForSequentialRecommendation(BaselineForSequentialRecommendation, BERT4RecPreTrainedModel):
    """BERT4Rec with its scores over the catalogue, its training losses and `recommend`."""

    base_model_class = BERT4RecModel
    paper = "Sun et al. 2019"
    description = (
        "BERT4Rec reads the history with bidirectional self-attention and is trained to fill in masked items; "
        "a mask at the end asks for the next one."
    )
    citation = r"""
    @inproceedings{sun2019bert4rec,
      title = {{BERT4Rec}: Sequential Recommendation with Bidirectional Encoder Representations from Transformer},
      author = {Sun, Fei and Liu, Jun and Wu, Jian and Pei, Changhua and Lin, Xiao and Ou, Wenwu and Jiang, Peng},
      booktitle = {CIKM},
      year = {2019},
    }
    """


__all__ = ["BERT4RecConfig", "BERT4RecForSequentialRecommendation", "BERT4RecModel"]
