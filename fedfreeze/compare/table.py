"""The tables of a comparison: for a terminal, as Markdown, as JSON, and as plain cells for the page."""

import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedfreeze.compare.figures_of import Comparison, Figure, Row, as_plain

WAYS_CAPTION = "ways to take a step (train.fit): share of device-rounds"
_NARROWEST, _WIDEST = 60, 120  # columns of a terminal that tables are laid out for
_LABEL_WIDTH = 20  # terminal columns, at least, that a setting's label has beside its figures


@dataclass(frozen=True)
class Column:
    """A column of figures."""

    figure: str
    heading: str
    """With the unit."""
    divisor: float
    """A figure divided by this is in the unit of the heading."""
    decimals: int
    is_way: bool = False
    """Whether the figure is the share of a way."""

    def of(self, row: Row) -> Figure:
        """Return the figure of a setting."""
        return (row.ways if self.is_way else row.figures)[self.figure]

    def cell(self, row: Row) -> str:
        """Return mean and spread, and how many seeds have this figure where it is not all."""
        figure = self.of(row)
        known, seeds = len(figure.known), len(figure.values)
        some = f" ({known}/{seeds})" if known < seeds and seeds > 1 else ""
        if figure.mean is None:
            return f"-{some}"
        spread = f" ± {self._number(figure.spread)}" if figure.spread else ""
        return f"{self._number(figure.mean)}{spread}{some}"

    def _number(self, value: float) -> str:
        text = f"{value / self.divisor:.{self.decimals}f}"
        return text.removeprefix("-") if not text.strip("-0.") else text  # no "-0"


@dataclass(frozen=True)
class Group:
    """Columns that stand in one table."""

    caption: str
    columns: tuple[Column, ...]


def column_groups(comparison: Comparison) -> list[Group]:
    """Return the tables; units follow from how large the figures are, one unit a column."""
    rows = comparison.rows

    def column(name: str, heading: str, divisor: float = 1.0, decimals: int | None = None) -> Column:
        largest = _largest([row.figures[name] for row in rows]) / divisor
        return Column(name, heading, divisor, _decimals(largest) if decimals is None else decimals)

    def rounds(name: str, heading: str) -> Column:
        means = [row.figures[name].mean or 0.0 for row in rows]
        return column(name, heading, decimals=0 if all(mean == int(mean) for mean in means) else 1)

    def share(name: str, heading: str) -> Column:
        return column(name, heading, 0.01, 0 if all(len(row.setting.runs) == 1 for row in rows) else 1)

    unit_s, time_unit = _unit([row.figures["emulated_s"] for row in rows], [(3600.0, "h"), (1.0, "s")], 7200.0)
    unit_b, data_unit = _unit([row.figures["traffic_bytes"] for row in rows], [(1e9, "GB"), (1e6, "MB")], 1e9)
    operations = [row.figures["flops"] for row in rows]
    unit_f, flop_unit = _unit(operations, [(1e15, "PFLOP"), (1e12, "TFLOP")], 1e15)
    # runs of an older revision have none
    computing = (column("flops", f"computing ({flop_unit})", unit_f),) if any(each.known for each in operations) else ()
    # which ways there are follows from the runs; where all went the same, it is nothing to compare
    ways = tuple(
        Column(way, f"{way} %", 0.01, 0 if all(len(row.setting.runs) == 1 for row in rows) else 1, is_way=True)
        for way in rows[0].ways
    )
    target = comparison.target.accuracy
    to = "to target" if target is None else f"to {target:.4g}"
    return [
        Group(
            "accuracy on the test data, and what it took to reach the target",
            (
                column("final_accuracy", "final accuracy", decimals=3),
                column("best_accuracy", "best accuracy", decimals=3),
                rounds("rounds_to_target", f"rounds {to}"),
                column("emulated_s_to_target", f"time {to} ({time_unit})", unit_s),
            ),
        ),
        Group(
            "length, traffic, and which devices took part",
            (
                rounds("rounds", "rounds"),
                column("emulated_s", f"emulated time ({time_unit})", unit_s),
                column("traffic_bytes", f"traffic ({data_unit})", unit_b),
                *computing,
                share("participation", "trained %"),
                share("inclusion", "could train %"),
            ),
        ),
        Group(
            "memory of a device",
            (
                column("peak_memory_mib", "peak MiB"),
                column("mean_memory_mib", "mean MiB"),
                column("full_memory_mib", "full model MiB"),
                share("memory_cut_peak", "cut of peak %"),
            ),
        ),
        *([Group(WAYS_CAPTION, ways)] if len(ways) > 1 else []),
    ]


