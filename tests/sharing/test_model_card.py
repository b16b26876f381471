import contextlib
import dataclasses
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import render_cards
from elastic_hf import ElasticItemTokenizer
from elastic_hf.registry import MODELS
from elastic_hf.results import RunResults
from elastic_hf.sharing.model_card import DATA_SOURCES, DataSource, make_model_card, render_model_card
from elastic_hf.sharing.trial import load_pipeline
from factories import NUM_TOKENS, elastic_model


ROOT = Path(__file__).parents[2]
METRICS = [
    f"{name}@{k}{suffix}" for suffix in ("", "_seen_kept") for name in ("hr", "ndcg", "mrr") for k in (1, 5, 10, 20)
]
COMMITTED = sorted(render_cards.CARDS.glob("*.md"))


def make_results(ndcg=0.25, **changes):
    """Results in which every metric is another number."""
    return RunResults.from_dict(results_file(ndcg, **changes))


def results_file(ndcg=0.25, **changes):
    """What `all_results.json` holds of them."""
    results = {
        "dataset": "ml-1m",
        "hub_dataset": None,
        "model_type": "elastic",
        "seed": 42,
        "variant": None,
        "git_commit": "c0ffee",
        "command": "python examples/run_seqrec.py --seed 42",
        "protocol": "leave_one_out, full ranking",
        "k_core": 5,
        "num_users": 1_200,
        "num_items": 3_100,
        "num_interactions": 54_000,
        "num_duplicates": 17,
        "num_filtered": 0,
        "num_parameters": 123_456,
        "max_length": 70,
        "split_into_windows": True,
        "config": {"is_causal": True, "num_memory_subkeys": 6, "training_loss": "gbce"},
        "training": {"batch_size": 64, "learning_rate": 0.004, "metric_for_best_model": "ndcg@10"},
        "epochs": 9.0,
        "best_epoch": 8.0,
        "train_seconds": 1_500.0,
        "validation_ndcg@10": 0.3125,
        **{f"test_{key}": i / 100 for i, key in enumerate(METRICS)},
        **{f"popularity_{key}": i / 1000 for i, key in enumerate(METRICS)},
        "test_coverage@10": 0.625,
        "popularity_coverage@10": 0.0625,
        "test_popularity_percentile@10": 0.81,
        "test_popularity_percentile_target": 0.74,
        "test_head_share@10": 0.432,
        "test_head_share_target": 0.321,
        "hardware": "a processor",
        "python_version": "3.11",
        "torch_version": "2.13",
        "transformers_version": "5.23",
        "elastic_hf_version": "0.1.0",
    }
    return results | {"test_ndcg@10": ndcg} | changes


@pytest.fixture
def folder(tmp_path):
    """A model folder with two more seeds and a baseline."""
    (tmp_path / "results").mkdir()
    (tmp_path / "training_curve.png").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "elastic", "num_memory_subkeys": 6}))
    (tmp_path / "all_results.json").write_text(json.dumps(results_file()))
    for seed, ndcg in ((43, 0.26), (44, 0.30)):
        write_other(tmp_path, f"elastic-{seed}", seed=seed, ndcg=ndcg)
    write_other(tmp_path, "sasrec-42", model_type="sasrec", ndcg=0.28, config={"is_causal": True}, train_seconds=300)
    return tmp_path


def write_other(folder, name, **changes):
    (folder / "results" / f"{name}.json").write_text(json.dumps(results_file(**changes)))


def rows(card, first):
    """The cells of the table whose first column is called `first`."""
    lines = str(card).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def check_metadata(card):
    """What the Hub's validation asks of the metadata, as far as that is documented."""
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert {"sequential-recommendation", "recommender-system", "elastic_hf"} <= {*data["tags"]}
    assert all(isinstance(tag, str) for tag in data["tags"]) and isinstance(data.get("license", ""), str)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in data.get("datasets", []))
    for model in data.get("model-index", []):
        assert model["name"]
        for result in model["results"]:
            assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            assert all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"])
            assert len({metric["name"] for metric in result["metrics"]}) == len(result["metrics"])
    again = ModelCard(str(card))
    assert again.data.to_dict() == data and again.data.eval_results == card.data.eval_results


