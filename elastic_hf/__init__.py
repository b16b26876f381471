"""Long-history sequential recommendation with ELASTIC, as plain Hugging Face models, tokenizers and datasets."""

from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from . import baselines
from .data_collator import SequentialRecommendationCollator
from .hub import publish
from .interactions import load_histories
from .item_index import ItemIndex
from .models.cache_elastic import ElasticCache
from .models.configuration_elastic import ElasticConfig
from .models.item_tokenizer import ElasticItemTokenizer
from .models.modeling_elastic import ElasticForSequentialRecommendation, ElasticModel
from .models.pipeline import SequentialRecommendationPipeline
from .trainer import SequentialRecommendationTrainer


__version__ = "0.1.0"

__all__ = [
    "ElasticCache",
    "ElasticConfig",
    "ElasticForSequentialRecommendation",
    "ElasticItemTokenizer",
    "ElasticModel",
    "ItemIndex",
    "SequentialRecommendationCollator",
    "SequentialRecommendationPipeline",
    "SequentialRecommendationTrainer",
    "baselines",
    "load_histories",
    "publish",
]

AutoConfig.register(ElasticConfig.model_type, ElasticConfig, exist_ok=True)
AutoModel.register(ElasticConfig, ElasticForSequentialRecommendation, exist_ok=True)
AutoTokenizer.register(ElasticConfig, tokenizer_class=ElasticItemTokenizer, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "sequential-recommendation", pipeline_class=SequentialRecommendationPipeline, pt_model=AutoModel, type="text"
)
