"""Long-history sequential recommendation with ELASTIC, as plain Hugging Face models, tokenizers and datasets."""

from transformers import AutoConfig, AutoModel, AutoTokenizer

from .configuration_elastic import ElasticConfig
from .modeling_elastic import ElasticForSequentialRecommendation, ElasticModel


__version__ = "0.1.0"

AutoConfig.register(ElasticConfig.model_type, ElasticConfig, exist_ok=True)
AutoModel.register(ElasticConfig, ElasticForSequentialRecommendation, exist_ok=True)
