import os
import pickle
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import polars as pl
import polars.testing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from moto.server import ThreadedMotoServer
from pyarrow import fs

import score_users
import user_states
from elastic_hf import ElasticItemTokenizer, load_histories
from elastic_hf.commands import recommend
from factories import elastic_model
from scoring import score_here
from storage import Folder, list_files
from user_histories import find_source, partition_of, read_piece


NUM_ITEMS, TOP_K, NUM_PARTITIONS = 97, 5, 7


def save(folder, events=None, **changes):
    """Save a model of random weights, which reads what `events` hold, and return its folder."""
    items = pl.DataFrame({"item_id": range(NUM_ITEMS), "count": range(NUM_ITEMS)})
    events = None if events is None else Dataset.from_dict(events)
    tokenizer = ElasticItemTokenizer.from_items(items, model_max_length=200, events=events)
    tokenizer.save_pretrained(folder)
    model = elastic_model(vocab_size=NUM_ITEMS + 3, event_features=tokenizer.event_features, **changes)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    return save(tmp_path_factory.mktemp("timed"), use_timestamps=True)


# Of the values in the log some are of no category that was trained on, and "true" is one of strings. Rows have a
# `position` in the program, too.
LOG = {"is_gift": [[True, False]], "position": [["top", "true"]], "price": [[1.5, 4.0]], "rating": [[1, 2, 3]]}


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    return save(tmp_path_factory.mktemp("rated"), LOG, use_timestamps=True)


@pytest.fixture(scope="module")
def events():
    """Interactions of 40 users in random order, with many equal times and some rows that repeat another, and what is
    known of each."""
    generator = np.random.default_rng(0)
    rows = [
        (user, int(generator.integers(NUM_ITEMS)), int(1e9 + 1000 * generator.integers(20)))
        for user in range(40)
        for _ in range(generator.integers(1, 30))
    ]
    rows += rows[:3]
    generator.shuffle(rows)
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    of_item = {
        "is_gift": [(True, None, False)[item % 3] for item in frame["item_id"]],
        "position": [("top", "side", "true", None)[item % 4] for item in frame["item_id"]],
        "price": [None if item % 7 == 0 else item / 8 for item in frame["item_id"]],
        "rating": [(1, 2, None, 3, 9)[item % 5] for item in frame["item_id"]],
    }
    return frame.with_columns(**{name: pl.Series(values) for name, values in of_item.items()})


