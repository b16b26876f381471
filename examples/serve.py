#!/usr/bin/env python
"""
A recommendation service over HTTP: events come in, recommendations go out, and each user's state is a value in SQLite
or Redis, however long the history.

    python examples/serve.py --model_name_or_path outputs/shop --store users.sqlite
    curl -X POST localhost:8000/events -H 'Content-Type: application/json' \\
        -d '{"events": [{"user": "ada", "item": "sku 17", "event_id": "order 1"}]}'
    curl localhost:8000/recommendations/ada?top_k=3

    POST /events                    appends events: user, item, event_id and, for a model that reads them, timestamp
                                    and the features of events, null where one is not known
    GET  /recommendations/{user}    recommends to a user whose events it has; top_k, now
    POST /recommendations           recommends from histories in the request, as an Inference Endpoint does
    GET  /healthz                   200 if the store can be read
    GET  /metrics                   for Prometheus

What was acknowledged is stored; an event that is sent again, with the same `event_id`, counts once. Requests that
arrive while the model works are read together. Several processes may share a store. States are of one model: another
one, or the same one trained on, refuses them by name; read the histories into a new store then.

It listens on this machine alone unless told otherwise. Where the environment variable ELASTIC_HF_TOKEN is set, every
request but /healthz must bring it: `Authorization: Bearer ...`.
"""

import argparse
import asyncio
import hmac
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import chain, islice
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, create_model
from starlette.exceptions import HTTPException
from transformers import pipeline

import elastic_hf  # noqa: F401
from elastic_hf.models.request import MAX_TOP_K
from elastic_hf.serving.batcher import Batcher, Overloaded
from elastic_hf.serving.recommender import Event, Recommender, Request, StateError, UnknownUser
from elastic_hf.serving.stores import StoreUnavailable, open_store


MAX_BODY_BYTES = 2**20
MAX_EVENTS = 1_000  # in one request
MAX_BATCH_SIZE = 64  # requests
MAX_WAITING = 1_024  # requests
TOKEN = "ELASTIC_HF_TOKEN"
STATUS = {UnknownUser: 404, StateError: 409, ValueError: 422, Overloaded: 503, StoreUnavailable: 503}


def as_name(value: Any) -> Any:
    """Return an integer as the string that stands for it in a URL."""
    return str(value) if type(value) is int else value


Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256), BeforeValidator(as_name)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class EventBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    user: Name
    item: Name
    event_id: Name
    timestamp: Seconds | None = None


def make_events_body(feature_names: list[str]) -> type[BaseModel]:
    """Return the body of events of which each has these features, too.

    Raises:
        ValueError: if a feature has the name of another field.
    """
    taken = [name for name in feature_names if name in EventBody.model_fields]
    if taken:
        raise ValueError(f"event_features must not be called {', '.join(EventBody.model_fields)}, found {taken[0]!r}")
    # Names of columns need not be names of Python. What their values may be is the tokenizer's to say.
    fields: dict[str, Any] = {f"feature_{i}": (Any, Field(alias=name)) for i, name in enumerate(feature_names)}
    event_body = create_model("EventBody", __base__=EventBody, **fields)
    events = (list[event_body], Field(min_length=1, max_length=MAX_EVENTS))
    return create_model("EventsBody", __config__=ConfigDict(extra="forbid"), events=events)


def to_event(body: EventBody) -> Event:
    """Return what a body says."""
    given = body.model_dump(by_alias=True)
    fields = {name: given.pop(name) for name in EventBody.model_fields}
    return Event(**fields, features=given)


class Metrics:
    """What Prometheus is told, of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._make(Counter, "requests", "Requests by route and status.", ["route", "status"])
        self.seconds = self._make(Histogram, "request_seconds", "Seconds to the end of an answer.", ["route"])
        self.events = self._make(Counter, "events", "Events by what became of them.", ["outcome"])
        sizes = {"buckets": [2**power for power in range(MAX_BATCH_SIZE.bit_length())]}
        self.batch_size = self._make(Histogram, "batch_size", "Requests answered together.", ["kind"], **sizes)

    def _make(self, kind, name: str, text: str, labels: list[str], **options):
        return kind(f"elastic_hf_{name}", text, labels, registry=self.registry, **options)


class Door:
    """
    Lets requests in that bring the token and are not too large, and counts and times all of them.

    The token is compared in constant time and stands in no message.
    """

    def __init__(self, app, token: str | None, metrics: Metrics) -> None:
        self.app = app
        self.token = token
        self.metrics = metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, num_bytes = time.perf_counter(), 500, 0

        async def send_noted(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def receive_bounded():
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise too_large(f"at least {num_bytes:,}")
            return message

        try:
            refusal = self.refuse(scope)
            answer = self.app if refusal is None else refuse(None, refusal)
            await answer(scope, receive_bounded, send_noted)
        finally:
            # Other paths are not named: there may be any number of them.
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def refuse(self, scope) -> HTTPException | None:
        """Return why a request is refused before it is read, if it is."""
        headers = dict(scope["headers"])
        if self.token is not None and scope["path"] != "/healthz":
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token.encode()):
                wanted = {"WWW-Authenticate": "Bearer"}
                return HTTPException(401, "a request must bring the token, Authorization: Bearer ...", wanted)
        num_bytes = int(headers.get(b"content-length", 0))
        return too_large(f"{num_bytes:,}") if num_bytes > MAX_BODY_BYTES else None


def too_large(found: str) -> HTTPException:
    return HTTPException(413, f"a body must have at most {MAX_BODY_BYTES:,} bytes, found {found}")


def refuse(_: Any, error: Exception) -> JSONResponse:
    """Return the answer to a request that ended in an error which is not this program's."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, RequestValidationError):
        found = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        return JSONResponse({"error": "; ".join(found[:3])}, 422)
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    return JSONResponse({"error": str(error)}, status, {"Retry-After": "1"} if status == 503 else None)