def _largest(figures: Sequence[Figure]) -> float:
    return max((abs(figure.mean) for figure in figures if figure.mean is not None), default=0.0)


def _unit(figures: Sequence[Figure], units: Sequence[tuple[float, str]], limit: float) -> tuple[float, str]:
    """Return the large unit if the largest figure is at or over the limit, else the small one."""
    return units[0] if _largest(figures) >= limit else units[1]


def _decimals(largest: float) -> int:
    """Return how many decimals show three or four digits of the largest figure; at most three."""
    return 2 if largest <= 0 else max(0, min(3, 2 - math.floor(math.log10(largest))))


def heading_notes(comparison: Comparison) -> list[str]:
    """Return the lines that say how to read the tables."""
    several = any(len(row.setting.runs) > 1 for row in comparison.rows)
    notes = [comparison.target.text]
    if several:
        notes.append(
            "mean ± sample standard deviation over n seeds (no ±: all alike); (1/3): one of three seeds has this figure"
        )
    return notes


def terminal_text(comparison: Comparison, width: int | None = None) -> str:
    """Return the tables and notices for a terminal of `width` columns; none: of this one."""
    width = max(_NARROWEST, min(_WIDEST, width or shutil.get_terminal_size((100, 24)).columns))
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False, color_system=None)
    first = True
    for group in column_groups(comparison):
        for number, columns in enumerate(_fitting(group.columns, comparison.rows, width - _LABEL_WIDTH - 4 * first)):
            caption = f"{group.caption}{', continued' if number else ''}"
            console.print(Text(caption))  # not as the table's title, which is broken where the table is narrow
            console.print(_terminal_table(columns, comparison.rows, width, with_n=first))
            console.print()
            first = False
    text = "\n".join(line.rstrip() for line in file.getvalue().splitlines())
    notes = [*heading_notes(comparison), *(f"notice: {notice}" for notice in comparison.notices)]
    return "\n".join([text, *notes])


def _terminal_table(columns: Sequence[Column], rows: Sequence[Row], width: int, *, with_n: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    widths = [_width(column, rows) for column in columns]
    longest = max(len("setting"), *(len(row.setting.title) for row in rows))
    table.add_column(
        "setting", overflow="fold", width=min(longest, width - 2 - sum(widths) - 2 * len(widths) - 4 * with_n)
    )
    if with_n:
        table.add_column("n", justify="right", width=2)
    for column, needed in zip(columns, widths, strict=True):
        table.add_column(column.heading, justify="right", width=needed)
    for row in rows:
        cells = [str(len(row.setting.runs))] if with_n else []
        # Text: what stands in brackets is no markup
        table.add_row(*(Text(cell) for cell in (row.setting.title, *cells, *(column.cell(row) for column in columns))))
    return table


def _width(column: Column, rows: Sequence[Row]) -> int:
    """Return the terminal columns in which no cell is broken, and the heading has two lines at most."""
    words = column.heading.split()
    halves = [max(len(" ".join(words[:i])), len(" ".join(words[i:]))) for i in range(len(words))]
    return max(min(halves), *(len(column.cell(row)) for row in rows))


def _fitting(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[list[Column]]:
    """Split columns into tables that fit beside the label."""
    tables: list[list[Column]] = []
    left = 0
    for column in columns:
        needed = _width(column, rows) + 2
        if needed > left or not tables:
            tables.append([])
            left = width
        tables[-1].append(column)
        left -= needed
    return tables


def markdown_table(comparison: Comparison) -> str:
    """Return all figures as one GitHub table."""
    columns = [column for group in column_groups(comparison) for column in group.columns]
    head = ["setting", "n", *(column.heading for column in columns)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in comparison.rows:
        lines.append([row.setting.title, str(len(row.setting.runs)), *(column.cell(row) for column in columns)])
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def markdown_page(comparison: Comparison) -> str:
    """Return the GitHub table with the notes under it."""
    notes = [*heading_notes(comparison), *(f"Notice: {notice}" for notice in comparison.notices)]
    return "\n".join([markdown_table(comparison), "", *(f"- {_escaped(note)}" for note in notes)])


def _escaped(text: str) -> str:
    """Keep Markdown from taking a sign in a label for its own."""
    for sign in "\\|*_<>`[]":
        text = text.replace(sign, f"\\{sign}")
    return text


def as_json(comparison: Comparison) -> str:
    """Return a comparison as JSON, in plain units."""
    return json.dumps(as_plain(comparison), indent=2, allow_nan=False, default=str)
