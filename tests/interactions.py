"""Small tables of interactions, and the files that hold them."""

import random

import polars as pl


# Three users, interleaved and not in time order; user 2 has two interactions at time 5.
ROWS = [
    (2, 30, 5),
    (1, 10, 1),
    (2, 10, 5),
    (1, 20, 9),
    (2, 20, 2),
    (1, 30, 4),
    (3, 20, 7),
    (3, 30, 8),
    (3, 10, 6),
    (1, 10, 8),
]


def frame(rows=ROWS, columns=("user_id", "item_id", "timestamp")):
    return pl.DataFrame(rows, schema=list(columns), orient="row")


def write(path, table):
    if path.suffix == ".parquet":
        table.write_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        table.write_ndjson(path)
    else:
        table.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


def split_rows(result, split):
    return result.histories[split].to_list()


def random_rows(seed, make_user=int, make_item=int, make_time=int):
    rng = random.Random(seed)
    return [
        (make_user(rng.randrange(25)), make_item(int(rng.paretovariate(0.7)) % 40), make_time(rng.randrange(60)))
        for _ in range(600)
    ]


MOVIELENS_FILES = {
    "ml-100k": {
        "u.data": "".join(f"{user}\t{item}\t3\t{time}\n" for user, item, time in ROWS),
        "u.item": "10|Café (1995)|01-Jan-1995||http://x|0\n20|A, B: C (1996)||\n30|Three (1997)|\n40|Not seen|\n",
    },
    "ml-1m": {
        "ratings.dat": "".join(f"{user}::{item}::3::{time}\n" for user, item, time in ROWS),
        "movies.dat": "10::Café (1995)::Drama\n20::A, B: C (1996)::Drama|War\n30::Three (1997)::War\n",
    },
    "ml-latest-small": {
        "ratings.csv": "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},3.5,{t}\n" for u, i, t in ROWS),
        "movies.csv": 'movieId,title,genres\n10,Café (1995),Drama\n20,"A, B: C (1996)",War\n30,Three (1997),War\n',
    },
}


def write_movielens(folder, name, encoding="utf-8"):
    folder.mkdir(parents=True)
    for filename, text in MOVIELENS_FILES[name].items():
        (folder / filename).write_bytes(text.encode(encoding))
    return folder
