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


def test_targets_are_compared_with_what_was_found(results):
    results(factor=6)
    found = {what: rest for what, *rest in render_results.findings()}
    assert len(found) == 23
    encoding = "encoding a user of {} items, times as fast as SASRec with SDPA"
    assert found[encoding.format("2,048")] == ["at least 6", "6", "yes"]
    assert found[encoding.format("32,768")] == ["at least 55", "6", "no"]
    assert found["the same at 2,048, both compiled"] == ["at least 8", "6", "no"]
    saved = "peak memory of {} 2,048 items, less than with naive attention by"
    assert found[saved.format("encoding")] == ["at least 97 %", "98.3 %", "yes"]
    assert found[saved.format("training on")] == ["at least 85 %", "98.3 %", "yes"]
    assert found["the same over SASRec's with SDPA"] == ["at most 0.4", "0.167", "yes"]
    assert found["the same over SASRec's with SDPA: elastic, checkpointed"] == ["at most 0.6", "0.0556", "yes"]
    assert found["four reader layers over two, time to encode 2,048 items"] == ["at most 1.6", "1.5", "yes"]
    defaults = "training memory of one user, defaults of the configuration, 16,384 over 2,048 items"
    assert found[defaults] == ["at most 8.8", "8", "yes"]
    assert found["one more item after 100,000 items over after 100"] == ["at most 1.1", "1.2", "no"]
    assert found["one more item after 100,000 items"] == ["at most 1.5 ms", "1.5 ms", "yes"]
    assert found["state of a user"] == ["at most 9,000 bytes", "8,840 bytes", "yes"]
    for what in ("training step on 200 items over SASRec's with SDPA: elastic", encoding.format("50")):
        assert found[what][-1] == "yes"
    results(factor=0.5)
    found = {what: rest for what, *rest in render_results.findings()}
    assert found["training step on 200 items over SASRec's with SDPA: elastic"] == ["at most 1.8", "2", "no"]
    assert found[encoding.format("50")] == ["at least 1.2", "0.5", "no"]


def test_what_was_not_measured_is_not_stated(results):
    for name in ("targets", "claims", "inference", "training_memory", "streaming", "profile", "onnx", "headline"):
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


def test_figures_are_drawn(results, tmp_path):
    render_results.plot("inference")
    assert not list((tmp_path / "results").glob("*.png"))
    results(factor=2)
    for subject in LENGTHS:
        render_results.plot(subject)
        assert (tmp_path / "results" / f"benchmark-{subject}.png").read_bytes().startswith(b"\x89PNG")
