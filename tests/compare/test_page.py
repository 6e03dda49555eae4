"""What `fedfreeze compare --out` writes: pictures that are pictures, and a page that a browser shows."""

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fedfreeze.cli import main
from fedfreeze.errors import ExitCode
from tests.support.run_folders import write_run

pytest.importorskip("matplotlib")

FEDAVG = {"method": {"name": "fedavg"}, "fleet": {"enforce": False}}
PICTURES = [
    "accuracy_rounds.png",
    "accuracy_time.png",
    "accuracy_traffic.png",
    "memory.png",
    "participation.png",
    "perturbation.png",
]
VOID = ("meta", "img", "br", "wbr", "hr", "link", "input")


class Page(HTMLParser):
    """The elements of a page, and whether they are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    stages = [(2, "converged"), (2, "converged")]
    made = [
        write_run(
            folder / f"frozen{seed}",
            seed=seed,
            accuracies=[0.3, None, 0.6 + seed / 10, 0.7],
            perturbations=[None, 0.9, None, 0.7],
            stages=stages,
        )
        for seed in range(2)
    ]
    return [*made, write_run(folder / "whole", sections=FEDAVG, caps_mib=[None] * 4, summary={"inclusion": 1.0})]


@pytest.fixture(scope="module")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "deep" / "report"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    return out


def pixels(content: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)).convert("L"), dtype=np.float64)


def test_everything_is_written_and_nothing_else(report: Path) -> None:
    written = {path.name for path in report.iterdir()}
    assert written == {*PICTURES, "report.html", "table.md", "compare.json"}
    for name in PICTURES:
        image = pixels((report / name).read_bytes())
        assert image.shape[1] == 1296
        assert 200 < image.mean() < 255, f"{name} is blank or black"
        assert len(np.unique(image)) > 20
    assert len(json.loads((report / "compare.json").read_text())["settings"]) == 2
    assert (report / "table.md").read_text().startswith("| setting | n | final accuracy |")


def test_the_same_runs_give_the_same_bytes(runs: list[Path], report: Path, tmp_path: Path) -> None:
    assert main(["compare", *map(str, reversed(runs)), "--json", "--out", str(tmp_path)]) == 0
    for path in report.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_page_is_whole_and_needs_nothing_else(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    assert page.all("title")
    assert not page.all("script") + page.all("link") + page.all("a")
    assert not re.search(r"https?:|@import|url\(", text)
    images = page.all("img")
    assert len(images) == len(PICTURES)
    for image in images:
        assert (image["src"] or "").startswith("data:image/png;base64,")
        assert len(image["alt"] or "") > 60
    assert len(page.all("table")) == len(page.all("caption")) == 5
    assert {cell["scope"] for cell in page.all("th")} == {"col", "row"}
    for says in ("fedavg (no caps)", "method.name", "fleet.enforce", "0123456789ab", "torch 2.13.0", "cpu (x86_64)"):
        assert says in page.text
    assert "first evaluation whose accuracy is at or above the target" in page.text


def test_labels_cannot_break_the_page(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", '"&amp;', "$x_$", "_hidden", "字", "a|b"]
    runs = [write_run(tmp_path / str(i), sections={"model": {"split": [name]}}) for i, name in enumerate(names)]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out"), "--markdown"]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.open == []
    assert not page.all("script")
    assert "<script>alert(1)</script>" in page.text


def test_ten_settings_of_three_seeds_are_drawn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_run(tmp_path / f"{number}-{seed}", sections={"train": {"batch_size": number + 2}}, seed=seed)
        for number in range(10)
        for seed in range(3)
    ]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().err == ""
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == set(PICTURES) - {"perturbation.png"}  # no run has any
    image = pixels((tmp_path / "out" / "accuracy_rounds.png").read_bytes())
    assert image.shape[0] > 1400  # four lines of panels


def test_runs_with_nothing_to_draw(tmp_path: Path) -> None:
    """No evaluation, no peak, no clock, no perturbation: what is not there is left out, and nothing breaks."""
    run = write_run(
        tmp_path / "run", accuracies=[None], emulated_s=[None], peaks_mib=[{}], status="running", summary={"rounds": 0}
    )
    assert main(["compare", str(run), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"memory.png", "participation.png"}


def test_without_matplotlib_tables_work_and_pictures_say_what_to_install(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", str(runs[0])]) == 0
    capfd.readouterr()
    assert main(["compare", str(runs[0]), "--out", str(tmp_path / "out")]) == ExitCode.UNAVAILABLE
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "pip install 'fedfreeze[plot]'" in err
    assert not (tmp_path / "out").exists()


def test_a_terminal_without_the_sign(runs: list[Path]) -> None:
    command = [sys.executable, "-m", "fedfreeze", "compare", str(runs[0]), str(runs[1])]
    done = subprocess.run(
        command, env={"PYTHONIOENCODING": "ascii", "PATH": ""}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "+-" in done.stdout


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]
    command += ["--enable-logging=stderr", "--v=0", "--no-first-run", "--window-size=1200,3000", *options]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=False)


def test_a_browser_shows_the_page(report: Path, tmp_path: Path) -> None:
    done = browse(report / "report.html", tmp_path / "profile", "--dump-dom")
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    page = Page(done.stdout)
    assert len(page.all("table")) == 5
    assert len(page.all("img")) == len(PICTURES)


def test_a_browser_decodes_every_picture(report: Path, tmp_path: Path) -> None:
    """The page has no script, so a copy of it gets one, which notes the size of every picture in the title."""
    script = (
        "<script>addEventListener('load', () => { document.title = [...document.images]"
        ".map(i => i.complete ? i.naturalWidth : 0).join(' '); });</script>"
    )
    copy = tmp_path / "copy.html"
    copy.write_text((report / "report.html").read_text().replace("</body>", f"{script}</body>"))
    done = browse(copy, tmp_path / "profile", "--virtual-time-budget=5000", "--dump-dom")
    assert done.returncode == 0, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert title[1] == " ".join(["1296"] * len(PICTURES))
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_paints_the_page_in_the_light_and_in_the_dark(dark: bool, report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    options = ["--force-dark-mode"] if dark else []
    done = browse(report / "report.html", tmp_path / "profile", "--hide-scrollbars", f"--screenshot={shot}", *options)
    assert done.returncode == 0, done.stderr
    image = pixels(shot.read_bytes())
    assert image.shape == (3000, 1200)
    assert (image[:20].mean() < 60) == dark
    assert len(np.unique(image)) > 50