def check_text(card):
    """No filler, no gaps, and no word of what is not there."""
    text = str(card)
    assert not re.search(r"None|\bnan\b|[Uu]ndefined|TODO|More Information|\{\{ |\{%|<!--", text)
    assert "\n\n\n" not in text and " \n" not in text and text.endswith("\n") and not text.endswith("\n\n")
    assert text.count("```") % 2 == 0


def test_metadata_name_the_task_and_each_metric_with_its_protocol():
    card = make_model_card("org/elastic-ml1m", make_results(), license="mit", tags=["films"])
    check_metadata(card)
    assert card.data.license == "mit" and card.data.tags[-2:] == ["elastic", "films"]
    assert card.data.datasets is None and card.data.base_model is None
    results = {result.metric_name: result for result in card.data.eval_results}
    assert card.data.pipeline_tag == "sequential-recommendation" and card.data.metrics == ["hr", "ndcg", "mrr"]
    assert results.keys() == {
        f"{name}@10, full ranking, seen items {words}"
        for name in ("HR", "NDCG", "MRR")
        for words in ("excluded", "kept")
    }
    kept = results["NDCG@10, full ranking, seen items kept"]
    assert kept.metric_value == make_results().metrics["test_ndcg@10_seen_kept"] and kept.metric_type == "ndcg_at_10"
    assert results["NDCG@10, full ranking, seen items excluded"].metric_value == 0.25
    assert (kept.dataset_type, kept.dataset_name, kept.dataset_split) == ("ml-1m", "MovieLens-1M", "test")
    assert kept.task_type == "sequential-recommendation"


def test_a_dataset_is_linked_only_where_it_is_on_the_hub():
    local = make_model_card("org/shop", make_results(dataset="/home/me/shop.csv"))
    assert local.data.datasets is None and "trained on shop.csv:" in str(local) and "/home/me" not in str(local)
    hub = make_model_card("org/shop", make_results(dataset="org/clicks", hub_dataset="org/clicks"))
    check_metadata(hub)
    assert hub.data.datasets == ["org/clicks"] and hub.data.eval_results[0].dataset_type == "org/clicks"


def test_the_protocol_stands_before_the_numbers(folder):
    text = render_model_card(folder, "org/elastic-ml1m").text
    first_number = text.index("| NDCG@10 |")
    for words in (
        "1,200 users, 3,100 items, 54,000 interactions, 45.0 per user on average; every user and every item has at "
        "least 5; 17 exact duplicates were left out.",
        "Leave-one-out: each user's last item is the test target",
        "among all items of the catalogue",
        "Ties count against the model",
        "*Seen items excluded*",
        "All models read the 70 most recent items",
        "that of epoch 8, the one with the best NDCG@10 on the validation items: 0.3125.",
        "The seed of this checkpoint is 42. The comparison adds the same model with seeds 43 and 44.",
    ):
        assert 0 < text.index(words) < first_number
    temporal = make_model_card("org/x", make_results(protocol="temporal, full ranking")).text
    assert "Two dates cut" in temporal and "Leave-one-out" not in temporal
    protocol = "leave_one_out, sampled validation, full ranking"
    sampled = make_model_card("org/x", make_results(protocol=protocol, num_validation_users=2_048)).text
    assert "sampled validation: each user's last item is the test target. The one before it is" in sampled
    assert "the validation target of 2,048 users, drawn at random; all other users train on it" in sampled
    assert "sampled" not in make_model_card("org/x", make_results()).text


def test_a_card_says_what_a_model_that_reads_times_was_told():
    config = {"use_timestamps": True, "exclude_seen": False, "mask_seen_in_loss": False}
    metrics = {"test_ndcg@10": 0.2, "test_ndcg@10_seen_kept": 0.3, "untimed_ndcg@10": 0.1}
    results = make_results(config=config, **metrics, **{"untimed_ndcg@10_seen_kept": 0.125})
    text = make_model_card("org/x", results).text
    told = "The model reads when items came, and is told when each target came, as a service knows when it is asked."
    assert f"{told} Without that time its NDCG@10 on the test items is 0.1250.\n" in text
    assert f"{told}\n" in make_model_card("org/x", make_results(config=config)).text
    assert "told when" not in make_model_card("org/x", make_results()).text


