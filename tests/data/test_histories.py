import logging
import os
import random
from collections import Counter, defaultdict

import polars as pl
import pytest
from datasets import Dataset, List, Value

from elastic_hf.data import histories as module
from interactions import ROWS, frame, split_rows, write


def reference(rows, k_core):
    """The rules of load_histories, in loops: user -> [(item, time), ...], and the numbers of rows dropped."""
    distinct = list(dict.fromkeys(rows))
    kept = distinct
    while True:
        users, items = Counter(row[0] for row in kept), Counter(row[1] for row in kept)
        strong = [row for row in kept if users[row[0]] >= k_core and items[row[1]] >= k_core]
        if strong == kept:
            break
        kept = strong
    histories = defaultdict(list)
    for user, item, time in kept:
        histories[user].append((item, time))
    for history in histories.values():
        history.sort(key=lambda pair: pair[1])  # stable
    return dict(sorted(histories.items())), len(rows) - len(distinct), len(distinct) - len(kept)


def random_rows(seed, make_user=int, make_item=int, make_time=int):
    rng = random.Random(seed)
    return [
        (make_user(rng.randrange(25)), make_item(int(rng.paretovariate(0.7)) % 40), make_time(rng.randrange(60)))
        for _ in range(600)
    ]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json", ".jsonl"])
def test_leave_one_out_by_hand(tmp_path, load, suffix):
    result = load(write(tmp_path / f"rows{suffix}", frame()))
    assert split_rows(result, "train") == [
        {"user_id": 1, "item_ids": [10, 30], "timestamps": [1, 4]},
    ]  # the others have one item to train on, and nothing to predict from it
    assert split_rows(result, "validation") == [
        {"user_id": 1, "item_ids": [10, 30], "timestamps": [1, 4], "target": 10, "target_timestamp": 8},
        {"user_id": 2, "item_ids": [20], "timestamps": [2], "target": 30, "target_timestamp": 5},
        {"user_id": 3, "item_ids": [10], "timestamps": [6], "target": 20, "target_timestamp": 7},
    ]
    assert split_rows(result, "test") == [
        {"user_id": 1, "item_ids": [10, 30, 10], "timestamps": [1, 4, 8], "target": 20, "target_timestamp": 9},
        {"user_id": 2, "item_ids": [20, 30], "timestamps": [2, 5], "target": 10, "target_timestamp": 5},
        {"user_id": 3, "item_ids": [10, 20], "timestamps": [6, 7], "target": 30, "target_timestamp": 8},
    ]
    # of 10 rows four are to train on: items 10 (twice), 20 and 30
    assert result.items.to_list() == [
        {"item_id": 10, "title": None, "count": 2},
        {"item_id": 20, "title": None, "count": 1},
        {"item_id": 30, "title": None, "count": 1},
    ]
    assert result.counts == {
        "num_rows": 10,
        "num_users": 3,
        "num_items": 3,
        "num_interactions": 10,
        "num_duplicates": 0,
        "num_filtered": 0,
        "num_filtered_users": 0,
        "num_train_users": 1,
        "num_validation_users": 3,
        "num_test_users": 3,
        "num_seen_targets": 1,  # that of user 1
    }


