"""The page of a comparison: one HTML file that needs nothing else, in the light, in the dark and on paper."""

import base64
from collections.abc import Sequence
from html import escape

import fedfreeze
from fedfreeze.compare.figures_of import DEFAULT_TARGET_SHARE, Comparison
from fedfreeze.compare.pictures import Picture
from fedfreeze.compare.settings import plain
from fedfreeze.compare.table import column_groups, heading_notes

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #555; --paper: #fff; --line: #ccc; --card: #f4f4f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --soft: #b0b0ae; --paper: #17181a; --line: #45474a; --card: #222427; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, dd, li { max-width: 48rem; }
.table { overflow-x: auto; margin: 1rem 0; }
.table:focus-visible { outline: 2px solid currentColor; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { vertical-align: bottom; border-bottom-width: 2px; }
th:first-child, td.text, th.text { text-align: left; }
tbody th { font-weight: 500; min-width: 10rem; max-width: 24rem; overflow-wrap: break-word; }
td.text { overflow-wrap: break-word; max-width: 18rem; }
td.figure { white-space: nowrap; }
.notices { background: var(--card); border-left: 4px solid #D55E00; margin: 1rem 0; padding: .6rem 1rem .6rem 2rem; }
figure { margin: 1.5rem 0; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); padding: .4rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; max-width: 48rem; }
dt { font-weight: 600; margin-top: .5rem; }
dd { margin: 0; }
footer { color: var(--soft); font-size: .85rem; margin-top: 2rem; }
@media print {
  :root { --ink: #000; --soft: #333; --paper: #fff; --line: #999; --card: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .table { overflow: visible; }
  table { font-size: 8pt; }
  tbody th { min-width: 0; }
  img { width: auto; max-width: 100%; max-height: 19cm; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

_TITLES = {
    "accuracy_rounds.png": "Accuracy over rounds",
    "accuracy_time.png": "Accuracy over emulated time",
    "accuracy_traffic.png": "Accuracy over traffic",
    "memory.png": "Memory of each device",
    "participation.png": "Who took part",
    "perturbation.png": "Perturbation and freezing",
}


def report_page(comparison: Comparison, pictures: Sequence[Picture]) -> str:
    """Return the page; pictures are in it, and nothing is loaded from anywhere."""
    title = "Comparison of federated runs"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<header>",
        f"<h1>{title}</h1>",
        f"<p>{escape(_counts(comparison))}</p>",
        "</header>",
        "<main>",
        _notices(comparison),
        "<h2>Figures</h2>",
        *(f"<p>{escape(_sentence(note))}</p>" for note in heading_notes(comparison)),
        *_figures(comparison),
        *_differences(comparison),
        *(_picture(picture) for picture in pictures),
        _definitions(comparison),
        *_sources(comparison),
        "</main>",
        f"<footer><p>Made by fedfreeze {escape(fedfreeze.__version__)} from the metrics.jsonl of each run. The same "
        "figures are in compare.json and table.md beside this page.</p></footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _counts(comparison: Comparison) -> str:
    settings = len(comparison.rows)
    runs = [run for row in comparison.rows for run in row.setting.runs]
    config = runs[0].config
    data = config.get("data.path") or config.get("data.name")
    return (
        f"{settings} setting{'s' * (settings > 1)}, {len(runs)} run{'s' * (len(runs) > 1)} on the data set {data}"
        f"{f', {runs[0].num_classes} classes' if runs[0].num_classes else ''}."
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _notices(comparison: Comparison) -> str:
    if not comparison.notices:
        return ""
    # as they are: one that begins with a folder must not get a capital
    items = "\n".join(f"<li>{escape(notice)}</li>" for notice in comparison.notices)
    return f'<h2>Before you compare</h2>\n<ul class="notices">\n{items}\n</ul>'


def _figures(comparison: Comparison) -> list[str]:
    tables = []
    for group in column_groups(comparison):
        head = ["setting", "n", *(column.heading for column in group.columns)]
        rows = [
            [row.setting.title, str(len(row.setting.runs)), *(column.cell(row) for column in group.columns)]
            for row in comparison.rows
        ]
        tables.append(_table(_sentence(group.caption).removesuffix("."), head, rows))
    return tables


def _differences(comparison: Comparison) -> list[str]:
    if not comparison.differing:
        return []
    head = ["key", *(row.setting.title for row in comparison.rows)]
    if len(comparison.rows) <= 4:
        rows = [[key, *(plain(row.setting.values[key]) for row in comparison.rows)] for key in comparison.differing]
    else:  # a setting a line: that many columns would not fit
        head = ["setting", *comparison.differing]
        rows = [
            [row.setting.title, *(plain(row.setting.values[key]) for key in comparison.differing)]
            for row in comparison.rows
        ]
    return [
        "<h2>What differs</h2>",
        _table("Keys of the configuration that differ between the settings", head, rows, text=True),
    ]


def _sources(comparison: Comparison) -> list[str]:
    head = ["run folder", "setting", "seed", "status", "rounds", "revision", "versions", "hardware", "caps enforced by"]
    rows = []
    for row in comparison.rows:
        for run in row.setting.runs:
            found = run.summary
            ranks = f", {found.world_size} rank{'s' * (found.world_size != 1)}" if found.world_size else ""
            rows.append(
                [
                    str(run.path),
                    row.setting.label,
                    str(run.seed),
                    found.status,
                    str(len(run.rounds)),
                    found.git_revision or "-",
                    ", ".join(f"{name} {version}" for name, version in found.versions.items()) or "-",
                    f"{found.device or '-'}{ranks}",
                    (found.cap_enforcement or "-").replace("_", " "),
                ]
            )
    return ["<h2>Where the figures come from</h2>", _table("The runs", head, rows, text=True)]


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    kind = "text" if text else "figure"
    heads = "".join(f'<th scope="col" class="{kind}">{_breakable(cell)}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    ]
    # a wide table scrolls in a box of its own, which the keyboard can reach
    return "\n".join(
        [
            f'<div class="table" tabindex="0" role="region" aria-label="{escape(caption)}">',
            f"<table><caption>{escape(caption)}</caption>",
            f"<thead><tr>{heads}</tr></thead>",
            "<tbody>",
            *lines,
            "</tbody></table></div>",
        ]
    )


def _breakable(heading: str) -> str:
    """Let the name of a key go on in the next line after a dot or a dash."""
    return escape(heading).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f"<section>\n<h2>{_TITLES[picture.file_name]}</h2>\n<figure>\n"
        f'<img src="data:image/png;base64,{data}" alt="{escape(picture.alternative)}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n</section>"
    )


def _definitions(comparison: Comparison) -> str:
    share = f"{DEFAULT_TARGET_SHARE:.0%}".replace("%", " %")
    terms = [
        ("n", "Runs of the setting, each with a seed of its own."),
        (
            "mean ± spread",
            "Over the seeds; the spread is the sample standard deviation. A share in brackets, as (2/3), says how many "
            "of the seeds have the figure; the mean is over those.",
        ),
        (
            "rounds and time to target",
            "The round, and the emulated time at its end, of the first evaluation whose accuracy is at or above the "
            f"target. Without --target that is {share} of the lowest best accuracy among the settings. A dash: no run "
            "reached it. Evaluations are eval.every_rounds apart, so no finer than that.",
        ),
        (
            "emulated time",
            "What the rounds would have taken on the emulated devices: download, training and upload of the slowest "
            "that is waited for, asking devices, and waiting for one; not the time of this computer.",
        ),
        ("traffic", "Bytes that all devices sent and received, 32-bit floats; MB and GB are 10^6 and 10^9 bytes."),
        (
            "peak, mean, full model, cut",
            "The largest measured peak of a device, the mean of measured peaks over devices and rounds, what the full "
            "model is predicted to need at train.batch_size, and 1 - peak / full model. A MiB is 2^20 bytes.",
        ),
        (
            "trained, could train",
            "Share of the devices that completed a round at least once, and of those whose cap holds some stage.",
        ),
    ]
    if len(comparison.rows[0].ways) > 1:
        terms.append(
            (
                "ways to take a step",
                "Of all rounds of all devices that completed one, the share in which the device took its steps that "
                "way; a dash: the run did not note it.",
            )
        )
    items = "\n".join(f"<dt>{escape(term)}</dt>\n<dd>{escape(text)}</dd>" for term, text in terms)
    return f"<h2>What the figures mean</h2>\n<dl>\n{items}\n</dl>"
