import json

import pytest

import render_results


LENGTHS = {"inference": [50, 200, 500, 2048, 4096, 8192, 32768], "training": [200, 2048], "memory": [2048]}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A function that writes results in which SASRec takes `factor` times what ELASTIC takes."""
    monkeypatch.setattr(render_results, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()

    def write(factor, variant=""):
        setting = {"hardware": "a machine", "dtype": "float32", "threads": 2, "versions": {"torch": "2"}}
        setting["git_commit"] = None
        for subject, lengths in LENGTHS.items():
            rows = []
            for length in lengths:
                values = {"elastic": 3.0, "elastic, no memory": 3.0, "elastic, 4 layers": 4.5}
                values["elastic, block on the stream"] = 6.0
                values |= {"elastic, checkpointed": 1.0, "elastic, compiled": 1.0, "sasrec, sdpa": 3.0 * factor}
                values |= {"sasrec, sdpa, compiled": factor, "sasrec, naive": 30.0 * factor}
                if subject == "memory":
                    values = {name: 1e6 * value for name, value in values.items()}
                for name in ("inference", "training") if subject == "memory" else (subject,):
                    key = "peak_bytes" if subject == "memory" else "seconds"
                    rows.append({"pass": name, "length": length, "batch_size": 2, key: values})
            if subject == "memory":
                for length, peak in ((2048, 1e6), (16384, 8e6)):
                    of_default = {"length": length, "batch_size": 1, "peak_bytes": {"elastic": peak}}
                    rows.append({"pass": "training, defaults", **of_default})
            file = tmp_path / "results" / f"benchmark-{subject}{variant}.json"
            file.write_text(json.dumps({**setting, "rows": rows}))
        state = {"bytes_per_user": 8_840, "seconds": {"100": 1.25e-3, "100,000": 1.5e-3}}
        (tmp_path / "results" / f"benchmark-streaming{variant}.json").write_text(json.dumps({**setting, **state}))

    return write


def test_ratios_are_those_of_sasrec_over_elastic(results):
    results(factor=6)
    header, _, *lines = render_results.ratios().splitlines()
    assert header.endswith("| 50 | 200 | 500 | 2,048 | 8,192 | 32,768 |")
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert rows["time to encode a user"] == ["6"] * 6
    assert rows["time to encode a user, with a block on the stream"] == ["3"] * 6
    assert rows["time of a training step"] == ["", "6", "", "6", "", ""]
    assert rows["memory of a training step, ELASTIC checkpointed"] == ["", "", "", "18", "", ""]
    assert rows["memory to encode a user, naive attention"] == ["", "", "", "60", "", ""]
    results(factor=0.5)
    assert "| time to encode a user | 0.5 | 0.5 | 0.5 | 0.5 | 0.5 | 0.5 |" in render_results.ratios()


def test_the_front_page_puts_elastic_first(results, tmp_path):
    results(factor=6)
    data = {"num_users": 3, "num_items": 5, "num_interactions": 20, "max_length": 7, "num_parameters": 11}
    data["dataset"] = "ml-1m"
    for model, seed, ndcg in (("sasrec", 42, 0.25), ("gru4rec", 42, 0.2), ("gru4rec", 43, 0.4), ("elastic", 42, 0.15)):
        run = {**data, "model_type": model, "main_row": True, "protocol": "leave_one_out, full ranking"}
        run |= {"test_hr@10": 0.5, "test_ndcg@10": ndcg}
        (tmp_path / "results" / f"ml-1m-{model}-{seed}.json").write_text(json.dumps(run))
    *_, elastic, gru4rec, sasrec = render_results.front_page().splitlines()
    assert elastic == "| **ELASTIC** | **0.5000** | **0.1500** | **1** | **11** |"
    assert gru4rec == "| GRU4Rec | 0.5000 ± 0.0000 | 0.3000 ± 0.1414 | 2 | 11 |"
    assert sasrec == "| SASRec | 0.5000 | 0.2500 | 1 | 11 |"
    speed, state, accuracy = render_results.highlights().splitlines()
    assert (
        "6.0 times" in speed
        and "3.0 times" in speed
        and "1.5 ms" in state
        and "-50.0%" in accuracy
        and "GRU4Rec" in accuracy
    )
    assert "6.0 times" not in render_results.training_cost() and "0.2 times" in render_results.training_cost()


def test_models_are_compared_by_their_fastest_programs(results, tmp_path):
    """SASRec's CUDA graph is slower than its eager form, and does not count."""
    results(6, "-cuda-bfloat16")
    results(6)
    file = tmp_path / "results" / "benchmark-inference-cuda-bfloat16.json"
    measured = json.loads(file.read_text())
    for row in measured["rows"]:
        row["seconds"] = {"elastic": 8.0, "sasrec, sdpa": 6.0, "sasrec, naive": 20.0}
        if row["length"] == 2048:
            row["seconds"] |= {"elastic, CUDA graph": 3.0, "sasrec, sdpa, CUDA graph": 7.0}
    file.write_text(json.dumps(measured))
    rows = {
        row.pop("SASRec's over ELASTIC's, by items in the history"): row
        for row in rows_of(render_results.ratios("-cuda-bfloat16"))
    }
    eager, programs = (rows[f"time to encode a user{form}"] for form in ("", ", each by its fastest program"))
    assert {*eager.values()} == {"0.75"}
    assert programs == {**dict.fromkeys(programs, ""), "2,048": "2"}
    assert "time to encode a user, naive attention, each by its fastest program" not in rows
    cost = render_results.training_cost()
    assert "takes 1.3 times as long there as SASRec" in cost and "0.5 times as long at 2,048 as SASRec's" in cost


