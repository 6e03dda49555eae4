"""A run whose data lies elsewhere in its next life: the same bits where it holds the same, 64 where a pixel differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedfreeze.data.identity import Identity
from fedfreeze.data.sources import fingerprint_key, make_source
from fedfreeze.errors import DataError
from fedfreeze.run import experiment
from fedfreeze.run.experiment import Experiment
from tests.support.checkpoints import flip_byte, rewrite_content
from tests.support.checks import assert_one_line
from tests.support.in_process import Outcome, parquet, png
from tests.support.launching import summary
from tests.support.tiny_runs import assert_same, go, write

LABELS = {"train": [i % 3 for i in range(24)], "test": [0, 1, 2]}


def write_data(folder: Path, *, seed: int = 0, labels: dict[str, list[int]] | None = None) -> None:
    """Write FOLDER/data; another seed is another first training image."""
    for split, these in (labels or LABELS).items():
        images = [png(seed=100 + i) for i in range(len(these))]
        if split == "train" and seed:
            images[0] = png(seed=seed)
        parquet(folder, split, these, images)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, its decoded cache, and a run on it with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder, data={"path": "data", "cache_dir": "cache"}, checkpoint={"keep": 100})
    write_data(folder)
    outcome = go(folder)
    assert (outcome.code, outcome.err) == (0, "")
    return folder


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Path:
    """The same, as if the run had been killed after its third round."""
    folder = tmp_path / "begun"
    shutil.copytree(finished, folder)
    run = folder / "run"
    for number in (4, 5, 6):
        shutil.rmtree(run / "checkpoints" / f"round-{number:06d}")
    (run / "model.safetensors").unlink()
    (run / "summary.json").write_text(json.dumps(summary(run) | {"status": "running", "exit_code": None}))
    return folder


def assert_goes_on(outcome: Outcome, begun: Path, finished: Path) -> None:
    assert (outcome.code, outcome.err) == (0, "")
    assert "notice: resumed after round 3" in outcome.out
    assert_same(begun / "run", finished / "run")


def assert_other_data(outcome: Outcome, *says: str) -> None:
    """Refused, and the run folder is as it was."""
    assert outcome.code == 64, outcome.err
    assert outcome.err.count("\n") == 1
    for words in ("have changed since run was begun (the images or labels)", "or use another --run-dir", *says):
        assert words in outcome.err
    assert [name for name in outcome.changed if name.startswith("run")] == []


def new_cache(folder: Path, finished: Path) -> list[str]:
    return ["--data.cache_dir=other"]


def copied_cache(folder: Path, finished: Path) -> list[str]:
    """The decoded data copied to another disk, as `cp` does it: without times of change."""
    shutil.copytree(finished / "cache", folder / "other", copy_function=shutil.copyfile)
    return [f"--data.path={finished / 'data'}", "--data.cache_dir=other"]


def moved_data(folder: Path, finished: Path) -> list[str]:
    (folder / "data").rename(folder / "moved")
    return ["--data.path=moved"]


def fetched_again(folder: Path, finished: Path) -> list[str]:
    shutil.rmtree(folder / "data")
    shutil.rmtree(folder / "cache")
    write_data(folder)
    return []


def with_names_of_columns(folder: Path, finished: Path) -> list[str]:
    return ["--data.image_column=img", "--data.label_column=label"]


@pytest.mark.parametrize("move", [new_cache, copied_cache, moved_data, fetched_again, with_names_of_columns])
def test_the_same_data_elsewhere_goes_on_with_the_same_bits(
    move: Callable[[Path, Path], list[str]], begun: Path, finished: Path
) -> None:
    assert_goes_on(go(begun, "run", *move(begun, finished)), begun, finished)


def one_pixel(folder: Path, finished: Path) -> list[str]:
    write_data(folder, seed=7)
    return []


def one_pixel_elsewhere(folder: Path, finished: Path) -> list[str]:
    (folder / "else").mkdir()
    write_data(folder / "else", seed=7)
    return ["--data.path=else/data", "--data.cache_dir=other"]


def one_label(folder: Path, finished: Path) -> list[str]:
    write_data(folder, labels=LABELS | {"test": [0, 1, 1]})
    return []


def other_order(folder: Path, finished: Path) -> list[str]:
    images = [png(seed=100 + i) for i in range(24)]
    parquet(folder, "train", LABELS["train"][::-1], images[::-1])
    return []


@pytest.mark.parametrize("change", [one_pixel, one_pixel_elsewhere, one_label, other_order])
def test_other_data_is_refused(change: Callable[[Path, Path], list[str]], begun: Path, finished: Path) -> None:
    assert_other_data(go(begun, "run", *change(begun, finished)))


def test_one_pixel_in_a_copy_of_the_decoded_data_is_refused(begun: Path, finished: Path) -> None:
    options = copied_cache(begun, finished)
    (images,) = (begun / "other").rglob("train.images.u8")
    flip_byte(images, 11)
    assert_other_data(go(begun, "run", *options), "is damaged: delete that folder", images.parent.name)
    fresh = go(begun, "fresh", *options)
    assert fresh.code == 65
    assert_one_line(Exception(fresh.err.strip()), "is damaged", "delete that folder", images.parent.name)
    assert not (begun / "fresh").exists()


def test_other_data_is_refused_before_the_first_checkpoint_too(begun: Path, finished: Path) -> None:
    shutil.rmtree(begun / "run" / "checkpoints")
    one_pixel(begun, finished)
    assert_other_data(go(begun))


def test_another_embedded_data_set_is_named_by_its_key(begun: Path) -> None:
    outcome = go(begun, "run", "--data.image_size=9")
    assert outcome.code == 64
    assert "data.image_size was None and is now 9" in outcome.err


# --- checkpoints of the version before, which had the name of the store


def of_version_before(folder: Path, key: str) -> None:
    (folder / "run" / "data.json").unlink()
    for checkpoint in (folder / "run" / "checkpoints").glob("round-*"):
        rewrite_content(checkpoint, lambda content: content["state"]["inputs"].update(data=f"v2-{key}"))


def key_here(begun: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    from fedfreeze.config.file import load_config

    monkeypatch.chdir(begun)
    return fingerprint_key(make_source(load_config("small.yaml").data))


def test_a_checkpoint_of_before_goes_on_with_the_files_that_it_had(begun, finished, monkeypatch) -> None:
    of_version_before(begun, key_here(begun, monkeypatch))
    assert_goes_on(go(begun, "run", "--data.cache_dir=other"), begun, finished)


def test_a_checkpoint_of_before_goes_on_where_its_decoded_data_says_the_same(begun, finished, monkeypatch) -> None:
    of_version_before(begun, "0123456789abcdef")
    (store,) = (begun / "cache").glob("v3-*")
    old = store.rename(begun / "cache" / "v2-0123456789abcdef")
    meta = json.loads((old / "meta.json").read_text())
    (old / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k not in ("content", "class_names")}))
    assert_goes_on(go(begun, "run", *moved_data(begun, finished)), begun, finished)


def test_a_checkpoint_of_before_is_refused_where_nothing_tells(begun: Path) -> None:
    of_version_before(begun, "0123456789abcdef")
    assert_other_data(go(begun))


# --- several ranks


def test_ranks_with_other_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "identify", lambda store: Identity("one", intact=True))
    ranks: Any = SimpleNamespace(
        together=lambda action: action(), all_gather=lambda one: [one, one, "two"], rank_hosts=["a", "a", "b"]
    )
    stub: Any = SimpleNamespace(ranks=ranks, store=Path("cache/v3-0"))
    with pytest.raises(DataError) as caught:
        Experiment._agree_on_data(stub)
    assert_one_line(caught.value, "rank 2 on b", "cache/v3-0", "rank 0")


def test_what_is_learnt_from_is_written_down(finished: Path) -> None:
    data = json.loads((finished / "run" / "data.json").read_text())
    assert {key: data[key] for key in ("image_shape", "train", "test", "num_classes", "class_names")} == {
        "image_shape": [1, 8, 8],
        "train": 24,
        "test": 3,
        "num_classes": 3,
        "class_names": None,
    }
    assert len(data["digest"]) == 64
