"""Power-of-choice selection by hand: who is drawn, who is asked, who is taken."""

from collections import Counter

import numpy as np
import pytest

from fedfreeze.config.file import make_config
from fedfreeze.messages import DeviceReport
from fedfreeze.select import Probes, Situation, make_selector
from fedfreeze.select.power_of_choice import PowerOfChoice

SAMPLES = [10, 20, 30, 40, 50, 60]
EVERYONE = list(range(6))


def make(participants: int = 2, *, seed: int = 0, **select) -> PowerOfChoice:
    options = {"name": "power_of_choice", **select}
    selector = make_selector(make_config({"seed": seed, "select": options, "train": {"participants": participants}}))
    assert isinstance(selector, PowerOfChoice)
    return selector


def at(round_number: int, samples=SAMPLES) -> Situation:
    return Situation(round_number, 0, round_number, np.asarray(samples), np.ones(len(samples)))


def answers(losses: dict[int, float]) -> Probes:
    devices, loss = np.array(sorted(losses)), np.array([losses[device] for device in sorted(losses)])
    return Probes(devices, loss, loss**2, np.zeros((len(devices), 0), np.float32))


def test_those_drawn_are_asked_for_their_loss_and_the_highest_are_taken():
    for round_number in range(1, 20):
        selector = make(choices=4)
        selector.prepare(at(round_number))
        request = selector.wanted(EVERYONE, 2)
        assert request is not None
        assert (len(request.devices), request.signature_size) == (4, 0)
        losses = {device: [0.3, 2.0, 0.1, 1.0, 3.0, 0.2][device] for device in request.devices}
        selector.learn(answers(losses))
        expected = sorted(sorted(losses, key=losses.get)[-2:])
        assert selector.select(round_number, EVERYONE, 2) == expected


def test_draws_are_by_data_volume():
    first: Counter[int] = Counter()
    for seed in range(1000):
        selector = make(1, seed=seed, choices=1)
        selector.prepare(at(1))
        first.update(selector.wanted(EVERYONE, 1).devices)
    assert [first[device] for device in EVERYONE] == pytest.approx([1000 * n / 210 for n in SAMPLES], abs=60)


def test_how_many_are_asked():
    def asked(selector, count=2, candidates=EVERYONE):
        selector.prepare(at(1))
        return len(selector.wanted(candidates, count).devices)

    assert asked(make()) == 4, "twice the participants"
    assert asked(make(choices=3)) == 3
    assert asked(make(choices=1)) == 2, "no fewer than are needed"
    assert asked(make(choices=5), candidates=[1, 4]) == 2


def test_who_does_not_answer_comes_last_in_the_order_of_the_draw():
    selector = make(3, choices=5)
    selector.prepare(at(1))
    drawn = selector.wanted(EVERYONE, 3).devices
    selector.learn(answers({drawn[3]: 0.1, drawn[4]: float("nan")}))
    assert selector.select(1, EVERYONE, 3) == sorted([drawn[3], drawn[0], drawn[1]])
    # answers are of their round
    selector.prepare(at(2))
    drawn = selector.wanted(EVERYONE, 3).devices
    assert selector.select(2, EVERYONE, 3) == sorted(drawn[:3])


def test_with_stale_losses_nobody_is_asked_and_unknown_comes_first():
    selector = make(choices=6, stale_losses=True)
    selector.prepare(at(1))
    assert selector.wanted(EVERYONE, 2) is None
    selector.observe([DeviceReport(d, 10, loss=loss) for d, loss in ((0, 5.0), (1, 2.0), (2, 3.0), (3, 1.0))])
    assert selector.select(1, EVERYONE, 2) == [4, 5]
    assert selector.select(1, EVERYONE, 4) == [0, 2, 4, 5]
    late, failed = DeviceReport(4, 10, failed="late", left_out=True), DeviceReport(5, 10, failed="diverged")
    selector.observe([late, failed])
    assert selector.select(1, EVERYONE, 2) == [0, 4], "what always fails does not come first for ever"
    assert selector.select(1, EVERYONE, 5) == [0, 1, 2, 3, 4]


def test_only_stale_losses_are_a_state():
    report = [DeviceReport(2, 10, loss=5.0)]
    asking, stale = make(), make(stale_losses=True)
    for selector in (asking, stale):
        selector.prepare(at(1))
        selector.observe(report)
    assert asking.state_dict() == {}
    assert stale.state_dict() == {"last_loss": [(2, 5.0)]}
