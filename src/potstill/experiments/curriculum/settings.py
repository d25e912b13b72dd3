"""In which order a distilled student meets its images."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from potstill.data.settings import Pacing


class CurriculumSettings(BaseModel):
    """Easy images first, by its teacher's word; `null`: all images in every epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: Literal["easy", "hard", "random"] = Field(
        "easy", description="who comes first; hard (anti-curriculum) and random are there to compare with"
    )
    score: Literal["loss", "confidence"] = Field(
        "loss",
        description="of the teacher: loss: on the true class; confidence: in whatever it names",
    )
    pacing: Pacing = Field("linear", description="how the share of admitted images grows from start to 1")
    start: float = Field(0.3, gt=0, le=1, description="share of each class that the first epoch draws from")
    until: float = Field(0.5, gt=0, le=1, description="share of the epochs after which all images are admitted")
