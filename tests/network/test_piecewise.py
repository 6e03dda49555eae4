"""A stage that trains piece by piece: what a piece holds, what it hands on, and what stays."""

import torch

from fedfreeze.config.file import make_config
from fedfreeze.network.blocks import build_network
from fedfreeze.network.piecewise import Piece, PiecewiseStage, spans_in, whole_parts
from fedfreeze.network.skip import skip_behind
from fedfreeze.network.stage import Stage

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)
CONFIG = make_config({"model": {"name": "resnet8", "width": 8}, "train": {"batch_size": 8}})


def stage_of(*pieces: Piece) -> PiecewiseStage:
    blocked = build_network(CONFIG.model, SHAPE, 10, 0)
    skips = [skip_behind(shape, blocked.shapes[-1]) for shape in blocked.shapes]
    return PiecewiseStage(blocked.blocks[: pieces[-1][1]], blocked.head, pieces, skips, CPU)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, *SHAPE, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def after_training(stage: PiecewiseStage, values: torch.Tensor) -> torch.Tensor:
    trainer = stage.trainer(CONFIG.train)
    trainer.begin(values, 0.1)
    for piece in trainer.pieces():
        trainer.step(*batch(piece))
    return stage.flat.values().clone()


def test_a_piece_changes_itself_and_the_head_and_what_follows_starts_there() -> None:
    stage = stage_of((0, 1), (1, 3))
    paths = {slot.path: slot for slot in stage.flat.slots}
    trainer = stage.trainer(CONFIG.train)
    trainer.begin(stage.flat.values().clone(), 0.1)
    before = stage.flat.values().clone()
    for piece in trainer.pieces():
        trained = trainer.at_work.stage
        for slot in trained.flat.slots:
            there = paths[slot.path]
            assert torch.equal(trained.flat.buffer[slot.begin : slot.end], stage.flat.buffer[there.begin : there.end])
        for ours, theirs in zip(stage.active, trained.frozen, strict=False):
            for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(one, other)
                assert not other.requires_grad
        before = stage.flat.values().clone()
        trainer.step(*batch(piece))
        assert torch.equal(stage.flat.values(), before)  # until the piece is done
        if piece == 1:
            last = before
    changed = {
        slot.path for slot in stage.flat.slots if not torch.equal(slot.view_of(last), slot.view_of(stage.flat.values()))
    }
    assert {path.split(".")[1] for path in changed} == {"1", "2", "head"}


def test_pieces_that_are_not_kept_have_the_same_bits() -> None:
    """As on a GPU, where one piece at a time is there."""
    kept, anew = stage_of((0, 1), (1, 2), (2, 3)), stage_of((0, 1), (1, 2), (2, 3))
    values = kept.flat.values().clone()
    expected = [after_training(kept, values) for _ in range(2)]
    trainer = anew.trainer(CONFIG.train)
    trainer._keeps = False
    for _ in range(2):
        trainer.begin(values, 0.1)
        for piece in trainer.pieces():
            assert list(trainer._made) == [piece]
            trainer.step(*batch(piece))
        assert not trainer._made
        assert torch.equal(anew.flat.values(), expected[0])
    assert torch.equal(*expected)


def test_a_piece_holds_nothing_of_later_blocks() -> None:
    stage = stage_of((0, 1), (1, 2), (2, 3))
    sizes = []
    trainer = stage.trainer(CONFIG.train)
    trainer.begin(stage.flat.values().clone(), 0.1)
    blocks = [sum(t.numel() for t in (*b.parameters(), *b.buffers())) for b in stage.active]
    head = sum(p.numel() for p in stage.output_module.parameters())
    for piece in trainer.pieces():
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in trainer.held_tensors()}
        counters = sum(
            t.numel() for b in list(stage.active)[: piece + 1] for t in b.buffers() if not t.is_floating_point()
        )
        momentum = sum(p.numel() for p in (*stage.active[piece].parameters(), *stage.output_module.parameters()))
        assert (
            sum(held.values()) == 4 * (sum(blocks[: piece + 1]) + head + momentum) + 4 * counters
        )  # they have 8 bytes
        sizes.append(sum(held.values()))
    assert sizes == sorted(sizes)


def test_what_only_runs_is_not_sent() -> None:
    stage = stage_of((1, 2))
    first = sum(t.numel() for t in (*stage.active[0].parameters(), *stage.active[0].buffers()) if t.is_floating_point())
    assert stage.received_elements == first
    index = stage.sent(torch.arange(len(stage.flat)))
    assert int((index < 0).sum()) == first
    plain = Stage(0, [], *whole_parts(list(stage.active), stage.output_module[1]), CPU)
    assert plain.received_elements == 0
    assert int((plain.sent(torch.arange(len(plain.flat))) < 0).sum()) == 0


def test_spans_are_stretches_of_the_whole() -> None:
    blocked = build_network(CONFIG.model, SHAPE, 10, 0)
    whole = Stage(0, [], *whole_parts(blocked.blocks, blocked.head), CPU)
    part = stage_of((0, 2))
    spans = spans_in(part.flat, whole.flat)
    assert sum(here.stop - here.start for here, _ in spans) == len(part.flat)
    assert len(spans) == 2  # parameters of the blocks; those of the head and statistics, which follow one another
    assert all(torch.equal(part.flat.buffer[here], whole.flat.buffer[there]) for here, there in spans)


def test_tensors_follow_the_flat_buffer_where_it_is_laid() -> None:
    stage = stage_of((0, 2), (2, 3))
    before = stage.flat.values().clone()
    stage.move(CPU)
    stage.begin_asking()
    stage._lay_on(CPU)
    stage.flat.load(2 * before)
    assert torch.equal(stage.flat.values(), 2 * before)
    for slot in stage.flat.slots:
        assert torch.equal(slot.tensor.detach(), 2 * slot.view_of(before))
    assert stage(batch(0)[0]).shape == (8, 10)