def rows_of(text):
    """The cells of a table, by its header."""
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def write_run(folder, name, ndcg, **changes):
    run = {"dataset": "ml-1m", "model_type": "elastic", "main_row": True, "seed": 42, "max_length": 7}
    run |= {"protocol": "leave_one_out, full ranking", "num_parameters": 11, "hardware": "a machine", **changes}
    run |= {f"test_{metric}@10{suffix}": ndcg for metric in ("hr", "ndcg") for suffix in ("", "_seen_kept")}
    (folder / "results" / f"{name}.json").write_text(json.dumps(run))


def test_figures_of_two_protocols_are_not_mixed(results, tmp_path):
    write_run(tmp_path, "ml-1m-elastic-42", 0.25)
    write_run(tmp_path, "ml-1m-elastic-43", 0.35, seed=43)
    write_run(tmp_path, "ml-1m-sasrec-42", 0.2, model_type="sasrec")
    assert "protocol" not in rows_of(render_results.accuracy())[0]
    assert "protocol" not in rows_of(render_results.differences())[0]
    sampled = "leave_one_out, sampled validation, full ranking"
    write_run(tmp_path, "ml-1m-elastic-42-sampled", 0.5, protocol=sampled)
    write_run(tmp_path, "ml-1m-sasrec-42-sampled", 0.6, protocol=sampled, model_type="sasrec")
    rows = [(row["protocol"], row["model"], row["NDCG@10"]) for row in rows_of(render_results.accuracy())]
    assert rows == [
        ("leave_one_out, full ranking", "elastic", "**0.3000 ± 0.0707**"),
        ("leave_one_out, full ranking", "sasrec", "**0.2000**"),
        (sampled, "elastic", "**0.5000**"),
        (sampled, "sasrec", "**0.6000**"),
    ]
    differences = [(row["protocol"], row["NDCG@10"]) for row in rows_of(render_results.differences())]
    assert differences == [("leave_one_out, full ranking", "+0.1000"), (sampled, "-0.1000")]
    assert [len(seeds) for seeds in render_results.main_runs("ml-1m").values()] == [2, 1]


