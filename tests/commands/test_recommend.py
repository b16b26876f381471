import json

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from datasets import Dataset
from transformers import pipeline

from elastic_hf import ElasticItemTokenizer
from elastic_hf.commands import recommend
from factories import NUM_TOKENS, elastic_model


NUM_ITEMS = NUM_TOKENS - 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    elastic_model().save_pretrained(folder)
    table = pl.DataFrame({"item_id": range(NUM_ITEMS), "title": [f"Product {i}" for i in range(NUM_ITEMS)]})
    ElasticItemTokenizer.from_items(table, model_max_length=11).save_pretrained(folder)
    return str(folder)


def test_one_history(folder, capsys):
    recommend.main(["--model_name_or_path", folder, "--history", "3", "Product 5", "--top_k", "4"])
    expected = pipeline("sequential-recommendation", model=folder, top_k=4)([3, 5])
    printed = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert printed == [[str(i), str(item["item"]), item["title"]] for i, item in enumerate(expected, start=1)]


def test_all_users_of_a_file(folder, tmp_path, capsys):
    """Whole histories in the order of time, also of those who have only one item, with the seen items kept."""
    generator = np.random.default_rng(0)
    histories = {
        user: generator.choice(NUM_ITEMS, size, replace=False).tolist() for user, size in enumerate((1, 4, 13))
    }
    rows = [(user, item, time) for user, items in histories.items() for time, item in enumerate(items)]
    generator.shuffle(rows)
    pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").write_csv(tmp_path / "shop.csv")
    output_file = tmp_path / "out" / "recommended.parquet"
    arguments = {"model_name_or_path": folder, "input_file": tmp_path / "shop.csv", "output_file": output_file}
    arguments |= {"top_k": 3, "exclude_seen": False, "batch_size": 2, "cache_dir": tmp_path / "cache"}
    recommend.main([str(part) for name, value in arguments.items() for part in (f"--{name}", value)])
    table = pl.read_parquet(output_file)
    assert table.columns == ["user_id", "rank", "item_id", "score"]
    pipe = pipeline("sequential-recommendation", model=folder, top_k=3, exclude_seen=False)
    for user, history in histories.items():
        expected = pipe(history)
        found = table.filter(pl.col("user_id") == user)
        assert found["rank"].to_list() == [1, 2, 3]
        assert found["item_id"].to_list() == [item["item"] for item in expected]
        np.testing.assert_allclose(found["score"], [item["score"] for item in expected], rtol=1e-5)
    assert len(table) == 9 and "3 items for each of 3 users" in capsys.readouterr().out


@pytest.mark.parametrize("own", [True, False])
def test_seen_items_are_left_out_as_the_model_says_unless_told_otherwise(folder, tmp_path, capsys, own):
    elastic_model(exclude_seen=own).save_pretrained(tmp_path)
    ElasticItemTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    pipe = pipeline("sequential-recommendation", model=str(tmp_path))
    for arguments, exclude_seen in (([], own), (["--exclude_seen", str(not own)], not own)):
        recommend.main(["--model_name_or_path", str(tmp_path), "--history", "3", "5", "--top_k", "26", *arguments])
        printed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
        assert printed == [str(item["item"]) for item in pipe([3, 5], top_k=26, exclude_seen=exclude_seen)]
        assert ({"3", "5"} & {*printed} == set()) == exclude_seen


