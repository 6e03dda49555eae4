"""`fedfreeze plan --cut`: the cheapest cut for a share of the fleet, and those that it replaces."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from fedfreeze.config.file import dump_config, is_name
from fedfreeze.config.schema import Config
from fedfreeze.config.ways import ways_of
from fedfreeze.data.store import Data, open_store, prepare
from fedfreeze.errors import ConfigError, storage_error
from fedfreeze.fleet.devices import Fleet, make_fleet
from fedfreeze.plan.cut import Proposal, cheapest, cut_as_it_is, proposal_of, propose, wanted_devices
from fedfreeze.plan.cut_search import Cut
from fedfreeze.plan.step_costs import with_split
from fedfreeze.plan.table import plan_rows, stage_table, title_of
from fedfreeze.run.reporter import LastingConsole
from fedfreeze.storage.files import write_whole
from fedfreeze.units import MIB


def plan_cut(config: Config, *, share: float, write: Path | None, as_json: bool) -> None:
    """Propose the cheapest cut with which a share of the devices can join every stage; write that configuration.

    Raises ConfigError if no cut does, after printing what the best one reaches.
    """
    data = open_store(prepare(config.data))
    fleet = make_fleet(config.fleet, config.seed)
    console = LastingConsole(stderr=as_json)
    wanted = wanted_devices(share, fleet)
    cuts: list[Cut] = []
    with console.status("measuring cuts") as status:
        for cut in propose(config, data.image_shape, data.num_classes, fleet, share):
            cuts.append(cut)
            status.update(f"measuring cuts: {_blocks(cut)} need {cut.peak_bytes / MIB:.2f} MiB")
        chosen = cheapest(cuts, wanted)
        proposal = proposal_of(config, chosen.split, data.image_shape, data.num_classes, fleet)
        usual = _usual(config, data, fleet)
    reached = chosen.eligible >= wanted
    others = [cut for cut in cuts if cut is not chosen]
    if as_json:
        found = {
            "devices": len(fleet),
            "share": share,
            "reached": reached,
            "usual": None if usual is None else _whole_as_json(usual, config, fleet),
            "proposal": _whole_as_json(proposal, config, fleet),
            "runners_up": [_as_json(cut, config) for cut in others],
        }
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print_tables(console, proposal, others, usual, config, data, fleet, reached)
    if not reached:
        raise ConfigError(
            f"--share: no cut lets {share:.0%} of the devices join every stage; the best has a peak of "
            f"{chosen.peak_bytes / MIB:.2f} MiB and lets {chosen.eligible / len(fleet):.0%} join (lower "
            "train.batch_size or model.width, or try another train.fit or method.output_module)"
        )
    if write is not None:
        # a name of its own, or the run would want the folder of the usual cut
        _write(write, replace(with_split(config, chosen.split), name=write.stem))
        console.print(
            f"wrote {write}; train with: fedfreeze run {write}", soft_wrap=True, highlight=False, markup=False
        )
    else:
        console.print(f"train with --model.split='{_split(chosen)}'", soft_wrap=True, highlight=False, markup=False)


def _usual(config: Config, data: Data, fleet: Fleet) -> Proposal | None:
    """Return the cut that the configuration has now; None for a network of the user's own without one."""
    if config.model.factory is not None and config.model.split is None:
        return None
    return cut_as_it_is(config, data.image_shape, data.num_classes, fleet)


def _print_tables(
    console: LastingConsole,
    proposal: Proposal,
    others: Sequence[Cut],
    usual: Proposal | None,
    config: Config,
    data: Data,
    fleet: Fleet,
    reached: bool,
) -> None:
    cut = proposal.cut
    if usual is not None:
        console.print(stage_table(plan_rows(usual.costs, fleet), f"the cut as it is: {title_of(config, data, fleet)}"))
        console.print(_told(usual.cut, config, fleet), soft_wrap=True, highlight=False)
        console.print()
    console.print(stage_table(plan_rows(proposal.costs, fleet), "the proposal" if reached else "the smallest peak"))
    console.print(_told(cut, config, fleet), soft_wrap=True, highlight=False)
    if others:
        console.print()
        console.print(cuts_table([*others, cut], cut, config, len(fleet), reached))
    stored = ", without the frozen blocks" if config.train.prefix == "stored" else ""
    console.print(
        f"GFLOP/step: of a full batch{stored}, the mean over stages and, in each, over the devices that can join "
        "it.\nHow many rounds a cut takes, and which accuracy it reaches, is not known before.",
        soft_wrap=True,
        highlight=False,
    )