def test_the_temporal_split_has_a_table_of_its_own(results, tmp_path, monkeypatch):
    monkeypatch.setattr(render_results, "PUBLISHED", tmp_path / "published.yaml")
    render_results.PUBLISHED.write_text(json.dumps({"ml-1m": []}))
    for model, ndcg in (("elastic", 0.25), ("sasrec", 0.2)):
        write_run(tmp_path, f"ml-1m-{model}-42", ndcg, model_type=model)
    assert render_results.temporal() == "Not measured yet."
    names = ("accuracy", "differences", "published", "times", "events")
    tables = {name: render_results.TABLES[name]() for name in names}
    split = {"protocol": "temporal, full ranking", "num_test_users": 5}
    for model, seed, ndcg in (("elastic", 42, 0.5), ("elastic", 43, 0.25), ("sasrec", 42, 0.75)):
        write_run(tmp_path, f"ml-1m-{model}-{seed}-temporal", ndcg, model_type=model, seed=seed, **split)
    timed = {"protocol": "temporal, full ranking, target times given", "config": {"use_timestamps": True}}
    write_run(tmp_path, "ml-1m-elastic-42-temporal-timed", 0.5, **timed)
    elastic, sasrec = rows_of(render_results.temporal())
    assert (elastic["model"], elastic["NDCG@10"], elastic["seeds"]) == ("elastic", "**0.3750 ± 0.1768**", "2")
    assert (sasrec["model"], sasrec["HR@10"], sasrec["test users"]) == ("sasrec", "0.7500", "5")
    assert elastic["protocol"] == "temporal, full ranking"
    assert {name: render_results.TABLES[name]() for name in tables} == tables


def test_published_figures_stand_beside_ours_of_each_protocol(results, tmp_path, monkeypatch):
    monkeypatch.setattr(render_results, "PUBLISHED", tmp_path / "published.yaml")
    report = {"model": "Theirs", "hr@10": 0.5, "ndcg@10": 0.25, "source": "a table", "differs": "other users"}
    render_results.PUBLISHED.write_text(json.dumps({"ml-1m": [report], "not-measured": [report]}))
    assert render_results.published() == "Not measured yet."
    sampled = "leave_one_out, sampled validation, full ranking"
    for model, ndcg in (("gru4rec", 0.125), ("sasrec", 0.5), ("elastic", 0.375)):
        write_run(tmp_path, f"ml-1m-{model}-42", ndcg, model_type=model)
    write_run(tmp_path, "ml-1m-elastic-42-sampled", 0.75, protocol=sampled)
    assert [(row["model"], row["NDCG@10"], row["what differs"]) for row in rows_of(render_results.published())] == [
        ("**ELASTIC**, this project", "0.3750", ""),
        ("**SASRec**, this project", "0.5000", ""),
        ("**ELASTIC**, this project", "0.7500", sampled),
        ("Theirs", "0.2500", "other users"),
    ]


def test_models_with_times_stand_beside_the_same_without(results, tmp_path):
    write_run(tmp_path, "ml-1m-elastic-42", 0.25)
    assert render_results.times() == "Not measured yet."
    timed = {"protocol": "leave_one_out, full ranking, target times given", "config": {"use_timestamps": True}}
    for seed, told, untold in ((42, 0.5, 0.125), (43, 0.25, 0.25)):
        write_run(tmp_path, f"ml-1m-elastic-{seed}-timed", told, seed=seed, **{"untimed_ndcg@10": untold}, **timed)
    (row,) = rows_of(render_results.times())
    assert row["without times"] == "0.2500" and row["seeds"] == "1 and 2"
    assert row["with times, not told the target's"] == "0.1875 ± 0.0884"
    assert row["told the target's"] == "0.3750 ± 0.1768" and row["told against without"] == "+50.0%"

    sampled = "leave_one_out, sampled validation, full ranking"
    write_run(tmp_path, "ml-1m-elastic-42-sampled", 0.5, protocol=sampled)
    timed |= {"protocol": f"{sampled}, target times given", "untimed_ndcg@10": 0.5}
    write_run(tmp_path, "ml-1m-elastic-42-sampled-timed", 0.75, **timed)
    first, of_sampled = rows_of(render_results.times())
    assert first == row and of_sampled["dataset"] == "ml-1m, sampled validation"
    assert of_sampled["without times"] == "0.5000" and of_sampled["told the target's"] == "0.7500"


