"""Proposes where to cut the network, so that a wanted share of a fleet's devices can join every stage. [ours]"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch._subclasses.fake_tensor import FakeTensorMode

from fedfreeze.config.schema import Config
from fedfreeze.device.cost import Costs, fake_tensors, measure_costs
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.devices import Fleet
from fedfreeze.methods import SmartFreeze, make_method
from fedfreeze.network.blocks import build_outline
from fedfreeze.network.probing import ImageShape
from fedfreeze.plan.cut_search import Cut, CutSearch, cut_of
from fedfreeze.plan.step_costs import Caps, StageSteps, one_block_a_stage, step_costs, with_split


@dataclass(frozen=True)
class Proposal:
    """A cut, with all that the cost model says of it."""

    cut: Cut
    costs: Costs


def wanted_devices(share: float, fleet: Fleet) -> int:
    """Return how many devices a share of a fleet is, rounded up; at least one."""
    return max(1, math.ceil(share * len(fleet) - 1e-9))  # 0.55 * 20 is 11, and a little more in floating point


def propose(config: Config, image_shape: ImageShape, num_classes: int, fleet: Fleet, share: float) -> Iterator[Cut]:
    """Yield, for as many blocks as train together, one more, ..., the cheapest cut that lets a share join every stage.

    Each device goes the first way of `train.fit` that its cap holds. What is minimised are the floating-point
    operations of a training step of a full batch, frozen blocks and recomputation included: of each stage the mean over
    the devices whose cap holds it by some way, and of that the mean over the stages. Ties go to fewer blocks, then to
    the lower peak. [ours] So stages count alike, as if the pace controller gave each as many rounds; how many rounds a
    cut takes, and which accuracy it reaches, is not known before. The proposal is `cheapest` of those yielded; numbers
    of blocks that could not become it are left out.

    If no cut lets the share join, those of the smallest peak are yielded instead, each lower than the one before; the
    last has the smallest peak there is. Raises ConfigError for a method without stages, or a network with fewer places
    for a cut than blocks that train together.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_tensors(mode):
        outline = build_outline(config.model, image_shape, num_classes, config.seed)
        alone = with_split(one_block_a_stage(config), outline.places[:1])
        if not isinstance(make_method(alone, outline.cut([])), SmartFreeze):
            raise ConfigError(f"--cut: cuts are sought for the stages of smartfreeze, not of {config.method.name}")
    window = config.method.window
    if len(outline.places) < window:
        raise ConfigError(
            f"method.window: {window} blocks cannot train together in {config.model.label}, in which "
            f"blocks can begin at {len(outline.places)} places"
        )
    steps = StageSteps(config, outline, image_shape, mode)
    search = CutSearch(steps, Caps(fleet), window, wanted_devices(share, fleet))
    numbers = range(window, len(outline.places) + 1)
    fewest_flops = math.inf
    for blocks in numbers:
        cut = search.cheapest(blocks, fewest_flops)
        if cut is not None:
            fewest_flops = min(fewest_flops, cut.step_flops)
            yield cut
    if fewest_flops < math.inf:
        return
    lowest = math.inf
    for blocks in numbers:
        cut = search.lowest_peak(blocks, lowest)
        if cut is not None:
            lowest = cut.peak_bytes
            yield cut


def cheapest(cuts: Sequence[Cut], wanted: int) -> Cut:
    """Return the proposal of what `propose` yielded: if so many devices cannot join any, the one of smallest peak."""
    return min((cut for cut in cuts if cut.eligible >= wanted), key=lambda cut: cut.rank, default=cuts[-1])


def proposal_of(config: Config, split: Sequence[str], image_shape: ImageShape, classes: int, fleet: Fleet) -> Proposal:
    """Measure one cut in full."""
    return cut_as_it_is(with_split(config, split), image_shape, classes, fleet)


def cut_as_it_is(config: Config, image_shape: ImageShape, classes: int, fleet: Fleet) -> Proposal:
    """Measure the cut that a configuration has; its `split` is empty where that is the usual one."""
    costs = measure_costs(config, image_shape, classes)
    stages = [step_costs(cost, config) for cost in costs.stages]
    blocks = len(stages) + config.method.window - 1
    return Proposal(cut_of(config.model.split or (), blocks, stages, Caps(fleet)), costs)
