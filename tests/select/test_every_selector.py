"""What every selector keeps to: enough different candidates, the same ones again, also after its state went to disk."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.config.file import make_config
from fedfreeze.messages import DeviceReport
from fedfreeze.select import SELECTORS, Probes, Selector, Situation, make_selector

OWN_DRAWS = [name for name in SELECTORS if name != "uniform"]
# Those that draw nothing at random: no seed changes whom they choose.
WITHOUT_CHANCE: tuple[str, ...] = ()


@dataclass
class World:
    """A fleet in which selectors are tried: what devices have, who can be selected, what they tell."""

    samples: list[int]
    seconds: list[float]
    participants: int = 3
    select: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    stage_rounds: int = 4
    missing: float = 0.3
    """Chance that a device is no candidate, that it does not answer, that it fails."""
    shuffled: bool = False

    def selector(self, name: str) -> Selector:
        train = {"participants": self.participants, "rounds": 20}
        return make_selector(make_config({"seed": self.seed, "select": {"name": name, **self.select}, "train": train}))

    def chance(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def candidates(self, round_number: int) -> list[int]:
        generator = self.chance(1, round_number)
        some = [device for device in range(len(self.samples)) if generator.random() >= self.missing]
        some = some or [int(generator.integers(len(self.samples)))]
        return [int(device) for device in generator.permutation(some)] if self.shuffled else some

    def situation(self, round_number: int) -> Situation:
        stage, stage_round = divmod(round_number - 1, self.stage_rounds)
        seconds = np.asarray(self.seconds) / (stage + 1)
        return Situation(round_number, stage, stage_round + 1, np.asarray(self.samples), seconds)

    def probes(self, devices: list[int], size: int, round_number: int) -> Probes:
        generator = self.chance(2, round_number)
        told = sorted(device for device in devices if generator.random() >= self.missing)
        loss = np.array([self.loss(device, round_number) for device in told])
        mixes = [self.chance(3, device % 4).normal(size=size) + generator.normal(size=size) / 4 for device in told]
        return Probes(np.array(told, np.int64), loss, loss**2, np.array(mixes, np.float32).reshape(len(told), size))

    def loss(self, device: int, round_number: int) -> float:
        return float(self.chance(4, device).random() * 3 / round_number)

    def report(self, device: int, round_number: int) -> DeviceReport:
        draw = self.chance(5, device, round_number).random()
        samples, loss = self.samples[device], self.loss(device, round_number)
        if draw < self.missing:
            return DeviceReport(device, samples, failed="diverged", left_out=draw < self.missing / 2)
        return DeviceReport(device, samples, loss=loss, squared_loss=loss**2)

    def play_round(self, selector: Selector, round_number: int) -> list[int]:
        """Do what the coordinator does in a round; return who was chosen."""
        candidates = self.candidates(round_number)
        selector.prepare(self.situation(round_number))
        request = selector.wanted(candidates, self.participants) if selector.probing else None
        if request is not None and request.devices:
            assert len(set(request.devices)) == len(request.devices)
            assert set(request.devices) <= set(candidates)
            selector.learn(self.probes(request.devices, request.signature_size, round_number))
        chosen = selector.select(round_number, candidates, self.participants)
        assert len(chosen) == len(set(chosen)) == min(self.participants, len(candidates))
        assert set(chosen) <= set(candidates)
        assert all(isinstance(device, int) for device in chosen)
        selector.observe([self.report(device, round_number) for device in sorted(chosen)])
        return sorted(chosen)

    def play(self, name: str, rounds: int = 10, *, cut: int | None = None) -> list[list[int]]:
        """Return who was chosen in each round; before round `cut`, the state goes through JSON to a new selector."""
        selector = self.selector(name)
        log = []
        for round_number in range(1, rounds + 1):
            if round_number == cut:
                state = json.loads(json.dumps(selector.state_dict(), allow_nan=False))
                selector = self.selector(name)
                selector.load_state_dict(state)
            log.append(self.play_round(selector, round_number))
        return log


KEYS: dict[str, st.SearchStrategy[Any]] = {
    "communities": st.booleans(),
    "neighbours": st.integers(1, 5),
    "community_limit": st.integers(2, 6),
    "signature_size": st.just(8),
    "refresh_rounds": st.sampled_from([None, 1, 3]),
    "slots_by_volume": st.booleans(),
    "loss_utility": st.booleans(),
    "speed_utility": st.booleans(),
    "exploration": st.sampled_from([0.0, 0.2, 1.0]),
    "exploration_start": st.sampled_from([0.0, 0.9]),
    "cutoff": st.sampled_from([0.0, 0.95, 1.0]),
    "pacer_rounds": st.integers(1, 3),
    "blocklist_rounds": st.sampled_from([None, 1, 3]),
    "tiers": st.integers(1, 6),
    "tier_rounds": st.integers(1, 3),
    "tier_credits": st.sampled_from([None, 1]),
    "choices": st.sampled_from([None, 1, 7]),
    "stale_losses": st.booleans(),
}


@st.composite
def worlds(draw: st.DrawFn) -> World:
    devices = draw(st.integers(1, 24))
    samples = draw(st.lists(st.integers(0, 40) | st.just(0), min_size=devices, max_size=devices))
    seconds = draw(st.lists(st.sampled_from([0.01, 1.0, 2.0, 3.5, 90.0]), min_size=devices, max_size=devices))
    select = {key: draw(strategy) for key, strategy in KEYS.items()}
    return World(samples, seconds, draw(st.integers(1, 8)), select, draw(st.integers(0, 5)))


@pytest.mark.parametrize("name", SELECTORS)
@given(world=worlds(), cut=st.integers(2, 10))
@settings(max_examples=40, deadline=None)
def test_choices_are_candidates_and_go_on_as_they_were(name, world, cut):
    log = world.play(name)
    assert world.play(name) == log
    assert world.play(name, cut=cut) == log


@pytest.mark.parametrize("name", OWN_DRAWS)
@given(world=worlds())
@settings(max_examples=20, deadline=None)
def test_the_order_of_candidates_does_not_matter(name, world):
    log = world.play(name)
    world.shuffled = True
    # permutations do not change who is a candidate, as they are drawn last
    assert world.play(name) == log


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_devices_without_data_come_last(name):
    world = World([0, 10, 0, 12, 1, 9, 30], [1.0, 3.0, 1.0, 2.0, 0.5, 4.0, 9.0], participants=4, missing=0.0)
    select = world.play(name, rounds=6)
    assert select == [[1, 3, 5, 6]] * 6


@pytest.mark.parametrize("name", [name for name in OWN_DRAWS if name not in WITHOUT_CHANCE])
def test_the_seed_decides_who_is_chosen(name):
    def log(seed):
        generator = np.random.default_rng(0)
        samples, seconds = generator.integers(5, 50, 40).tolist(), generator.uniform(1, 9, 40).tolist()
        # the same world but for the selector's own draws
        world = World(samples, seconds, participants=5, missing=0.0)
        selectors = World(samples, seconds, participants=5, seed=seed).selector(name)
        return [world.play_round(selectors, round_number) for round_number in range(1, 9)]

    assert log(1) == log(1)
    assert log(1) != log(2)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_saved_state_and_a_loaded_one_are_kept_apart_from_the_selector(name):
    world = World([10] * 12, [float(i + 1) for i in range(12)], missing=0.1)
    selector = world.selector(name)
    for round_number in (1, 2):
        world.play_round(selector, round_number)
    state = selector.state_dict()
    text = json.dumps(state)
    loaded = json.loads(text)
    other = world.selector(name)
    other.load_state_dict(loaded)
    for round_number in range(3, 10):
        world.play_round(other, round_number)
    assert json.dumps(loaded) == text


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_a_coordinator_hands_states_over_json(name):
    world = World([10] * 12, [1.0] * 12)
    selector = world.selector(name)
    world.play_round(selector, 1)
    state = selector.state_dict()
    assert json.loads(json.dumps(state)) == json.loads(json.dumps(json.loads(json.dumps(state))))
    assert len(json.dumps(state)) < 4000
