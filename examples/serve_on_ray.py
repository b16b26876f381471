#!/usr/bin/env python
"""
The service of `serve.py` in several processes, on one machine or on many, behind one address: Ray Serve starts them,
spreads the requests over them and replaces those that end. They share the states of users in Redis.

    python examples/serve_on_ray.py --model_name_or_path outputs/shop --store redis://localhost:6379/0 --num_replicas 4

Requests, answers, the token and the address to listen on are those of `serve.py`; `/metrics` are those of the process
that answers. Where too many requests wait, Ray Serve answers 503 itself, in its own words.

The token and the URL of Redis are part of what Ray runs: whoever reaches the cluster can read them, as they can run
code there.

It needs `pip install -e ".[ray,serve]"` in a clone, and starts Ray on this machine, or joins the cluster of
`RAY_ADDRESS`, where all machines must have the clone and a model's folder at the same path, and must reach Redis. It
serves until it is stopped.
"""

import argparse
from pathlib import Path

import ray.serve
from fastapi import FastAPI
from transformers import pipeline

from elastic_hf.serving.recommender import Recommender
from elastic_hf.serving.stores import is_redis, open_store
from serve import MAX_WAITING, create_app, read_token


def deploy(args: argparse.Namespace, blocking: bool = True) -> None:
    """Start the processes, and return when they answer or, if `blocking`, when they are stopped.

    Raises:
        ValueError: if the store is not one that processes of several machines may share.
        StoreUnavailable: if it cannot be reached.
    """
    if not is_redis(args.store):
        raise ValueError(f"store must be a URL of Redis, which all replicas share, found {args.store!r}")
    open_store(args.store).close()
    model = args.model_name_or_path
    if Path(model).exists():  # replicas may have another working directory
        model = str(Path(model).absolute())
    token = read_token()

    def build() -> FastAPI:
        recommend = pipeline("sequential-recommendation", model=model, revision=args.revision)
        return create_app(Recommender(recommend, open_store(args.store)), token)

    ray.serve.start(http_options={"host": args.host, "port": args.port})
    service = ray.serve.deployment(
        ray.serve.ingress(build)(),
        num_replicas=args.num_replicas,
        max_ongoing_requests=MAX_WAITING,  # of a replica: what arrives while the model works is answered together
        max_queued_requests=MAX_WAITING,  # of all: Ray Serve's own default has no bound
    )
    ray.serve.run(service.bind(), name="elastic_hf", blocking=blocking)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an ELASTIC model.")
    parser.add_argument("--revision", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--store", required=True, help="redis:// URL of the users' states.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on.")
    parser.add_argument(
        "--num_replicas", type=int, default=2, help="Processes, each with a model and a processor core of its own."
    )
    deploy(parser.parse_args())


if __name__ == "__main__":
    main()