@pytest.fixture
def shop(events, tmp_path):
    """The interactions as Parquet, of several row groups."""
    events.write_parquet(tmp_path / "shop.parquet", row_group_size=100)
    return tmp_path / "shop.parquet"


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(score_users, "score_users", score_here)
    monkeypatch.setattr(score_users, "ray_cluster", lambda *args: nullcontext())


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs the script and returns the rows that it writes, by user and rank."""

    def run(source, model, *more, output="scored"):
        arguments = {"input": source, "model": model, "output": tmp_path / output, "top_k": TOP_K}
        arguments = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
        if "--num_partitions" not in more:
            arguments += ["--num_partitions", str(NUM_PARTITIONS)]
        monkeypatch.setattr(sys, "argv", ["score_users.py", *arguments, *more])
        score_users.main()
        return read(tmp_path / output)

    return run


def read(folder):
    return pl.read_parquet(sorted(folder.glob("part-*.parquet"))).sort("user_id", "rank")


def expected(source, model, folder, *more):
    """What `elastic-hf recommend` writes."""
    arguments = ["--model_name_or_path", model, "--input_file", source, "--output_file", folder / "whole.parquet"]
    arguments += ["--cache_dir", folder / "cache", "--top_k", TOP_K, *more]
    recommend.main([str(argument) for argument in arguments])
    return pl.read_parquet(folder / "whole.parquet").sort("user_id", "rank")


def same(found, wanted):
    """Scores may differ in their last digits, by which other histories are in the batch."""
    polars.testing.assert_frame_equal(found, wanted, check_exact=False, rel_tol=1e-4, abs_tol=1e-5)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.glob("part-*.parquet")}


@pytest.mark.parametrize("kind", ["model", "rated"])
def test_every_form_of_input_gives_what_recommend_does(kind, shop, events, here, run, tmp_path, request):
    """Interactions as Parquet, as CSV in two files, whose users are text, and whole histories; several batches."""
    model, now, columns = request.getfixturevalue(kind), [], []
    if kind == "rated":
        now, columns = ["--now", "1.1e9"], [*LOG]
    wanted = expected(shop, model, tmp_path, *now)
    assert wanted["user_id"].n_unique() == 40
    same(run(shop, model, "--batch_size", "3", *now), wanted)
    assert sorted(file.name for file in (tmp_path / "scored").glob("part*")) == [
        f"part-{number:05}.parquet" for number in range(NUM_PARTITIONS)
    ]
    (tmp_path / "folder").mkdir()
    events[:200].write_csv(tmp_path / "folder" / "1.csv")
    events[200:].write_csv(tmp_path / "folder" / "2.csv")
    found = run(tmp_path / "folder", model, *now, output="of csv")
    same(found.with_columns(pl.col("user_id").cast(pl.Int64)).sort("user_id", "rank"), wanted)
    loaded = load_histories(str(shop), event_columns=columns, k_core=0, split="none", cache_dir=tmp_path / "cache")
    loaded.histories["train"].to_parquet(tmp_path / "histories.parquet")
    same(run(tmp_path / "histories.parquet", model, *now, output="of histories"), wanted)


@pytest.fixture
def bucket(monkeypatch):
    """The URI of a bucket of an object store on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    secrets = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**secrets, "AWS_ENDPOINT_URL": url}.items():
        monkeypatch.setenv(name, value)
    fs.FileSystem.from_uri("s3://shop?allow_bucket_creation=true")[0].create_dir("shop")
    yield "s3://shop"
    server.stop()


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_input_and_output_by_their_uris(kind, events, model, here, tmp_path, monkeypatch, request):
    """A file of the output is there when it is whole, and what was written is not written again."""
    root = request.getfixturevalue("bucket") if kind == "s3" else tmp_path.as_uri()
    store, path = fs.FileSystem.from_uri(root)
    store.create_dir(f"{path}/log/_delta_log")
    for number, part in enumerate((events[:200], events[200:])):
        pq.write_table(part.to_arrow(), f"{path}/log/{number}.parquet", filesystem=store)
    options = {"input": f"{root}/log", "model": model, "output": f"{root}/scored", "top_k": TOP_K}
    options |= {"num_partitions": NUM_PARTITIONS, "batch_size": 3}
    arguments = ["score_users.py", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    monkeypatch.setattr(sys, "argv", arguments)
    folder = Folder(options["output"], "output")
    write_table, written = pq.ParquetWriter.write_table, []

    def interrupted(writer, table):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(write_table(writer, table))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pq.ParquetWriter, "write_table", interrupted)
        score_users.main()
    parts = [name for name in folder.names() if name.startswith("part-")]
    source = pickle.loads(pickle.dumps(find_source(options["input"], {})))  # as it is sent to workers
    assert [file.path for file in source.files] == [f"{path}/log/{number}.parquet" for number in range(2)]
    pieces = [pa.Table.from_pylist([piece]) for piece in source.pieces()]
    assert sum(rows.num_rows for piece in pieces for rows in read_piece(piece, source, 1, [])) == len(events)
    assert 0 < len(parts) < NUM_PARTITIONS and "_SUCCESS" not in folder.names()
    stopped = {info.path: info.mtime_ns for info in list_files(store, f"{path}/scored")}
    score_users.main()
    files = list_files(store, f"{path}/scored")
    assert len(files) == NUM_PARTITIONS and {"_SUCCESS", "_settings.json"} < set(folder.names())
    assert stopped.items() <= {info.path: info.mtime_ns for info in files}.items()
    found = pl.concat(pl.from_arrow(pq.read_table(info.path, filesystem=store)) for info in files)
    events.write_parquet(tmp_path / "whole.parquet")
    same(found.sort("user_id", "rank"), expected(tmp_path / "whole.parquet", model, tmp_path))
    monkeypatch.setattr(sys, "argv", [*arguments, "--exclude_seen", "False"])
    with pytest.raises(ValueError, match=f"output {root}/scored is of a run with another exclude_seen"):
        score_users.main()


