"""How a student is taken from one domain to another."""

from pydantic import BaseModel, ConfigDict, Field


class DomainSettings(BaseModel):
    """Which images of `data.target` teach the student, and what their teacher is told of them first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    confidence: float = Field(
        0.9, ge=0, le=1, description="least probability of the teacher's first class for an image to be learned from"
    )
    balance: bool = Field(
        True, description="draw each class that the teacher names equally often; false: each image equally often"
    )
    adapt_batch_norm: bool = Field(
        False, description="take the teacher's BatchNorm statistics anew from the target's training images"
    )
