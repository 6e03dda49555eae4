"""What a device trains in one stage: frozen prefix, active block, output module."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn import functional

from fedfreeze.config.schema import TrainConfig
from fedfreeze.config.ways import WHOLE, Way
from fedfreeze.network.chain import leaves_in_order
from fedfreeze.network.descent import Descent
from fedfreeze.network.flat import FlatPart
from fedfreeze.network.recompute import Segment, recomputed, repeatable, segments_of, stored_from
from fedfreeze.network.recording import is_plain_sequential

M = TypeVar("M", bound=nn.Module)

# Numbers of an activation that are at hand while one chunk of a batch goes through the frozen blocks: 4 MiB. With fewer
# the calls take longer than the work, with more they leave the caches of a core.
CHUNK_ELEMENTS = 2**20

PREFIX_AGAIN = 3
"""The recompute level from which on what the frozen prefix puts out is not stored either."""


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
        widest_frozen: int = 0,
    ):
        """`watched`: the first part of `active`, which is frozen when the stage ends; none: all of it is.

        `widest_frozen`: the most numbers that a frozen module puts out for one image; 0: it is not known.
        """
        super().__init__()
        self.index = index
        self.frozen = _on(nn.ModuleList(frozen), device)
        self._without_gradients = [parameter for parameter in self.frozen.parameters() if parameter.requires_grad]
        self.frozen.requires_grad_(False)
        self.active = _on(active, device)
        self.output_module = _on(output_module, device)
        self._frozen_chain = list(leaves_in_order(self.frozen))
        self.prefix_chunk: int | None = None
        """How many samples go through the frozen blocks at a time; None: all of a batch."""
        self._usual_chunk = max(1, CHUNK_ELEMENTS // widest_frozen) if widest_frozen and device.type == "cpu" else None
        self.streams = False
        self.recompute_level = 0
        """How few activations what trains stores, and computes the others anew (config/ways.py, recompute.py)."""
        self._segments: dict[tuple[Any, ...], list[Segment]] = {}
        self.flat = FlatPart(self.active, self.output_module, device)
        self.watched_parameters = self.flat.active_parameters if watched is None else self.flat.parameters_of(watched)
        """How many parameters, the first of the flat buffer, the pace controller looks at."""
        self.train()

    def send_in_chunks(self, chunk: int | Literal["auto"] | None) -> None:
        """Send batches through the frozen blocks so many samples at a time (`train.prefix_chunk`)."""
        self.prefix_chunk = self._usual_chunk if chunk == "auto" else chunk

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
        if self.recompute_level < PREFIX_AGAIN or not len(self.frozen) or not torch.is_grad_enabled():
            return self.behind(self.frozen_forward(images))
        again = repeatable(self.frozen_forward, images)
        return self.behind(again(), again)

    def behind(self, features: torch.Tensor, again: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """Map what the frozen prefix puts out to logits (batch, classes); `again` makes it anew."""
        return self._through((self.active, self.output_module), features, to_logits=True, again=again)

    def through(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Map what goes into a part of what trains to what comes out, with its activations stored or to be recomputed.

        A stage with a forward of its own that calls its parts by this can be recomputed, too.
        """
        # gradients of all its uses in there are summed up first, whatever the way
        return self._through((part,), x.view_as(x), to_logits=False)

    def _through(
        self,
        parts: Sequence[nn.Module],
        x: torch.Tensor,
        *,
        to_logits: bool,
        again: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if self.recompute_level == 0 or not self.training or not torch.is_grad_enabled():
            for part in parts:
                x = part(x)
            return x
        within = self.recompute_level > 1
        key = (within, *map(id, parts))
        segments = self._segments.get(key)
        if segments is None:
            segments = self._segments[key] = segments_of(parts, within=within)
        return recomputed(segments, x, stored_from=stored_from(segments) if to_logits else None, again=again)

    def begin_device(self, labels: torch.Tensor) -> None:
        """Prepare for the next device; `labels`: those that it has, ascending. [nothing to do here]"""
        return

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss of a batch, to be differentiated, and the logits by which the device is judged."""
        logits = self(images)
        return functional.cross_entropy(logits, labels), logits

    def loss_behind(
        self, features: Callable[[], torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `loss` does, of what the frozen prefix put out, which is asked for where it is needed."""
        logits = self.behind(features(), features if self.recompute_level >= PREFIX_AGAIN else None)
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
            with _read_in(module) if self.streams else nullcontext():
                images = module(images)
        return images

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Have the tensors of frozen modules be there only while each runs, as a device does that streams them."""
        self.streams = True
        try:
            yield
        finally:
            self.streams = False

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
        if is_plain_sequential(network) or (self.recompute_level and torch.is_grad_enabled()):
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


@contextmanager
def _read_in(module: nn.Module) -> Iterator[None]:
    """Have a module hold copies of its tensors inside, such as are read from storage; they are let go of after."""
    tables: list[dict[str, Any]] = [
        table for inner in module.modules() for table in (inner._parameters, inner._buffers)
    ]
    stored = [dict(table) for table in tables]
    copies = {id(t): t.clone() for table in tables for t in table.values() if t is not None}
    for table in tables:
        table.update({name: copies[id(tensor)] for name, tensor in table.items() if tensor is not None})
    del copies
    try:
        yield
    finally:
        for table, before in zip(tables, stored, strict=True):
            table.update(before)


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
    """SGD on a stage, built once a stage and used by every device in turn."""

    def __init__(self, stage: Stage, config: TrainConfig):
        self.stage = stage
        self.stage.send_in_chunks(config.prefix_chunk)
        self.stage.train()
        self._modes = [(module, module.training) for module in stage.moded_modules()]
        self.config = config
        self.way: Way = WHOLE
        self.descent = Descent((stage.active, stage.output_module), stage.flat, config)

    def begin(self, values: torch.Tensor, learning_rate: float, way: Way = WHOLE) -> None:
        """Start a device: load the global values, forget the momentum of the device before; it steps by a way."""
        self.go(way)
        if any(module.training is not mode for module, mode in self._modes):
            self.stage.train()  # of a hundred modules it takes longer than a step of a small network
        self.stage.flat.load(values)
        self.descent.begin(learning_rate)

    def go(self, way: Way) -> None:
        """Take the steps that follow by a way."""
        self.way = way
        self.stage.recompute_level = way.recompute_level

    @property
    def at_work(self) -> "LocalTrainer":
        """What trains the piece that was yielded last. [all of the stage is one]"""
        return self

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
        return self._step(lambda part, some: self.stage.loss(part(), some), lambda: images, labels)

    def counted_step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Do what `step` does, with the tensors that a device has in its memory: by `train.prefix: streamed`, few."""
        with self.stage.streaming() if self.config.prefix == "streamed" else nullcontext():
            return self.step(images, labels)

    def step_behind(self, features: Callable[[], torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Take one SGD step on what the frozen prefix put out, which is held by nobody else; see `step`."""
        return self._step(self.stage.loss_behind, features, labels)

    def _step(
        self,
        loss_of: Callable[[Callable[[], torch.Tensor], torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
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
        last = len(sizes) - 1
        for number, (part, some) in enumerate(zip(parts, labels.split(sizes), strict=True)):
            loss, logits = loss_of(part, some)
            if last:
                loss = loss * (len(some) / len(labels))
            here = torch.stack([loss.detach(), squared_losses(logits.detach(), some)])
            told = here if told is None else told + here
            del logits
            # gradients go at the end at the latest: they must not be held through the next frozen forward
            with self.descent.one_pass(first=number == 0, last=number == last):
                loss.backward()
            del loss
        assert told is not None
        return told

    def drop_gradients(self) -> None:
        """Let go of the memory of all gradients."""
        self.descent.drop_gradients()

    def held_tensors(self) -> list[torch.Tensor]:
        """Return what a device holds between steps."""
        if self.config.prefix == "streamed":
            return self.held_behind()
        return [*self.stage.held_tensors(), self.descent.momentum]

    def held_behind(self) -> list[torch.Tensor]:
        """Return of that what is not the frozen blocks'."""
        return [*self.stage.trained_tensors(), self.descent.momentum]
