"""Teacher outputs cached on disk by (sample, view), so that the teacher runs once for each of them; and the settings
of that cache.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

RecordChoice = Literal["auto", "float16", "float32", "top16"]


class TeacherCacheSettings(BaseModel):
    """Whether and how teacher outputs are cached on disk; ``teacher_cache: off`` in a recipe sets ``mode``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["auto", "off"] = Field(
        "auto",
        description="auto: cache teacher outputs if the method needs no feature maps; off: run the teacher each step",
    )
    views: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto", "all"] = Field(
        "auto",
        description="number of augmented views of an image, used in turn by all methods; auto: one for every four "
        "epochs, at least eight; all: a new view in each epoch",
    )
    record: RecordChoice = Field(
        "auto",
        description="format of the logits: float16, float32, or top16: the 16 largest and the mass of the others; "
        "auto: float16, or top16 if float16 takes more than 10 GB for one seed and the method reads no more",
    )
    folder: str | None = Field(None, description="folder of the caches; null: potstill's cache folder")

    @field_validator("mode", mode="before")
    @classmethod
    def _off(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # YAML reads off as false
