"""A model of torch's CUDA caching allocator: what it reserves for a sequence of allocations, without a GPU.

Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.11, with its usual settings (no expandable segments, no
max_split_size, no roundup divisions) and one stream.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

from fedfreeze.units import MIB

GRANULE_BYTES = 512
"""Every request is rounded up to a multiple of this."""
SMALL_BYTES = 1 * MIB
"""The largest request of the small pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB
"""From this size on a request that finds no room has a segment of its own."""
OWN_STEP_BYTES = 2 * MIB
"""What the size of such a segment is a multiple of."""


class SegmentLimitError(Exception):
    """The allocator refuses a request: what it would reserve is over its limit."""

    def __init__(self, request_bytes: int, needed_bytes: int, limit_bytes: int):
        """`needed_bytes`: what would be reserved."""
        self.request_bytes = request_bytes
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes
        super().__init__(f"a segment for {request_bytes} bytes needs {needed_bytes} of {limit_bytes} bytes")


def rounded(size: int) -> int:
    """Return the bytes of the block that a request of so many bytes takes."""
    return max(1, -(-size // GRANULE_BYTES)) * GRANULE_BYTES


def segment_bytes(block_bytes: int) -> int:
    """Return the bytes of the segment that is reserved where a block finds no room."""
    if block_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block_bytes // OWN_STEP_BYTES) * OWN_STEP_BYTES


class Block:
    """A piece of a segment, which is used by one request or free."""

    __slots__ = ("address", "before", "behind", "free", "pool", "segment", "size")

    def __init__(self, address: int, size: int, segment: int, pool: "list[tuple[int, int, Block]]"):
        self.address, self.size = address, size
        self.segment = segment
        """The address at which its segment begins."""
        self.pool = pool
        self.free = False
        self.before: Block | None = None
        """Its neighbours in the segment."""
        self.behind: Block | None = None


Pool = list[tuple[int, int, Block]]
"""Free blocks by size and address, ascending; no two have the same address, so blocks are never compared."""


class SegmentAllocator:
    """Reserves segments and cuts blocks from them, as torch does on a GPU. [torch]

    All sizes are bytes. `placed` gives the address of a new segment of a size; by default they follow one another, as
    where a GPU maps memory is not published.
    """

    def __init__(self, limit_bytes: int | None = None, placed: Callable[[int], int] | None = None):
        """`limit_bytes`: what it may reserve; None: as much as is asked."""
        self.limit_bytes = limit_bytes
        self.reserved_bytes = 0
        self.peak_bytes = 0
        """The most that was reserved at once."""
        self.live_bytes = 0
        """What blocks in use take, rounded up."""
        self._placed = placed or self._behind_the_last
        self._next_address = OWN_STEP_BYTES
        self._small: Pool = []
        self._large: Pool = []
        self._segments: dict[int, Block] = {}  # by address, the first block of each

    def alloc(self, size: int) -> Block:
        """Return a block for a request. Raises SegmentLimitError."""
        size = rounded(size)
        pool = self._small if size <= SMALL_BYTES else self._large
        place = bisect_left(pool, (size, 0))
        found = pool.pop(place)[2] if place < len(pool) else self._reserve(size, pool)
        left = found.size - size
        if left >= GRANULE_BYTES if pool is self._small else left > SMALL_BYTES:
            rest = Block(found.address + size, left, found.segment, pool)
            rest.before, rest.behind = found, found.behind
            if found.behind is not None:
                found.behind.before = rest
            found.behind, found.size = rest, size
            self._put(rest)
        found.free = False
        self.live_bytes += found.size
        return found

    def free(self, block: Block) -> None:
        """Take a block back, and join it with free neighbours."""
        self.live_bytes -= block.size
        for other in (block.before, block.behind):
            if other is None or not other.free:
                continue
            self._take(other)
            if other is block.before:
                block.address, block.before = other.address, other.before
                if other.before is not None:
                    other.before.behind = block
            else:
                block.behind = other.behind
                if other.behind is not None:
                    other.behind.before = block
            block.size += other.size
        if block.before is None:
            self._segments[block.segment] = block
        self._put(block)

    def give_back(self) -> None:
        """Give back all segments in which nothing is used, as torch.cuda.empty_cache does."""
        for pool in (self._small, self._large):
            kept = []
            for entry in pool:
                block = entry[2]
                if block.before is None and block.behind is None:
                    self.reserved_bytes -= block.size
                    del self._segments[block.segment]
                else:
                    kept.append(entry)
            pool[:] = kept

    def segments(self) -> list[list[Block]]:
        """Return the blocks of each segment in order, segments in the order of their addresses."""
        found: list[list[Block]] = []
        for _, first in sorted(self._segments.items()):
            blocks, block = [first], first.behind
            while block is not None:
                blocks.append(block)
                block = block.behind
            found.append(blocks)
        return found

    def take_up(self, sizes: Sequence[tuple[int, bool]], address: int, *, small: bool) -> list[Block]:
        """Begin with a segment as torch.cuda.memory_snapshot shows it: size of each block, and whether it is free."""
        pool = self._small if small else self._large
        blocks: list[Block] = []
        at = address
        for size, free in sizes:
            block = Block(at, size, address, pool)
            if blocks:
                block.before, blocks[-1].behind = blocks[-1], block
            blocks.append(block)
            at += size
            if free:
                self._put(block)
            else:
                self.live_bytes += size
        self._segments[address] = blocks[0]
        self.reserved_bytes += at - address
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        return blocks

    def _reserve(self, size: int, pool: Pool) -> Block:
        """Return a new segment as one block; where the limit is hit, what is cached is given back first."""
        total = segment_bytes(size)
        if self.limit_bytes is not None and self.reserved_bytes + total > self.limit_bytes:
            self.give_back()
            if self.reserved_bytes + total > self.limit_bytes:
                raise SegmentLimitError(size, self.reserved_bytes + total, self.limit_bytes)
        self.reserved_bytes += total
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        address = self._placed(total)
        block = self._segments[address] = Block(address, total, address, pool)
        return block

    def _behind_the_last(self, total: int) -> int:
        address = self._next_address
        self._next_address += total
        return address

    def _put(self, block: Block) -> None:
        block.free = True
        insort(block.pool, (block.size, block.address, block))

    def _take(self, block: Block) -> None:
        del block.pool[bisect_left(block.pool, (block.size, block.address))]