def test_places_that_cannot_be_used(shop, model, here, bucket, monkeypatch):
    def run(**places):
        places = {"input": str(shop), "model": model, "output": f"{bucket}/scored", **places}
        arguments = [part for name, value in places.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["score_users.py", *arguments])
        score_users.main()

    for places, message in (
        ({"input": "s4://shop/log"}, "input must be a path, or a URI that PyArrow reads, found 's4://shop/log'"),
        ({"input": f"{bucket}/nothing"}, "input must be a file or a folder .* found 's3://shop/nothing' with no file"),
        ({"output": "s3://key:word@shop/scored"}, "output must be a URI without a secret, .*environment, found one$"),
        ({"output": "s3://nowhere/scored"}, "output s3://nowhere/scored must be a folder that can be written to"),
        ({"states": f"{bucket}/states"}, "states must be a folder whose files can be locked, found a URI"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**places)


def test_a_model_that_reads_times(shop, timed, here, run, tmp_path):
    more = ["--now", "1.1e9"]
    wanted = expected(shop, timed, tmp_path, *more)
    same(run(shop, timed, *more), wanted)
    assert not run(shop, timed, "--now", "2e9", output="later").equals(wanted)


def test_a_run_goes_on_where_it_was_stopped(shop, model, timed, here, run, tmp_path, monkeypatch):
    """A partition whose file is there is not done again; one whose file was being written is."""
    run(shop, timed)
    before = contents(tmp_path / "scored")
    (tmp_path / "scored" / "_SUCCESS").unlink()
    os.replace(tmp_path / "scored" / "part-00003.parquet", tmp_path / "scored" / "part-00003.parquet.tmp")
    written = []
    write = score_users.Scorer.write
    monkeypatch.setattr(score_users.Scorer, "write", lambda self, *args: (written.append(args[1]), write(self, *args)))
    run(shop, timed)
    assert written == ["part-00003.parquet"] and contents(tmp_path / "scored") == before
    assert not list((tmp_path / "scored").glob("*.tmp"))
    run(shop, timed)
    assert len(written) == 1, "a run that has ended has nothing left to do"


def test_an_output_of_another_run_is_refused(shop, events, model, here, run, tmp_path):
    run(shop, model)
    before = contents(tmp_path / "scored")
    with pytest.raises(ValueError, match="output .* is of a run with another top_k: top_k must be 5, found 6"):
        run(shop, model, "--top_k", "6")
    with pytest.raises(ValueError, match="another exclude_seen: exclude_seen must be None, found False"):
        run(shop, model, "--exclude_seen", "False")
    with pytest.raises(ValueError, match="another model: model must be '[0-9a-f]{64}', found"):
        run(shop, save(tmp_path / "other", hidden_size=12))
    with pytest.raises(ValueError, match="another num_partitions: num_partitions must be 7, found 8"):
        run(shop, model, "--num_partitions", "8")
    events[1:].write_parquet(shop)
    with pytest.raises(ValueError, match="another input"):
        run(shop, model)
    assert contents(tmp_path / "scored") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="output .*full must be empty or of an earlier run, found notes.txt"):
        run(shop, model, output="full")


def test_what_the_model_does_not_know(events, model, here, run, tmp_path):
    strange = pl.DataFrame({"user_id": [90, 91, 91], "item_id": [555, 555, 3], "timestamp": [1, 2, 3]})
    pl.concat([events, strange], how="diagonal").write_parquet(tmp_path / "shop.parquet")
    with pytest.raises(ValueError, match="must hold items that the model knows, found 555"):
        run(tmp_path / "shop.parquet", model)
    more = ["--unknown", "ignore", "--fallback", "popularity"]
    wanted = expected(tmp_path / "shop.parquet", model, tmp_path, *more)
    same(run(tmp_path / "shop.parquet", model, *more, output="ignored"), wanted)
    assert wanted.filter(user_id=90)["item_id"].to_list() == [96, 95, 94, 93, 92]