@pytest.mark.parametrize(
    "makers",
    [
        {},
        {"make_item": lambda item: f"item {item} ü", "make_time": lambda time: time / 4},
        {"make_user": lambda user: f"u{user}"},
    ],
    ids=["integers", "string items and fractions of a second", "string users"],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("users_per_batch", [7, 1000])
def test_equal_to_loops(tmp_path, load, monkeypatch, makers, suffix, users_per_batch):
    monkeypatch.setattr(module, "USERS_PER_BATCH", users_per_batch)
    rows = random_rows(0, **makers)
    result = load(write(tmp_path / f"rows{suffix}", frame(rows)), k_core=6)
    histories, num_duplicates, num_filtered = reference(rows, 6)
    assert num_duplicates and num_filtered
    assert split_rows(result, "test") == [
        {
            "user_id": user,
            "item_ids": [item for item, _ in history[:-1]],
            "timestamps": [time for _, time in history[:-1]],
            "target": history[-1][0],
            "target_timestamp": history[-1][1],
        }
        for user, history in histories.items()
    ]
    train = [item for history in histories.values() for item, _ in history[:-2]]
    assert [item for ids in result.histories["train"]["item_ids"] for item in ids] == train
    everything = {item for history in histories.values() for item, _ in history}
    assert result.items["item_id"][:] == sorted(everything)
    assert dict(zip(result.items["item_id"], result.items["count"], strict=True)) == {
        item: Counter(train)[item] for item in everything
    }
    assert result.counts == {
        "num_rows": len(rows),
        "num_users": len(histories),
        "num_items": len(everything),
        "num_interactions": sum(map(len, histories.values())),
        "num_duplicates": num_duplicates,
        "num_filtered": num_filtered,
        "num_filtered_users": len({user for user, _, _ in rows}) - len(histories),
        "num_train_users": len(histories),
        "num_validation_users": len(histories),
        "num_test_users": len(histories),
        "num_seen_targets": sum(
            history[-2][0] in {item for item, _ in history[:-2]} for history in histories.values()
        ),
    }
    assert 0 < result.counts["num_seen_targets"] < len(histories)


def test_targets_seen_before_are_counted_and_their_share_is_reported(tmp_path, load, caplog):
    items = {"a": "xyxyz", "b": "xyzyx", "c": "xyzwv", "d": "xxxx", "e": "xyz"}
    rows = [(user, item, time) for user, history in items.items() for time, item in enumerate(history)]
    path = write(tmp_path / "rows.parquet", frame(rows))
    with caplog.at_level(logging.INFO, logger="elastic_hf"):
        assert load(path).counts["num_seen_targets"] == 3  # y of a and of b, x of d: their last items do not count
    assert "60.0% of the 5 validation targets are items that the user had before" in caplog.text
    # times 0 to 4: validation targets are at time 3, test targets at 4
    temporal = load(path, split="temporal", validation_fraction=4 / 21, test_fraction=2 / 21).counts
    assert (temporal["num_validation_users"], temporal["num_seen_targets"]) == (4, 3)
    assert "num_seen_targets" not in load(path, split="none").counts


def test_sampled_validation_by_hand(tmp_path, load):
    path = write(tmp_path / "rows.parquet", frame())
    result = load(path, validation_users=1)
    (validated,) = split_rows(result, "validation")
    everyone = {row["user_id"]: row for row in split_rows(load(path), "validation")}
    assert validated == everyone[validated["user_id"]]
    # histories of 4, 3 and 3 items: all but the last one are to train on, and of the validated user all but two
    whole = {1: [10, 30, 10], 2: [20, 30], 3: [10, 20]}
    trained = {**whole, validated["user_id"]: validated["item_ids"]}
    assert {row["user_id"]: row["item_ids"] for row in split_rows(result, "train")} == {
        user: items for user, items in trained.items() if len(items) > 1
    }
    assert {row["user_id"]: row["item_ids"] for row in split_rows(result, "test")} == whole
    counts = Counter(item for items in trained.values() for item in items)
    assert dict(zip(result.items["item_id"], result.items["count"], strict=True)) == counts
    assert result.counts["num_validation_users"] == 1 and result.counts["num_test_users"] == 3
    assert load(path, validation_users=3).histories["train"][:] == load(path).histories["train"][:]


def test_validation_users_are_drawn_at_random_and_always_the_same(tmp_path, load):
    path = write(tmp_path / "rows.parquet", frame([(user, time, time) for user in range(60) for time in range(4)]))
    first, second = (load(path, validation_users=20, cache_dir=tmp_path / name) for name in ("a", "b"))
    users = first.histories["validation"]["user_id"][:]
    assert users == second.histories["validation"]["user_id"][:]
    assert users == sorted(set(users)) and len(users) == 20 and users not in ([*range(20)], [*range(40, 60)])
    lengths = {row["user_id"]: len(row["item_ids"]) for row in split_rows(first, "train")}
    assert lengths == {user: 2 if user in users else 3 for user in range(60)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_users": 0}, "validation_users must be an integer of at least 1, found 0"),
        ({"validation_users": 2.0}, "validation_users must be an integer of at least 1, found 2.0"),
        ({"validation_users": True}, "validation_users must be an integer of at least 1, found True"),
        ({"validation_users": 4}, "validation_users must be at most the number of users, 3, found 4"),
        ({"validation_users": 2, "split": "temporal"}, "with split='leave_one_out' alone, found split='temporal'"),
        ({"validation_users": 2, "split": "none"}, "with split='leave_one_out' alone, found split='none'"),
    ],
)
def test_validation_users_that_cannot_be_drawn_are_refused(tmp_path, load, options, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "rows.parquet", frame()), **options)


