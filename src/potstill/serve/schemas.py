"""The shapes of the API's answers, from which /openapi.json is made."""

from pydantic import BaseModel


class Problem(BaseModel):
    """Any refusal."""

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
    """What one model says of an image."""

    stage: str
    milliseconds: float
    predictions: list[Guess]
    gradcam: Cam | None = None


class Prediction(BaseModel):
    """What all models say of an image; ``agreement``: whether student and teacher name the same class."""

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


class Epoch(BaseModel):
    """A point of the curves."""

    epoch: int
    seconds: float
    train_loss: float | None = None
    train_top1: float | None = None
    val_loss: float | None = None
    val_top1: float | None = None


class Stage(BaseModel):
    """A network of a run."""

    stage: str
    test_top1: float | None = None


class Training(Stage):
    """A stage with its curves; ``eta_seconds``: until the last planned epoch."""

    done: bool
    planned: int | None = None
    epochs: list[Epoch]
    eta_seconds: float | None = None


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


class Progress(Run):
    """Of /runs/{id}."""

    stages: list[Training]  # type: ignore[assignment]
    verdict: str | None = None
