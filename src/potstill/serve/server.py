"""The page, the API, and the server that runs both."""

import ipaddress
import os
import socket
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from potstill import __version__
from potstill.errors import UsageError
from potstill.experiment.run_folder import find_model
from potstill.export.loading import find_model_folder
from potstill.hub import is_hub_model
from potstill.io import read_checksummed_json
from potstill.report.canvas import css_variables
from potstill.serve import runs
from potstill.serve.middleware import RequestGuardMiddleware, ServerLimits, limited_protocol
from potstill.serve.model_worker import WorkerClient, WorkerUnavailable
from potstill.serve.runs import list_runs

# The shapes of the API's answers, from which /openapi.json is made.


class Problem(BaseModel):
    """The body of any error response."""

    error: str


class Health(BaseModel):
    """Of /healthz."""

    status: str


class Guess(BaseModel):
    """A class and its probability, 0 to 1."""

    class_: str
    probability: float

    model_config = {"populate_by_name": True, "alias_generator": lambda name: name.rstrip("_")}


class Cam(BaseModel):
    """Where a network looks: ``rows`` of values 0 to 1 over ``region``, the shares left, top, width, height."""

    rows: list[list[float]] | None = None
    region: list[float] | None = None
    error: str | None = None


class Answer(BaseModel):
    """Predictions of one model for an image."""

    stage: str
    milliseconds: float
    predictions: list[Guess]
    gradcam: Cam | None = None


class Prediction(BaseModel):
    """Predictions of all models for an image; ``agreement``: whether student and teacher predict the same class."""

    width: int
    height: int
    preview: str
    models: list[Answer]
    agreement: bool | None = None


class Model(BaseModel):
    """A network of the run; ``size``: height and width of its images in pixels."""

    stage: str
    architecture: str
    classes: list[str]
    parameters: int
    size: int


class Models(BaseModel):
    """Of /models."""

    run: str
    models: list[Model]


class Stage(BaseModel):
    """A network of a run."""

    stage: str
    test_top1: float | None = None


class Run(BaseModel):
    """A run; ``state``: finished, training, stopped, or damaged (results.json)."""

    id: str
    state: str
    created: str | None = None
    method: str | None = None
    report: bool
    stages: list[Stage]


class Runs(BaseModel):
    """Of /runs, the newest first."""

    runs: list[Run]


_CONTENT_TYPES = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
# The report is a page of its own without scripts; sandboxed, it is of no origin and can do nothing here.
_REPORT_CSP = "sandbox allow-popups; default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
_STATUSES: tuple[int, ...] = (400, 403, 405, 408, 413, 415, 421, 422, 429, 503)
_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in _STATUSES}
_NOT_FOUND_RESPONSES: dict[int | str, dict[str, Any]] = {**_ERROR_RESPONSES, 404: {"model": Problem}}
_IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    "parameters": [
        {"name": "X-Potstill", "in": "header", "required": True, "schema": {"type": "string", "enum": ["1"]}}
    ],
}