def test_a_card_names_the_features_of_events_that_a_model_reads():
    text = make_model_card("org/x", make_results(config={"event_features": {"action": 3, "price": 0}})).text
    assert "The model reads, with each item of a history, action and price of its event" in text
    assert "nothing else about it is read but what its events carry, and" in text
    plain = make_model_card("org/x", make_results()).text
    assert "of its event" not in plain and "nothing else about it is read, and" in plain


def test_a_card_says_what_is_read_of_items_and_that_they_may_come():
    features = {"brand": {"kind": "categories", "size": 2, "length": 1}, "price": {"kind": "number", "size": 1}}
    text = make_model_card("org/x", make_results(config={"item_features": features})).text
    assert "- Of an item, its id and its brand, price are read." in text and "by `add_items`" in text
    assert "An item is its id" not in text
    assert "\n\n- An item is its id" in make_model_card("org/x", make_results()).text


def test_the_comparison_has_baselines_popularity_and_all_seeds(folder):
    card = render_model_card(folder, "org/elastic-ml1m")
    check_metadata(card)
    check_text(card)
    # Seeds 0.25, 0.26 and 0.30: mean 0.27; deviations -0.02, -0.01 and 0.03, whose squares add up to 0.0014 / 2.
    assert [row[0] for row in rows(card, "model")] == ["sasrec", "**elastic**, this model", "popularity"]
    assert [row[3] for row in rows(card, "model")] == ["0.2800", "0.2700 ± 0.0265", "0.0060"]
    assert [row[1] for row in rows(card, "model")] == ["1", "3", "1"]
    # This checkpoint's own numbers are those of its seed.
    assert ["NDCG@10", "0.2500", "0.1800"] in rows(card, "metric")
    cost = rows(card.text[card.text.index("## Cost") :], "model")
    minutes = {row[0]: row[2] for row in cost}
    assert minutes == {"elastic": "25", "sasrec": "5.0"}
    assert "elastic, seed 44, commit `c0ffee`: `python examples/run_seqrec.py --seed 42`" in card.text


def test_a_model_that_keeps_seen_items_is_judged_by_that(folder):
    config = {"is_causal": True, "num_memory_subkeys": 6, "training_loss": "gbce"}
    config |= {"exclude_seen": False, "mask_seen_in_loss": False}
    training = {"batch_size": 64, "learning_rate": 0.004, "metric_for_best_model": "ndcg@10_seen_kept"}
    changes = {"config": config, "training": training, "num_seen_targets": 810, "num_validation_users": 1_000}
    changes |= {"test_ndcg@10_seen_kept": 0.5, "validation_ndcg@10_seen_kept": 0.375}
    (folder / "all_results.json").write_text(json.dumps(results_file(**changes)))
    with pytest.raises(ValueError, match="exclude_seen must be False, as for the card's model, found True"):
        render_model_card(folder, "org/places")
    for name, seed in (("elastic-43", 43), ("elastic-44", 44)):
        write_other(folder, name, seed=seed, **changes)
    changes |= {"config": config | {"num_memory_subkeys": 0}, "test_ndcg@10_seen_kept": 0.375}
    write_other(folder, "sasrec-42", model_type="sasrec", ndcg=0.75, **changes)
    card = render_model_card(folder, "org/places")
    check_metadata(card)
    check_text(card)
    assert "recommends seen items, too, since users come back to items: they had had 81% of the val" in card.text
    assert "the one with the best NDCG@10 with seen items kept on the validation items: 0.3750." in card.text
    assert "| metric | seen items kept | seen items excluded |" in card.text
    assert ["NDCG@10", "0.5000", "0.2500"] in rows(card, "metric")
    assert "| model | seeds | HR@10, seen kept | NDCG@10, seen kept | HR@10 | NDCG@10 | coverage@10 |" in card.text
    table = [(row[0], row[3], row[5]) for row in rows(card, "model")]
    assert table[:2] == [
        ("**elastic**, this model", "0.5000 ± 0.0000", "0.2500 ± 0.0000"),
        ("sasrec", "0.3750", "0.7500"),
    ]
    first = card.data.eval_results[0]
    assert first.metric_name == "HR@10, full ranking, seen items kept"
    assert "recommends seen items, too" not in make_model_card("org/x", make_results()).text


