"""What ELASTIC adds for the times of events and requests, with `use_timestamps`.

    e_j   += pause[bucket of the seconds since the event before] + W_phases (phases of the event)
    r      = elapsed[bucket of the seconds since the last event] + W_request (phases of the request)
    h_t   += sqrt(D) r;   the first layer's query reads x_t + sqrt(D) r;   logits of experts += bias[same bucket]

Axis letters: B batch, L history length, Q positions that read, D hidden size, H heads, E interest experts per head.
"""

from torch import Tensor, nn

from .configuration_elastic import ElasticConfig
from .event_time import NUM_BUCKETS, NUM_PHASES, elapsed_until, time_buckets, time_phases
from .plain_linear import add_projected


class ElasticTime(nn.Module):
    """What the times of events and requests add: to the embeddings, to what the reader starts from, and to the logits
    of the experts."""

    def __init__(self, config: ElasticConfig):
        super().__init__()
        self.pause = nn.Embedding(NUM_BUCKETS, config.hidden_size)
        self.phases = nn.Linear(NUM_PHASES, config.hidden_size, bias=False)
        self.elapsed = nn.Embedding(NUM_BUCKETS, config.hidden_size)
        self.request_phases = nn.Linear(NUM_PHASES, config.hidden_size, bias=False)
        self.num_heads = config.num_attention_heads
        self.expert_bias = nn.Embedding(NUM_BUCKETS, config.num_attention_heads * config.num_interest_experts)

    def add_events(self, embeddings: Tensor, timestamps: Tensor, pauses: Tensor) -> Tensor:
        """Return the items' embeddings and what is added to them: (B, L, D) and (B, L) twice -> (B, L, D)."""
        embeddings = self.pause(time_buckets(pauses)).add_(embeddings)
        return add_projected(embeddings, self.phases, time_phases(timestamps))

    def of_requests(self, request_timestamps: Tensor, last_timestamps: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to the reader's embedding and to the experts' logits: (B, Q) twice -> (B, Q, D) and
        (B, H, Q, E)."""
        buckets = time_buckets(elapsed_until(request_timestamps, last_timestamps))
        bias = self.expert_bias(buckets).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return add_projected(self.elapsed(buckets), self.request_phases, time_phases(request_timestamps)), bias