@pytest.mark.parametrize(
    ("columns", "more", "message"),
    [
        (
            {"user_id": [1, 1], "item_ids": [[1], [2]]},
            [],
            "histories must be of distinct users, found 1 more than once",
        ),
        ({"user_id": [1, None], "item_ids": [[1], [2]]}, [], "row 2: user_id is None, expected a value"),
        ({"user_id": [1, 2], "item_ids": [[1], None]}, [], "item_ids must be lists, found 1 nulls"),
        ({"user_id": [1], "item_id": [2]}, [], "column 'timestamp' is missing"),
        ({"user_id": [], "item_ids": []}, [], "users.parquet has no rows"),
        ({"user_id": [1], "item_ids": [[2]]}, ["--now", "5"], "now must be left out for a model that reads no times"),
        ({"user_id": [1], "item_ids": [[2]]}, ["--batch_size", "0"], "batch_size must be at least 1, found 0"),
        ({"user_id": [1], "item_ids": [[2]]}, ["--states", "states"], "states need .* an input with timestamps"),
    ],
)
def test_what_is_wrong_is_named(columns, more, message, model, here, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pl.DataFrame(columns).write_parquet(tmp_path / "users.parquet")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "users.parquet", model, *more)


def test_features_of_events_that_are_refused(events, shop, rated, here, run, tmp_path):
    """A column that is missing, values of another kind, and another number of them than items."""
    now = ["--now", "1.1e9"]
    events.drop("price").write_parquet(tmp_path / "without.parquet")
    with pytest.raises(ValueError, match="without.parquet: column 'price' is missing, found"):
        run(tmp_path / "without.parquet", rated, *now)
    events.with_columns(rating=pl.lit("five")).write_parquet(tmp_path / "words.parquet")
    with pytest.raises(ValueError, match="users .*: history 0: event column 'rating' must hold integers, found other"):
        run(tmp_path / "words.parquet", rated, *now, output="words")
    lists = {
        "user_id": [7],
        "item_ids": [[1, 2]],
        "timestamps": [[5, 6]],
        **{name: [log[0][:2]] for name, log in LOG.items()},
    }
    for wrong, message in (
        ([[1.5]], "history 0 must have as many values of 'price' as items, 2, found 1"),
        ([None], "histories.parquet: price must be lists, found 1 nulls"),
    ):
        pl.DataFrame({**lists, "price": wrong}).write_parquet(tmp_path / "histories.parquet")
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "histories.parquet", rated, *now, output=f"{wrong}")


def test_an_output_of_other_categories_is_refused(shop, rated, here, run, tmp_path):
    """Of the same weights, which take the numbers of categories alone."""
    now = ["--now", "1.1e9"]
    run(shop, rated, *now)
    other = save(tmp_path / "other", {**LOG, "rating": [[1, 2, 9]]}, use_timestamps=True)
    with pytest.raises(ValueError, match="another model: model must be '[0-9a-f]{64}', found"):
        run(shop, other, *now)


def test_a_row_of_text_is_named(model, here, run, tmp_path):
    (tmp_path / "shop.csv").write_text("user,item,time\n1,2,2024-01-31\n1,,2024-02-01\n")
    with pytest.raises(ValueError, match="shop.csv, row 2: item is None, expected a value"):
        run(tmp_path / "shop.csv", model)
    with pytest.raises(ValueError, match="input must be a file or a folder of files that all end in one of .parquet"):
        find_source(str(tmp_path / "nothing.parquet"), {})


def test_files_of_other_columns_are_named(events, model, here, run, tmp_path):
    (tmp_path / "log" / "_delta_log").mkdir(parents=True)
    (tmp_path / "log" / "_delta_log" / "0.json").touch()
    events.write_parquet(tmp_path / "log" / "1.parquet")
    events.with_columns(pl.col("user_id").cast(pl.String)).write_parquet(tmp_path / "log" / "2.parquet")
    with pytest.raises(
        ValueError, match="2.parquet: column 'user_id' must have the type it has in .*1.parquet, int64"
    ):
        run(tmp_path / "log", model)
    events.drop("item_id").write_parquet(tmp_path / "log" / "2.parquet")
    with pytest.raises(ValueError, match="2.parquet: column 'item_id' is missing"):
        run(tmp_path / "log", model)


def test_a_user_is_always_of_one_partition():
    """Whatever the type of the ids, the other users and the machine."""
    users = pa.chunked_array([[7, 8, 7], [123_456_789_012]])
    assert partition_of(users, 1000).tolist() == partition_of(users.cast(pa.string()), 1000).tolist()
    assert partition_of(pa.chunked_array([["7"]]), 1000).tolist() == partition_of(users, 1000)[:1].tolist() == [346]


