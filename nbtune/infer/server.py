"""An OpenAI-compatible endpoint: any client that speaks to that API speaks to the base and its adapters.

    server = serve("base", run)              # http://127.0.0.1:8000/v1
    server.wait()                            # until Ctrl-C
    nbtune serve RUN --port 8000

`GET /v1/models` lists the columns; `POST /v1/chat/completions` answers, whole or streamed, with the column whose name
is the request's `model`. Sources: the API reference of OpenAI's chat completions, as its Python client reads it.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import threading
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from nbtune.errors import NbtuneError
from nbtune.infer.columns import ColumnLike, line_up
from nbtune.infer.completion import ChatRequest, Completion, RefusedError
from nbtune.infer.engine import Engine
from nbtune.infer.scheduler import Scheduler

LARGEST_BODY = 4 * 2**20  # bytes of a request: more text than any context holds


class Server:
    """A served engine. As a context manager it closes itself."""

    def __init__(self, engine: Engine, host: str, port: int, api_key: str | None) -> None:
        engine.hold_all()
        self.engine = engine
        self.api_key = api_key
        self._scheduler = Scheduler(engine)
        self._socket = _bound(host, port)
        address, number = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{address}]' if ':' in address else address}:{number}/v1"
        config = uvicorn.Config(
            application(engine, self._scheduler, api_key, local=_is_local(host)),
            log_level="warning", access_log=False, timeout_graceful_shutdown=2, server_header=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="nbtune-server", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Block until Ctrl-C, which closes it."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.5)
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        """End every answer, stop serving, give the memory back."""
        self._server.should_exit = True
        self._scheduler.close()
        self._thread.join()
        self._socket.close()
        self.engine.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve(
    *columns: ColumnLike,
    runs_dir: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
) -> Server:
    """Serve the base and these columns until `close`. Port 0 takes a free one.

    On 127.0.0.1 no key is asked for unless one is given; elsewhere one is made where none is given, in
    `Server.api_key`. Columns may be of several base models, as long as all fit into memory together: requests come in
    any order, and loading in turn would let each wait for the next. Raises NbtuneError as `arena` does, where they do
    not fit, and where the port is taken.
    """
    if api_key is None and not _is_local(host):
        api_key = secrets.token_urlsafe(24)
    lineup = line_up(columns, runs_dir)
    return Server(Engine.of(lineup), host, port, api_key)


def application(engine: Engine, scheduler: Scheduler, api_key: str | None, *, local: bool) -> FastAPI:
    """The endpoint of an engine."""
    app = FastAPI(title="nbtune", docs_url=None, redoc_url=None, openapi_url=None)
    if local:  # a page of another name that resolves to this machine must not reach it
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    def with_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise RefusedError(401, "The API key is missing or wrong.", "invalid_api_key")

    async def refused(_: Request, error: Exception) -> JSONResponse:
        found = RefusedError.of(error) if isinstance(error, NbtuneError) else error
        assert isinstance(found, RefusedError)
        return JSONResponse(found.body, status_code=found.status)

    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(NbtuneError, refused)
    checked = [Depends(with_key)]

    @app.get("/v1/models", dependencies=checked)
    def models() -> dict[str, Any]:
        known = [{"id": name, "object": "model", "created": 0, "owned_by": "nbtune"} for name in engine.columns]
        return {"object": "list", "data": known}

    @app.post("/v1/chat/completions", dependencies=checked)
    async def complete(body: Annotated[bytes, Depends(_body)]) -> Any:
        asked = _parsed(body, engine)
        completion = Completion(asked, scheduler)
        if asked.stream:
            await run_in_threadpool(completion.begin)  # what is wrong is told by the status
            return StreamingResponse(completion.stream(), media_type="text/event-stream")
        return JSONResponse(await run_in_threadpool(completion.whole))

    return app


async def _body(request: Request) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > LARGEST_BODY:
            raise RefusedError(413, f"The request is larger than {LARGEST_BODY:,} bytes.", "request_too_large")
    return bytes(found)


def _parsed(body: bytes, engine: Engine) -> ChatRequest:
    try:
        asked = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        deepest = max(error.errors(), key=lambda found: len(found["loc"]))  # of a union, the member that was meant
        where = ".".join(str(part) for part in deepest["loc"])
        text = f"{where}: {deepest['msg']}" if where else deepest["msg"]
        raise RefusedError(400, text, "invalid_request") from error
    if asked.model not in engine.columns:
        known = ", ".join(engine.columns)
        raise RefusedError(404, f"There is no model {asked.model!r}; there are: {known}.", "model_not_found")
    return asked


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()  # a client that comes before the server's thread runs waits, and is not refused
    except OSError as error:
        found.close()
        raise NbtuneError(f"Port {port} cannot be used", str(error), "Choose another, or 0 for a free one.") from error
    return found
