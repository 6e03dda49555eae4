"""An experiment on one rank: set up, resume, rounds, stage changes, deployment."""

import hashlib
import json
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedfreeze.comm.ranks import Ranks
from fedfreeze.config.schema import Config, code_named
from fedfreeze.data.identity import Identity, identify, is_same
from fedfreeze.data.partition import partition_of
from fedfreeze.data.partition_summary import summarise
from fedfreeze.data.store import Data, open_store, prepare
from fedfreeze.device.cost import fit_method, measure_costs
from fedfreeze.device.emulator import Emulator
from fedfreeze.device.feature_store import check_folder
from fedfreeze.device.features import check_storable
from fedfreeze.device.trial import config_on, model_on, with_reserved
from fedfreeze.errors import (
    ConfigError,
    DataError,
    ExitCode,
    PreemptedError,
)
from fedfreeze.fleet.devices import Fleet, make_fleet
from fedfreeze.methods import Method, make_method, method_class
from fedfreeze.methods.aggregate import device_weight
from fedfreeze.network.blocks import build_network
from fedfreeze.network.flat import named_once
from fedfreeze.plugins import code_digests, own_code
from fedfreeze.run.history import History
from fedfreeze.run.parts import RoundParts
from fedfreeze.run.preempt import Preemption
from fedfreeze.run.reporter import Reporter
from fedfreeze.run.round import RoundResult, run_round
from fedfreeze.server.coordinator import Coordinator
from fedfreeze.server.pace import PerturbationWindow
from fedfreeze.storage.checkpoint import Checkpoint, CheckpointStore, weight_bytes
from fedfreeze.storage.run_folder import RunFolder
from fedfreeze.units import MIB


@dataclass(frozen=True)
class Unsaved:
    """The end of a round after which no checkpoint was due, in case that the next is dropped."""

    state: dict[str, Any]
    values: torch.Tensor
    updates: list[tuple[int, np.ndarray]]