def test_a_popularity_run_stands_in_for_the_popularity_of_the_results(folder):
    write_other(folder, "popularity-42", model_type="popularity", ndcg=0.01, config={}, training={})
    table = rows(render_model_card(folder, "org/elastic-ml1m"), "model")
    assert [row[3] for row in table if row[0] == "popularity"] == ["0.0100"]


def test_popularity_bias_and_coverage_are_stated():
    text = make_model_card("org/x", make_results(memory_slots=36, memory_share_retrieved=0.75)).text
    limits = text[text.index("## Limits and biases") :]
    for words in ("percentile 0.81 ", "at 0.74;", "43.2% of the recommendations", "32.1% of what", "62.5% of the"):
        assert words in limits
    assert "6.2% with recommendations by popularity" in limits and "75.0% of the 36 slots" in limits


@pytest.mark.parametrize("dataset", DATA_SOURCES)
def test_known_data_have_their_terms_and_citation(dataset):
    text = make_model_card("org/x", make_results(dataset=dataset), license="mit").text
    source = DATA_SOURCES[dataset]
    assert source.name in text and source.terms in text and source.citation in text and "The weights: `mit`" in text


def test_the_caller_describes_other_data():
    bare = make_model_card("org/shop", make_results(dataset="shop.csv"))
    check_text(bare)
    assert "## Licence" not in bare.text and "GroupLens" not in bare.text
    source = DataSource("The shop's baskets", "One row for each thing bought.", "all rights reserved.", "@misc{shop}")
    told = make_model_card("org/shop", make_results(dataset="shop.csv"), data_source=source).text
    assert "**The shop's baskets**: 1,200 users" in told and "One row for each thing bought." in told
    assert ": all rights reserved." in told and "@misc{shop}" in told


@pytest.mark.parametrize("model_type", MODELS)
def test_every_model_type_says_what_it_is(model_type):
    card = make_model_card("org/x", make_results(model_type=model_type))
    check_text(card)
    about = MODELS[model_type]
    assert inspect.cleandoc(about.citation) in card.text and model_type in card.data.tags
    assert card.text.count(about.description) == 1
    assert ("interest memory of 36 vectors" in card.text) == (model_type == "elastic")
    assert ("not the paper's" in card.text) == (model_type in ("elastic", "linrec"))
    bidirectional = make_model_card("org/x", make_results(model_type=model_type, config={"is_causal": False}))
    assert ("not the paper's" in bidirectional.text) == (model_type == "elastic")
    assert "interest memory of" not in bidirectional.text


def test_what_is_unknown_is_left_out():
    card = make_model_card("org/x", RunResults("another"))
    check_metadata(card)
    check_text(card)
    assert re.findall(r"^## (.*)", card.text, flags=re.MULTILINE) == ["Use", "Limits and biases", "Citation"]
    # One key less at a time: nothing breaks, nothing is filled in.
    results = results_file(memory_slots=36, memory_share_retrieved=0.75)
    belong_together = {"num_users": ("num_items", "num_interactions"), "memory_slots": ("memory_share_retrieved",)}
    for key in set(results) - {"model_type"}:
        if not key.startswith(("test_popularity_", "test_head_")) and key not in sum(belong_together.values(), ()):
            gone = {key, *belong_together.get(key, ())}
            known = {name: results[name] for name in results if name not in gone}
            check_text(make_model_card("org/x", RunResults.from_dict(known)))


