import polars as pl
import pytest
from transformers import TrainingArguments

from elastic_hf import ElasticItemTokenizer, SequentialRecommendationTrainer, load_histories, prepare_histories
from elastic_hf.data import partitions, preparation
from interactions import ROWS, frame, random_rows, split_rows, write
from trainers import make_model


@pytest.fixture(autouse=True)
def small_partitions(monkeypatch):
    monkeypatch.setattr(preparation, "ROWS_PER_BATCH", 70)
    monkeypatch.setattr(partitions, "ROWS_PER_PARTITION", 90)
    monkeypatch.setattr(partitions, "ROWS_PER_SAMPLE", 3)


MAKERS = {
    "integers": {},
    "string items and fractions of a second": {
        "make_item": lambda item: f"item {item} ü",
        "make_time": lambda time: time / 4,
    },
    "string users": {"make_user": lambda user: f"u{user}"},
}
READING = ("column_names", "in_time_order", "items_file", "timestamp_column")


def assert_equal(source, folder, load, **options):
    """Check that what is prepared is what is loaded in memory, and return that."""
    expected = load(source, **options)
    assert prepare_histories(source, folder, **{"k_core": 0, **options}) == expected.counts
    prepared = load(folder, **{name: value for name, value in options.items() if name not in READING})
    assert prepared.counts == expected.counts
    assert [*prepared.histories] == [*expected.histories]
    for name, rows in expected.histories.items():
        assert prepared.histories[name].features == rows.features
        assert split_rows(prepared, name) == rows.to_list()
    assert prepared.items.features == expected.items.features and prepared.items.to_list() == expected.items.to_list()
    assert {path.name for path in folder.parent.iterdir() if path.name.startswith("tmp-")} == set()
    return expected


def num_shards(folder):
    return len([*(folder / "train").iterdir()])


