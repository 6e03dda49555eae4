"""What a device trains in one stage: frozen prefix, active block, output module."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional
from torch.optim.sgd import sgd

from fedfreeze.config.schema import TrainConfig
from fedfreeze.config.ways import WHOLE, Way
from fedfreeze.network.chain import leaves_in_order
from fedfreeze.network.flat import FlatPart
from fedfreeze.network.recompute import recomputed, segments_of
from fedfreeze.network.recording import is_plain_sequential

M = TypeVar("M", bound=nn.Module)


class Stage(nn.Module):
    """The network of a stage. [paper: block-wise training with an output module]

    Frozen blocks run without gradients and in eval mode: with gradients merely switched off, their running statistics
    would drift and their activations would still be stored.
    """

    def __init__(
        self,
        index: int,
        frozen: Sequence[nn.Module],
        active: nn.Module,
        output_module: nn.Module,
        device: torch.device,
        watched: nn.Module | None = None,
    ):
        """`watched`: the first part of `active`, which is frozen when the stage ends; none: all of it is."""
        super().__init__()
        self.index = index
        self.frozen = _on(nn.ModuleList(frozen), device)
        self._without_gradients = [parameter for parameter in self.frozen.parameters() if parameter.requires_grad]
        self.frozen.requires_grad_(False)
        self.active = _on(active, device)
        self.output_module = _on(output_module, device)
        self._frozen_chain = list(leaves_in_order(self.frozen))
        self.prefix_chunk: int | None = None
        """How many samples go through the frozen blocks at a time (`train.prefix_chunk`); None: all of a batch."""
        self.recomputes = False
        """Whether what trains stores few activations and computes the others a second time (recompute.py)."""
        self._segments: dict[int, list[nn.Sequential]] = {}
        self.flat = FlatPart(self.active, self.output_module, device)
        self.watched_parameters = self.flat.active_parameters if watched is None else self.flat.parameters_of(watched)
        """How many parameters, the first of the flat buffer, the pace controller looks at."""
        self.train()

    def train(self, mode: bool = True) -> "Stage":
        """Set the training mode of active block and output module; the frozen prefix stays in eval mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def moded_modules(self) -> Iterator[nn.Module]:
        """Yield all modules whose mode `train` sets."""
        yield from self.modules()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, channels, height, width) to logits (batch, classes)."""
        return self.behind(self.frozen_forward(images))

    def behind(self, features: torch.Tensor) -> torch.Tensor:
        """Map what the frozen prefix puts out to logits (batch, classes)."""
        return self.through(self.output_module, self.through(self.active, features))

    def through(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Map what goes into a part of what trains to what comes out, with its activations stored or to be recomputed.

        A stage with a forward of its own that calls its parts by this can be recomputed, too.
        """
        if not self.recomputes or not torch.is_grad_enabled():
            found: torch.Tensor = part(x)
            return found
        segments = self._segments.get(id(part))
        if segments is None:
            segments = self._segments[id(part)] = segments_of(part)
        return recomputed(segments, x)

    def begin_device(self, labels: torch.Tensor) -> None:
        """Prepare for the next device; `labels`: those that it has, ascending. [nothing to do here]"""
        return

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss of a batch, to be differentiated, and the logits by which the device is judged."""
        logits = self(images)
        return functional.cross_entropy(logits, labels), logits

    def loss_behind(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `loss` does, of what the frozen prefix put out."""
        logits = self.behind(features)
        return functional.cross_entropy(logits, labels), logits

    def frozen_forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images to what the frozen prefix puts out, without gradients."""
        with torch.no_grad():
            if self.prefix_chunk is None or len(images) <= self.prefix_chunk or not self._frozen_chain:
                return self._frozen(images)
            found: torch.Tensor | None = None
            for begin in range(0, len(images), self.prefix_chunk):
                part = self._frozen(images[begin : begin + self.prefix_chunk])
                if found is None:
                    found = _as_long(part, len(images))
                found[begin : begin + len(part)] = part
                del part
            assert found is not None
            return found

    def _frozen(self, images: torch.Tensor) -> torch.Tensor:
        for module in self._frozen_chain:
            images = module(images)
        return images

    def leave(self) -> None:
        """End the stage: storage of its own for every tensor, all of it on the host."""
        self.flat.release()
        for parameter in self._without_gradients:  # what does not train in other stages either is the user's to say
            parameter.requires_grad_(True)
        for part in (self.frozen, self.active, self.output_module):
            _on(part, torch.device("cpu"))

    def trainer(self, config: TrainConfig) -> "LocalTrainer":
        """Return what trains the stage."""
        return LocalTrainer(self, config)

    def sent(self, index: torch.Tensor) -> torch.Tensor:
        """Return where the elements of a sub-model's flat buffer are added that a device sends; -1: nowhere.

        `index`: where they belong (Method.part_index), which may be overwritten. [all of them]
        """
        return index

    @property
    def received_elements(self) -> int:
        """Number of float elements that a device of a sub-model is sent in each round, runs, and does not send back."""
        return 0

    def begin_asking(self) -> None:
        """Prepare for what is asked before a round, for which all of it runs. [nothing to do here]"""

    def held_tensors(self) -> list[torch.Tensor]:
        """Return what a device holds between steps: all parameters and buffers of the stage."""
        return [*self.parameters(), *self.buffers()]

    def trained_tensors(self) -> list[torch.Tensor]:
        """Return of them those that are not frozen blocks'."""
        parts = (self.active, self.output_module)
        return list({id(t): t for part in parts for t in (*part.parameters(), *part.buffers())}.values())

    def frozen_tensors(self) -> list[torch.Tensor]:
        """Return parameters and buffers of the frozen blocks."""
        return [*self.frozen.parameters(), *self.frozen.buffers()]

    @property
    def frozen_elements(self) -> int:
        """Number of float elements of the frozen prefix."""
        return sum(tensor.numel() for tensor in self.frozen_tensors() if tensor.is_floating_point())