def python_of(card):
    """The code of a card, which is one block."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    compile(code, "code", "exec")
    return code


def test_figures_are_shown_only_where_they_are(folder):
    card = render_model_card(folder, "org/elastic-ml1m")
    links = re.findall(r"\]\((?!https://)(.*?)\)", card.text)
    assert links == ["training_curve.png"] and all((folder / link).exists() for link in links)
    (folder / "expert_horizons.png").write_bytes(b"")
    assert "](expert_horizons.png)" in render_model_card(folder, "org/elastic-ml1m").text


def test_a_model_without_code_needs_the_package(folder):
    """Which is on no index: what would be installed by its name there is somebody else's."""
    card = render_model_card(folder, "org/elastic-ml1m")
    assert python_of(card).startswith("import elastic_hf")
    assert 'pipeline("sequential-recommendation", model="org/elastic-ml1m")' in python_of(card)
    assert "trust_remote_code" not in card.text and re.findall("pip install.*", card.text) == [
        "pip install -e .` in a clone of it."
    ]
    pinned = render_model_card(folder, "org/elastic-ml1m", revision="v2")
    assert 'model="org/elastic-ml1m", revision="v2")' in python_of(pinned)


def test_a_model_with_code_needs_public_packages_and_a_revision(folder):
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_elastic.X"}}))
    card = render_model_card(folder, "org/elastic-ml1m")
    check_text(card)
    assert "import elastic_hf" not in python_of(card)
    assert 'pipeline(model="org/elastic-ml1m", trust_remote_code=True, revision="main")' in python_of(card)
    assert "put the commit that you have read in place of `main`" in card.text
    (install,) = re.findall("```bash\n(.*?)\n```", card.text)
    assert re.findall(r'"(\w+)[^"]*"', install) == ["pyarrow", "torch", "transformers"]
    tagged = render_model_card(folder, "org/elastic-ml1m", revision="v2")
    assert 'trust_remote_code=True, revision="v2")' in python_of(tagged)
    assert "in place of `v2`" in tagged.text and "main" not in python_of(tagged)


def test_the_example_has_titles_and_what_the_model_recommends():
    recommended = [{"item": 7, "title": "Amélie", "score": 1.5}, {"item": "sku 8", "title": None, "score": 1.0}]
    example = {"history": ['The "Heat"', 12], "recommended": recommended}
    card = make_model_card("org/x", make_results(), example=example)
    check_metadata(card)
    asked = []

    def recommend(history, top_k):
        asked.append((history, top_k))
        return recommended

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(python_of(card).split("\n", 4)[4], {"recommend": recommend})
    assert asked == [(['The "Heat"', 12], 2)]
    (output,) = re.findall(r"```text\n(.*?)```", card.text, flags=re.DOTALL)
    assert output == printed.getvalue() == "Amélie\nsku 8\n"
    assert str(make_model_card("org/x", make_results(example=example))) == str(card)
    without = make_model_card("org/x", make_results())
    assert "```text" not in without.text and 'items["item_id"]' in python_of(without)


@pytest.mark.parametrize(
    "events", [{"timestamps": [0, 3600], "now": 7200}, {"rating": [5, None], "ok": [True, False], "tag": ['"', "é"]}]
)
def test_the_example_of_a_model_that_reads_more_than_items_can_be_pasted(events):
    recommended = [{"item": 7, "title": "Amélie", "score": 1.5}, {"item": "sku 8", "title": None, "score": 1.0}]
    history = {"history": ['The "Heat"', 12], **events}
    card = make_model_card("org/x", make_results(), example={"history": history, "recommended": recommended})
    check_metadata(card)
    asked = []

    def recommend(history, top_k):
        asked.append(history)
        return recommended

    with contextlib.redirect_stdout(io.StringIO()):
        exec(python_of(card).split("\n", 4)[4], {"recommend": recommend})
    assert asked == [history]


