"""Teacher outputs cached on disk by (sample, view), so that the teacher runs once for each of them; and the settings
of that cache.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

RecordChoice = Literal["auto", "float16", "float32", "top16"]


class TeacherCacheSettings(BaseModel):
    """Whether and how the teacher's answers are kept on disk; ``teacher_cache: off`` in a recipe is short for
    the mode.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["auto", "off"] = Field(
        "auto", description="auto: record the teacher's answers where the method needs no feature maps; off: ask anew"
    )
    views: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto", "all"] = Field(
        "auto",
        description="how many augmented versions of an image are drawn in turn, by whatever method; auto: one for four "
        "epochs, eight at least; all: a new one in each epoch",
    )
    record: RecordChoice = Field(
        "auto",
        description="what is kept of the logits: float16, float32, or top16: the 16 largest and the mass of the rest; "
        "auto: float16, or top16 where float16 takes more than 10 GB for one seed and 16 suffice",
    )
    folder: str | None = Field(None, description="where stores stand; null: the cache folder")

    @field_validator("mode", mode="before")
    @classmethod
    def _off(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # YAML reads off as false
