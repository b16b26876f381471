"""
GRU4Rec (Hidasi et al. 2016, "Session-based Recommendations with Recurrent Neural Networks") with the constrained
embeddings of Hidasi and Karatzoglou 2018, "Recurrent Neural Networks with Top-k Gains for Session-based
Recommendations": items are read and scored with the same vectors.
"""

import math

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ..models.configuration_recommender import RecommenderConfig
from .common import BaselineForSequentialRecommendation, BaselineModel, BaselinePreTrainedModel


@strict
class GRU4RecConfig(RecommenderConfig):
    r"""
    Configuration of [`GRU4RecModel`] and [`GRU4RecForSequentialRecommendation`]: the fields of [`RecommenderConfig`]
    and these.

    Args:
        num_hidden_layers (`int`, defaults to 1):
            Number of stacked GRU layers.
        recurrent_size (`int`, defaults to 128):
            Width R of the GRU's state; a linear layer brings it back to `hidden_size`.
        hidden_dropout (`float`, defaults to 0.2):
            Dropout probability of the embeddings and of the output of each GRU layer.
    """

    model_type = "gru4rec"

    num_hidden_layers: int = 1
    recurrent_size: int = 128
    hidden_dropout: float | int = 0.2

    def validate_sizes(self):
        """Every size is positive."""
        self._validate_at_least(1, "num_hidden_layers", "recurrent_size")
        self._validate_fractions("hidden_dropout")

    def validate_causal(self):
        """GRU4Rec predicts the next item at every position."""
        if not self.is_causal:
            raise ValueError("is_causal must be True for gru4rec, found False")


class GRU4RecLayer(nn.Module):
    """A GRU over the items of each history: its state is that of a new user until the first item after the padding."""

    def __init__(self, config: GRU4RecConfig, input_size: int):
        super().__init__()
        self.gru = nn.GRU(input_size, config.recurrent_size, batch_first=True)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, input_size) and a mask (B, L) -> (B, L, R); zeros at padding."""
        states, _ = self.gru(items_first(hidden_states, attention_mask))
        states = F.pad(states, (0, 0, 1, 0))  # (B, L + 1, R): after 0, 1, ... L items
        num_read = attention_mask.cumsum(dim=-1)  # (B, L)
        return states.gather(1, num_read[..., None].expand(-1, -1, states.shape[-1]))


def items_first(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return each row's items in their order, then its padding: (B, L, D) and a mask (B, L) -> (B, L, D).

    A recurrent network's biases move its state at padding too, so it has to read the padding last.
    """
    order = (~attention_mask).int().argsort(dim=-1, stable=True)
    return hidden_states.gather(1, order[..., None].expand_as(hidden_states))


class GRU4RecPreTrainedModel(BaselinePreTrainedModel):
    config: GRU4RecConfig
    config_class = GRU4RecConfig
    _no_split_modules = ["GRU4RecLayer"]
    _can_record_outputs = {"hidden_states": GRU4RecLayer}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.GRU):
            # Uniform by the rows and columns of each gate's matrix (2016, section 4); three gates share a parameter.
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    bound = math.sqrt(6 / (parameter.shape[1] + module.hidden_size))
                    init.uniform_(parameter, -bound, bound)
                else:
                    init.zeros_(parameter)


class GRU4RecModel(BaselineModel, GRU4RecPreTrainedModel):
    """
    Item embeddings, a stack of GRUs and a linear layer: token ids to a vector at each position.

    The first GRU reads the items alone, from a zero state (2016, equations 2 to 5):

        r = sigmoid(W_r x + U_r h);   z = sigmoid(W_z x + U_z h);   n = tanh(W_n x + r * (U_n h))
        h = (1 - z) * n + z * h

    in PyTorch's form: with biases, r after U_n, and the paper's z as 1 - z.
    """

    def __init__(self, config: GRU4RecConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout)
        input_sizes = [config.hidden_size] + [config.recurrent_size] * (config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(GRU4RecLayer(config, input_size) for input_size in input_sizes)
        self.output = nn.Linear(config.recurrent_size, config.hidden_size)
        self.post_init()

    def encode(self, input_ids: Tensor, attention_mask: Tensor, last_position_only: bool) -> Tensor:
        hidden_states = self.dropout(self.embed_tokens(input_ids))
        for layer in self.layers:
            hidden_states = self.dropout(layer(hidden_states, attention_mask))
        return self.output(hidden_states[:, -1:] if last_position_only else hidden_states)


class GRU4RecForSequentialRecommendation(BaselineForSequentialRecommendation, GRU4RecPreTrainedModel):
    """GRU4Rec with its scores over the catalogue, its training losses and `recommend`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    base_model_class = GRU4RecModel
    paper = "Hidasi et al. 2016, with the tied embeddings of Hidasi and Karatzoglou 2018"
    description = (
        "GRU4Rec reads the history with a gated recurrent network and predicts the next item at each position."
    )
    citation = r"""
    @inproceedings{hidasi2016session,
      title = {Session-based Recommendations with Recurrent Neural Networks},
      author = {Hidasi, Bal{\'a}zs and Karatzoglou, Alexandros and Baltrunas, Linas and Tikk, Domonkos},
      booktitle = {ICLR},
      year = {2016},
    }
    """


__all__ = ["GRU4RecConfig", "GRU4RecForSequentialRecommendation", "GRU4RecModel"]
