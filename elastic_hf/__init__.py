"""Long-history sequential recommendation with ELASTIC, as plain Hugging Face models, tokenizers and datasets.

The models need torch and transformers alone. Everything else is imported when it is first asked for, but for the
tokenizer and the pipeline, which Transformers has to know by then: they need pyarrow.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from transformers import AutoConfig, AutoModel

from . import baselines
from .models.cache_elastic import ElasticCache
from .models.configuration_elastic import ElasticConfig
from .models.modeling_elastic import ElasticForSequentialRecommendation, ElasticModel


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

IMPORTED_LATER = {
    "ElasticItemTokenizer": ".models.item_tokenizer",
    "ItemIndex": ".item_index",
    "SequentialRecommendationCollator": ".data.collator",
    "SequentialRecommendationPipeline": ".models.pipeline",
    "SequentialRecommendationTrainer": ".training.trainer",
    "load_histories": ".data.histories",
    "publish": ".sharing.hub",
}


def __getattr__(name: str) -> Any:
    if name not in IMPORTED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(IMPORTED_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *IMPORTED_LATER})


AutoConfig.register(ElasticConfig.model_type, ElasticConfig, exist_ok=True)
AutoModel.register(ElasticConfig, ElasticForSequentialRecommendation, exist_ok=True)
if find_spec("pyarrow") is not None:
    from transformers import AutoTokenizer
    from transformers.pipelines import PIPELINE_REGISTRY

    from .models.item_tokenizer import ElasticItemTokenizer
    from .models.pipeline import SequentialRecommendationPipeline

    for config_class in (ElasticConfig, *(config_class for config_class, _ in baselines.BASELINES)):
        AutoTokenizer.register(config_class, tokenizer_class=ElasticItemTokenizer, exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(
        "sequential-recommendation", pipeline_class=SequentialRecommendationPipeline, pt_model=AutoModel, type="text"
    )
