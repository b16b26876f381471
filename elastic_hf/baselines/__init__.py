"""Published sequential recommenders under the head, losses, data and evaluation of this package."""

from transformers import AutoConfig, AutoModel

from .bert4rec import BERT4RecConfig, BERT4RecForSequentialRecommendation
from .elastic_paper import ElasticPaperConfig, ElasticPaperForSequentialRecommendation
from .gru4rec import GRU4RecConfig, GRU4RecForSequentialRecommendation
from .lightsans import LightSANsConfig, LightSANsForSequentialRecommendation
from .linrec import LinRecConfig, LinRecForSequentialRecommendation
from .popularity import PopularityConfig, PopularityForSequentialRecommendation
from .sasrec import SASRecConfig, SASRecForSequentialRecommendation


__all__ = [
    "BERT4RecConfig",
    "BERT4RecForSequentialRecommendation",
    "ElasticPaperConfig",
    "ElasticPaperForSequentialRecommendation",
    "GRU4RecConfig",
    "GRU4RecForSequentialRecommendation",
    "LightSANsConfig",
    "LightSANsForSequentialRecommendation",
    "LinRecConfig",
    "LinRecForSequentialRecommendation",
    "PopularityConfig",
    "PopularityForSequentialRecommendation",
    "SASRecConfig",
    "SASRecForSequentialRecommendation",
]

BASELINES = (
    (BERT4RecConfig, BERT4RecForSequentialRecommendation),
    (ElasticPaperConfig, ElasticPaperForSequentialRecommendation),
    (GRU4RecConfig, GRU4RecForSequentialRecommendation),
    (LightSANsConfig, LightSANsForSequentialRecommendation),
    (LinRecConfig, LinRecForSequentialRecommendation),
    (PopularityConfig, PopularityForSequentialRecommendation),
    (SASRecConfig, SASRecForSequentialRecommendation),
)

for config_class, model_class in BASELINES:
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
