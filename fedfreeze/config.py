"""The configuration: typed dataclasses, one a concern, a docstring with the unit under every field."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

# Strict: `rounds: "12"` and `rounds: true` are mistakes, not numbers. The YAML loader reads 1e-3 as a float.
_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

Positive = Annotated[int, Field(ge=1, le=10**6)]
NonNegative = Annotated[int, Field(ge=0, le=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class DataConfig:
    """What is learnt from, and how it is spread over the devices."""

    name: str = "digits"
    """`digits` (embedded, 8x8 grey), or the name of a data set on the Hugging Face hub."""
    path: str | None = None
    """A folder of Parquet files (`train-*.parquet`, `test-*.parquet`); wins over `name`."""
    partition: Literal["iid", "dirichlet", "shards"] = "dirichlet"
    """How the training samples are spread: evenly at random, by a Dirichlet draw a class, or by label-sorted shards."""
    alpha: PositiveFloat = 0.5
    """Concentration of the Dirichlet partition; small values give each device few classes."""
    shards_per_device: Positive = 2
    """How many label-sorted shards each device gets with `partition: shards`."""
    augment: Literal["none", "flip", "crop_flip"] = "none"
    """Augmentation of training batches: none, horizontal flips, or random crops (padding of an eighth) and flips."""
    cache_dir: str | None = None
    """Folder of the decoded, memory-mapped data; default `$XDG_CACHE_HOME/fedfreeze` or `~/.cache/fedfreeze`."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class ModelConfig:
    """The network."""

    name: Literal["resnet8", "resnet10", "resnet18", "resnet34"] = "resnet8"
    """The architecture, with a CIFAR stem (3x3 convolution, no pooling)."""
    width: Positive = 16
    """Channels of the first block; each later block doubles them."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation layer."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class MethodConfig:
    """The federated method."""

    name: Literal["smartfreeze", "fedavg"] = "smartfreeze"
    """`smartfreeze` trains block by block; `fedavg` trains the whole model at once."""
    output_module: Literal["conv_norm", "conv", "block", "pool"] = "conv_norm"
    """What imitates a missing block: convolution + norm + activation, bare convolution, residual block, or nothing."""
    carry: bool = True
    """Carry the output module's remaining parts into the next stage (true) or start them anew (false)."""
    weights: Literal["samples", "uniform"] = "samples"
    """A device's weight in the average: its number of samples, or one."""
    sum: Literal["exact", "float32"] = "exact"
    """`exact` adds updates as 64-bit fixed point: any order gives the same bits, at twice the bytes between ranks."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class FleetConfig:
    """The emulated devices."""

    devices: Positive = 20
    """How many devices there are."""
    memory_cap_mib: float | list[float] | str = "uniform(100, 900)"
    """MiB of each device: a number, a list (cycled over the devices), `uniform(low, high)`, `loguniform(low, high)`,
    `normal(mean, sd)`, or the path of a CSV file with the columns `device,memory_cap_mib`."""
    enforce: bool = True
    """Whether the caps hold. False emulates devices without a memory limit: all may train, nothing is capped."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class TrainConfig:
    """What a device does in a round, and for how many rounds."""

    rounds: Positive = 100
    """The most rounds, over all stages."""
    participants: Positive = 10
    """Devices selected a round."""
    local_epochs: Positive = 1
    """Passes over its own data that a device makes a round."""
    batch_size: Positive = 32
    """Samples a step."""
    learning_rate: PositiveFloat = 0.05
    """Step size of SGD at the first round."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate goes over `rounds`: it stays, or falls to zero as a half cosine."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; its buffer starts at zero in every round."""
    weight_decay: NonNegativeFloat = 5e-4
    """L2 penalty of SGD, a step."""
    threads_per_rank: Positive = 1
    """CPU threads of each rank, whatever the launcher sets: the bits of the result depend on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; `auto` takes CUDA where there is one."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class PaceConfig:
    """When a block is frozen."""

    policy: Literal["perturbation", "fixed", "proportional", "plateau"] = "perturbation"
    """Block perturbation, equal rounds a stage, rounds in proportion to parameters, or a plateau of the loss."""
    window: Annotated[int, Field(ge=2, le=10**6)] = 10
    """Rounds whose updates one perturbation spans (Q)."""
    slope_window: Annotated[int, Field(ge=2, le=10**6)] = 10
    """Rounds over which the slope of perturbation (or the fall of the loss, for `plateau`) is taken (W)."""
    slope_limit: PositiveFloat = 2e-3
    """The slope of perturbation, a round, must lie within plus or minus this (phi)."""
    checks: Positive = 3
    """Rounds in a row in which the criterion must hold (C)."""
    relative_level: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Perturbation must be under this share of the stage's highest (rho), or under the noise level below."""
    noise_level: PositiveFloat = 1.5
    """Times 1/sqrt(window): the level that unrelated zero-mean updates give is 1/sqrt(window)."""
    improvement: NonNegativeFloat = 0.01
    """`plateau`: the relative fall of the loss over `slope_window` rounds under which a block counts as converged."""
    min_rounds: Positive = 1
    """No block is frozen before this many rounds of its stage (k_min)."""
    max_rounds: Positive | None = None
    """A stage ends here at the latest (k_max); none: only `train.rounds` limits it."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class SelectConfig:
    """Which devices train in a round."""

    name: Literal["uniform"] = "uniform"
    """`uniform`: at random among the devices whose cap holds the stage."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class CommConfig:
    """How ranks talk."""

    transport: Literal["torch"] = "torch"
    """`torch`: torch.distributed (gloo on CPU and where ranks share a GPU, NCCL with a GPU a rank)."""
    timeout_s: Annotated[float, Field(gt=0, le=1e7)] = 600.0
    """Seconds after which a collective that a rank does not join is given up (exit code 76)."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class EvalConfig:
    """How the network is judged on the test data."""

    every_rounds: Positive = 1
    """Rounds between two evaluations; the last round of a stage is always evaluated."""
    batch_size: Positive = 256
    """Samples a batch; evaluation is the server's work and runs outside the caps."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class CheckpointConfig:
    """What survives a kill."""

    every_rounds: Positive = 1
    """Rounds between two checkpoints; the end of a stage is always one."""
    keep: Annotated[int, Field(ge=2, le=10**6)] = 2
    """How many of the newest are kept (at least 2, in case the newest is torn)."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class Config:
    """A whole run."""

    name: str = "run"
    """Name of the run; its folder is `runs/NAME` unless `--run-dir` says otherwise."""
    seed: NonNegative = 0
    """Every random draw of the run follows from it."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Data and partition."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """Network."""
    method: MethodConfig = Field(default_factory=MethodConfig)
    """Federated method."""
    fleet: FleetConfig = Field(default_factory=FleetConfig)
    """Emulated devices."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Local training and rounds."""
    pace: PaceConfig = Field(default_factory=PaceConfig)
    """Pace controller."""
    select: SelectConfig = Field(default_factory=SelectConfig)
    """Participant selector."""
    comm: CommConfig = Field(default_factory=CommConfig)
    """Communication between ranks."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""


# A resumed run may differ in these sections only; anything else would make it another run.
RESUME_MAY_DIFFER = ("comm", "checkpoint")