class WholeStage(Stage):
    """A network as it is, in one stage: its own forward, its own `train()`. [ours]

    `active` and `output_module` are its parts, all of it: what is counted and averaged.
    """

    def __init__(self, network: nn.Module, active: nn.Module, output_module: nn.Module, device: torch.device):
        self._network = (_on(network, device),)  # in a tuple: its tensors are those of the parts, not more
        super().__init__(0, [], active, output_module, device)

    def train(self, mode: bool = True) -> "WholeStage":
        """See Stage. The network's own `train()` has the last word."""
        super().train(mode)
        self._network[0].train(mode)
        return self

    def moded_modules(self) -> Iterator[nn.Module]:
        """See Stage."""
        yield from super().moded_modules()
        yield from self._network[0].modules()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See Stage."""
        (network,) = self._network
        # in its parts fewer intermediate results are held without gradients, and none need be where they are recomputed
        if is_plain_sequential(network) or (self.recomputes and torch.is_grad_enabled()):
            return super().forward(images)
        logits: torch.Tensor = network(images)
        return logits

    def leave(self) -> None:
        """See Stage."""
        super().leave()
        _on(self._network[0], torch.device("cpu"))


def sees_one_value(error: ValueError) -> bool:
    """Tell whether a step failed because a normalisation layer saw a single value a channel; in torch's words."""
    return "more than 1 value per channel" in str(error)


def has_batch_norm(stage: nn.Module) -> bool:
    """Tell whether a stage normalises over the batch, in whichever of its parts."""
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in stage.modules())


def least_samples(batch_norm: bool) -> int:
    """Return how many samples a device needs to train a stage: batch normalisation has no variance over one. [ours]"""
    return 2 if batch_norm else 1


def cannot_learn(samples: int, batch_norm: bool) -> str | None:
    """Return why a device with this many samples cannot train a stage; None: it can."""
    if samples >= least_samples(batch_norm):
        return None
    return "one sample, too few for batch normalisation" if samples else "no samples"


def classifier_of(network: nn.Module, num_classes: int) -> nn.Linear:
    """Return the last linear layer with an output for each class."""
    return [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes][-1]


def _on(module: M, device: torch.device) -> M:
    """Move a module's tensors that are elsewhere; each stays the same object, so that whoever shares it goes along."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)
    return module


def _as_long(part: torch.Tensor, length: int) -> torch.Tensor:
    """Return memory for so many samples of which some are given; its dimensions lie in the same order."""
    strides = part.stride()
    order = sorted(range(part.dim()), key=lambda dimension: -strides[dimension])
    shape = (length, *part.shape[1:])
    return part.new_empty([shape[dimension] for dimension in order]).permute(
        [order.index(d) for d in range(part.dim())]
    )


def squared_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum, over a batch, of the squared loss of a sample."""
    return functional.cross_entropy(logits, labels, reduction="none").square().sum()


