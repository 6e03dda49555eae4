"""The configuration: typed dataclasses, one a concern, a docstring with the unit under every field."""

from operator import attrgetter
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

# Strict: `rounds: "12"` and `rounds: true` are mistakes, not numbers. The YAML loader reads 1e-3 as a float.
_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

Positive = Annotated[int, Field(ge=1, le=10**6)]
NonNegative = Annotated[int, Field(ge=0, le=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]

# A class or function of the user's own, as `package.module:Name`; found in the folder of the start or installed.
OwnObject = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
Options = dict[str, Any]

# A figure of each device: one for all, a list that is cycled over the devices, a distribution, or a CSV file.
PerDevice = float | list[float] | str


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class DataConfig:
    """What is learnt from, and how it is spread over the devices."""

    name: str = "digits"
    """`digits` (embedded, 8x8 grey), `synthetic`, or the name of a data set on the Hugging Face hub."""
    path: str | None = None
    """A folder, wins over `name`: of one data set in Parquet files (`train-*.parquet`, `test-*.parquet`) or of images
    (`train/CLASS/*.png`, `test/CLASS/*.png`)."""
    subset: str | None = None
    """The configuration of a data set on the hub that has several."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the hub; none: its newest."""
    image_column: str | None = None
    """The column of the images; none: the first of `img`, `image`, `images`."""
    label_column: str | None = None
    """The column of the labels (whole numbers from 0); none: the first of `label`, `labels`, `fine_label`."""
    image_size: Annotated[int, Field(ge=1, le=10**4)] | None = None
    """Pixels: scale and centre-crop every image to this square; none: images must all be of one size."""
    synthetic_shape: Annotated[list[Annotated[int, Field(ge=1, le=10**4)]], Field(min_length=3, max_length=3)] = Field(
        default_factory=lambda: [3, 32, 32]
    )
    """Channels, height and width of the images of `name: synthetic`."""
    synthetic_samples: Annotated[int, Field(ge=10, le=10**8)] = 10_000
    """Training samples of `name: synthetic`; a fifth as many come on top as test data."""
    synthetic_classes: Annotated[int, Field(ge=2, le=10**5)] = 10
    """Classes of `name: synthetic`."""
    partition: Literal["iid", "dirichlet", "shards"] = "dirichlet"
    """How the training samples are spread: evenly at random, by a Dirichlet draw a class, or by label-sorted shards."""
    alpha: PositiveFloat = 0.5
    """Concentration of the Dirichlet partition; small values give each device few classes."""
    shards_per_device: Positive = 2
    """How many label-sorted shards each device gets with `partition: shards`."""
    augment: Literal["none", "flip", "crop_flip"] = "none"
    """Augmentation of training batches: none, horizontal flips, or random crops (padding of an eighth) and flips."""
    views: Annotated[int, Field(ge=1, le=256)] | None = None
    """How many images each sample becomes by augmentation: drawn once a stage, one of them in each pass over a device's
    data, so that features of frozen blocks can be kept. None: a new one each time; flips alone are two anyway."""
    cache_dir: str | None = None
    """Folder of the decoded, memory-mapped data; default `$XDG_CACHE_HOME/fedfreeze` or `~/.cache/fedfreeze`."""

    @property
    def view_count(self) -> int | None:
        """How many images each sample can become by augmentation; None: there is no end of them."""
        if self.augment == "none":
            return 1
        return self.views or (2 if self.augment == "flip" else None)


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class ModelConfig:
    """The network."""

    name: Literal["resnet8", "resnet10", "resnet18", "resnet34", "vgg11", "vgg16", "vit"] = "resnet8"
    """The architecture: a ResNet with a CIFAR stem (3x3 convolution, no pooling), a VGG with a single linear layer, or
    a small Vision Transformer."""
    width: Positive = 16
    """Channels of the first block (ResNet, VGG: later blocks double them), or the dimension of a token (ViT)."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation layer of ResNets and VGGs (a ViT has layer normalisation)."""
    factory: OwnObject | None = None
    """A function of your own, `package.module:function`, wins over `name`; called with the keywords `num_classes`,
    `in_channels`, `image_size` (height, width) and `model.options`, it returns the network (docs/extending.md)."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """How weights of convolutions lie in memory: `channels_last` is faster on CPUs, and results differ by rounding;
    `auto` takes it on CPUs, for networks of several convolutions that run so: not for those with 1x1 convolutions with
    a stride over fewer than 16 channels (torch spoils memory with them), and of your own not with group
    normalisation."""
    split: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the modules at which blocks begin; none: the usual cut of `name`. `fedfreeze plan CONFIG --cut` proposes
    one for the fleet."""
    options: Options = Field(default_factory=dict)
    """Further keywords for `model.factory`."""

    @property
    def label(self) -> str:
        """What tables and summaries call the network."""
        return self.factory or f"{self.name} (width {self.width})"


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class MethodConfig:
    """The federated method."""

    name: (
        Literal[
            "smartfreeze",
            "fedavg",
            "exclusivefl",
            "allsmall",
            "heterofl",
            "fedrolex",
            "depthfl",
            "fedepth",
            "progfed",
            "progfed_layerwise",
        ]
        | OwnObject
    ) = "smartfreeze"
    """`smartfreeze` trains block by block; `fedavg` the whole model at once (with `fleet.enforce=false` the ideal
    without memory limits); `exclusivefl` the whole model on the devices that hold it; `allsmall` the width that the
    weakest device holds; `heterofl` and `fedrolex` the width, `depthfl` the depth that each device holds; `fedepth` the
    whole model on each device, in pieces that it holds, one after the other within a round; `progfed` grows the model,
    `progfed_layerwise` freezes what it grew; or a class of your own, `package.module:Class`."""
    options: Options = Field(default_factory=dict)
    """Settings of a method of your own, which finds them in `config.method.options`."""
    output_module: Literal["conv_norm", "conv", "block", "pool"] = "conv_norm"
    """What imitates a missing block: convolution + norm + activation, bare convolution, residual block, or nothing."""
    carry: bool = True
    """Carry the output module's remaining parts into the next stage (true) or start them anew (false)."""
    start: Literal["surrogate", "anew"] = "surrogate"
    """`smartfreeze`: what a new block starts from: the surrogate that imitated it, so that the network goes on where it
    was, or weights of its own (the paper's form, as far as it says). `output_module: pool` has no surrogates."""
    start_kept: Annotated[float, Field(ge=0, le=1)] = 0.3
    """`start: surrogate`: the share of its first weights that a later layer of the block keeps beside the identity."""
    window: Positive = 1
    """`smartfreeze`: neighbouring blocks that train together; at the end of a stage the first of them is frozen and the
    window slides by one."""
    weights: Literal["samples", "uniform"] = "samples"
    """A device's weight in the average: its number of samples, or one."""
    widths: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1, max_length=20)] = Field(
        default_factory=lambda: [1.0, 0.5, 0.25, 0.125, 0.0625]
    )
    """`heterofl`, `fedrolex`: the shares of the channels among which each device trains the largest that it holds."""
    statistics_samples: Positive = 2048
    """`heterofl`, `fedrolex`: training samples over which the statistics of batch normalisation are taken."""
    distillation: NonNegativeFloat = 1.0
    """`depthfl`: weight of the distillation between the exits of a device."""
    sum: Literal["exact", "float32"] = "exact"
    """`exact` adds updates as 64-bit fixed point: any order gives the same bits, at twice the bytes between ranks, also
    by NCCL. `float32` depends on the order of devices and ranks, and on how NCCL or MPI adds."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class FleetConfig:
    """The emulated devices."""

    devices: Positive = 20
    """How many devices there are."""
    profile: str | dict[str, NonNegativeFloat] | None = None
    """What the devices are: a preset (`phones`, `raspberry_pi`, `jetson`, `mixed`), a mixture `{CLASS: share, ...}` of
    device classes (docs/fleet.md), or a CSV file; a key below that is set wins over it."""
    memory_scale: PositiveFloat = 1.0
    """The memory of a profile's devices times this: real devices hold more than a small network needs."""
    memory_cap_mib: PerDevice | None = None
    """MiB of each device: a number, a list (cycled over the devices), `uniform(low, high)`, `loguniform(low, high)`,
    `normal(mean, sd)`, or a CSV file with the columns `device,memory_cap_mib`; none: the profile's, else
    `uniform(100, 900)`."""
    speed_gflops: PerDevice | None = None
    """Training speed of each device, 10^9 floating-point operations a second, given likewise; none: the profile's, else
    `loguniform(2, 20)`."""
    up_mbit_s: PerDevice | None = None
    """Upload of each device, 10^6 bits a second, given likewise; none: the profile's, else `loguniform(2, 20)`."""
    down_mbit_s: PerDevice | None = None
    """Download of each device, 10^6 bits a second, given likewise; none: the profile's, else `loguniform(10, 100)`."""
    availability: PerDevice | None = None
    """Share of the time, over 0 and up to 1, in which a device can be selected, given likewise; none: the profile's,
    else 1."""
    availability_period_s: PositiveFloat = 86_400.0
    """Emulated seconds after which a device's availability repeats; it starts anywhere in the period."""
    enforce: bool = True
    """Whether the caps hold. False emulates devices without a memory limit: all may train, nothing is capped."""
    accounting: Literal["tensor_bytes", "cuda_segments"] = "tensor_bytes"
    """What a cap holds where ranks compute on CPUs: live tensor bytes, or the segments that torch's allocator would
    reserve for them on a GPU (docs/caps.md). On GPUs it changes nothing: there the allocator itself is held. [ours]"""


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
    deadline_s: PositiveFloat | None = None
    """Emulated seconds of a round after which a device's work is left out; none: the round waits for the slowest."""
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.0
    """Devices asked for each participant: those that finish first take part, the others' work is left out."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; its buffer starts at zero in every round."""
    weight_decay: NonNegativeFloat = 5e-4
    """L2 penalty of SGD, a step."""
    threads_per_rank: Positive = 1
    """CPU threads of each rank, whatever the launcher sets: the bits of the result depend on it."""
    prefix: Literal["recomputed", "streamed", "stored"] = "recomputed"
    """What an emulated device does with its frozen blocks: run them in every step; the same, but with each of their
    layers in its memory only while that runs, read from its storage (`streamed`; the time to read is not charged); or
    run them once a stage for every view of its samples and store what they put out in its flash memory, which
    `fedfreeze plan` states (`stored`). Then they are neither in its memory nor in its time while it trains. [ours]"""
    prefix_chunk: Positive | Literal["auto"] | None = "auto"
    """Samples that go through the frozen blocks at a time, as without gradients nothing of them but the outcome must
    stay; None: the whole batch at once. `auto`: as many as make 4 MiB of the widest activation, which costs no time, on
    CPUs; on GPUs the whole batch. Results may differ by rounding. [ours]"""
    fit: str = "whole"
    """How devices take their steps: a list of ways, of which each takes the first that its cap holds. `whole` stores
    all activations; `recompute` few of them, and computes the others again in the backward pass, which gives the same
    bits; `recompute2` fewer, and computes more again, `recompute3` also what the frozen blocks put out; `micro(k)`
    takes a batch in k passes whose gradients add up, and normalises over each alone; `recompute2+micro(k)` does both.
    `auto` is `whole, recompute, recompute2, recompute3`. [ours: that each device has its own]"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; `auto` takes CUDA where there is one."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class PaceConfig:
    """When a block is frozen."""

    policy: Literal["perturbation", "fixed", "proportional", "plateau"] | OwnObject = "perturbation"
    """Block perturbation, equal rounds a stage, rounds in proportion to parameters, a plateau of the loss, or a class
    of your own, `package.module:Class`."""
    options: Options = Field(default_factory=dict)
    """Settings of a policy of your own, which finds them in `config.options`."""
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
    min_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """A round is evidence of convergence only if this share of `train.participants` completed it (of the devices that
    can train in the stage, where those are fewer); a sparser one is left out of the window. 0: one device will do."""
    min_rounds: Positive = 1
    """No block is frozen before this many rounds of its stage (k_min)."""
    max_rounds: Positive | None = None
    """A stage ends here at the latest (k_max); none: only `train.rounds` limits it."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class SelectConfig:
    """Which devices train in a round."""

    name: Literal["uniform", "smartfreeze", "oort", "tifl", "power_of_choice"] | OwnObject = "uniform"
    """Among the devices whose cap holds the stage: `uniform` at random; `smartfreeze` by communities of alike data,
    loss and speed; `oort` by loss and speed; `tifl` by tiers of speed; `power_of_choice` the highest loss of a random
    few; or a class of your own, `package.module:Class`."""
    options: Options = Field(default_factory=dict)
    """Settings of a selector of your own, which finds them in `config.select.options`."""
    memory: bool = True
    """Select only devices whose cap holds the stage, by the cost model. False: any device, which may then run out."""
    memory_correction: bool = True
    """When a device runs out all the same, leave out for the rest of the stage those with no more memory, too. False:
    that device alone."""
    communities: bool = True
    """`smartfreeze`: spread the participants over communities of devices with alike data. False: one community, and no
    signatures are gathered."""
    neighbours: Annotated[int, Field(ge=1, le=1000)] = 10
    """`smartfreeze`: nearest neighbours of each device in the graph in which communities are found."""
    community_limit: Annotated[int, Field(ge=2, le=10**6)] | None = None
    """`smartfreeze`: a community of more devices is split again; none: twice `train.participants`."""
    signature_size: Annotated[int, Field(ge=8, le=10**6)] = 512
    """`smartfreeze`: numbers of a device's signature; a larger gradient of the last layer is sketched to this size."""
    signature_devices: Positive | None = None
    """`smartfreeze`: devices that are asked each time, drawn among the candidates, half of them among those without a
    community, the others from every community; more than `neighbours`, and better ten times as many. None: all
    candidates."""
    refresh_rounds: Positive | None = 25
    """`smartfreeze`: rounds after which signatures and losses are gathered again within a stage; none: only when a
    stage starts."""
    slots_by_volume: bool = True
    """`smartfreeze`: a community with more data gets more participants. False: as many as any other."""
    loss_utility: bool = True
    """`smartfreeze`: prefer devices with much loss over all their samples. False: their samples alone count."""
    speed_utility: bool = True
    """`smartfreeze`: prefer fast devices."""
    exploration: Annotated[float, Field(ge=0, le=1)] = 0.2
    """`smartfreeze`: share of the participants taken at random from those that never trained."""
    speed_exponent: NonNegativeFloat = 2.0
    """`smartfreeze`, `oort`: how strongly a device slower than the preferred duration is held back (alpha)."""
    preferred_percentile: Annotated[float, Field(gt=0, le=100)] = 50.0
    """`smartfreeze`, `oort`: the preferred duration of a round is this percentile of the candidates' (T)."""
    exploration_start: Annotated[float, Field(ge=0, le=1)] = 0.9
    """`oort`: share of participants that never trained, in the first round; it falls from round to round."""
    exploration_decay: Annotated[float, Field(gt=0, le=1)] = 0.98
    """`oort`: the exploration share of a round times this is the next round's."""
    exploration_floor: Annotated[float, Field(ge=0, le=1)] = 0.2
    """`oort`: the exploration share falls no lower."""
    clip_percentile: Annotated[float, Field(gt=0, le=100)] = 95.0
    """`oort`: a utility counts no more than this percentile of all."""
    cutoff: Annotated[float, Field(ge=0, le=1)] = 0.95
    """`oort`: devices are drawn among those with at least this share of the utility that would just be taken."""
    pacer_rounds: Positive = 20
    """`oort`: rounds a window of the pacer (W), which allows longer rounds when utility falls."""
    pacer_step: Annotated[float, Field(ge=0, le=100)] = 5.0
    """`oort`: percentile points that the pacer adds to the preferred duration (Delta)."""
    blocklist_rounds: Positive | None = 10
    """`oort`: a device that trained this often is left out from then on; none: never."""
    tiers: Annotated[int, Field(ge=1, le=1000)] = 5
    """`tifl`: groups of devices of alike speed."""
    tier_rounds: Positive = 20
    """`tifl`: rounds between two changes of the tiers' probabilities (I)."""
    tier_credits: Positive | None = None
    """`tifl`: how often a tier may be selected; none: `train.rounds` divided by `tiers`, times two."""
    choices: Positive | None = None
    """`power_of_choice`: devices drawn by data volume, whose loss is asked for (d); none: twice the participants."""
    stale_losses: bool = False
    """`power_of_choice`: take the loss that a device had when it last trained instead of asking (rpow-d)."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class CommConfig:
    """How ranks talk."""

    transport: Literal["torch", "mpi"] = "torch"
    """`torch`: torch.distributed (gloo on CPU and where ranks share a GPU, NCCL with a GPU a rank). `mpi`: mpi4py,
    under mpirun or `srun --mpi=pmix`."""
    timeout_s: Annotated[float, Field(gt=0, le=1e7)] = 1800.0
    """Seconds after which a collective that a rank does not join is given up (exit code 76), although it is alive: more
    than the ranks of a round can lie apart."""
    join_s: Annotated[float, Field(ge=1, le=1e5)] = 300.0
    """Seconds within which all ranks must have come together at the start (exit code 76)."""
    heartbeat_s: Annotated[float, Field(ge=1, le=1e5)] = 30.0
    """Seconds without a sign of life after which a rank counts as lost (exit code 76); a slow rank goes on giving
    them, and one that has died is noticed at once."""
    cuda_aware_mpi: bool = False
    """`transport=mpi` on GPUs: hand MPI the GPU's memory, which only an MPI built for that can take. False: updates
    travel from the host."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class CacheConfig:
    """What the emulation keeps to be faster; emulated devices are charged as if it did not."""

    features: bool = False
    """Keep what the frozen blocks put out for the devices' samples and use it in later rounds of the stage. Results
    differ by rounding from those without. `data.augment: crop_flip` needs `data.views`, or it has no end of views."""
    budget_mib: Annotated[float, Field(ge=0, le=10**9)] = 2048.0
    """MiB of host memory that each rank may keep; what does not fit goes to `dir`, or is calculated anew."""
    dir: Annotated[str, Field(min_length=1)] | None = None
    """A folder on a disk of each host for what is over `budget_mib`, such as a node's own scratch disk; none: no disk.
    Its files have no names and go with the process."""
    disk_mib: Annotated[float, Field(ge=0, le=10**9)] = 65_536.0
    """MiB of `dir` that each rank may use."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class EvalConfig:
    """How the network is judged on the test data."""

    every_rounds: Positive = 5
    """Rounds between two evaluations on all the test data; the last round of a stage always has one."""
    samples: Positive | None = None
    """Test samples, drawn once by the seed, on which the other rounds are evaluated; none: they are not."""
    batch_size: Positive = 256
    """Samples a batch; evaluation is the server's work and runs outside the caps."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class CheckpointConfig:
    """What survives a kill."""

    every_rounds: Positive = 1
    """Rounds between two checkpoints; the end of a stage is always one."""
    keep: Annotated[int, Field(ge=2, le=10**6)] = 2
    """How many of the newest are kept (at least 2, in case the newest is torn)."""
    grace_s: Annotated[float, Field(ge=0, le=1e6)] = 90.0
    """Seconds between SIGUSR1 or SIGUSR2 and the end of the job: a round that cannot be done by then is dropped."""
    term_grace_s: Annotated[float, Field(ge=0, le=1e6)] = 20.0
    """Seconds between SIGTERM and SIGKILL, likewise."""
    time_limit_s: PositiveFloat | None = None
    """Seconds from the start after which to save and leave (exit code 75), where no SLURM tells when the job ends; a
    round that cannot be done by then is not begun; none: no limit."""