def days(events, tmp_path, *cuts):
    """The interactions as files of one day after the other."""
    edges = [0, *cuts, 2e9]
    for number in range(len(edges) - 1):
        day = events.filter(pl.col("timestamp") >= edges[number], pl.col("timestamp") < edges[number + 1])
        day.write_parquet(tmp_path / f"day{number}.parquet", row_group_size=50)
        yield tmp_path / f"day{number}.parquet"


@pytest.mark.parametrize("kind", ["model", "timed", "rated"])
def test_new_events_on_top_of_states_say_what_whole_histories_do(kind, events, shop, here, run, tmp_path, request):
    """Over three days, on each of which some users have no event and others are new."""
    model = request.getfixturevalue(kind)
    now = ["--now", "1.1e9"] if kind != "model" else []
    wanted = expected(shop, model, tmp_path, *now)
    more = ["--states", str(tmp_path / "states"), "--batch_size", "3", *now]
    found, num_users = {}, []
    for number, day in enumerate(days(events, tmp_path, 1e9 + 4_000, 1e9 + 9_000)):
        rows = run(day, model, *more, output=f"day {number}")
        users = pl.read_parquet(day)["user_id"].unique().sort()
        assert rows["user_id"].unique().sort().equals(users)
        num_users.append(len(users))
        found |= {user: rows.filter(user_id=user) for user in users}
    assert len(num_users) == 3 and max(num_users[:2]) < 40
    same(pl.concat(found[user] for user in range(40)), wanted)
    states = pl.read_parquet(tmp_path / "states" / "part-*.parquet").sort("user_id")
    seen = events.group_by("user_id").agg(pl.col("item_id").unique().sort() + 3).sort("user_id")["item_id"]
    assert states["seen"].to_list() == seen.to_list()
    assert {path.name for path in (tmp_path / "states").iterdir() if path.suffix != ".parquet"} == {
        "_settings.json",
        ".lock",
    }