def test_a_failure_leaves_an_older_file(folder, tmp_path):
    pl.DataFrame({"user": [1, 1], "item": [2, NUM_ITEMS + 7], "time": [1, 2]}).write_csv(tmp_path / "shop.csv")
    (tmp_path / "recommended.parquet").write_text("older")
    arguments = ["--model_name_or_path", folder, "--input_file", str(tmp_path / "shop.csv")]
    arguments += ["--output_file", str(tmp_path / "recommended.parquet"), "--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match=f"history 0 must hold items that the model knows, found {NUM_ITEMS + 7}"):
        recommend.main(arguments)
    assert (tmp_path / "recommended.parquet").read_text() == "older"
    recommend.main([*arguments, "--unknown", "ignore"])
    assert len(pl.read_parquet(tmp_path / "recommended.parquet")) == 10


@pytest.fixture(scope="module")
def timed(folder, tmp_path_factory):
    """A folder with a model that reads times."""
    path = tmp_path_factory.mktemp("timed")
    elastic_model(use_timestamps=True).save_pretrained(path)
    ElasticItemTokenizer.from_pretrained(folder).save_pretrained(path)
    return str(path)


def test_one_history_with_times(timed, capsys):
    arguments = ["--model_name_or_path", timed, "--history", "3", "Product 5", "--timestamps", "10", "86400.5"]
    pipe = pipeline("sequential-recommendation", model=timed, top_k=26)
    printed = []
    for now in (1e5, 1e9):
        recommend.main([*arguments, "--now", str(now), "--top_k", "26"])
        expected = pipe({"history": [3, 5], "timestamps": [10, 86400.5], "now": now})
        printed.append([line.split()[1] for line in capsys.readouterr().out.splitlines()])
        assert printed[-1] == [str(item["item"]) for item in expected]
    assert printed[0] != printed[1]
    with pytest.raises(ValueError, match="as many timestamps as items, 2, for a model .*, found None"):
        recommend.main(arguments[:5])
    with pytest.raises(ValueError, match="and now after them, found 9.0 after 86400.5"):
        recommend.main([*arguments, "--now", "9"])


def test_all_users_of_a_file_with_times(timed, tmp_path):
    generator = np.random.default_rng(0)
    histories = {user: generator.choice(NUM_ITEMS, user, replace=False).tolist() for user in (1, 4, 13)}
    rows = [(user, item, 10**i) for user, items in histories.items() for i, item in enumerate(items)]
    pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").write_csv(tmp_path / "shop.csv")
    arguments = ["--model_name_or_path", timed, "--input_file", str(tmp_path / "shop.csv"), "--top_k", "3"]
    arguments += ["--output_file", str(tmp_path / "out.parquet"), "--cache_dir", str(tmp_path / "cache")]
    recommend.main([*arguments, "--now", "3e12", "--batch_size", "2"])
    found = pl.read_parquet(tmp_path / "out.parquet")
    pipe = pipeline("sequential-recommendation", model=timed, top_k=3)
    for user, items in histories.items():
        times = [10**i for i in range(len(items))]
        expected = pipe({"history": items, "timestamps": times, "now": 3e12})
        assert found.filter(pl.col("user_id") == user)["item_id"].to_list() == [item["item"] for item in expected]
    pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").drop("time").write_csv(tmp_path / "shop.csv")
    with pytest.raises(ValueError, match="history 0 must have as many timestamps as items, 1, .*, found None"):
        recommend.main([*arguments, "--in_time_order", "True"])


@pytest.fixture(scope="module")
def featured(folder, tmp_path_factory):
    """A folder with a model that reads features of events."""
    path = tmp_path_factory.mktemp("featured")
    events = Dataset.from_dict({"action": [["buy", "view"]], "price": [[1.5, 2.5]]})
    tokenizer = ElasticItemTokenizer.from_items(ElasticItemTokenizer.from_pretrained(folder).items, 11, events)
    tokenizer.save_pretrained(path)
    elastic_model(event_features=tokenizer.event_features).save_pretrained(path)
    return str(path)


def test_one_history_with_features_of_events(featured, capsys):
    arguments = ["--model_name_or_path", featured, "--top_k", "26", "--history", "3", "Product 5"]
    pipe = pipeline("sequential-recommendation", model=featured, top_k=26)
    printed = []
    for features in ({"action": ["buy", None], "price": [2, 3.5]}, {"action": ["view", "?"], "price": [None, None]}):
        recommend.main([*arguments, "--event_features", json.dumps(features)])
        expected = pipe({"history": [3, 5], **features})
        printed.append([line.split()[1] for line in capsys.readouterr().out.splitlines()])
        assert printed[-1] == [str(item["item"]) for item in expected]
    assert printed[0] != printed[1]
    for text, message in (
        ("buy", "event_features must be JSON, found 'buy'"),
        ("[5]", "event_features must be a JSON object of lists, found"),
        ('{"action": ["buy"]}', "as many values of 'action' as items, 2, found 1"),
        ('{"action": ["buy", "buy"], "price": [1, NaN]}', "event column 'price' must hold finite numbers, found nan"),
        (
            '{"action": ["buy", "buy"], "cost": [1, 2]}',
            "with 'history' and 'action' and 'price' alone, found the keys",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            recommend.main([*arguments, "--event_features", text])


def test_all_users_of_a_file_with_features_of_events(featured, tmp_path):
    rows = [
        (user, item, item, ["buy", "view", None][item % 3], item / 4) for user in (1, 4, 9) for item in range(user)
    ]
    table = pl.DataFrame(rows, schema=["user", "item", "time", "action", "price"], orient="row")
    table.write_csv(tmp_path / "shop.csv")
    arguments = ["--model_name_or_path", featured, "--input_file", str(tmp_path / "shop.csv"), "--top_k", "3"]
    arguments += ["--output_file", str(tmp_path / "out.parquet"), "--cache_dir", str(tmp_path / "cache")]
    recommend.main([*arguments, "--batch_size", "2"])
    found = pl.read_parquet(tmp_path / "out.parquet")
    pipe = pipeline("sequential-recommendation", model=featured, top_k=3)
    for user in (1, 4, 9):
        columns = table.filter(pl.col("user") == user).to_dict(as_series=False)
        expected = pipe({"history": columns["item"], "action": columns["action"], "price": columns["price"]})
        assert found.filter(pl.col("user_id") == user)["item_id"].to_list() == [item["item"] for item in expected]
    table.drop("price").write_csv(tmp_path / "shop.csv")
    with pytest.raises(ValueError, match="column 'price' is missing, found"):
        recommend.main(arguments)


@pytest.mark.parametrize("arguments", [["--timestamps", "1", "2"], ["--now", "5"]])
def test_times_for_a_model_without_are_refused(folder, arguments):
    with pytest.raises(ValueError, match="timestamps and now must be left out for a model that reads no times"):
        recommend.main(["--model_name_or_path", folder, "--history", "3", "5", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "set history or input_file, one of them"),
        (["--history", "1", "--input_file", "shop.csv"], "set history or input_file, one of them"),
        (["--input_file", "shop.csv"], "input_file and output_file belong together"),
        (["--history", "1", "--output_file", "out.parquet"], "input_file and output_file belong together"),
        (
            ["--input_file", "shop.csv", "--output_file", "out.parquet", "--timestamps", "1"],
            "timestamps belong to a history",
        ),
        (
            ["--input_file", "shop.csv", "--output_file", "out.parquet", "--event_features", "{}"],
            "event_features belong to a history",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend.main(["--model_name_or_path", "here", *arguments])


def test_plain_histories_are_read_as_the_pipeline_reads_them(folder, timed, monkeypatch):
    """Longer ones than the model reads, too; whatever is not plain is left to the pipeline."""
    users = pa.table({"user_id": ["a", "b", "c"], "item_ids": [[3, 5, 3], [7], [*range(13)]]})
    pipe = pipeline("sequential-recommendation", model=folder, top_k=4)
    schema = recommend.recommendations_schema(pa.string(), pipe)
    found = recommend.recommend_for_users(pipe, users, None, schema)
    assert recommend.plain_histories(pipe, users).tolist()[1] == [0] * 12 + [10]
    for left_out in ([[3], [99]], [[3], []]):
        assert recommend.plain_histories(pipe, pa.table({"item_ids": left_out})) is None
    assert recommend.plain_histories(pipe, pa.table({"item_ids": [[*range(NUM_ITEMS - 3)]]})) is None
    of_times = pipeline("sequential-recommendation", model=timed)
    assert recommend.plain_histories(of_times, users) is None
    monkeypatch.setattr(recommend, "plain_histories", lambda *args: None)
    assert recommend.recommend_for_users(pipe, users, None, schema).equals(found)