@pytest.mark.parametrize("k_core", [0, 6])
@pytest.mark.parametrize("makers", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_equal_to_histories_in_memory(tmp_path, load, makers, suffix, k_core):
    source = write(tmp_path / f"rows{suffix}", frame(random_rows(0, **makers)))
    counts = assert_equal(source, tmp_path / "prepared", load, k_core=k_core).counts
    assert counts["num_duplicates"] and (counts["num_filtered"] > 0) == (k_core > 0)
    assert num_shards(tmp_path / "prepared") > 4


EVENTS = {
    "numbers": [4.5, None, 3.0],
    "integers": [7, 2, None],
    "categories": ["view", "buy", None],
    "booleans": [True, None, False],
    "numbers that are integers for long": [1] * 400 + [0.5],
    "categories that are numbers for long": ["1"] * 500 + ["x"],
    "missing": [None],
}


@pytest.mark.parametrize("values", EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_event_columns(tmp_path, load, suffix, values):
    rows = frame(random_rows(12))
    rows = rows.with_columns(
        pl.Series("what", (values * len(rows))[: len(rows)], strict=False),
        pl.int_range(len(rows)).alias("row"),  # ties keep the order of the source
    )
    source = write(tmp_path / f"rows{suffix}", rows)
    assert_equal(source, tmp_path / "prepared", load, event_columns=["what", "row"], k_core=4)
    alone = load(tmp_path / "prepared", event_columns=["row"], k_core=4).histories["test"].column_names
    assert alone == ["user_id", "item_ids", "timestamps", "row", "target", "target_timestamp"]
    with pytest.raises(ValueError, match="event_columns must be of those with .* what, row, found 'price'"):
        load(tmp_path / "prepared", event_columns=["price"], k_core=4)


def test_event_columns_whose_type_another_file_decides(tmp_path, load):
    (tmp_path / "logs").mkdir()
    for file, value in enumerate([None, 1, 0.5]):
        column = pl.Series("what", [value] * 600, pl.Null if value is None else None)
        write(tmp_path / "logs" / f"{file}.parquet", frame(random_rows(file)).with_columns(column))
    histories = assert_equal(tmp_path / "logs", tmp_path / "prepared", load, event_columns=["what"]).histories
    assert {value for values in histories["train"]["what"] for value in values} == {None, 1.0, 0.5}


@pytest.mark.parametrize("options", [{"split": "none"}, {"validation_users": 7}])
def test_every_split_is_that_of_histories_in_memory(tmp_path, load, options):
    source = write(tmp_path / "rows.parquet", frame(random_rows(1)))
    assert_equal(source, tmp_path / "prepared", load, **options)


def test_users_whose_rows_are_all_filtered(tmp_path, load):
    """A partition may be left without users, and its shards without rows."""
    rows = [*random_rows(2), *((user, 10_000 + user, 5) for user in range(100, 400))]
    counts = assert_equal(write(tmp_path / "rows.parquet", frame(rows)), tmp_path / "prepared", load, k_core=4).counts
    assert counts["num_filtered_users"] >= 300 and num_shards(tmp_path / "prepared") > 6


def test_one_user_with_most_of_the_rows(tmp_path, load):
    rows = [*random_rows(3), *((12, time % 40, 100 + time) for time in range(2_000))]
    assert_equal(write(tmp_path / "rows.parquet", frame(rows)), tmp_path / "prepared", load, k_core=4)


def test_titles(tmp_path, load):
    source = write(tmp_path / "rows.parquet", frame(random_rows(4)))
    titles = write(tmp_path / "titles.csv", pl.DataFrame({"item_id": [1, 2], "title": ["One", "Two"]}))
    items = assert_equal(source, tmp_path / "prepared", load, items_file=titles).items
    assert items["title"][:3] == [None, "One", "Two"]


@pytest.mark.parametrize("makers", MAKERS.values(), ids=MAKERS)
def test_a_source_without_times(tmp_path, load, makers):
    source = write(tmp_path / "rows.parquet", frame(random_rows(5, **makers)).drop("timestamp"))
    counts = assert_equal(source, tmp_path / "prepared", load, in_time_order=True).counts
    assert counts["num_duplicates"] == 0


def test_several_files_of_which_one_decides_the_types(tmp_path, load):
    """Ids of text are integers if all of them are; times are floats if one is."""
    (tmp_path / "logs").mkdir()
    rows = random_rows(6)
    write(tmp_path / "logs" / "a.csv", frame(rows[:300]).with_columns(pl.col("item_id").cast(pl.Float64)))
    write(tmp_path / "logs" / "b.csv", frame(rows[300:500]).with_columns(pl.col("timestamp") / 2))
    write(tmp_path / "logs" / "c.csv", frame(rows[500:]))
    integers = assert_equal(tmp_path / "logs", tmp_path / "integers", load)
    write(tmp_path / "logs" / "d.csv", frame([("u1", "x", 1), ("u1", "10.0", 2), ("u1", "10", 3)]))
    strings = assert_equal([tmp_path / "logs"], tmp_path / "strings", load)
    types = [
        [result.histories["train"].features["user_id"].dtype, result.items.features["item_id"].dtype]
        for result in (integers, strings)
    ]
    assert types == [["int64", "int64"], ["string", "string"]]


def test_ids_that_are_integers_in_their_own_file_alone(tmp_path, load):
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs" / "a.csv", frame(random_rows(7, make_item=lambda item: f"i{item}")))
    write(tmp_path / "logs" / "b.csv", frame(random_rows(8, make_user=lambda user: f"u{user}")))
    assert_equal(tmp_path / "logs", tmp_path / "prepared", load)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
def test_a_bad_row_is_named_as_in_memory(tmp_path, load, suffix, column):
    rows = frame(random_rows(9)).with_columns(
        pl.when(pl.int_range(pl.len()) == 431).then(None).otherwise(pl.col(column)).alias(column)
    )
    source = write(tmp_path / f"rows{suffix}", rows)
    with pytest.raises(ValueError) as expected:
        load(source)
    assert f"{'row 432' if suffix == '.parquet' else 'line 433'}: {column} is None" in str(expected.value)
    with pytest.raises(ValueError) as found:
        prepare_histories(source, tmp_path / "prepared")
    assert str(found.value) == str(expected.value)
    assert {path.name for path in tmp_path.iterdir()} <= {source.name, "cache"}


def test_columns_and_what_is_left_out_are_reported_once_and_as_in_memory(tmp_path, load, caplog):
    rows = frame([*random_rows(10), (99, 1, 253_402_300_800)]).rename({"timestamp": "ts"})
    source = write(tmp_path / "rows.parquet", rows)
    load(source)
    expected = sorted(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    caplog.clear()
    prepare_histories(source, tmp_path / "prepared", k_core=0)
    assert sorted(record.getMessage() for record in caplog.records if record.levelname == "WARNING") == expected
    assert len(expected) >= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "temporal"}, "split must be 'leave_one_out' or 'none' .* found 'temporal'"),
        ({"split": "random"}, "split must be one of"),
        ({"k_core": -1}, "k_core must be"),
        ({"k_core": 11}, "none of 10 interactions is left with k_core=11: a user needs at least 11"),
        ({"validation_users": 4, "k_core": 0}, "validation_users must be at most the number of users, 3, found 4"),
        ({"item_column": "sku"}, "column 'sku' is missing"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    source = write(tmp_path / "rows.parquet", frame())
    with pytest.raises(ValueError, match=message):
        prepare_histories(source, tmp_path / "prepared", **options)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_nothing_is_overwritten(tmp_path):
    source = write(tmp_path / "rows.parquet", frame())
    for folder in (tmp_path, source):
        with pytest.raises(ValueError, match="output_dir must be a folder that is empty or does not exist"):
            prepare_histories(source, folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [(frame(ROWS[:-1]), "found 10 rows, then 9"), (frame([*ROWS[:-1], (1, 99, 3)]), "found 99, an item that was not")],
)
def test_a_source_that_changes_meanwhile_is_refused(tmp_path, monkeypatch, changed, message):
    source = write(tmp_path / "rows.parquet", frame())
    survey = preparation.survey

    def change_after(batches):
        known = survey(batches)
        write(source, changed)
        return known

    monkeypatch.setattr(preparation, "survey", change_after)
    with pytest.raises(ValueError, match=f"the source must not change while it is read, {message}"):
        prepare_histories(source, tmp_path / "prepared", k_core=0)


def test_prepared_histories_are_loaded_with_their_own_settings(tmp_path, load):
    source = write(tmp_path / "rows.parquet", frame())
    prepare_histories(source, tmp_path / "prepared", k_core=0)
    for options, message in (
        ({"k_core": 5}, "k_core must be 0, with which .* was prepared, found 5"),
        ({"split": "none"}, "split must be 'leave_one_out', with which"),
        ({"validation_users": 2}, "validation_users must be None, with which"),
        ({"item_column": "sku"}, "item_column must not be given for .*, which is prepared already, found 'sku'"),
        ({"in_time_order": True}, "in_time_order must not be given"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "prepared", **options)
    with pytest.raises(ValueError, match="streaming is for a folder that prepare_histories wrote, found"):
        load(source, streaming=True)


def test_streams_are_tokenized_and_train_as_histories_in_memory(tmp_path, load):
    source = write(tmp_path / "rows.parquet", frame(random_rows(11)).with_columns(pl.col("timestamp").alias("price")))
    expected = load(source, event_columns=["price"])
    prepare_histories(source, tmp_path / "prepared", event_columns=["price"], k_core=0)
    streamed = load_histories(tmp_path / "prepared", event_columns=["price"], k_core=0, streaming=True)
    tokenizer = ElasticItemTokenizer.from_items(streamed.items, 20, events=expected.histories["train"])
    rows, streams = (tokenizer.tokenize_histories(result.histories) for result in (expected, streamed))
    for name, stream in streams.items():
        assert stream.features == rows[name].features and [*stream] == rows[name].to_list()
        assert stream.num_shards == num_shards(tmp_path / "prepared") > 4
    args = TrainingArguments(tmp_path / "run", max_steps=3, use_cpu=True, save_strategy="no", report_to="none")
    metrics = []
    for data in (rows, streams):
        model = make_model(vocab_size=len(tokenizer), event_features=tokenizer.event_features)
        trainer = SequentialRecommendationTrainer(
            model, args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer
        )
        metrics.append(trainer.evaluate()["eval_ndcg@10"])
        assert trainer.train().global_step == 3
    assert metrics[0] == metrics[1]
