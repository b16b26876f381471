"""Every model of this package by its `model_type`: ELASTIC and the baselines."""

from .baselines import BASELINES
from .models.modeling_elastic import ElasticForSequentialRecommendation


MODELS = {model.config_class.model_type: model for model in (ElasticForSequentialRecommendation, *BASELINES)}
