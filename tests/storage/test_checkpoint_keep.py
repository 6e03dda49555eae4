"""What is kept of checkpoints, and what resumed runs write over."""

import pytest

from tests.support.checkpoints import WINDOW, assert_is, cut_weights, no_state, open_folder, rounds_in, save, tensors_of

pytestmark = pytest.mark.usefixtures("quick_disk")

# --- what is kept


@pytest.mark.parametrize("keep", [2, 3])
def test_only_the_newest_stay(tmp_path, keep):
    store, _ = open_folder(tmp_path, keep)
    for number in range(1, 7):
        save(store, number)
        first = max(1, number - keep + 1)
        assert rounds_in(tmp_path) == [f"round-{n:06d}" for n in range(first, number + 1)]
        needed = range(max(1, first - WINDOW + 1), number + 1)
        kept = sorted(path.name for path in (tmp_path / "updates").iterdir())
        assert kept == [f"round-{n:06d}.safetensors" for n in needed]


def test_the_millionth_round_is_the_newest(tmp_path):
    store, _ = open_folder(tmp_path)
    for number in (999_998, 999_999, 10**6):
        save(store, number)
    assert rounds_in(tmp_path) == ["round-1000000", "round-999999"]
    assert_is(open_folder(tmp_path)[0].load_newest(), 10**6)


def test_each_update_is_written_once(folder):
    facts = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "updates").iterdir()}
    store, _ = open_folder(folder)
    store.load_newest()  # a resumed run does not write them again either
    save(store, 4)
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "updates").iterdir()}
    for number in (2, 3):
        name = f"round-{number:06d}.safetensors"
        assert after[name] == facts[name]
    assert "round-000004.safetensors" in after


def test_a_checkpoint_without_window_lets_updates_go_when_the_last_that_needs_them_goes(folder):
    store, _ = open_folder(folder)
    store.load_newest()
    store.save(4, tensors_of(4), {}, [])  # a new stage has begun: its window is empty
    kept = sorted(path.name for path in (folder / "updates").iterdir())
    assert kept == ["round-000002.safetensors", "round-000003.safetensors"]  # round 3 still needs them
    cut_weights(folder / "round-000004")
    assert_is(open_folder(folder)[0].load_newest(), 3)
    store.save(5, tensors_of(5), {}, [])
    store.save(6, tensors_of(6), {}, [])  # the torn one was dropped when it was met: now round 3 goes
    assert list((folder / "updates").iterdir()) == []


def test_a_larger_keep_on_resume_keeps_more_from_then_on(folder):
    store, _ = open_folder(folder, keep=4)
    store.load_newest()
    save(store, 4)
    save(store, 5)
    assert rounds_in(folder) == [f"round-{n:06d}" for n in (2, 3, 4, 5)]
    smaller, _ = open_folder(folder, keep=2)
    smaller.load_newest()
    save(smaller, 6)
    assert rounds_in(folder) == ["round-000005", "round-000006"]


def test_an_older_torn_checkpoint_does_not_stop_the_run(folder):
    no_state(folder / "round-000002")
    store, _ = open_folder(folder, keep=3)
    store.load_newest()
    save(store, 4)
    again, notices = open_folder(folder)
    assert_is(again.load_newest(), 4)
    assert notices == []
