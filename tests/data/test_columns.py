import pytest

from elastic_hf.data.columns import ColumnRequest, Columns


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["user_id", "item_id", "timestamp"], ("user_id", "item_id", "timestamp")),
        (["x", "userId", "movieId", "rating", "time"], ("userId", "movieId", "time")),
        (["user", "item", "ts"], ("user", "item", "ts")),
        (["USER ID", "Product-ID", "Date"], ("USER ID", "Product-ID", "Date")),
        (["reviewerID", "asin", "overall", "unixReviewTime", "reviewTime"], ("reviewerID", "asin", "unixReviewTime")),
        (["visitorid", "itemid", "event", "timestamp"], ("visitorid", "itemid", "timestamp")),
        (["user_id", "user", "item", "item_id", "timestamp", "date"], ("user_id", "item_id", "timestamp")),
    ],
)
def test_common_names(found, expected, caplog):
    request = ColumnRequest()
    columns = request.find(found, "rows.csv")
    assert columns == Columns(*expected)
    request.report(columns, found, "rows.csv")
    for role, name in zip(("user", "item", "timestamp"), expected, strict=True):
        assert (f"{name!r} as {role}" in caplog.text) == (name not in ("user_id", "item_id", "timestamp"))


def test_a_name_that_is_given_is_taken(caplog):
    request = ColumnRequest({"user": "customer", "title": "name"})
    found = ["user_id", "customer", "item", "timestamp", "name"]
    columns = request.find(found, "rows.csv")
    assert columns == Columns("customer", "item", "timestamp", "name")
    request.report(columns, found, "rows.csv")
    assert caplog.messages == ["rows.csv: reading 'item' as item"]


def test_what_tells_interactions_apart_is_named_once(caplog):
    found = ["user_id", "item_id", "timestamp", "Rating", "event_type", "price"]
    request = ColumnRequest()
    request.report(request.find(found, "rows.csv"), found, "rows.csv")
    assert caplog.messages == ["rows.csv: not using 'Rating', 'event_type' to order, weigh or filter the interactions"]


def test_keys_stand_in_for_what_a_file_lacks():
    request = ColumnRequest()
    assert request.find(["user", "ts"], "rows", keys=["item_id", "date"]) == Columns("user", "item_id", "ts")
    with pytest.raises(ValueError, match=r"column 'item_id' is missing, found \['user', 'ts', 'day'\]"):
        request.find(["user", "ts"], "rows", keys=["day"])


@pytest.mark.parametrize(
    ("names", "found", "message"),
    [
        ({}, ["item_id", "timestamp"], "rows.csv: column 'user_id' is missing, found .* name it with user_column$"),
        ({}, ["user_id", "item_id"], "column 'timestamp' is missing, .* timestamp_column or, .*set in_time_order"),
        (
            {},
            ["user", "customer", "item", "time"],
            r"any of the columns \['user', 'customer'\] may be the user column",
        ),
        ({"user": "who"}, ["user_id", "item_id", "timestamp"], "column 'who' is missing"),
        (
            {"item": "user_id"},
            ["user_id", "timestamp"],
            "users and items must be two columns, found 'user_id' for both",
        ),
        ({}, ["user_id", "item_id", "item_id", "timestamp"], "column 'item_id' appears more than once"),
        ({}, [f"c{number}" for number in range(100_000)], r"found \['c0', .*'c19', ... of 100,000\]"),
    ],
)
def test_columns_that_cannot_be_found(names, found, message):
    with pytest.raises(ValueError, match=message):
        ColumnRequest(names).find(found, "rows.csv")


def test_columns_that_are_repeated_but_not_wanted():
    found = ["user_id", "item_id", "timestamp", "x", "x", "", ""]
    assert ColumnRequest().find(found, "rows.csv") == Columns("user_id", "item_id", "timestamp")
