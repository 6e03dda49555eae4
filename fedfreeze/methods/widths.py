"""Sub-models of fewer channels: what HeteroFL, FedRolex and AllSmall share."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from fedfreeze.config.schema import Config, ModelConfig
from fedfreeze.errors import ConfigError
from fedfreeze.methods.base import Method
from fedfreeze.methods.fedavg import full_model_stage
from fedfreeze.network.blocks import BlockedNetwork, build_network
from fedfreeze.network.flat import Slot
from fedfreeze.network.stage import Stage, WholeStage, classifier_of

_BatchNorm = nn.modules.batchnorm._BatchNorm


def width_of(model: ModelConfig, method: str) -> int:
    """Return what is scaled: `model.width`, or `width` of `model.options`. Raises ConfigError where there is none."""
    if model.factory is None:
        return model.width
    width = model.options.get("width")
    if type(width) is not int or width < 1:
        raise ConfigError(
            f"method.name: {method} scales the width of the network, and model.options of {model.factory} has no whole "
            "number `width` of 1 or more"
        )
    return width


def scaled(model: ModelConfig, width: int) -> ModelConfig:
    """Return the same network at another width."""
    if model.factory is None:
        return replace(model, width=width)
    return replace(model, options={**model.options, "width": width})


def fitted_network(model: ModelConfig, fitted: dict[str, Any]) -> ModelConfig:
    """Return the network at the width that `fit` found, if any."""
    return scaled(model, fitted["width"]) if "width" in fitted else model


def level_widths(shares: Sequence[float], width: int) -> list[int]:
    """Return the widths of the levels, ascending; shares that round up to the same width are one level.

    Example: the shares 1, 1/2, 1/4, 1/8 and 1/16 of width 8 are the widths 1, 2, 4 and 8.
    """
    # 0.1 * 30 is 3.0000000000000004, and means 3
    return sorted({max(1, math.ceil(share * width - 1e-9)) for share in shares})


class SubModelStage(WholeStage):
    """A sub-model of fewer channels: masked cross-entropy, scaled layers, no running statistics. [HeteroFL]"""

    absent: torch.Tensor

    def __init__(self, blocked: BlockedNetwork, share: float, device: torch.device):
        leave_out_statistics(blocked.network)
        scale_layers(blocked.network, share, blocked.num_classes)
        super().__init__(blocked.network, nn.Sequential(*blocked.blocks), blocked.head, device)
        absent = torch.zeros(blocked.num_classes, dtype=torch.bool, device=device)
        self.register_buffer("absent", absent, persistent=False)

    def begin_device(self, labels: torch.Tensor) -> None:
        """See Stage."""
        self.absent.fill_(True)
        self.absent[labels.to(self.absent.device)] = False

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See Stage. Logits of labels that the device lacks are zero, so that nothing pushes them down."""
        logits = self(images).masked_fill(self.absent, 0.0)
        return functional.cross_entropy(logits, labels), logits


def leave_out_statistics(network: nn.Module) -> None:
    """Have batch normalisation keep no running statistics, so that a device neither holds nor sends any."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def scale_layers(network: nn.Module, share: float, num_classes: int) -> None:
    """Divide what each convolution and linear layer puts out by `share` in training; the classifier is left alone.

    In place, so that it takes no memory.
    """
    if share == 1:
        return

    def scale(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return output.mul_(1 / share) if module.training else output

    classifier = classifier_of(network, num_classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module is not classifier:
            module.register_forward_hook(scale)


def joined(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield batches of two images or more, as normalisation needs; a last single image is left out."""
    held: torch.Tensor | None = None
    for images in batches:
        held = images if held is None else torch.cat([held, images])
        if len(held) > 1:
            yield held
            held = None


