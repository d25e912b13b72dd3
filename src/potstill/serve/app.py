"""The page and the API."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from potstill import __version__
from potstill.report.theme import css_variables
from potstill.serve import runs, schemas
from potstill.serve.oracle import Oracle, Unavailable

_TYPES = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
# The report is a page of its own without scripts; sandboxed, it is of no origin and can do nothing here.
_REPORT_CSP = "sandbox allow-popups; default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
_STATUSES: tuple[int, ...] = (400, 403, 405, 408, 413, 415, 421, 422, 429, 503)
_WRONG: dict[int | str, dict[str, Any]] = {status: {"model": schemas.Problem} for status in _STATUSES}
_ABSENT: dict[int | str, dict[str, Any]] = {**_WRONG, 404: {"model": schemas.Problem}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    "parameters": [
        {"name": "X-Potstill", "in": "header", "required": True, "schema": {"type": "string", "enum": ["1"]}}
    ],
}


def application(oracle: Oracle, name: str, known: Callable[[], dict[str, Path]]) -> FastAPI:
    """The application, without its guard.

    Args:
        oracle: is asked about images.
        name: of the run whose models it has.
        known: the runs that can be looked at, by id.
    """
    app = FastAPI(title="potstill", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    _errors(app)
    _page(app)
    _models(app, oracle, name)
    _runs(app, known)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        said = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
        return JSONResponse({"error": said}, 422)


def _page(app: FastAPI) -> None:
    folder = files("potstill.serve") / "static"
    light, dark = css_variables()
    html = (folder / "page.html").read_bytes()
    served = {name: (folder / name).read_text("utf-8") for name in _TYPES}
    served["page.css"] = served["page.css"].replace("/* light */", light).replace("/* dark */", dark)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html")

    @app.get("/page.css", include_in_schema=False)
    async def style() -> Response:
        return Response(served["page.css"], media_type=_TYPES["page.css"])

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(served["page.js"], media_type=_TYPES["page.js"])


def _models(app: FastAPI, oracle: Oracle, name: str) -> None:
    @app.get("/healthz", responses=_WRONG)
    async def healthz() -> schemas.Health:
        """Whether the server answers; it does so while images are looked at."""
        return schemas.Health(status="ok")

    @app.get("/models", responses=_WRONG)
    async def models() -> schemas.Models:
        """The networks that are asked."""
        known = [schemas.Model(stage=stage, **about) for stage, about in oracle.models.items()]
        return schemas.Models(run=name, models=known)

    @app.post("/predict", responses=_WRONG, openapi_extra=_BODY, response_model_exclude_none=True)
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="classes for each model")] = 5,
        gradcam: Annotated[bool, Query(description="where each network looks")] = False,
    ) -> schemas.Prediction:
        """What the models say of an image, which is the raw body; nothing of it is kept."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not (kind.startswith("image/") or kind == "application/octet-stream"):
            raise HTTPException(415, "the body is the image itself: Content-Type image/... or application/octet-stream")
        image = await request.body()
        if not image:
            raise HTTPException(400, "the body is empty; it should be an image")
        try:
            answer = await run_in_threadpool(oracle.ask, image, top=top, gradcam=gradcam)
        except Unavailable as error:
            raise HTTPException(503, str(error), {"Retry-After": "2"}) from None
        if "error" in answer:
            raise HTTPException(answer["status"], answer["error"])
        return schemas.Prediction.model_validate(answer)


def _runs(app: FastAPI, known: Callable[[], dict[str, Path]]) -> None:
    def folder(run: str) -> Path:
        found = known().get(run)
        if found is None:
            raise HTTPException(404, "no such run; /runs lists them")
        return found

    @app.get("/runs", responses=_WRONG)
    def listing() -> schemas.Runs:
        """All runs."""
        return schemas.Runs.model_validate({"runs": [runs.summary(run, path) for run, path in known().items()]})

    @app.get("/runs/{run}", responses=_ABSENT)
    def one(run: str) -> schemas.Progress:
        """One run with its curves; of a running training, up to the last epoch."""
        return schemas.Progress.model_validate(runs.progress(run, folder(run)))

    @app.get("/runs/{run}/report", responses={**_ABSENT, 200: {"content": {"text/html": {}}}}, response_class=Response)
    def report(run: str) -> Response:
        """The run's report."""
        content = runs.report(folder(run))
        if content is None:
            raise HTTPException(404, "this run has no report yet")
        return Response(content, media_type="text/html", headers={"Content-Security-Policy": _REPORT_CSP})