def create_app(worker: WorkerClient, name: str, known: Callable[[], dict[str, Path]]) -> FastAPI:
    """Return the application, without the middleware."""
    app = FastAPI(title="potstill", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    _add_error_handlers(app)
    _add_page(app)
    _add_model_routes(app, worker, name)
    _add_run_routes(app, known)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
        return JSONResponse({"error": message}, 422)


def _add_page(app: FastAPI) -> None:
    folder = files("potstill.serve") / "static"
    light, dark = css_variables()
    html = (folder / "page.html").read_bytes()
    served = {name: (folder / name).read_text("utf-8") for name in _CONTENT_TYPES}
    served["page.css"] = served["page.css"].replace("/* light */", light).replace("/* dark */", dark)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html")

    @app.get("/page.css", include_in_schema=False)
    async def style() -> Response:
        return Response(served["page.css"], media_type=_CONTENT_TYPES["page.css"])

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(served["page.js"], media_type=_CONTENT_TYPES["page.js"])


def _add_model_routes(app: FastAPI, worker: WorkerClient, name: str) -> None:
    @app.get("/healthz", responses=_ERROR_RESPONSES)
    async def healthz() -> Health:
        """Whether the server is up, also while images are processed."""
        return Health(status="ok")

    @app.get("/models", responses=_ERROR_RESPONSES)
    async def models() -> Models:
        """The networks that predict."""
        return Models(run=name, models=[Model(stage=stage, **about) for stage, about in worker.models.items()])

    @app.post("/predict", responses=_ERROR_RESPONSES, openapi_extra=_IMAGE_BODY, response_model_exclude_none=True)
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="classes for each model")] = 5,
        gradcam: Annotated[bool, Query(description="a Grad-CAM heat map of each network")] = False,
    ) -> Prediction:
        """Predictions of the models for an image, which is the raw body and is not stored."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not (kind.startswith("image/") or kind == "application/octet-stream"):
            raise HTTPException(415, "the body is the image itself: Content-Type image/... or application/octet-stream")
        image = await request.body()
        if not image:
            raise HTTPException(400, "the body is empty; it should be an image")
        try:
            answer = await run_in_threadpool(worker.predict, image, top=top, gradcam=gradcam)
        except WorkerUnavailable as error:
            raise HTTPException(503, str(error), {"Retry-After": "2"}) from None
        if "error" in answer:
            raise HTTPException(answer["status"], answer["error"])
        return Prediction.model_validate(answer)


def _add_run_routes(app: FastAPI, known: Callable[[], dict[str, Path]]) -> None:
    def folder(run: str) -> Path:
        found = known().get(run)
        if found is None:
            raise HTTPException(404, "no such run; /runs lists them")
        return found

    @app.get("/runs", responses=_ERROR_RESPONSES)
    def listing() -> Runs:
        """All runs."""
        return Runs.model_validate({"runs": [runs.summary(run, path) for run, path in known().items()]})

    @app.get(
        "/runs/{run}/report",
        responses={**_NOT_FOUND_RESPONSES, 200: {"content": {"text/html": {}}}},
        response_class=Response,
    )
    def report(run: str) -> Response:
        """The run's report."""
        content = runs.report(run, folder(run))
        if content is None:
            raise HTTPException(404, "this run has no report yet")
        return Response(content, media_type="text/html", headers={"Content-Security-Policy": _REPORT_CSP})


_STAGES = ("distilled", "teacher", "baseline")
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")


def serve(
    run: Path,
    *,
    host: str,
    port: int,
    output_dir: Path,
    on_start: Callable[[str], None],
    limits: ServerLimits | None = None,
) -> None:
    """Serve the page until SIGINT or SIGTERM; ``port`` 0: any free one; ``on_start`` gets its address."""
    limits = limits or ServerLimits()
    folders = _model_folders(run)
    listening = _open_socket(host, port)
    with listening:
        port = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        worker = WorkerClient(folders, limits)
        try:
            worker.start()
            title = os.fspath(run) if is_hub_model(os.fspath(run)) else run.resolve().name
            app = create_app(worker, title, lambda: list_runs(output_dir, run))
            guard = RequestGuardMiddleware(app, _allowed_hosts(shown, port), limits)
            config = uvicorn.Config(
                guard,
                http=limited_protocol(limits),
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=16_384,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=3,
            )
            on_start(f"http://{shown}:{port}/")
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            worker.close()


def _allowed_hosts(shown: str, port: int) -> set[str]:
    names = {shown.lower(), *_LOCAL_HOSTS}
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())


def _model_folders(run: Path) -> dict[str, Path]:
    """Return the folders of student, teacher and baseline of a run; else that of the single model."""
    cards = {stage: run / stage / "model.json" for stage in _STAGES}
    if is_hub_model(os.fspath(run)):
        find_model_folder(run)  # so that its errors come before the page
        return {"model": run}
    found = {stage: run / stage for stage, card in cards.items() if card.is_file() and _predicts(card)}
    if found:
        return found
    folder = find_model(run)
    return {folder.name if folder.name in _STAGES else "model": folder}


def _predicts(card: Path) -> bool:
    """Return whether a model answers any image; a table of answers and a teacher of embeddings alone do not."""
    model = read_checksummed_json(card)
    head = model.get("facts", {}).get("head") or {}
    return model.get("architecture") != "table" and bool(head.get("kind") != "none")


def _open_socket(host: str, port: int) -> socket.socket:
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = not host
    if everywhere:
        raise UsageError(
            f"--host {host or '(nothing)'} stands for every address, and the server answers to known ones only; "
            "give the address that people will type, such as 127.0.0.1"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: {getattr(error, 'strerror', None) or 'no address'}") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)  # before the address is printed, so that no early connection is refused
    except OSError as error:
        listening.close()
        raise UsageError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; --port gives another"
        ) from error
    return listening