@dataclass(kw_only=True, frozen=True, config=_STRICT)
class TrackConfig:
    """Tracking of the run; metrics.jsonl stays the truth, and what fails here never stops training."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases, by rank 0; the variable WANDB_MODE can only make it quieter."""
    project: str | None = None
    """Project of the run; none: the variable WANDB_PROJECT, else `fedfreeze`."""
    entity: str | None = None
    """User or team that owns the project; none: WANDB_ENTITY, else the default of whoever is logged in."""
    group: str | None = None
    """Group that ties several runs together, such as the seeds of one setting; none: WANDB_RUN_GROUP, else none."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the run; empty: those in WANDB_TAGS, with commas between them, else none."""
    dir: str | None = None
    """Folder in which wandb writes, such as a node's own disk; none: the run folder."""
    artifact: bool = False
    """Log the deployed network, model.safetensors, as an artifact at the end."""


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
    cache: CacheConfig = Field(default_factory=CacheConfig)
    """What is kept to be faster."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    track: TrackConfig = Field(default_factory=TrackConfig)
    """Tracking."""


# Keys that may name code of the user's own, package.module:Name.
CODE_KEYS = ("model.factory", "method.name", "select.name", "pace.policy")


def code_named(config: Config) -> tuple[str | None, ...]:
    """Return what a configuration has under CODE_KEYS, in their order."""
    named: tuple[str | None, ...] = attrgetter(*CODE_KEYS)(config)
    return named


# What versions did that did not know a key yet, where the default is something else now.
BEFORE = {"method.start": "anew", "train.prefix_chunk": None, "model.memory_format": "contiguous"}

# A resumed run may differ in these sections only; anything else would make it another run.
RESUME_MAY_DIFFER = ("comm", "checkpoint", "track")

# Of the section cache, what decides where features are, not what they are.
CACHE_MAY_DIFFER = ("budget_mib", "dir", "disk_mib")

# Where the data lies and how it is found there: a resumed run may have it elsewhere, and what it holds decides.
WHERE_DATA_LIES = ("path", "cache_dir", "subset", "revision", "image_column", "label_column")


def allowed_values(annotation: Any) -> list[str]:
    """Return the names that a key allows, `package.module:Class` for the user's own; none where it is no choice."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    members = get_args(annotation)
    literal = [name for member in members for name in allowed_values(member)]
    return [*literal, "package.module:Class"] if literal and OwnObject in members else literal
