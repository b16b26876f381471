import datasets
import polars as pl

from interactions import frame, write


def test_ids_stay_what_they_are(tmp_path, load):
    leading_zeros = [("a b", item, time) for time, item in enumerate(["007", "7", "12"])]
    items = load(write(tmp_path / "zeros.csv", frame(leading_zeros))).items
    assert items["item_id"][:] == ["007", "12", "7"]

    # the first of many rows do not decide the type
    late = [(1, str(item), item) for item in range(5_000)] + [(1, "NA", 5_000)]
    assert "NA" in load(write(tmp_path / "late.csv", frame(late))).items["item_id"][:]

    digits = [("1", "5", 0), ("1", "6", 1), ("1", "7", 2)]
    assert load(write(tmp_path / "digits.parquet", frame(digits))).items["item_id"][:] == ["5", "6", "7"]
    assert load(write(tmp_path / "digits.csv", frame(digits))).items["item_id"][:] == [5, 6, 7]

    categories = frame(digits).with_columns(pl.col("item_id").cast(pl.Categorical), pl.col("user_id").cast(pl.UInt16))
    result = load(write(tmp_path / "categories.parquet", categories))
    assert result.items["item_id"][:] == ["5", "6", "7"]
    assert result.histories["train"].features["user_id"] == datasets.Value("int64")
