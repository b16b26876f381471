"""`examples/score_users.py` without Ray."""

import pyarrow as pa
import pyarrow.compute as pc

import score_users
from user_histories import read_piece


def score_here(source, settings, num_workers):
    """What Ray does, in this process and the order of the input: read, group by partition, score."""
    pieces = [pa.Table.from_pylist([piece]) for piece in source.pieces()]
    done = score_users.done_partitions(settings)
    rows = pa.concat_tables(
        rows for piece in pieces for rows in read_piece(piece, source, settings["num_partitions"], done)
    )
    scorer = score_users.Scorer(settings)
    for partition in rows["partition"].unique().to_pylist():
        scorer(rows.filter(pc.equal(rows["partition"], partition)))