def test_temporal_split_by_hand(tmp_path, load, caplog):
    times = {"a": [0, 1, 2, 6, 8], "b": [3, 4, 5], "c": [7, 9, 9.5]}
    rows = [(user, f"{user}{time}", time) for user, user_times in times.items() for time in map(float, user_times)]
    path = write(tmp_path / "rows.parquet", frame(rows))
    result = load(path, split="temporal", validation_fraction=2 / 11, test_fraction=3 / 11)
    # the sorted times are 0 1 2 3 4 5 6 7 8 9 9.5: the quantiles 6/11 and 8/11 of 0..10, rounded up, are 6 and 8
    assert split_rows(result, "train") == [
        {"user_id": "a", "item_ids": ["a0.0", "a1.0", "a2.0"], "timestamps": [0, 1, 2]},
        {"user_id": "b", "item_ids": ["b3.0", "b4.0", "b5.0"], "timestamps": [3, 4, 5]},
    ]
    assert split_rows(result, "validation") == [
        {
            "user_id": "a",
            "item_ids": ["a0.0", "a1.0", "a2.0"],
            "timestamps": [0, 1, 2],
            "target": "a6.0",
            "target_timestamp": 6,
        }
    ]
    assert split_rows(result, "test") == [
        {
            "user_id": "a",
            "item_ids": ["a0.0", "a1.0", "a2.0", "a6.0"],
            "timestamps": [0, 1, 2, 6],
            "target": "a8.0",
            "target_timestamp": 8,
        },
        {"user_id": "c", "item_ids": ["c7.0"], "timestamps": [7], "target": "c9.0", "target_timestamp": 9},
    ]
    assert "validation leaves out 1 users" in caplog.text


def test_temporal_split_tells_the_windows_apart(tmp_path, load):
    # the quantiles 0.4 and 0.7 of the times 0..10 are 4 and 7: b has nothing between them and a nothing after
    rows = [("a", time, time) for time in (0, 1, 4, 5, 6)] + [("b", time, time) for time in (2, 3, 7, 8, 9, 10)]
    path = write(tmp_path / "rows.parquet", frame(rows))
    result = load(path, split="temporal", validation_fraction=0.3, test_fraction=0.3)
    assert result.histories["train"]["user_id"][:] == ["a", "b"]
    assert [(row["user_id"], row["target"]) for row in split_rows(result, "validation")] == [("a", 4)]
    assert [(row["user_id"], row["target"]) for row in split_rows(result, "test")] == [("b", 7)]


def test_temporal_split_never_trains_on_the_future(tmp_path, load):
    path = write(tmp_path / "rows.parquet", frame(random_rows(1)))
    result = load(path, split="temporal", validation_fraction=0.2, test_fraction=0.2)
    train_end = max(time for times in result.histories["train"]["timestamps"] for time in times)
    full = {user: dict(enumerate(history)) for user, history in reference(random_rows(1), 0)[0].items()}
    for name in ("validation", "test"):
        for row in split_rows(result, name):
            item, time = full[row["user_id"]][len(row["item_ids"])]
            assert row["target"] == item and row["target_timestamp"] == time > train_end