def test_models_with_features_of_events_stand_beside_the_same_without(results, tmp_path):
    write_run(tmp_path, "ml-1m-elastic-42", 0.25)
    accuracy = render_results.accuracy()
    assert render_results.events() == "Not measured yet."
    featured = {
        "protocol": "leave_one_out, full ranking, events with rating",
        "config": {"event_features": {"rating": 5}},
    }
    for seed, ndcg in ((42, 0.5), (43, 0.25)):
        write_run(tmp_path, f"ml-1m-elastic-{seed}-with-rating", ndcg, seed=seed, **featured)
    write_run(tmp_path, "ml-1m-sasrec-42-with-rating", 0.5, model_type="sasrec", **featured)
    (row,) = rows_of(render_results.events())
    assert row["event features"] == "rating" and row["without"] == "0.2500" and row["seeds"] == "1 and 2"
    assert row["with"] == "0.3750 ± 0.1768" and row["with against without"] == "+50.0%"
    assert render_results.accuracy() == accuracy

    sampled = "leave_one_out, sampled validation, full ranking"
    write_run(tmp_path, "ml-1m-elastic-42-sampled", 0.5, protocol=sampled)
    featured["protocol"] = f"{sampled}, events with rating"
    write_run(tmp_path, "ml-1m-elastic-42-sampled-with-rating", 0.75, **featured)
    first, of_sampled = rows_of(render_results.events())
    assert first == row and of_sampled["dataset"] == "ml-1m, sampled validation"
    assert (of_sampled["without"], of_sampled["with"]) == ("0.5000", "0.7500")


def test_runs_that_keep_seen_items_are_told_by_that_and_say_so(results, tmp_path):
    write_run(tmp_path, "ml-1m-elastic-42", 0.25)
    places = {"dataset": "places", "config": {"exclude_seen": False, "mask_seen_in_loss": False}}
    for model, excluded, kept in (("elastic", 0.125, 0.5), ("sasrec", 0.25, 0.375)):
        write_run(tmp_path, f"places-{model}-42", excluded, model_type=model, **places)
        file = tmp_path / "results" / f"places-{model}-42.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"test_ndcg@10_seen_kept": kept}))
    _, elastic, sasrec = rows_of(render_results.accuracy())
    assert (elastic["model"], sasrec["model"]) == ("elastic", "sasrec")
    assert elastic["protocol"] == "leave_one_out, full ranking, seen items kept"
    assert (elastic["NDCG@10"], sasrec["NDCG@10"]) == ("**0.5000**", "**0.3750**")
    (difference,) = rows_of(render_results.differences())
    assert difference["protocol"] == elastic["protocol"] and difference["NDCG@10"] == "+0.1250"


def test_what_was_not_measured_is_not_stated(results):
    for name in (
        "ratios",
        "claims",
        "inference",
        "training_memory",
        "streaming",
        "profile",
        "onnx",
        "quantization",
        "scoring",
        "scoring_checks",
        "training_cost",
    ):
        assert render_results.TABLES[name]() == "Not measured yet."
    assert render_results.gpu() == "Nothing has been measured on a GPU yet."
    results(factor=2, variant="-cuda-bfloat16")
    assert render_results.inference() == "Not measured yet."
    text = render_results.gpu()
    assert "### bfloat16" in text and "### float32" not in text and "a machine" in text


def test_values_are_those_of_one_user(results):
    results(factor=2)
    lines = render_results.training_memory().splitlines()
    assert lines[0] == "| items in the history | 2,048 |" and lines[2] == "| users in a batch | 2 |"
    assert "| sasrec, naive | 30 |" in lines
    assert "| elastic | 1 | 8 |" in render_results.default_memory()
    assert "| elastic, checkpointed | naive | 2,048 | 60x | 98% |" in render_results.claims()


def test_figures_are_drawn_the_same_again(results, tmp_path, monkeypatch):
    monkeypatch.setattr(render_results, "FIGURES", tmp_path)
    render_results.plot("inference")
    render_results.plot_encoding()
    assert not list(tmp_path.glob("*.svg"))
    results(factor=2)
    for subject in LENGTHS:
        render_results.plot(subject)
        assert "</svg>" in (tmp_path / f"{subject}.svg").read_text()
    render_results.plot_encoding()
    drawn = (tmp_path / "encoding.svg").read_bytes()
    render_results.plot_encoding()
    assert (tmp_path / "encoding.svg").read_bytes() == drawn