class Experiment:
    """One run on this rank; every rank holds the same global model, rank 0 also the coordinator."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        ranks: Ranks,
        device: torch.device,
        reporter: Reporter,
        history: History | None,
        preemption: Preemption,
    ):
        """Collective: every rank must call this. Prepare data, devices, network and, on rank 0, the coordinator."""
        self.config = config = config_on(config, device)
        self.folder = folder
        self.ranks = ranks
        self.reporter = reporter
        self.history = history
        self.preemption = preemption
        self._unsaved: Unsaved | None = None
        self._cache_noted = False
        self.coordinator: Coordinator | None = None
        self.store = ranks.together(lambda: prepare(config.data))
        self.data: Data = ranks.together(lambda: open_store(self.store))
        self.identity = self._agree_on_data()
        self.parts = parts = ranks.together(lambda: partition_of(self.data, config))
        fleet = ranks.together(lambda: make_fleet(config.fleet, config.seed))
        self.fitted: dict[str, Any] = ranks.decide(lambda: self._fit(fleet))
        # before the network is built: what no device can hold may not fit this machine either
        ranks.decide(lambda: self._check_storable(device))
        ranks.decide(partial(self._make_coordinator, fleet, [len(part) for part in parts], device))
        ranks.together(self._check_cache)
        self.method = ranks.together(partial(self._build, device))
        self.emulator = Emulator(config, self.data, parts, self.method, device, self._check)
        self.window = PerturbationWindow(config.pace.window)
        self.checkpoints = CheckpointStore(folder.path / "checkpoints", config.checkpoint.keep, reporter.notice)

    def _agree_on_data(self) -> Identity:
        """Collective: every rank must call this. Return what all ranks learn from: the disks of nodes may hold copies.

        Raises DataError where one holds something else than rank 0.
        """
        identity: Identity = self.ranks.together(lambda: identify(self.store))
        digests = self.ranks.all_gather(identity.digest)
        strange = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if strange is not None:
            raise DataError(
                f"the data of rank {strange} on {self.ranks.rank_hosts[strange]}, decoded in {self.store}, is not that "
                "of rank 0; copy or fetch it there again"
            )
        return identity

    def _build(self, device: torch.device) -> Method:
        model = model_on(self.config, self.fitted, device)
        blocked = build_network(model, self.data.image_shape, self.data.num_classes, self.config.seed)
        method = make_method(self.config, blocked, self.fitted)
        with own_code("method.name", self.config.method.name):
            for samples in {len(part) for part in self.parts}:
                weight, most = method.weight(samples), device_weight(self.config.method.weights, samples)
                if not isinstance(weight, int) or not 0 <= weight <= most:
                    raise ConfigError(
                        f"method.name: {self.config.method.name} gives {samples} samples the weight {weight}; it"
                        f" must be a whole number of 0 to {most}, or the exact sum could overflow"
                    )
        return method

    def _check_storable(self, device: torch.device) -> None:
        check_storable(self.config, self.data.image_shape, self.data.num_classes, self.fitted, device)

    def _check_cache(self) -> None:
        cache = self.config.cache
        if cache.features and cache.dir is not None:
            check_folder(Path(cache.dir))

    def _fit(self, fleet: Fleet) -> dict[str, Any]:
        return fit_method(self.config, self.data.image_shape, self.data.num_classes, fleet.memory_cap_bytes)

    def _make_coordinator(self, fleet: Fleet, samples: list[int], device: torch.device) -> None:
        """On rank 0 alone: what a stage costs is found once, and everyone learns of it by the plans."""
        facts = self.data.image_shape, self.data.num_classes, self.fitted
        costs = measure_costs(self.config, *facts)
        if device.type != "cpu":
            costs = with_reserved(self.config, costs, *facts, device)
        world_size, paced = self.ranks.world_size, method_class(self.config).paced
        self.coordinator = Coordinator(self.config, fleet, samples, costs, world_size=world_size, paced=paced)

    def run(self) -> int:
        """Collective: every rank must call this. Train to the end and return the exit code."""
        stage, ended = self._resume()
        self.preemption.arm(root=self.ranks.is_root, stop_file=self.folder.stop_path)
        if not ended:
            self.emulator.enter_stage(stage)
        told: dict[str, Any] = self.ranks.decide(lambda: {"stop": self.preemption.reason_to_stop(), "save": False})
        writing = RoundParts()
        while not ended:
            if told["stop"] is not None:
                raise PreemptedError(told["stop"])
            writing.end("write")
            started = time.monotonic()
            self.preemption.round_begins()
            try:
                result = run_round(self.ranks, self.coordinator, self.window, self.emulator)
            except PreemptedError:
                self._save_finished_rounds()
                raise
            parts, writing = result.parts.before(writing), RoundParts()
            # rank 0 writes; if it cannot, every rank leaves with the same error
            told = self.ranks.decide(partial(self._record, result, started, parts))
            verdict = result.verdict
            if verdict.end_stage is not None:
                self._note_cache()
                self.emulator.leave_stage()
                if not verdict.stop:
                    stage += 1
                    with own_code("method.name", self.config.method.name):
                        self.method.begin_stage(stage)
                    self._share_weights()
                    self.window.clear()
                    self.emulator.enter_stage(stage)
            if verdict.checkpoint or told["save"] or told["stop"] is not None:
                self.ranks.decide(self._checkpoint)
            elif self.ranks.is_root:
                # a GPU's values are overwritten in the next round, those of a CPU are not
                values = self.emulator.values.cpu()
                self._unsaved = Unsaved(json.loads(json.dumps(self._state())), values, list(self.window.updates))
            self.preemption.round_ends()
            ended = verdict.stop
        self.ranks.decide(lambda: self._finish(stage))
        if self.history is not None:
            self.history.tracked_to_the_end()  # after the last collective: no rank waits for an upload
        return ExitCode.DONE

    def _resume(self) -> tuple[int, bool]:
        """Collective: every rank must call this. Load the newest checkpoint, if any; share rank 0's weights."""
        stage, ended = self.ranks.decide(self._load_checkpoint)
        self._share_weights()
        return stage, ended

    def _share_weights(self) -> None:
        """Collective: every rank must call this. Give all ranks rank 0's weights, bit for bit.

        What a stage starts from is calculated on each, and processors may differ in the last bit.
        """
        for tensor in self.method.state_dict().values():
            host = tensor.detach().contiguous()
            self.ranks.broadcast(host)
            tensor.copy_(host)

    def _load_checkpoint(self) -> tuple[int, bool]:
        """Return the stage to go on with, and whether there is nothing left but to deploy."""
        assert self.coordinator is not None
        assert self.history is not None
        self._check_data()
        self.history.note_code(code_digests(code_named(self.config)))
        found = self.checkpoints.load_newest(self._restore)
        self.folder.claim(self.config)
        self.folder.write_data(self._data_facts())
        caps = [None if cap is None else cap / MIB for cap in self.coordinator.fleet.memory_cap_bytes]
        self.folder.write_partition(summarise(self.parts, self.data).csv(caps))
        for change in self.history.code_changes[-1:]:
            if change["round"] == self.coordinator.round:
                changed = ", ".join(change["modules"])
                self.reporter.notice(
                    f"your own code has changed since round {change['round']} ({changed}): the run goes on with it; "
                    "summary.json (code_changes) and compare say so"
                )
        if found is not None and self.folder.metrics_bytes() < found.state["metrics_bytes"]:
            self.reporter.notice(f"{self.folder.metrics_path} is shorter than it was: lines are missing in it")
        if self.folder.forget_stop():
            self.reporter.notice(f"removed {self.folder.stop_path}, which ended the run before")
        self.folder.cut_metrics(found.state["metrics_bytes"] if found else 0)
        self.history.run_start(self.coordinator)
        self.reporter.start(self.config, self.coordinator, self.ranks, self.history, resumed=found is not None)
        with own_code("method.name", self.config.method.name):
            notices = self.method.notices()
        if self.config.cache.features and self.config.data.view_count is None:
            notices.append(
                f"cache.features: nothing is kept, as data.augment={self.config.data.augment} has no end of views; "
                "data.views gives it one"
            )
        for notice in notices:
            self.reporter.notice(notice)
        return self.coordinator.stage, self.coordinator.ended

    def _restore(self, found: Checkpoint) -> None:
        assert self.coordinator is not None
        assert self.history is not None
        if not isinstance(found.state["metrics_bytes"], int):
            raise TypeError("its length of metrics.jsonl is no number")
        before, now = found.state["inputs"], self._inputs
        if not is_same(before["data"], self.store, self.identity):
            raise self._other_inputs("the images or labels")
        if before != now | {"data": before["data"]}:
            raise self._other_inputs("what the devices are")
        ours = self.method.state_dict()
        if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in found.tensors.items()}:
            raise DataError(f"the checkpoints in {self.folder.path} are of another network; use another --run-dir")
        for name, tensor in ours.items():
            tensor.copy_(found.tensors[name])
        self.coordinator.load_state_dict(found.state["coordinator"])
        self.history.load_state_dict(found.state["history"], self.coordinator.round)
        self.preemption.remember(found.state.get("round_s", 0.0))
        self.window.clear()
        for number, update in found.updates:
            self.window.updates.append((number, update))

    def _check_data(self) -> None:
        """Raise ConfigError where the run folder was begun with other data, DataError where ours is damaged."""
        begun_with = self.folder.read_data()
        if begun_with is not None and begun_with.get("digest") != self.identity.digest:
            raise self._other_inputs("the images or labels")
        if not self.identity.intact and not self.folder.has_checkpoint():
            raise DataError(
                f"decoded data in {self.store} is damaged: it is not what was decoded; delete that folder, run again"
            )

    def _other_inputs(self, what: str) -> ConfigError:
        damaged = "" if self.identity.intact else f"; the decoded data in {self.store} is damaged: delete that folder"
        return ConfigError(
            f"the data or the devices (a CSV file?) have changed since {self.folder.path} was begun ({what}); put them "
            f"back, or use another --run-dir{damaged}"
        )

    def _data_facts(self) -> dict[str, Any]:
        """Return what data.json holds."""
        data = self.data
        return {
            "digest": self.identity.digest,
            "image_shape": list(data.image_shape),
            "train": len(data.train),
            "test": len(data.test),
            "num_classes": data.num_classes,
            "class_names": None if data.class_names is None else list(data.class_names),
        }

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        """What the run is made of and config.yaml only points to: the decoded data and the devices."""
        assert self.coordinator is not None
        fleet = self.coordinator.fleet
        figures = [list(fleet.memory_cap_bytes)]
        for each in (fleet.speed_flops, fleet.up_bytes_s, fleet.down_bytes_s, fleet.availability, fleet.phase):
            figures.append(each.tolist())
        return {"data": self.identity.digest, "fleet": hashlib.sha256(json.dumps(figures).encode()).hexdigest()}

    def _check(self) -> None:
        """Raise why the round in progress must not go on: a rank was lost, or there is no time for the rest."""
        self.ranks.check()
        reason = self.preemption.reason_to_drop() if self.ranks.is_root else None
        if reason is not None:
            raise PreemptedError(reason)

    def _note_cache(self) -> None:
        """Collective: every rank must call this. Say once if features of a stage that ends were not all kept."""
        features, stage = self.emulator.features, self.emulator.stage.index + 1
        if not self.config.cache.features or self.config.data.view_count is None or self._cache_noted:
            return
        refused = [reason for reason in self.ranks.all_gather(features and features.store.refused) if reason]
        if self.emulator.no_features is not None:
            self._cache_noted = True
            self.reporter.notice(f"cache.features: those of stage {stage} were not kept: {self.emulator.no_features}")
        elif refused:
            self._cache_noted = True
            cache = self.config.cache
            more = ", or name a folder on a disk in cache.dir" if cache.dir is None else " or cache.disk_mib"
            self.reporter.notice(
                f"cache.budget_mib: {cache.budget_mib:g} MiB a rank were too few for the features of stage {stage} "
                f"({refused[0]}), the rest was calculated anew; raise it{more}"
            )

    def _between_rounds(self) -> dict[str, Any]:
        """On rank 0 alone: whether the run shall leave or save now, for all ranks."""
        return {"stop": self.preemption.reason_to_stop(), "save": self.folder.asked_to_save()}

    def _record(self, result: RoundResult, started: float, parts: RoundParts) -> dict[str, Any]:
        assert self.coordinator is not None
        assert self.history is not None
        wall_s = time.monotonic() - started
        record = self.history.round_end(self.coordinator, result, wall_s, parts)
        self.reporter.round_end(record)
        if result.verdict.end_stage is not None:
            stage_record = self.history.stage_end(self.coordinator, result.verdict.end_stage)
            self.reporter.stage_end(stage_record)
            if not result.verdict.stop:
                self.coordinator.advance()
        return self._between_rounds()

    def _checkpoint(self) -> None:
        self.emulator.settle()
        state = self._state()
        self.checkpoints.save(state["coordinator"]["round"], self.method.state_dict(), state, self.window.updates)
        self._unsaved = None

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides tensors; whoever keeps it copies it, as it may change later."""
        assert self.coordinator is not None
        assert self.history is not None
        return {
            "coordinator": self.coordinator.state_dict(),
            "history": self.history.state_dict(),
            "metrics_bytes": self.folder.metrics_bytes(),
            "inputs": self._inputs,
            "round_s": self.preemption.round_s,
        }

    def _save_finished_rounds(self) -> None:
        """On rank 0, without the others: the round in progress is dropped, but not those before it."""
        if self._unsaved is not None:
            unsaved = self._unsaved
            self.emulator.values = unsaved.values
            self.emulator.settle()
            tensors = self.method.state_dict()
            self.checkpoints.save(unsaved.state["coordinator"]["round"], tensors, unsaved.state, unsaved.updates)

    def _finish(self, stage: int) -> None:
        """Deploy the network and close the books. Raises ConfigError if no device completed any round."""
        assert self.coordinator is not None
        assert self.history is not None
        if not self.coordinator.device_rounds:
            self.history.nothing_learned(self.coordinator)
        self.coordinator.check_learned()
        self.folder.write_model(weight_bytes(named_once(self.method.deployed(stage))))
        summary = self.history.finish(self.coordinator, self.data, stage, self.fitted)
        self.reporter.finish(summary, self.history.stages, self.folder.path)