def test_source_without_time_keeps_order_and_repeats(tmp_path, load):
    path = tmp_path / "rows.txt"
    path.write_text("7 1\n3 2\n7 1\n7 5\n3 2\n7 4\n3 9\n")
    result = load(path)
    assert split_rows(result, "test") == [
        {"user_id": 3, "item_ids": [2, 2], "target": 9},
        {"user_id": 7, "item_ids": [1, 1, 5], "target": 4},
    ]
    assert result.counts["num_duplicates"] == 0
    with pytest.raises(ValueError, match="needs timestamps"):
        load(path, split="temporal")


def test_duplicates_are_counted_and_reported(tmp_path, load, caplog):
    # a repeat with another item in between at the same time, and the same item at another time
    rows = [(1, 10, 5), (1, 20, 5), (1, 10, 5), (1, 10, 6), (1, 20, 7)]
    with caplog.at_level(logging.WARNING):
        result = load(write(tmp_path / "rows.csv", frame(rows)))
    assert split_rows(result, "test")[0]["item_ids"] == [10, 20, 10]
    assert result.counts["num_duplicates"] == 1
    assert "dropped 1 rows" in caplog.text


@pytest.mark.parametrize("unit", [1, 1_000, 1_000_000])
def test_timestamps_that_are_no_seconds_are_reported(tmp_path, load, caplog, unit):
    path = write(tmp_path / "rows.csv", frame([(1, item, (1_700_000_000 + item) * unit) for item in range(3)]))
    assert split_rows(load(path), "test")[0]["timestamps"] == [1_700_000_000 * unit, 1_700_000_001 * unit]
    assert ("divide them first if they are milliseconds" in caplog.text) == (unit > 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "random"}, "split must be .* found 'random'"),
        ({"k_core": -1}, "k_core must be .* found -1"),
        ({"split": "temporal", "test_fraction": 0}, "validation_fraction and test_fraction"),
        ({"split": "temporal", "test_fraction": 0.95}, "validation_fraction and test_fraction"),
        ({"title_column": "title", "items_file": "items.csv"}, "only one of them"),
        ({"timestamp_column": "when"}, "column 'when' is missing"),
        ({"data_dir": "."}, "data_dir is for MovieLens"),
        ({"items_file": "missing.csv"}, "missing.csv is not a file"),
        ({"column_names": "user_id"}, "column_names must be a list"),
        ({"in_time_order": True, "timestamp_column": "timestamp"}, "in_time_order is for a source without timestamps"),
        ({"user_column": "item_id"}, "users and items must be two columns"),
    ],
)
def test_bad_arguments(tmp_path, load, kwargs, message):
    path = write(tmp_path / "rows.csv", frame())
    with pytest.raises(ValueError, match=message):
        load(path, **kwargs)


def test_users_with_too_few_interactions_are_left_out_and_counted(tmp_path, load, caplog):
    path = write(tmp_path / "rows.csv", frame([*ROWS, (4, 10, 1), (4, 99, 2), (5, 10, 1)]))
    for k_core in (0, 2, 3):
        result = load(path, k_core=k_core)
        assert result.histories["test"]["user_id"][:] == [1, 2, 3]
        assert result.items["item_id"][:] == [10, 20, 30]
        counts = result.counts
        assert [counts[name] for name in ("num_rows", "num_interactions", "num_filtered")] == [13, 10, 3]
        assert counts["num_filtered_users"] == 2
        assert ("left out 2 of 5 users with fewer than 3 interactions" in caplog.text) == (k_core < 3)
        caplog.clear()
    with pytest.raises(ValueError, match="none of 13 interactions is left with k_core=20: a user needs at least 20"):
        load(path, k_core=20)
    with pytest.raises(ValueError, match="none of 2 interactions is left with k_core=0: a user needs at least 3"):
        load(write(tmp_path / "two.csv", frame([(1, 2, 3), (1, 3, 4)])))


