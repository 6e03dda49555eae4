"""`plan --calibrate`: every stage is timed by real steps that change nothing; how long they take is not judged."""

import json

import pytest
import torch

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.device.cost import Costs, measure_costs
from fedfreeze.errors import UnavailableError
from fedfreeze.network.stage import LocalTrainer
from fedfreeze.plan import calibrate as calibration
from fedfreeze.plan.calibrate import StageSpeed, calibrate, machine_gflops, speed_rows, spread
from tests.support.in_process import assert_refused, attempt

SHAPE, CLASSES = (1, 8, 8), 10
SMALL = ["--model.width=4", "--train.batch_size=8"]


def priced(**sections) -> tuple[Config, Costs]:
    """Return a configuration and its costs; before a test watches steps, which the cost model takes, too."""
    config = make_config({"model": {"width": 4}, "train": {"batch_size": 8, "device": "cpu"}} | sections)
    return config, measure_costs(config, SHAPE, CLASSES)


def timed(config: Config, costs: Costs, seconds: float = 0.0) -> list[StageSpeed]:
    return calibrate(config, SHAPE, CLASSES, costs, seconds_a_stage=seconds)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS_A_STAGE", 0.0)


@pytest.mark.parametrize("method", ["smartfreeze", "fedavg"])
def test_every_stage_is_timed_at_the_flops_of_the_cost_model(method):
    config, costs = priced(method={"name": method})
    speeds = timed(config, costs)
    assert [(speed.name, speed.step_flops) for speed in speeds] == [(c.name, c.step_flops) for c in costs.stages]
    for speed in speeds:
        assert speed.step_s > 0
        assert speed.gflops == pytest.approx(speed.step_flops / speed.step_s / 1e9)
        assert speed.steps == calibration.FEWEST_STEPS


def test_more_time_takes_more_steps():
    speeds = timed(*priced(method={"name": "fedavg"}), seconds=0.5)
    assert all(speed.steps > calibration.FEWEST_STEPS for speed in speeds)


def test_the_first_steps_do_not_count(monkeypatch):
    config, costs = priced(method={"name": "fedavg"})
    taken = iter([9.0, 9.0, 9.0, 1.0, 2.0, 4.0])
    now = [0.0]
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])

    def step(self, images, labels):
        now[0] += next(taken)

    monkeypatch.setattr(LocalTrainer, "step", step)
    assert timed(config, costs) == [StageSpeed("full model", costs.stages[0].step_flops, 2.0, 3)]


def test_real_steps_are_taken_and_no_parameter_changes(monkeypatch):
    config, costs = priced()
    seen = []
    step = LocalTrainer.step

    def watched(self, images, labels):
        before = {name: value.clone() for name, value in self.stage.named_parameters()}
        result = step(self, images, labels)
        assert images.shape == (8, *SHAPE)
        assert result.isfinite().all()
        seen.append(all(torch.equal(value, before[name]) for name, value in self.stage.named_parameters()))
        return result

    monkeypatch.setattr(LocalTrainer, "step", watched)
    timed(config, costs)
    assert len(seen) == 3 * (calibration.WARM_UP_STEPS + calibration.FEWEST_STEPS)
    assert all(seen)


def test_the_configured_threads_are_used_and_put_back(monkeypatch):
    config, costs = priced(train={"batch_size": 8, "device": "cpu", "threads_per_rank": 2})
    before, seen = torch.get_num_threads(), set()
    step = LocalTrainer.step

    def watched(self, images, labels):
        seen.add(torch.get_num_threads())
        return step(self, images, labels)

    monkeypatch.setattr(LocalTrainer, "step", watched)
    timed(config, costs)
    assert seen == {2}
    assert torch.get_num_threads() == before


def test_the_largest_level_is_the_one_that_is_timed(monkeypatch):
    """A method whose devices train sub-models; which, does not matter here."""
    from fedfreeze.methods.fedavg import FedAvg
    from fedfreeze.network.stage import Stage

    def enter_level(self, index, level, device):
        blocks = self.blocked.blocks
        entered.append(level)
        return Stage(index, [], torch.nn.Sequential(*blocks), self.blocked.head, device)

    entered: list[int] = []
    monkeypatch.setattr(FedAvg, "counted", True)
    monkeypatch.setattr(FedAvg, "num_levels", lambda self, index: 2)
    monkeypatch.setattr(FedAvg, "enter_level", enter_level)
    config, costs = priced(method={"name": "fedavg"})
    assert entered == [0, 1]
    speeds = timed(config, costs)
    assert entered == [0, 1, 1]
    assert speeds[0].step_flops == costs.levels[0][-1].step_flops


def test_one_speed_stands_for_all_stages():
    speeds = [StageSpeed("a", 4 * 10**9, 1.0, 3), StageSpeed("b", 2 * 10**9, 2.0, 3)]
    assert [speed.gflops for speed in speeds] == [4, 1]
    assert machine_gflops(speeds) == 2  # 6 GFLOP in 3 s
    assert spread(speeds) == 4
    assert [row["stage"] for row in speed_rows(speeds)] == [0, 1]


def test_cuda_that_is_missing_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UnavailableError, match=r"train\.device is cuda, but torch finds no CUDA device"):
        timed(*priced(train={"device": "cuda"}))


def test_too_little_memory_for_a_step_is_one_line(monkeypatch):
    config, costs = priced()

    def step(self, images, labels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LocalTrainer, "step", step)
    with pytest.raises(UnavailableError, match=r"not enough for a step of 8 samples; lower train\.batch_size"):
        timed(config, costs)


@pytest.mark.gpu
def test_a_gpu_is_timed_to_the_end_of_each_step():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    assert all(speed.step_s > 0 for speed in timed(*priced(train={"batch_size": 8, "device": "cuda"})))


def test_the_command_prints_a_row_a_stage_and_the_key_to_set(short, tmp_path):
    outcome = attempt(tmp_path, "plan", "digits", "--calibrate", "--data.cache_dir=cache", *SMALL)
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("resnet8 (width 4), batch 8, 1 thread", "layer1", "layer2", "layer3", "--fleet.speed_gflops="):
        assert words in outcome.out
    assert "times the speed of the slowest" in outcome.out
    assert not [name for name in outcome.changed if not name.startswith("cache")]


def test_the_command_prints_json(short, tmp_path):
    outcome = attempt(tmp_path, "plan", "digits", "--calibrate", "--json", "--data.cache_dir=cache", *SMALL)
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert set(found) == {"batch_size", "threads", "speed_gflops", "spread", "stages"}
    assert (found["batch_size"], found["threads"]) == (8, 1)
    assert found["spread"] >= 1
    slowest, fastest = (pick(row["speed_gflops"] for row in found["stages"]) for pick in (min, max))
    assert 0 < slowest <= found["speed_gflops"] <= fastest
    assert [row["stage"] for row in found["stages"]] == [0, 1, 2]
    assert set(found["stages"][0]) == {"stage", "blocks", "step_gflop", "step_s", "steps", "speed_gflops"}


def test_calibrate_and_cut_are_two_questions(tmp_path):
    assert_refused(attempt(tmp_path, "plan", "digits", "--calibrate", "--cut"), 64, "--calibrate and --cut")
