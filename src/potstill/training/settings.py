"""Every setting of the training loop."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Not the training loss: its term weights may change with the epochs, or differ between the trials of a sweep.
SelectionMetric = Literal["top1", "top3", "f1_macro", "auc_macro", "nll"]


class TrainingSettings(BaseModel):
    """How one stage is trained; the defaults are those of the original specification."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(30, ge=1, le=100_000, description="passes over the training split")
    min_steps: int = Field(
        0, ge=0, le=10_000_000, description="more epochs than `epochs`, if those have fewer steps than this"
    )
    batch_size: int = Field(32, ge=1, le=65_536, description="images per step, over all processes together")
    optimizer: str = Field(
        "adamw", description="sgd, adamw, dot, any class in torch.optim, or an optimizer of timm: lamb, lion, muon, ..."
    )
    lr: float = Field(1e-4, gt=0, description="learning rate after warm-up")
    weight_decay: float = Field(
        1e-4, ge=0, description="weight decay of all parameters but biases and normalisation layers"
    )
    decay_all: bool = Field(False, description="apply weight decay to biases and normalisation layers too")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd and dot")
    nesterov: bool = Field(False, description="Nesterov momentum, for sgd")
    dot_delta: float = Field(
        0.075,
        ge=0,
        lt=1,
        description="for dot: added to the momentum of the teacher's gradients, subtracted from that of the labels'",
    )
    optimizer_options: dict[str, Any] = Field({}, description="further keyword arguments of the optimizer's class")
    schedule: Literal["constant", "cosine", "step"] = Field("constant", description="learning rate schedule")
    milestones: list[int] = Field([], description="epochs after which schedule: step multiplies lr by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone")
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="final learning rate of schedule: cosine, as a ratio of lr"
    )
    warmup_epochs: float = Field(0.0, ge=0, description="epochs in which the learning rate rises linearly from 0 to lr")
    freeze: int = Field(
        0,
        ge=0,
        description="number of first epochs that train the head alone; BatchNorm statistics stay fixed too",
    )
    freeze_batch_norm: bool | Literal["auto"] = Field(
        "auto",
        description="normalise by the BatchNorm statistics of the initial weights and do not update them; auto: for "
        "head: finetune",
    )
    layer_decay: float | None = Field(
        None, gt=0, lt=1, description="ratio of the learning rates of each block and the next one towards the head"
    )
    layer_decay_no_opt_scale: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="blocks whose learning rate, by layer_decay, is a lower share of lr than this are not trained: "
        "saves memory and their backward pass",
    )
    max_grad_norm: float | None = Field(
        None, gt=0, description="clip the gradient norm to this value; null: no clipping"
    )
    sync_batch_norm: bool = Field(
        False, description="with several GPUs, BatchNorm uses the images of all processes, by torch's SyncBatchNorm"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches whose gradients are averaged into one step")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label that is spread over all classes")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average of the weights, which is evaluated in their place; after n "
        "steps: min(decay, (1 + n) / (10 + n))",
    )
    qat_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a student's epochs, the last ones, with quantization-aware training for int8",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after this many epochs without a better val metric; null: never"
    )
    selection_metric: SelectionMetric = Field(
        "top1",
        description="val metric that selects the best epoch, of equal ones the first with the highest top-1; nll: "
        "cross-entropy with the labels alone",
    )
    temperature_scaling: bool = Field(
        True,
        description="divide the logits of baseline and distilled student by the temperature of least nll on val, if "
        "that lowers it beyond doubt; the top class stays",
    )
    evaluate_test_every_epoch: bool = Field(
        False, description="record test metrics of every epoch; they select nothing"
    )
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: bf16 if the hardware supports it and a step is not slower in it; fp16, with a scaled loss, "
        "on GPUs that have only that (V100, T4, RTX 20)",
    )
    channels_last: bool | Literal["auto"] = Field(
        "auto", description="channels_last memory format of images and weights; auto: on all devices but mps"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int | Literal["auto"] = Field(
        "auto", description="CPU threads; auto: all cores or one, whichever is faster at the start of the run"
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile for the student's forward pass; auto: on cuda, if enough training is left to gain "
        "time",
    )
    compile_teacher: bool = Field(
        False, description="torch.compile for teachers that give logits alone; pays where they answer many batches"
    )
    checkpoint_seconds: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="least time between two checkpoints; auto: 60, or longer, so that they take at most 2 % of the "
        "time; 0: after each epoch only",
    )
    keep_checkpoint: bool = Field(
        False, description="keep the last checkpoint of a finished stage, so that --resume can add epochs"
    )