def test_items_keep_their_core_when_short_users_go(tmp_path, load):
    """Item 40 has two interactions, until the user of one of them is found to have no more than two."""
    rows = [*ROWS, (1, 40, 10), (4, 40, 1), (4, 10, 2)]
    result = load(write(tmp_path / "rows.csv", frame(rows)), k_core=2)
    assert result.items["item_id"][:] == [10, 20, 30]
    assert [row["target"] for row in split_rows(result, "test")] == [20, 10, 30]
    assert result.counts["num_filtered"] == 3


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_train_holds_no_user_with_one_item(tmp_path, load, caplog, split):
    short = [("a", f"a{time}", time) for time in (0, 8, 9)]
    rows = short + [("b", f"b{time}", time) for time in (1, 2, 3, 4, 5, 6, 7)]
    path = write(tmp_path / "rows.parquet", frame(rows))
    result = load(path, split=split, validation_fraction=0.2, test_fraction=0.1)
    assert result.histories["train"]["user_id"][:] == ["b"]
    assert "a" in result.histories["validation"]["user_id"][:] and "a" in result.histories["test"]["user_id"][:]
    assert result.counts["num_train_users"] == 1
    assert "train leaves out 1 of 2 users, who have fewer than 2 items to train on" in caplog.text
    assert dict(zip(result.items["item_id"], result.items["count"], strict=True))["a0"] == 1


def test_nothing_is_held_out_where_nothing_is_to_be_evaluated(tmp_path, load, caplog):
    rows = [("a", "x", 3), ("b", "x", 2), ("b", "y", 9), ("b", "x", 5)]
    result = load(write(tmp_path / "rows.parquet", frame(rows)), split="none")
    assert split_rows(result, "train") == [
        {"user_id": "a", "item_ids": ["x"], "timestamps": [3]},
        {"user_id": "b", "item_ids": ["x", "x", "y"], "timestamps": [2, 5, 9]},
    ]
    assert {*result.histories} == {"train"} and result.items["count"][:] == [3, 1] and not caplog.records
    assert result.counts["num_train_users"] == 2 and "num_test_users" not in result.counts


@pytest.mark.parametrize("num_users", [499, 500])
def test_few_evaluated_users_are_reported(tmp_path, load, caplog, num_users):
    path = write(
        tmp_path / "rows.parquet", frame([(user, item, item) for user in range(num_users) for item in range(4)])
    )
    counts = load(path).counts
    assert counts["num_validation_users"] == counts["num_test_users"] == num_users
    expected = (
        "few users are evaluated (499 in validation, 499 in test): a metric over fewer than 500 is mostly chance"
    )
    assert (expected in caplog.text) == (num_users < 500)


def add_length(row):
    return {"length": len(row["item_ids"])}


def test_memory_mapped_and_mapped_by_two_processes(tmp_path, load):
    result = load(write(tmp_path / "rows.parquet", frame(random_rows(2))), k_core=3)
    assert all(dataset.cache_files for dataset in [*result.histories.values(), result.items])
    mapped = result.histories.map(add_length, num_proc=2)
    for name, dataset in mapped.items():
        assert dataset["length"][:] == [len(items) for items in result.histories[name]["item_ids"]]


def test_loading_twice_is_the_same_and_takes_no_more_disk(tmp_path, load):
    path = write(tmp_path / "rows.csv", frame())
    first, second = load(path), load(path)
    assert first.counts == second.counts and first.items.to_list() == second.items.to_list()
    for name, dataset in first.histories.items():
        assert split_rows(first, name) == split_rows(second, name)
        assert dataset._fingerprint == second.histories[name]._fingerprint  # what `map` looks its caches up by
    assert len(list((tmp_path / "cache").iterdir())) == 1
    load(path, split="temporal", validation_fraction=0.3, test_fraction=0.3)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert [row["target"] for row in split_rows(first, "test")] == [20, 10, 30]


