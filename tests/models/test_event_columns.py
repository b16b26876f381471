"""Event columns: what is learned of them, what becomes of their values, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest

from elastic_hf.models import event_columns
from elastic_hf.models.event_columns import encode_event_column, encode_event_lists, learn_event_column


CATEGORIES = [
    pa.array(["view", "buy", None, "add to cart", "buy"]),
    pa.array(["view", "buy", None, "add to cart", "buy"], pa.large_string()),
    pa.array(["view", "buy", None, "add to cart", "buy"]).dictionary_encode(),
    pa.array([5, 1, None, -3, 1]),
    pa.array([5, 1, None, 3, 1], pa.uint8()),
    pa.array([True, False, None, False]),
    pa.chunked_array([["b", "a"], ["a"], [None, "c"]]),
]


@pytest.mark.parametrize("values", CATEGORIES, ids=lambda values: str(values.type))
def test_categories_are_counted_from_1_in_order(values):
    known = learn_event_column("x", values)
    distinct = sorted({value for value in values.to_pylist() if value is not None})
    assert known == {"categories": distinct}
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    expected = [0 if value is None else 1 + distinct.index(value) for value in array.to_pylist()]
    encoded = encode_event_column("x", array, known)
    assert encoded.to_pylist() == expected and encoded.type == pa.float32()


@pytest.mark.parametrize("type_", [pa.float64(), pa.float32(), pa.decimal128(9, 2), pa.int64()], ids=str)
def test_numbers_are_standardised_by_what_was_learned(type_):
    values = [1.0, 4.0, None, 7.0, 8.0, *range(200)]
    array = pa.array(values, pa.float64()).cast(type_)
    known = learn_event_column("x", array)
    numbers = np.array([value for value in values if value is not None])
    assert known == pytest.approx({"mean": numbers.mean(), "deviation": numbers.std()})
    found = encode_event_column("x", pa.array([None, 1000, -3]), known)
    expected = [0, (1000 - numbers.mean()) / numbers.std(), (-3 - numbers.mean()) / numbers.std()]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_few_distinct_integers_are_categories_and_more_are_numbers(monkeypatch):
    monkeypatch.setattr(event_columns, "MAX_INTEGERS", 3)
    assert learn_event_column("x", pa.array([4, 4, 6, 5])) == {"categories": [4, 5, 6]}
    assert learn_event_column("x", pa.array([4, 4, 6, 5, 7])).keys() == {"mean", "deviation"}
    assert learn_event_column("x", pa.array([2.5, 2.5, None])) == {"mean": 2.5, "deviation": 1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, None], "event column 'x' must have a value in the training events, found none"),
        ([], "event column 'x' must have a value in the training events, found none"),
        ([1.0, float("nan")], "event column 'x' must hold finite numbers, found nan"),
        ([1.0, -float("inf")], "event column 'x' must hold finite numbers, found -inf"),
        ([1e308, -1e308], "event column 'x' must hold numbers with a finite deviation, found inf"),
        ([[1], [2]], "must hold strings, booleans, integers or numbers, found type list<"),
        ([b"a"], "must hold strings, booleans, integers or numbers, found type binary"),
        ([str(i) for i in range(10_001)], "event column 'x' must have at most 10,000 categories, found 10,001"),
    ],
)
def test_what_cannot_be_learned_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        learn_event_column("x", pa.array(values))


INTEGERS, STRINGS = {"categories": [1, 5]}, {"categories": ["5", "x"]}
BOOLEANS, NUMBERS = {"categories": [False, True]}, {"mean": 1.5, "deviation": 2.0}


@pytest.mark.parametrize(
    ("known", "values", "expected"),
    [
        (INTEGERS, [5, 7, None], [2, 0, 0]),
        (INTEGERS, [5.0, None, 1.0], [2, 0, 1]),
        (INTEGERS, ["5", "9"], [2, 0]),
        (STRINGS, ["x", "X", None], [2, 0, 0]),
        (STRINGS, [5, 6], [1, 0]),
        (BOOLEANS, [True, None, False], [2, 0, 1]),
        (BOOLEANS, ["true", "False"], [2, 1]),
        (NUMBERS, [1, 2], [-0.25, 0.25]),
        (NUMBERS, ["2.5", None], [0.5, 0]),
        *((known, [None], [0]) for known in (INTEGERS, STRINGS, BOOLEANS, NUMBERS)),
    ],
)
def test_values_may_be_written_in_another_way(known, values, expected):
    assert encode_event_column("x", pa.array(values), known).to_pylist() == expected


@pytest.mark.parametrize(
    ("known", "values", "message"),
    [
        (INTEGERS, [1, 1.5], "event column 'x' must hold integers, found other values: Float value 1.5"),
        (INTEGERS, [float("nan")], "event column 'x' must hold integers, found other values: Float value nan"),
        (INTEGERS, ["five"], "event column 'x' must hold integers, found other values: .*'five'"),
        (INTEGERS, [True], "event column 'x' must hold integers, found type bool"),
        (STRINGS, [5.0], "event column 'x' must hold strings, found type double"),
        (STRINGS, [True], "event column 'x' must hold strings, found type bool"),
        (BOOLEANS, [1], "event column 'x' must hold booleans, found type int64"),
        (NUMBERS, [False], "event column 'x' must hold numbers, found type bool"),
        (NUMBERS, ["a"], "event column 'x' must hold numbers, found other values: .*'a'"),
        (NUMBERS, [float("nan")], "event column 'x' must hold finite numbers, found nan"),
        (NUMBERS, [float("inf")], "event column 'x' must hold finite numbers, found inf"),
        (NUMBERS, [[1.0]], "event column 'x' must hold numbers, found type list<"),
    ],
)
def test_values_of_another_kind_are_refused(known, values, message):
    with pytest.raises(ValueError, match=message):
        encode_event_column("x", pa.array(values), known)


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list])
def test_lists_stay_as_long_as_they_came(list_type):
    lists = pa.array([[9], [5, 1], [], [None, 5, 2]], list_type(pa.int64()))
    found = encode_event_lists("x", lists[1:], INTEGERS, pa.array([2, 0, 3]))
    assert found.to_pylist() == [[2, 1], [], [0, 2, 0]] and found.type == pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[1, 2], [3]], "event column 'x' must have as many values as items, 2 in row 701, found 1"),
        ([[1, 2], None], "event column 'x' must have as many values as items, 2 in row 701, found none"),
        ([[1.0, 2.0], [3.0, 2.5]], "event column 'x' must hold integers, .* Float value 2.5.* in row 701"),
        ([1, 2], "event column 'x' must hold lists, found type int64"),
    ],
)
def test_bad_lists_are_named_with_their_row(lists, message):
    with pytest.raises(ValueError, match=message):
        encode_event_lists("x", pa.array(lists), INTEGERS, pa.array([2, 2]), first_row=700)
