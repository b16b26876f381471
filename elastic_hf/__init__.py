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
from .registry import MODELS
from .version import __version__


__all__ = [
    "__version__",
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
    "prepare_histories",
    "publish",
]

IMPORTED_LATER = {
    "ElasticItemTokenizer": ".models.item_tokenizer",
    "ItemIndex": ".item_index",
    "SequentialRecommendationCollator": ".data.collator",
    "SequentialRecommendationPipeline": ".models.pipeline",
    "SequentialRecommendationTrainer": ".training.trainer",
    "load_histories": ".data.histories",
    "prepare_histories": ".data.preparation",
    "publish": ".sharing.hub",
}


def __getattr__(name: str) -> Any:
    if name not in IMPORTED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(IMPORTED_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *IMPORTED_LATER})


for model_type, model_class in MODELS.items():
    AutoConfig.register(model_type, model_class.config_class, exist_ok=True)
    AutoModel.register(model_class.config_class, model_class, exist_ok=True)
if find_spec("pyarrow") is not None:
    from transformers import AutoTokenizer
    from transformers.pipelines import PIPELINE_REGISTRY

    from .models.item_tokenizer import ElasticItemTokenizer
    from .models.pipeline import SequentialRecommendationPipeline

    for model_class in MODELS.values():
        AutoTokenizer.register(model_class.config_class, tokenizer_class=ElasticItemTokenizer, exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(
        "sequential-recommendation", pipeline_class=SequentialRecommendationPipeline, pt_model=AutoModel, type="text"
    )
