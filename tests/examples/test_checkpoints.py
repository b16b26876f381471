"""The checkpoints in the repository are those that their results are about."""

import json
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer, TrainingArguments

from elastic_hf import SequentialRecommendationTrainer, load_histories
from elastic_hf.results import read_json
from elastic_hf.sharing.hub import files_to_publish
from elastic_hf.sharing.model_card import render_model_card


EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "elastic-tiny"


def test_the_small_one_gives_the_figures_of_its_results(tmp_path):
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


@pytest.mark.parametrize(("name", "largest"), [("elastic-tiny", 2_000_000), ("elastic-ml1m", 6_000_000)])
def test_a_checkpoint_is_small_and_ready_to_be_published(name, largest):
    folder = EXAMPLES / name
    assert sum(operation.upload_info.size for operation in files_to_publish(folder)) < largest
    card = render_model_card(folder, f"examples/{name}", license="mit")
    assert (folder / "README.md").read_text() == str(card)
    assert (
        AutoModel.from_pretrained(folder).num_parameters() == read_json(folder / "all_results.json")["num_parameters"]
    )


def test_the_checkpoint_of_movielens_holds_no_titles():
    assert set(AutoTokenizer.from_pretrained(EXAMPLES / "elastic-ml1m").items["title"].to_pylist()) == {None}