class LocalTrainer:
    """SGD on a stage, built once a stage and used by every device in turn.

    torch's own step by its functional form: with the first torch.optim.Optimizer torch imports its compiler, which
    takes two seconds of every start.
    """

    def __init__(self, stage: Stage, config: TrainConfig):
        self.stage = stage
        self.stage.prefix_chunk = config.prefix_chunk
        self.stage.train()
        self._modes = [(module, module.training) for module in stage.moded_modules()]
        self.config = config
        self.learning_rate = config.learning_rate
        self.way: Way = WHOLE
        self.momentum = torch.zeros(stage.flat.parameters if config.momentum else 0, device=stage.flat.buffer.device)
        self._parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        self._momentum_of = stage.flat.views(self.momentum) if config.momentum else {}

    def begin(self, values: torch.Tensor, learning_rate: float, way: Way = WHOLE) -> None:
        """Start a device: load the global values, forget the momentum of the device before; it steps by a way."""
        self.go(way)
        if any(module.training is not mode for module, mode in self._modes):
            self.stage.train()  # of a hundred modules it takes longer than a step of a small network
        self.stage.flat.load(values)
        self.momentum.zero_()
        self.drop_gradients()
        self.learning_rate = learning_rate

    def go(self, way: Way) -> None:
        """Take the steps that follow by a way."""
        self.way = way
        self.stage.recomputes = way.recomputes

    def pieces(self) -> Iterator[int]:
        """Yield the number of each piece that a device trains in a round, one after the other, all its epochs each.

        Steps train the piece that was yielded last. [all of the stage is one]
        """
        yield 0

    def frozen_forward(self, images: torch.Tensor) -> torch.Tensor | None:
        """Map images to what the frozen blocks of the piece at work put out; None: it has none."""
        return self.stage.frozen_forward(images) if len(self.stage.frozen) else None

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take one SGD step; return the batch's mean loss and its sum of squared losses, (2,), still on the device."""
        return self._step(self.stage.loss, lambda: images, labels)

    def step_behind(self, features: Callable[[], torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Take one SGD step on what the frozen prefix put out, which is held by nobody else; see `step`."""
        return self._step(self.stage.loss_behind, features, labels)

    def _step(
        self,
        loss_of: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        take: Callable[[], torch.Tensor],
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Take one SGD step by as many passes as the way has, whose gradients add up to that of the mean loss."""
        sizes = self.way.sizes(len(labels), self.config.batch_size)
        # in one pass what is taken is held by nobody here, as a block may let go of it
        parts: list[Callable[[], torch.Tensor]] = [take]
        if len(sizes) > 1:
            parts = [partial(part.view_as, part) for part in take().split(sizes)]
        told: torch.Tensor | None = None
        for part, some in zip(parts, labels.split(sizes), strict=True):
            loss, logits = loss_of(part(), some)
            if len(sizes) > 1:
                loss = loss * (len(some) / len(labels))
            here = torch.stack([loss.detach(), squared_losses(logits.detach(), some)])
            told = here if told is None else told + here
            del logits
            loss.backward()
            del loss
        assert told is not None
        self._descend()
        # at the end, not before the next step: gradients must not be held through the next frozen forward
        self.drop_gradients()
        return told

    @torch.no_grad()
    def _descend(self) -> None:
        gradients = {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}
        if not gradients:
            return
        sgd(
            list(gradients),
            list(gradients.values()),
            [self._momentum_of[parameter] for parameter in gradients] if self._momentum_of else [],
            fused=True,  # one pass and no temporaries: on a device, memory is what we are short of
            weight_decay=self.config.weight_decay,
            momentum=self.config.momentum,
            lr=self.learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def drop_gradients(self) -> None:
        """Let go of the memory of all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def held_tensors(self) -> list[torch.Tensor]:
        """Return what a device holds between steps."""
        return [*self.stage.held_tensors(), self.momentum]

    def held_behind(self) -> list[torch.Tensor]:
        """Return what a device holds between steps that has stored what its frozen blocks put out."""
        return [*self.stage.trained_tensors(), self.momentum]