def _told(cut: Cut, config: Config, fleet: Fleet) -> str:
    """Return the lines under the table of a cut's stages."""
    lines = (
        f"{_blocks(cut)}: {_gflop(cut)} GFLOP/step, peak {cut.peak_bytes / MIB:.2f} MiB, {cut.eligible} of "
        f"{len(fleet)} devices can join every stage"
    )
    if len(cut.stages[0]) > 1:
        ways = "; ".join(f"{i}: {_ways(takers, config)}" for i, takers in enumerate(cut.takers, start=1))
        lines += f"\ndevices by way, in stage {ways}"
    return lines


def _ways(takers: Sequence[int], config: Config) -> str:
    """Return how many devices go each way, of which some do."""
    names = [way.name for way in ways_of(config.train.fit)]
    return ", ".join(f"{count} {name}" for count, name in zip(takers, names, strict=True) if count) or "none"


def cuts_table(cuts: Sequence[Cut], chosen: Cut, config: Config, devices: int, reached: bool) -> Table:
    """Return the proposal among the cuts that it replaces, a row for each number of blocks."""
    title = "the cheapest cut of each number of blocks" if reached else "the smallest peaks"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), header_style="underline", title_justify="left")
    several = len(chosen.stages[0]) > 1
    table.add_column("blocks", justify="right")
    table.add_column("GFLOP/step", justify="right")
    table.add_column("peak MiB", justify="right")
    table.add_column("join", justify="right")
    if several:
        table.add_column("devices by way, mean of the stages")
    table.add_column("blocks begin at", overflow="fold")
    for cut in sorted(cuts, key=lambda cut: cut.blocks):
        table.add_row(
            f"{'* ' if cut is chosen else ''}{cut.blocks}",
            _gflop(cut),
            f"{cut.peak_bytes / MIB:.2f}",
            f"{cut.eligible}/{devices}",
            *([_shares(cut, config)] if several else []),
            ", ".join(cut.split),
        )
    table.caption, table.caption_justify = "* the proposal" if reached else None, "left"
    return table


def _shares(cut: Cut, config: Config) -> str:
    """Return which share of the devices that can join goes each way, the mean over the stages."""
    found = []
    for number, way in enumerate(ways_of(config.train.fit)):
        share = sum(takers[number] / max(1, sum(takers)) for takers in cut.takers) / len(cut.takers)
        if share:
            found.append(f"{way.name} {share:.0%}")
    return ", ".join(found) or "none"


def _as_json(cut: Cut, config: Config) -> dict[str, Any]:
    names = [way.name for way in ways_of(config.train.fit)]
    return {
        "split": list(cut.split),
        "blocks": cut.blocks,
        "peak_mib": cut.peak_bytes / MIB,
        "eligible": cut.eligible,
        "step_gflop": cut.step_flops / 1e9 if cut.step_flops < math.inf else None,
        "devices_by_way": [dict(zip(names, takers, strict=True)) for takers in cut.takers],
    }


def _whole_as_json(proposal: Proposal, config: Config, fleet: Fleet) -> dict[str, Any]:
    return _as_json(proposal.cut, config) | {"stages": plan_rows(proposal.costs, fleet)}


def _blocks(cut: Cut) -> str:
    return f"{cut.blocks} block{'s' * (cut.blocks > 1)}"


def _gflop(cut: Cut) -> str:
    """Return the operations of a step in three or four digits; "-": some stage no device can join."""
    gflop = cut.step_flops / 1e9
    if not math.isfinite(gflop):
        return "-"
    return f"{gflop:.{max(0, min(6, 2 - math.floor(math.log10(gflop))))}f}" if gflop else "0"


def _split(cut: Cut) -> str:
    return json.dumps(list(cut.split)).replace('"', "")


def _write(path: Path, config: Config) -> None:
    if path.suffix not in (".yaml", ".yml") or not is_name(path.stem):
        raise ConfigError(
            f"--write: {path} must be letters, digits, '.', '_' and '-', and end in .yaml; the run is called after it"
        )
    try:
        write_whole(path, dump_config(config))
    except OSError as error:
        raise storage_error("write", path, error) from None
