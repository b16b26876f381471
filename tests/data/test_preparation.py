import json
import random

import datasets
import pytest

from elastic_hf.data import preparation
from elastic_hf.data import partitions as module
from elastic_hf.data.preparation import prepare_histories
from interactions import frame, split_rows, write
from test_histories import random_rows


@pytest.fixture(autouse=True)
def small_partitions(monkeypatch):
    monkeypatch.setattr(preparation, "ROWS_PER_BATCH", 70)
    monkeypatch.setattr(module, "ROWS_PER_PARTITION", 90)
    monkeypatch.setattr(module, "ROWS_PER_SAMPLE", 3)


def assert_equal(source, folder, load, **options):
    expected = load(source, **options)
    reading = {name: options.pop(name) for name in ("in_time_order", "items_file") if name in options}
    assert prepare_histories(source, folder, **{"k_core": 0, **options}, **reading) == expected.counts
    prepared = load(folder, **options)
    assert prepared.counts == expected.counts
    assert [*prepared.histories] == [*expected.histories]
    for name, rows in expected.histories.items():
        assert prepared.histories[name].features == rows.features
        assert split_rows(prepared, name) == rows.to_list()
    assert prepared.items.features == expected.items.features and prepared.items.to_list() == expected.items.to_list()
    return expected


MAKERS = {
    "integers": {},
    "string items and fractions of a second": {
        "make_item": lambda item: f"item {item} ü",
        "make_time": lambda time: time / 4,
    },
    "string users": {"make_user": lambda user: f"u{user}"},
}


@pytest.mark.parametrize("k_core", [0, 6])
@pytest.mark.parametrize("makers", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_equal_to_histories_in_memory(tmp_path, load, makers, suffix, k_core):
    source = write(tmp_path / f"rows{suffix}", frame(random_rows(0, **makers)))
    counts = assert_equal(source, tmp_path / "prepared", load, k_core=k_core).counts
    assert counts["num_duplicates"] and (counts["num_filtered"] > 0) == (k_core > 0)
    assert len([*(tmp_path / "prepared" / "train").iterdir()]) > 4
