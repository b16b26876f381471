"""The checkpoint in the repository is the one that its results are about."""

import json
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer, TrainingArguments

from elastic_hf import SequentialRecommendationTrainer, load_histories
from elastic_hf.sharing.hub import files_to_publish
from elastic_hf.sharing.model_card import render_model_card


FOLDER = Path(__file__).parents[2] / "examples" / "elastic-tiny"


def test_it_gives_the_figures_of_its_results(tmp_path):
    results = json.loads((FOLDER / "all_results.json").read_text())
    model, tokenizer = AutoModel.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    assert model.num_parameters() == results["num_parameters"]
    splits = tokenizer.tokenize_histories(load_histories("synthetic")[0])
    args = TrainingArguments(tmp_path, per_device_eval_batch_size=256, use_cpu=True)
    trainer = SequentialRecommendationTrainer(model, args, processing_class=tokenizer)
    metrics = trainer.predict(splits["test"]).metrics
    for name in ("test_hr@10", "test_ndcg@10", "test_ndcg@10_seen_kept"):
        assert metrics[name] == pytest.approx(results[name], abs=2e-3)  # processors round differently
    assert results["test_ndcg@10"] > 10 * results["popularity_ndcg@10"]


def test_it_is_small_and_ready_to_be_published():
    assert sum(operation.upload_info.size for operation in files_to_publish(FOLDER)) < 2_000_000
    card = render_model_card(FOLDER, "examples/elastic-tiny", license="mit")
    assert (FOLDER / "README.md").read_text() == str(card)