def test_states_change_all_at_once_or_not_at_all(events, model, here, run, tmp_path, monkeypatch):
    """A day that ends in an error, or is stopped at any point, is given up or goes on; it never counts twice."""
    first, second = days(events, tmp_path, 1e9 + 9_000)
    more = ["--states", str(tmp_path / "states")]
    run(first, model, *more, output="first")
    before = contents(tmp_path / "states")

    def stop(self, histories, name):
        if name == "part-00003.parquet":
            raise KeyboardInterrupt
        write(self, histories, name)

    write = score_users.Scorer.write
    for output in ("given up", "second"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(score_users.Scorer, "write", stop)
            run(second, model, *more, output=output)
        assert contents(tmp_path / "states") == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        replaced = []

        def replace(source, target, replace=os.replace):
            if len(replaced) == 2:
                raise KeyboardInterrupt
            replaced.append(replace(source, target))

        def interrupted(states):
            patch.setattr(user_states.os, "replace", replace)
            user_states.commit(states)

        patch.setattr(score_users, "commit", interrupted)
        run(second, model, *more, output="second")
    assert len(replaced) == 2 and not (tmp_path / "second" / "_SUCCESS").exists()
    found = run(second, model, *more, output="second")
    assert (tmp_path / "second" / "_SUCCESS").exists()
    after = contents(tmp_path / "states")

    events.write_parquet(tmp_path / "whole.parquet")
    run(tmp_path / "whole.parquet", model, "--states", str(tmp_path / "at once"), output="whole")
    columns = ["user_id", "num_items", "seen", "last_event"]
    states, at_once = (
        pl.read_parquet(tmp_path / name / "part-*.parquet", columns=columns).sort("user_id")
        for name in ("states", "at once")
    )
    assert states.equals(at_once)
    users = found["user_id"].unique().to_list()
    same(found, read(tmp_path / "whole").filter(pl.col("user_id").is_in(users)))
    with pytest.raises(ValueError, match="must be in the order of time and after the last one of the states"):
        run(second, model, *more, output="again")
    assert contents(tmp_path / "states") == after


def test_states_of_another_model_or_other_users_are_refused(events, model, timed, here, run, tmp_path):
    first, second = days(events, tmp_path, 1e9 + 9_000)
    more = ["--states", str(tmp_path / "states")]
    run(first, model, *more)
    with pytest.raises(ValueError, match="states .* is of a run with another model: model must be"):
        run(second, timed, *more, output="timed")
    pl.read_parquet(second).write_csv(tmp_path / "second.csv")
    with pytest.raises(ValueError, match="states must be of users with ids as in the input, string, found int64"):
        run(tmp_path / "second.csv", model, *more, output="of text")


def test_users_of_whose_new_events_the_model_knows_none(events, model, here, run, tmp_path):
    first, _ = days(events, tmp_path, 1e9 + 9_000)
    more = ["--states", str(tmp_path / "states"), "--unknown", "ignore", "--fallback", "popularity"]
    run(first, model, *more)
    user = pl.read_parquet(first)["user_id"][0]
    strange = pl.DataFrame({"user_id": [user, 99], "item_id": [555, 555], "timestamp": [int(1.1e9)] * 2})
    strange.write_parquet(tmp_path / "strange.parquet")
    before = pl.read_parquet(tmp_path / "states" / "part-*.parquet").sort("user_id")
    found = run(tmp_path / "strange.parquet", model, *more, output="strange")
    assert found["user_id"].to_list() == [99] * TOP_K and found["item_id"].to_list() == [96, 95, 94, 93, 92]
    assert pl.read_parquet(tmp_path / "states" / "part-*.parquet").sort("user_id").equals(before)


# On Ray: a cluster of two workers, one of which is killed once in the middle of a file.


class Killed(score_users.Scorer):
    """A worker that is killed, once in a run, when it is about to write a third time to the files of a partition."""

    def write(self, histories, name):
        mark = Path(self.settings["output"], "_killed")
        if not mark.exists():
            mark.touch()
            write_table, written = pq.ParquetWriter.write_table, []

            def die(writer, table):
                if len(written) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                written.append(write_table(writer, table))

            pq.ParquetWriter.write_table = die
        super().write(histories, name)


@pytest.mark.long
def test_two_workers_of_which_one_is_killed(shop, rated, ray_cluster, run, tmp_path, monkeypatch):
    """And blocks so small that each partition would be several of them, if Ray were to divide it."""
    monkeypatch.setattr(score_users, "Scorer", Killed)
    monkeypatch.setattr(score_users, "BLOCK_BYTES", 1_000)
    found = run(shop, rated, "--batch_size", "1", "--now", "1.1e9")
    assert (tmp_path / "scored" / "_killed").exists()
    same(found, expected(shop, rated, tmp_path, "--now", "1.1e9"))


@pytest.mark.long
def test_states_when_a_worker_is_killed(events, shop, model, ray_cluster, run, tmp_path, monkeypatch):
    first, second = days(events, tmp_path, 1e9 + 9_000)
    more = ["--states", str(tmp_path / "states"), "--batch_size", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(score_users, "score_users", score_here)
        run(first, model, *more, output="first")
    monkeypatch.setattr(score_users, "Scorer", Killed)
    found = run(second, model, *more, output="second")
    assert (tmp_path / "second" / "_killed").exists()
    wanted = expected(shop, model, tmp_path)
    same(found, wanted.filter(pl.col("user_id").is_in(pl.read_parquet(second)["user_id"].unique().to_list())))


@pytest.mark.long
def test_partitions_without_users(shop, model, ray_cluster, run, tmp_path):
    """Of the first run there is nothing left to do but to say so."""
    more = ["--num_partitions", "90", "--num_workers", "1"]
    found = run(shop, model, *more)
    assert found["user_id"].n_unique() == 40 and len(contents(tmp_path / "scored")) < 40
    (tmp_path / "scored" / "_SUCCESS").unlink()
    assert run(shop, model, *more).equals(found) and (tmp_path / "scored" / "_SUCCESS").exists()


@pytest.mark.long
def test_errors_of_workers_are_those_of_the_script(events, model, ray_cluster, run, tmp_path):
    strange = events.with_columns(pl.lit(555).alias("item_id"))
    strange.write_parquet(tmp_path / "shop.parquet")
    with pytest.raises(ValueError, match="users . to .*: history 0 must hold items that the model knows, found 555"):
        run(tmp_path / "shop.parquet", model, "--num_workers", "1")