@pytest.mark.parametrize("name", ["train.arrow", "validation.arrow", "test.arrow", "items.arrow"])
def test_damaged_cache_is_rebuilt(tmp_path, load, name):
    path = write(tmp_path / "rows.csv", frame(random_rows(3)))
    first = load(path, k_core=3)
    expected = [split_rows(first, split) for split in first.histories], first.items.to_list()
    (folder,) = (tmp_path / "cache").iterdir()
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for damaged in (None, b"", whole[:-300], bytes(flipped)):
        (folder / name).unlink()
        if damaged is not None:
            (folder / name).write_bytes(damaged)
        again = load(path, k_core=3)
        assert ([split_rows(again, split) for split in again.histories], again.items.to_list()) == expected
        assert (folder / name).read_bytes() == whole
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_failure_while_writing_leaves_nothing(tmp_path, load, monkeypatch):
    path = write(tmp_path / "rows.csv", frame())
    first = load(path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module, "_write_arrow", fail)
    with pytest.raises(OSError, match="disk full"):
        load(path, split="temporal", validation_fraction=0.3, test_fraction=0.3)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert [row["target"] for row in split_rows(first, "test")] == [20, 10, 30]


# the real files


DATA = os.environ.get("ELASTIC_HF_DATA")


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="the environment variable ELASTIC_HF_DATA names no folder with the data")
def test_counts_of_the_real_files(load):
    ml_1m = load(
        f"{DATA}/ml-1m/interactions.parquet",
        timestamp_column="order",
        items_file=f"{DATA}/ml-1m/movies.dat",
        k_core=5,
    )
    names = ("num_users", "num_items", "num_interactions", "num_duplicates", "num_filtered")
    assert [ml_1m.counts[name] for name in names] == [6_040, 3_416, 999_611, 0, 0]
    assert None not in ml_1m.items["title"][:]
    ml_100k = load("ml-100k", data_dir=f"{DATA}/ml-100k")
    assert [ml_100k.counts[name] for name in names] == [943, 1_682, 100_000, 0, 0]
    beauty = load(f"{DATA}/amazon/beauty.txt")
    assert [beauty.counts[name] for name in names] == [40_226, 54_542, 353_962, 0, 0]


# Event columns

EVENTS = {
    "rating": [5, 3, None, 4, 5, 1, 2, 3, 4, None],
    "action": ["buy", "view", None, "to cart", "buy", "view", "buy", "é", "buy", "view"],
    "ok": [True, False, None, True, True, False, True, False, True, True],
    "price": [1.5, 2.0, 3.0, None, 1e-3, 7.0, 2.25, 8.0, 9.0, 1.0],
}


@pytest.mark.parametrize("source", [".csv", ".tsv", ".parquet", ".jsonl", "polars", "arrow", "datasets"])
def test_event_columns_go_with_their_interactions(tmp_path, load, source):
    """Sorted by time, split and read back from every kind of source."""
    table = frame().with_columns(**{name: pl.Series(values, strict=False) for name, values in EVENTS.items()})
    if source.startswith("."):
        table.write_parquet(tmp_path / "rows.parquet")
        read = write(tmp_path / f"rows{source}", table)
    else:
        read = {"polars": table, "arrow": table.to_arrow(), "datasets": Dataset(table.to_arrow())}[source]
    result = load(read, event_columns=["price", "rating", "action", "ok"], k_core=0)
    types = {"price": "float64", "rating": "int64", "action": "string", "ok": "bool"}
    for name, type_ in types.items():
        assert result.histories["train"].features[name] == List(Value(type_))
    rows = table.sort("user_id", "timestamp", maintain_order=True).rows_by_key("user_id", named=True, unique=False)
    for split, held_out in (("train", 2), ("validation", 2), ("test", 1)):
        for row in result.histories[split]:
            expected = rows[row["user_id"]][:-held_out]
            assert row["item_ids"] == [event["item_id"] for event in expected]
            for name in EVENTS:
                assert row[name] == [event[name] for event in expected]
    assert "rating" not in load(read).histories["train"].column_names


