"""Every setting of the training loop."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Not the training loss: its term weights may change with the epochs, or differ between the trials of a sweep.
SelectionMetric = Literal["top1", "top3", "f1_macro", "auc_macro", "nll"]


class TrainingSettings(BaseModel):
    """How one stage is trained; the defaults are those of the original specification."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(30, ge=1, le=100_000, description="passes over the training split")
    batch_size: int = Field(32, ge=1, le=65_536, description="images per step")
    optimizer: str = Field("adamw", description="sgd, adamw, dot, or the name of any class in torch.optim")
    lr: float = Field(1e-4, gt=0, description="learning rate after warm-up")
    weight_decay: float = Field(1e-4, ge=0, description="of weights; biases and normalisation layers have none")
    decay_all: bool = Field(False, description="weight decay for biases and normalisation layers too")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and dot")
    nesterov: bool = Field(False, description="of sgd")
    dot_delta: float = Field(
        0.075, ge=0, lt=1, description="of dot: more momentum for the teacher's gradients, less for the labels'"
    )
    optimizer_options: dict[str, Any] = Field({}, description="further keywords of the optimizer's class")
    schedule: Literal["constant", "cosine", "step"] = Field("constant", description="of the learning rate")
    milestones: list[int] = Field([], description="epochs after which schedule step multiplies lr by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="share of lr at which the cosine ends")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear rise from 0 to lr")
    freeze: int = Field(
        0,
        ge=0,
        description="first epochs in which all but the head stays as the weights have it, BatchNorm statistics too",
    )
    freeze_batch_norm: bool | Literal["auto"] = Field(
        "auto",
        description="keep BatchNorm's running statistics as the weights have them, and normalise by them; auto: for "
        "head finetune",
    )
    layer_decay: float | None = Field(
        None, gt=0, lt=1, description="learning rate of each block as a share of the next one's, from the head down"
    )
    max_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches whose gradients are averaged into one step")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over all classes")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of averaged weights, which are then evaluated; min(decay, (1 + n) / (10 + n)) after n steps",
    )
    qat_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a student's epochs, the last ones, under int8's rounding (quantization-aware training)",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="epochs without a better val metric before stopping"
    )
    selection_metric: SelectionMetric = Field(
        "top1", description="val metric that picks the best epoch; nll: cross-entropy of the labels alone"
    )
    evaluate_test_every_epoch: bool = Field(False, description="test curves; never used to choose")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="auto: bf16 where the hardware has it and a step of the network is not slower in it"
    )
    channels_last: bool | Literal["auto"] = Field(
        "auto", description="memory layout of images and weights; auto: everywhere but on mps"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int | Literal["auto"] = Field(
        "auto", description="of the CPU; auto: all cores or one, whichever is faster at the start of the run"
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="the student's forward pass; auto: on cuda alone, where enough of the training is left"
    )
    checkpoint_seconds: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="least time between two checkpoints; auto: 60, and so long that they take at most 2 % of it; "
        "0: after every epoch only",
    )
    keep_checkpoint: bool = Field(
        False, description="keep a stage's last checkpoint when it is done, so that more epochs can go on from it"
    )
