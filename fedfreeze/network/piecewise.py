"""What a device trains piece by piece within a round: one piece behind frozen ones, the later ones skipped."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fedfreeze.config.schema import TrainConfig
from fedfreeze.config.ways import WHOLE, Way
from fedfreeze.network.flat import FlatPart
from fedfreeze.network.stage import LocalTrainer, Stage
from fedfreeze.network.state import copied

Piece = tuple[int, int]
"""A run of neighbouring blocks: the first, and the one behind the last."""


def whole_parts(blocks: Sequence[nn.Module], head: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """Return blocks and head as parts of a stage whose tensors have the names that they have in a PiecewiseStage."""
    return nn.Sequential(*blocks), nn.Sequential(OrderedDict(head=head))


def spans_in(part: FlatPart, whole: FlatPart) -> list[tuple[slice, slice]]:
    """Return which stretches of a flat part are which of a larger one, by the names of tensors."""
    slots = {slot.path: slot for slot in whole.slots}
    found: list[tuple[slice, slice]] = []
    for slot in part.slots:
        there = slots[slot.path]
        if found and (found[-1][0].stop, found[-1][1].stop) == (slot.begin, there.begin):
            last = found.pop()
            found.append((slice(last[0].start, slot.end), slice(last[1].start, there.end)))
        else:
            found.append((slice(slot.begin, slot.end), slice(there.begin, there.end)))
    return found


class PiecewiseStage(Stage):
    """Blocks up to the last that a device trains, and the head, in storage that is not the device's memory. [FeDepth]

    Each piece in turn is a stage of its own (`make`), with tensors of its own: the blocks before it, frozen, the piece,
    and a skip connection to the head, which trains along. So the memory of a piece is that of a stage: later blocks,
    and momentum of earlier ones, are not in it. The flat buffer here is what the device has of the global values;
    `take` writes into it what a piece learnt.
    """

    output_module: nn.Sequential

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        pieces: Sequence[Piece],
        skips: Sequence[nn.Module],
        device: torch.device,
        widest: Sequence[int] = (),
    ):
        """`blocks`: all up to the end of the last piece; `skips`: what leads from each of them to the head.

        `widest`: the most numbers that a module of each block puts out for one image (Stage's `widest_frozen`).
        """
        output_module = nn.Sequential(OrderedDict(skip=skips[len(blocks) - 1], head=head))
        super().__init__(0, [], nn.Sequential(*blocks), output_module, device)
        self.pieces = tuple(pieces)
        self.device = device
        self._widest = tuple(widest)
        self._skips = (tuple(skips),)  # in a tuple: a skip has no tensors, and is in the output module of its piece
        trained = {f"active.{block}." for begin, end in pieces for block in range(begin, end)} | {"output_module."}
        self._untrained = [slot for slot in self.flat.slots if not slot.path.startswith(tuple(trained))]

    def trainer(self, config: TrainConfig) -> "PiecewiseTrainer":
        """See Stage."""
        return PiecewiseTrainer(self, config)

    def sent(self, index: torch.Tensor) -> torch.Tensor:
        """See Stage. Blocks that it only runs are not sent."""
        for slot in self._untrained:
            index[slot.begin : slot.end] = -1
        return index

    @property
    def received_elements(self) -> int:
        """See Stage."""
        return sum(slot.end - slot.begin for slot in self._untrained)

    def begin_asking(self) -> None:
        """See Stage."""
        self.move(self.device)

    def move(self, device: torch.device) -> None:
        """Move all its tensors, such as out of the memory of a GPU while a piece trains there."""
        if self.flat.buffer.device != device:
            self._lay_on(device)

    def _lay_on(self, device: torch.device) -> None:
        values = self.flat.values().to(device)
        views = {id(slot.tensor) for slot in self.flat.slots if slot.tensor.dtype == torch.float32}
        for tensor in [*self.parameters(), *self.buffers()]:
            if id(tensor) not in views:
                tensor.data = tensor.data.to(device)
        self.flat.buffer = values
        for slot in self.flat.slots:
            if id(slot.tensor) in views:
                slot.tensor.data = slot.view_of(values)

    def make(self, number: int) -> Stage:
        """Return a piece as a stage, with tensors of its own on the device."""
        begin, end = self.pieces[number]
        *blocks, head = copied([*list(self.active.children())[:end], self.output_module[1]])
        active = nn.Sequential(OrderedDict((str(i), blocks[i]) for i in range(begin, end)))
        (skips,) = self._skips
        output_module = nn.Sequential(OrderedDict(skip=skips[end - 1], head=head))
        widest = max(self._widest[:begin], default=0)
        return Stage(number, blocks[:begin], active, output_module, self.device, widest_frozen=widest)

    @torch.no_grad()
    def give(self, piece: Stage, spans: Sequence[tuple[slice, slice]]) -> torch.Tensor:
        """Load the values of now into a piece's frozen blocks; return those of its flat buffer. See `take`."""
        blocks = list(self.active.children())[: len(piece.frozen)]
        for theirs, ours in zip(piece.frozen, blocks, strict=True):
            for their_tensor, our_tensor in zip(_tensors(theirs), _tensors(ours), strict=True):
                their_tensor.copy_(our_tensor)
        values = torch.zeros(len(piece.flat), device=self.flat.buffer.device)
        for here, there in spans:
            values[here] = self.flat.buffer[there]
        return values

    @torch.no_grad()
    def take(self, piece: Stage, spans: Sequence[tuple[slice, slice]]) -> None:
        """Take over what a piece learnt; `spans`: where its elements are in the flat buffer (`spans_in`)."""
        values = self.flat.buffer.clone()
        learnt = piece.flat.values().to(values.device)
        for here, there in spans:
            values[there] = learnt[here]
        self.flat.load(values)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


class PiecewiseTrainer(LocalTrainer):
    """SGD on a piecewise stage: what it is asked it hands on to the trainer of the piece that is at work.

    Momentum begins at zero with each piece. On a CPU the pieces are kept for the devices that follow; on a GPU only the
    one at work is there.
    """

    stage: PiecewiseStage

    def __init__(self, stage: PiecewiseStage, config: TrainConfig):
        # not LocalTrainer's own: nothing of the stage as a whole trains, so it has neither gradients nor momentum
        self.stage = stage
        self.config = config
        self.learning_rate = config.learning_rate
        self.way: Way = WHOLE
        self._keeps = stage.device.type == "cpu"
        self._made: dict[int, tuple[LocalTrainer, list[tuple[slice, slice]]]] = {}
        self._at_work = 0

    @property
    def at_work(self) -> LocalTrainer:
        """See LocalTrainer."""
        return self._made[self._at_work][0]

    def begin(self, values: torch.Tensor, learning_rate: float, way: Way = WHOLE) -> None:
        """See LocalTrainer. The pieces follow in `pieces`."""
        if not self._keeps:
            self.stage.move(torch.device("cpu"))
        self.stage.flat.load(values)
        self.learning_rate = learning_rate
        self.go(way)

    def go(self, way: Way) -> None:
        """See LocalTrainer."""
        self.way = way
        for trainer, _ in self._made.values():
            trainer.go(way)

    def pieces(self) -> Iterator[int]:
        """See LocalTrainer. Each piece begins with what those before have learnt."""
        for number in range(len(self.stage.pieces)):
            self._at_work = number
            if number not in self._made:
                made = self.stage.make(number)
                self._made[number] = made.trainer(self.config), spans_in(made.flat, self.stage.flat)
                del made
            spans = self._made[number][1]
            self.at_work.begin(self.stage.give(self.at_work.stage, spans), self.learning_rate, self.way)
            yield number
            self.stage.take(self.at_work.stage, spans)
            self._let_go()

    def _let_go(self) -> None:
        if not self._keeps:
            self._made.clear()

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See LocalTrainer."""
        return self.at_work.step(images, labels)

    def counted_step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See LocalTrainer."""
        return self.at_work.counted_step(images, labels)

    def drop_gradients(self) -> None:
        """See LocalTrainer."""
        for trainer, _ in self._made.values():
            trainer.drop_gradients()
        self._let_go()

    def held_tensors(self) -> list[torch.Tensor]:
        """See LocalTrainer. What the piece at work holds."""
        return self.at_work.held_tensors()

    def held_behind(self) -> list[torch.Tensor]:
        """See LocalTrainer."""
        return self.at_work.held_behind()

    def frozen_forward(self, images: torch.Tensor) -> torch.Tensor | None:
        """See LocalTrainer."""
        return self.at_work.frozen_forward(images)