def create_app(recommender: Recommender, token: str | None = None) -> FastAPI:
    """Return the application, which one server at a time may run.

    Args:
        recommender ([`Recommender`]).
        token (`str`, *optional*): what requests must bring.

    Raises:
        ValueError: as [`make_events_body`].
    """
    metrics = Metrics()
    EventsBody = make_events_body(recommender.feature_names)
    executor = ThreadPoolExecutor(1, "model")  # the model works on one batch at a time, with all its threads

    def append(requests: list[list[Event]]) -> list[list[str | ValueError]]:
        outcomes = iter(recommender.append([*chain.from_iterable(requests)]))
        return [[*islice(outcomes, len(request))] for request in requests]

    def answer(requests: list[dict]) -> list[Any]:
        return [recommender.pipeline.answer(request) for request in requests]

    def batcher(kind: str, function, max_batch_size: int = MAX_BATCH_SIZE) -> Batcher:
        def counted(requests: list) -> list:
            metrics.batch_size.labels(kind).observe(len(requests))
            return function(requests)

        return Batcher(counted, executor, max_batch_size, MAX_WAITING)

    appends = batcher("events", append)
    users = batcher("users", recommender.recommend)
    histories = batcher("histories", answer, max_batch_size=1)  # each is a batch of its own

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(batcher.run()) for batcher in (appends, users, histories)]
        yield
        for task in tasks:
            task.cancel()
        executor.shutdown()
        recommender.store.close()

    app = FastAPI(title="elastic_hf", version=elastic_hf.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Door, token=token, metrics=metrics)
    for kind in (HTTPException, RequestValidationError, *STATUS):
        app.add_exception_handler(kind, refuse)

    @app.post("/events")
    async def post_events(body: EventsBody) -> JSONResponse:
        events = [to_event(event) for event in body.events]
        outcomes = await appends(events)
        rows, status = [], 200
        for event, outcome in zip(events, outcomes, strict=True):
            row = {"user": event.user, "event_id": event.event_id}
            if isinstance(outcome, ValueError):
                row |= {"outcome": "refused", "error": str(outcome)}
                status = 409 if isinstance(outcome, StateError) else 422
            else:
                row["outcome"] = outcome
            metrics.events.labels(row["outcome"]).inc()
            rows.append(row)
        return JSONResponse({"events": rows}, status)

    @app.get("/recommendations/{user:path}")
    async def get_recommendations(
        user: str,
        top_k: Annotated[int, Query(ge=1, le=MAX_TOP_K)] = 10,
        now: Annotated[Seconds | None, Query()] = None,
    ) -> JSONResponse:
        return JSONResponse(await users(Request(user, top_k, now)))

    @app.post("/recommendations")
    async def post_recommendations(request: HTTPRequest) -> JSONResponse:
        try:
            body = await request.json()
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"a body must be JSON: {error}") from error
        return JSONResponse(await histories(body))

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        await asyncio.get_running_loop().run_in_executor(executor, recommender.store.read, [""])
        return JSONResponse({"status": "ok", "version": elastic_hf.__version__})

    @app.get("/metrics")
    async def get_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def read_token() -> str | None:
    """Return the token that the environment names, if it does.

    Raises:
        ValueError: if it is empty or holds what no header can.
    """
    token = os.environ.get(TOKEN)
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError(f"{TOKEN} must be printable ASCII characters without spaces, found others or none")
    return token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an ELASTIC model.")
    parser.add_argument("--revision", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--store", default="users.sqlite", help="SQLite file or redis:// URL of the users' states.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on; 0 is any that is free.")
    args = parser.parse_args()
    token = read_token()
    recommend = pipeline("sequential-recommendation", model=args.model_name_or_path, revision=args.revision)
    app = create_app(Recommender(recommend, open_store(args.store)), token)
    # Paths of requests name users: they are not logged.
    uvicorn.run(app, host=args.host, port=args.port, access_log=False)


if __name__ == "__main__":
    main()