def test_the_example_is_of_the_model_beside_the_results(tmp_path):
    """In the middle of a training, before there are any, the folder may hold an older model, or a torn one."""
    ElasticItemTokenizer.from_items(range(NUM_TOKENS - 3), model_max_length=11).save_pretrained(tmp_path)
    elastic_model().save_pretrained(tmp_path)
    in_training = render_model_card(tmp_path, "org/x", RunResults("elastic"))
    assert "```text" not in in_training.text
    (tmp_path / "all_results.json").write_text(json.dumps({"model_type": "elastic"}))
    text = render_model_card(tmp_path, "org/x").text
    recommended = load_pipeline(tmp_path)([0, 1, 2], top_k=3)
    assert "```text\n" + "".join(f"{row['item']}\n" for row in recommended) + "```" in text
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert str(render_model_card(tmp_path, "org/x", example={"history": [1], "recommended": recommended}))
    with pytest.raises(ValueError, match="model.safetensors must be the weights"):
        render_model_card(tmp_path, "org/x")


def test_the_numbers_of_users_and_the_standard_errors_stand_beside_the_metrics():
    results = make_results(num_validation_users=1_000, num_test_users=21, **{"test_ndcg@10_standard_error": 0.0625})
    text = make_model_card("org/x", results).text
    assert "- 1,000 users have validation items.\n" in text
    assert "- 21 users have test items, so few that the figures say little about others.\n" in text
    assert ["NDCG@10", "0.2500 ± 0.0625", "0.1800"] in rows(text, "metric")
    assert [row[0] for row in rows(text, "metric")] == ["HR@10", "NDCG@10", "MRR@10"]
    assert "users have" not in make_model_card("org/x", make_results()).text


def test_nobody_is_shown_in_a_card():
    sample = {"user_id": "ada@example.org", "history": ["Alien"], "recommended": ["Heat"], "target": "Kes"}
    command = "python /home/ada/run.py --train_file /home/ada/shop.csv"
    results = make_results(dataset="/home/ada/shop.csv", command=command, sample=sample)
    others = {"sasrec.json": dataclasses.replace(results, model_type="sasrec")}
    text = str(make_model_card("org/x", results, others))
    assert "ada" not in text.replace("data", "") and "Alien" not in text and "Kes" not in text
    assert text.count("`python run.py --train_file shop.csv`") == 2


