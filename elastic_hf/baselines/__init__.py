"""Published sequential recommenders under the head, losses, data and evaluation of this package."""

from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..tokenization_elastic import ElasticItemTokenizer
from .sasrec import SASRecConfig, SASRecForSequentialRecommendation


BASELINES = {
    SASRecConfig: SASRecForSequentialRecommendation,
}

for config_class, model_class in BASELINES.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoTokenizer.register(config_class, tokenizer_class=ElasticItemTokenizer, exist_ok=True)