def test_of_equal_rows_the_first_one_s_event_columns_are_kept(tmp_path, load):
    rows = [(1, item, item) for item in (10, 20, 30, 40)] + [(1, 20, 20), (2, 10, 1)]
    table = frame(rows).with_columns(rating=pl.Series([1, 2, 3, 4, 5, 6]))
    result = load(write(tmp_path / "rows.csv", table), event_columns=["rating"], split="none")
    assert result.counts["num_duplicates"] == 1
    assert result.histories["train"]["rating"][:] == [[1, 2, 3, 4], [6]]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["5", "03", "-1"], [5, 3, -1]),
        (["5", "3.5", "1e2"], [5.0, 3.5, 100.0]),
        (["true", "False", "true"], [True, False, True]),
        (["5", "n/a", "3"], ["5", "n/a", "3"]),
        (["", "4", ""], [None, 4, None]),
    ],
)
def test_what_text_stands_for_is_decided_when_all_of_it_is_known(tmp_path, load, written, expected):
    lines = [f"1,{item},{item},{rating}" for item, rating in enumerate(written)]
    (tmp_path / "rows.csv").write_text("\n".join(["user_id,item_id,timestamp,rating", *lines, ""]))
    assert (
        load(tmp_path / "rows.csv", event_columns=["rating"], split="none").histories["train"]["rating"][0] == expected
    )


def test_files_may_differ_in_the_numbers_of_an_event_column(tmp_path, load):
    table = frame(ROWS[:5]).with_columns(rating=pl.Series([1, 2, 3, 4, 5]))
    paths = [write(tmp_path / "a.parquet", table)]
    other = frame(ROWS[5:])
    for i, ratings in enumerate(([0.5] * 5, [None] * 5)):
        path = write(tmp_path / f"b{i}.parquet", other.with_columns(rating=pl.Series(ratings)))
        found = load([*paths, path], event_columns=["rating"], split="none").histories["train"]["rating"][:]
        values = [value for row in found for value in row]
        assert sorted(value for value in values if value is not None) == sorted(
            [*range(1, 6), *([0.5] * 5 * (i == 0))]
        )
    path = write(tmp_path / "c.parquet", other.with_columns(rating=pl.Series(["a"] * 5)))
    with pytest.raises(ValueError, match=r"c.parquet: column 'rating' must have the type it has in .*, int64, found"):
        load([*paths, path], event_columns=["rating"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("rating", "event_columns must be a list of distinct columns, found 'rating'"),
        (["rating", "rating"], "event_columns must be a list of distinct columns, found"),
        (["target"], "event_columns must not be called user_id, .*, found 'target'"),
        (["now"], "event_columns must not be called user_id, .*, found 'now'"),
        (["stars"], r"rows.csv: column 'stars' is missing, found \['user_id', 'item_id', 'timestamp', 'rating'\]"),
    ],
)
def test_event_columns_that_cannot_be_are_named(tmp_path, load, columns, message):
    path = write(tmp_path / "rows.csv", frame().with_columns(rating=1))
    with pytest.raises(ValueError, match=message):
        load(path, event_columns=columns)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("suffix", "place"), [(".csv", "line 6"), (".parquet", "row 5"), ("", "row 5")])
def test_event_columns_of_numbers_are_finite(tmp_path, load, suffix, place, value):
    table = frame().with_columns(price=pl.Series([1.5, 2, 3, 4, value, 6, 7, 8, 9, 10]))
    source = write(tmp_path / f"rows{suffix}", table) if suffix else table
    with pytest.raises(ValueError, match=f"{place}: price is .*, expected a finite number"):
        load(source, event_columns=["price"])


def test_dates_are_no_event_column(load):
    table = frame().with_columns(day=pl.date(2026, 1, 1))
    with pytest.raises(ValueError, match="column 'day' must hold strings, booleans, integers or numbers, found type"):
        load(table, event_columns=["day"])
