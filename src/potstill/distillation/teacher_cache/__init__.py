"""The teacher cache: teacher outputs on disk by (sample, view); its settings."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

RecordChoice = Literal["auto", "float16", "float32", "top16"]


class TeacherCacheSettings(BaseModel):
    """Whether and how teacher outputs are kept on disk; ``teacher_cache: off`` is short for ``{mode: off}``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["auto", "off"] = Field(
        "auto",
        description="auto: cache the teacher's logits, unless the method needs its feature maps; off: always run the "
        "teacher",
    )
    views: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto", "all"] = Field(
        "auto",
        description="number of augmented views of each image, which the epochs use in turn; auto: epochs / 4, at least "
        "8; all: a new view in each epoch",
    )
    record: RecordChoice = Field(
        "auto",
        description="format of the cached logits: float16, float32, or top16: the 16 largest and the probability of "
        "the rest; auto: float16, or top16 if float16 needs more than 10 GB for one seed and the method allows it",
    )
    folder: str | None = Field(None, description="folder of the teacher caches; null: a folder in potstill's cache")

    @field_validator("mode", mode="before")
    @classmethod
    def _off(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # YAML reads off as false
