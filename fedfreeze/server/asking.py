"""Who is asked together before a round, and by which rank."""

from collections.abc import Iterable, Sequence

from fedfreeze.messages import AskedGroup


def groups_to_ask(
    devices: Iterable[int],
    samples: Sequence[int],
    memory_cap_bytes: Sequence[int | None],
    *,
    most_samples: int,
    world_size: int,
) -> tuple[AskedGroup, ...]:
    """Cut devices, ascending, into groups of `most_samples` samples at most, and give each group to a rank. [ours]

    A device with more is alone. The groups do not depend on the ranks, so that answers are the same bits on any number;
    the largest group goes to the rank with least work.
    """
    groups: list[list[int]] = []
    sizes: list[int] = []
    for device in devices:
        if not groups or sizes[-1] + samples[device] > most_samples:
            groups.append([])
            sizes.append(0)
        groups[-1].append(device)
        sizes[-1] += samples[device]
    load = [0] * world_size
    ranks = [0] * len(groups)
    for number in sorted(range(len(groups)), key=lambda number: (-sizes[number], number)):
        ranks[number] = min(range(world_size), key=lambda rank: (load[rank], rank))
        load[ranks[number]] += sizes[number]
    return tuple(
        AskedGroup(rank, tuple(group), tuple(memory_cap_bytes[device] for device in group))
        for rank, group in zip(ranks, groups, strict=True)
    )