def test_latency_is_that_of_the_benchmark(folder):
    assert "Milliseconds" not in render_model_card(folder, "org/x").text
    benchmark = {"hardware": "a processor", "threads": 2, "git_commit": "c0ffee", "rows": []}
    for length, seconds in ((128, {"elastic": 0.5, "sasrec, naive": 0.25}), (4096, {"elastic": 0.75})):
        benchmark["rows"].append({"length": length, "batch_size": 4, "seconds": seconds})
    (folder / "results" / "benchmark-inference.json").write_text(json.dumps(benchmark))
    card = render_model_card(folder, "org/x")
    check_text(card)
    assert rows(card, "history (items)") == [["128", "4", "125.00", "62.50"], ["4,096", "4", "187.50", ""]]
    assert "random weights on a processor, 2 threads, commit `c0ffee`" in card.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "bad.json must have a model_type, found dataset, "),
        ({"dataset": "beauty"}, "bad.json: dataset must be 'ml-1m', as for the card's model, found 'beauty'"),
        ({"protocol": "temporal, full ranking"}, "protocol must be"),
        ({"num_interactions": 53_999}, "num_interactions must be 54000"),
        ({"max_length": 71}, "max_length must be 70"),
        ({"seed": 43}, "elastic with seed 43 is also .*bad.json"),
        ({"seed": 42}, "elastic with seed 42 is also the model's own results"),
        ({"seed": 45, "config": {"num_memory_subkeys": 7}}, "num_memory_subkeys must be 6 as in .*, found 7"),
        ({"seed": 45, "training": {"learning_rate": 0.1}}, "learning_rate must be 0.004"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(folder, changes, message):
    write_other(folder, "bad", **changes)
    with pytest.raises(ValueError, match=message):
        render_model_card(folder, "org/x")


def test_a_variant_is_another_model(folder):
    write_other(folder, "wide", variant="wide", ndcg=0.29, config={"num_memory_subkeys": 7})
    assert [row[0] for row in rows(render_model_card(folder, "org/x"), "model")][0] == "elastic, wide"


def test_files_that_are_missing_broken_or_of_another_model_are_named(folder):
    with pytest.raises(ValueError, match="repo_id"):
        render_model_card(folder, "")
    (folder / "config.json").write_text(json.dumps({"num_memory_subkeys": 9}))
    with pytest.raises(
        ValueError, match="all_results.json must be of the model in config.json, found num_memory_subkeys"
    ):
        render_model_card(folder, "org/x")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must hold JSON"):
        render_model_card(folder, "org/x")
    (folder / "all_results.json").unlink()
    with pytest.raises(ValueError, match="must hold all_results.json"):
        render_model_card(folder, "org/x")
    (folder / "config.json").write_text("{}")
    (folder / "all_results.json").write_text("{}")
    with pytest.raises(ValueError, match="all_results.json must have a model_type, found nothing"):
        render_model_card(folder, "org/x")


def test_every_checkpoint_that_is_named_has_results_and_a_card():
    named = re.findall(r"^\| `(elastic-\w+)` \|", (ROOT / "docs" / "hub.md").read_text(), flags=re.MULTILINE)
    assert [path.stem for path in COMMITTED] == sorted(render_cards.CHECKPOINTS) == sorted(named)
    assert set(render_cards.CHECKPOINTS.values()) <= render_cards.read_results("*.json").keys()


@pytest.mark.parametrize("file", COMMITTED, ids=lambda path: path.stem)
def test_committed_cards_are_what_the_results_say(file):
    card = render_cards.render(file.stem)
    assert str(card) == file.read_text(), "run python examples/benchmarks/render_cards.py"
    check_metadata(card)
    check_text(card)
    links = re.findall(r"\]\((?!https://)(.*?)\)", card.text)
    assert all((file.parent / link).read_bytes().startswith(b"\x89PNG") for link in links)
    assert set(links) == {str(path.relative_to(file.parent)) for path in (file.parent / file.stem).glob("*")}


def test_render_cards_writes_cards_and_draws_their_figures(tmp_path, monkeypatch):
    run = results_file(log_history=[{"epoch": 1.0, "loss": 2.0}], expert_half_lives=[[2.0, 300.0]], main_row=True)
    others = {"ml-1m-sasrec-42.json": run | {"model_type": "sasrec", "config": {}}}
    others |= {"trial.json": run | {"model_type": "gru4rec", "main_row": False}, "benchmark-data.json": {"rows": 1}}
    of_another_split = {"model_type": "hstu", "protocol": "temporal, full ranking"}
    others["ml-1m-hstu-42-temporal.json"] = run | {"config": {}} | of_another_split
    files = {"ml-1m-elastic-42.json": run, **others}
    monkeypatch.setattr(render_cards, "CHECKPOINTS", {"elastic-ml1m": "ml-1m-elastic-42.json"})
    monkeypatch.setattr(render_cards, "read_results", lambda pattern: dict(files))
    monkeypatch.setattr(render_cards, "CARDS", tmp_path / "model_cards")
    monkeypatch.setattr(render_cards, "EXAMPLES", tmp_path)
    render_cards.main()
    assert [path.name for path in (tmp_path / "model_cards").glob("*.md")] == ["elastic-ml1m.md"]
    text = (tmp_path / "model_cards" / "elastic-ml1m.md").read_text()
    links = re.findall(r"\]\((?!https://)(.*?)\)", text)
    assert links == ["elastic-ml1m/training_curve.png", "elastic-ml1m/expert_horizons.png"]
    assert all((tmp_path / "model_cards" / link).read_bytes().startswith(b"\x89PNG") for link in links)
    assert "| sasrec |" in text and "gru4rec" not in text and "hstu" not in text


def test_templates_and_data_ship_with_the_package(tmp_path):
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "elastic_hf", tmp_path / "elastic_hf", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    built = tmp_path / "built" / "elastic_hf" / "sharing"
    for name in ("data_sources.yaml", "templates/handler.py", "templates/model_card.md"):
        assert (built / name).read_bytes() == (ROOT / "elastic_hf" / "sharing" / name).read_bytes()