@torch.no_grad()
def take_static_statistics(stage: Stage, batches: Iterable[torch.Tensor]) -> None:
    """Set running statistics to the mean over batches of each batch's, with batch normalisation in training mode.

    Everything else is in eval mode: dropout would draw random numbers. [HeteroFL: static batch normalisation]
    """
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    stage.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    try:
        for images in joined(batches):
            stage(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        stage.eval()


class WidthScaled(Method):
    """Each device trains the widest sub-model that its cap holds; each element is averaged over those that hold it."""

    paced = False
    counted = True
    num_stages = 1

    def __init__(self, config: Config, blocked: BlockedNetwork):
        super().__init__(config, blocked)
        self.stage_names = ("by width",)
        name = config.method.name
        if config.model.factory is None and config.model.name == "vit":
            raise ConfigError(f"method.name: {name} scales the channels of ResNets and VGGs, and model.name is vit")
        self.full_width = width_of(config.model, name)
        self.check(blocked.network)
        if any(isinstance(module, _BatchNorm) for module in blocked.network.modules()):
            self.statistics_samples = config.method.statistics_samples

    def check(self, network: nn.Module) -> None:
        """Raise ConfigError for a network whose channels cannot be chosen freely."""
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d) and module.groups not in (1, module.in_channels):
                raise ConfigError(
                    f"method.name: {self.config.method.name} cannot take some of the channels of {name}, a convolution "
                    f"of {module.groups} groups"
                )

    @property
    def width(self) -> int:
        """Width of the global network."""
        width: int = self.fitted.get("width", self.full_width)
        return width

    @property
    def widths(self) -> list[int]:
        """Widths of the sub-models, ascending."""
        return [w for w in level_widths(self.config.method.widths, self.full_width) if w <= self.width]

    @abstractmethod
    def window(self, size: int, kept: int, round_number: int) -> torch.Tensor:
        """Return which `kept` of the `size` channels of a dimension a sub-model has in a round, (kept,)."""

    def begin_stage(self, index: int) -> None:
        """See Method. There is one stage and nothing to carry over."""

    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """See Method."""
        return full_model_stage(self.blocked, device)

    def num_levels(self, index: int) -> int:
        """See Method."""
        return len(self.widths)

    def level_name(self, index: int, level: int) -> str:
        """See Method."""
        return f"width {self.widths[level]}"

    def enter_level(self, index: int, level: int, device: torch.device) -> Stage:
        """See Method."""
        width = self.widths[level]
        # a narrow one may lie otherwise than the whole network does (memory.py); places are by the names of elements
        laid: Literal["auto", "contiguous"] = "auto" if self.blocked.channels_last else "contiguous"
        model = replace(scaled(self.config.model, width), memory_format=laid)
        blocked = build_network(model, self.blocked.image_shape, self.blocked.num_classes, self.config.seed)
        return SubModelStage(blocked, width / self.width, device)

    def part_index(self, stage: Stage, part: Stage, round_number: int, labels: torch.Tensor) -> torch.Tensor:
        """See Method. The classifier's rows of labels that the device lacks are its own."""
        whole = {slot.path: slot for slot in stage.flat.slots}
        index = torch.full((len(part.flat),), -1)
        classifier = classifier_of(part, self.blocked.num_classes)
        absent = torch.ones(self.blocked.num_classes, dtype=torch.bool)
        absent[labels] = False
        for slot in part.flat.slots:
            places = self._places(whole[slot.path], slot.shape, round_number)
            if slot.owner is classifier:
                places[absent] = -1
            index[slot.begin : slot.end] = slot.flattened(places)
        return index

    def _places(self, slot: Slot, kept: torch.Size, round_number: int) -> torch.Tensor:
        """Return where the elements of a tensor of the sub-model, in its shape, are in the flat buffer."""
        places = torch.tensor(slot.begin)
        for size, size_kept, stride in zip(slot.shape, kept, slot.strides, strict=True):
            # a dimension that is not cut (image channels, classes, kernels) stays in order
            chosen = torch.arange(size) if size == size_kept else self.window(size, size_kept, round_number)
            places = places.unsqueeze(-1) + stride * chosen
        return places

    def take_statistics(self, stage: Stage, batches: Iterable[torch.Tensor]) -> None:
        """See Method."""
        take_static_statistics(stage, batches)

    def deployed(self, stage: int) -> nn.Module:
        """See Method."""
        return self.blocked.network

    def state_modules(self) -> dict[str, nn.Module]:
        """See Method."""
        return {"network": self.blocked.network}
