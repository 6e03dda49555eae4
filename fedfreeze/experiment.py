"""The program of one rank: set up, resume, rounds, stage changes, end."""

import hashlib
import json
import signal
import socket
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedfreeze.aggregate import device_weight
from fedfreeze.blocks import build_network
from fedfreeze.cap import MIB
from fedfreeze.checkpoint import Checkpoint, CheckpointStore, weight_bytes
from fedfreeze.comm import Ranks, launch_by_mpi
from fedfreeze.compute import choose_device, keep_freed_memory
from fedfreeze.config import Config
from fedfreeze.coordinator import Coordinator
from fedfreeze.cost import fit_method, measure_costs
from fedfreeze.data.partition import partition_of
from fedfreeze.data.store import Data, open_store, prepare
from fedfreeze.errors import (
    ConfigError,
    DataError,
    ExitCode,
    FedfreezeError,
    PreemptedError,
    RankLostError,
    out_of_memory,
)
from fedfreeze.fleet import Fleet, make_fleet
from fedfreeze.launcher import Launch
from fedfreeze.methods import Method, make_method, method_class
from fedfreeze.pace import PerturbationWindow
from fedfreeze.partition_summary import summarise
from fedfreeze.plugins import own_code, own_frame
from fedfreeze.preempt import Preemption
from fedfreeze.report import Reporter
from fedfreeze.round import RoundResult, run_round
from fedfreeze.run_folder import RunFolder
from fedfreeze.summary import History
from fedfreeze.train import Emulator


def run_rank(config: Config, run_dir: Path, launch: Launch, preemption: Preemption) -> int:
    """Collective: every rank must call this. Run an experiment to the end and return the exit code.

    Errors are told once, by rank 0; its own loss by all others.
    """
    reporter = Reporter(quiet=launch.rank != 0, launcher=launch.launcher)
    session = Session(config, run_dir, preemption, reporter)
    code = int(ExitCode.INTERNAL)
    try:
        code = _told(session, config, launch, reporter)
    finally:
        session.leave(code)
    return code


def _told(session: "Session", config: Config, launch: Launch, reporter: Reporter) -> int:
    """Collective: every rank must call this. Run, and turn whatever ends the run into words and an exit code."""
    try:
        return session.run(launch)
    except PreemptedError as error:
        reporter.notice(f"{error}: left; the last checkpoint stands, run again to go on")
        return error.exit_code
    except RankLostError as error:
        root_lost = session.ranks is not None and session.ranks.lifeline.root_lost
        if root_lost and launch.launcher != "nproc":  # whose parent tells it
            reporter.quiet = False
        reporter.error(error)
        return error.exit_code
    except FedfreezeError as error:
        reporter.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        reporter.notice("interrupted; the last checkpoint stands, run again to go on")
        return ExitCode.INTERRUPTED
    except Exception as error:
        too_large = out_of_memory(error)
        if too_large is not None:
            reporter.crash(f"error: {too_large}")
            return too_large.exit_code
        own = own_frame(error, [config.model.factory, config.method.name, config.select.name, config.pace.policy])
        blame = f"error in code of your own ({own})" if own else "internal error"
        reporter.crash(f"{blame}, rank {launch.rank} on {socket.gethostname()}:\n{traceback.format_exc()}")
        return ExitCode.INTERNAL
    finally:
        reporter.close()


class Session:
    """What a rank holds from its first collective to its last breath, whatever comes between."""

    def __init__(self, config: Config, run_dir: Path, preemption: Preemption, reporter: Reporter):
        self.config = config
        self.folder = RunFolder(run_dir)
        self.preemption = preemption
        self.reporter = reporter
        self.ranks: Ranks | None = None

    def run(self, launch: Launch) -> int:
        """Collective: every rank must call this. Set up, train, and leave the group and the folder in order."""
        config, folder, reporter, preemption = self.config, self.folder, self.reporter, self.preemption
        # set before anything computes: the bits depend on it, and launchers set it to all sorts of values
        torch.set_num_threads(config.train.threads_per_rank)
        if config.comm.transport == "mpi":
            launch = launch_by_mpi(launch)
            reporter.quiet = launch.rank != 0
        device = choose_device(config.train.device, launch.local_rank)
        keep_freed_memory()
        is_root = launch.rank == 0
        self.ranks = ranks = Ranks(
            launch, device, config.comm, poll=lambda: preemption.message(root=is_root), hear_wish=preemption.hear
        )
        history = None
        try:
            if ranks.decide(lambda: _open_folder(folder, config, reporter)):
                return ExitCode.DONE
            history = History(config, folder, launch, ranks) if is_root else None
            ranks.decide(lambda: history.track(reporter.notice) if history else None)
            code = Experiment(config, folder, ranks, device, reporter, history, preemption).run()
            ranks.close()
            return code
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not spoil the way out
            if history is not None and history.begun:
                history.failed(error)
            raise
        finally:
            folder.close()

    def leave(self, code: int) -> None:
        """Tell the other ranks how this one leaves; where rank 0 was lost, rank 1 keeps its books."""
        if self.ranks is not None:
            self.ranks.leave(code)
            if self.ranks.rank == 1 and self.ranks.lifeline.root_lost:
                note_exit_code(self.folder.path, ExitCode.RANK_LOST, self.ranks.lifeline.lost)


def note_exit_code(run_dir: Path, code: int, error: str | None = None) -> None:
    """Have summary.json say how the ranks ended, where rank 0 could not, or knew only that another was gone."""
    folder = RunFolder(run_dir)
    summary = folder.read_summary()
    if summary is None:
        return
    if summary.get("status") == "running" and code == ExitCode.RANK_LOST:
        folder.write_summary(summary | {"status": "failed", "exit_code": int(code), "error": error})
    elif summary.get("exit_code") == ExitCode.RANK_LOST and code == ExitCode.INTERNAL:
        folder.write_summary(summary | {"exit_code": int(code)})


def _open_folder(folder: RunFolder, config: Config, reporter: Reporter) -> bool:
    """Lock the folder; tell whether the run in it is finished already."""
    for notice in folder.open(config):
        reporter.notice(notice)
    summary = folder.read_summary()
    if summary is not None and summary.get("status") == "finished":
        reporter.notice(f"{folder.path} is finished already (accuracy {summary.get('final_accuracy')})")
        return True
    return False


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
        self.config = config
        self.folder = folder
        self.ranks = ranks
        self.reporter = reporter
        self.history = history
        self.preemption = preemption
        self.coordinator: Coordinator | None = None
        self.store = ranks.together(lambda: prepare(config.data))
        self.data: Data = ranks.together(lambda: open_store(self.store))
        self.parts = parts = ranks.together(lambda: partition_of(self.data, config))
        fleet = ranks.together(lambda: make_fleet(config.fleet, config.seed))
        self.fitted: dict[str, Any] = ranks.decide(lambda: self._fit(fleet))
        # before the network is built: what no device can hold may not fit this machine either
        ranks.decide(partial(self._make_coordinator, fleet, [len(part) for part in parts]))
        self.method = ranks.together(self._build)
        self.emulator = Emulator(config, self.data, parts, self.method, device, self._check)
        self.window = PerturbationWindow(config.pace.window)
        self.checkpoints = CheckpointStore(folder.path / "checkpoints", config.checkpoint.keep, reporter.notice)

    def _build(self) -> Method:
        model = method_class(self.config).network(self.config.model, self.fitted)
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

    def _fit(self, fleet: Fleet) -> dict[str, Any]:
        return fit_method(self.config, self.data.image_shape, self.data.num_classes, fleet.memory_cap_bytes)

    def _make_coordinator(self, fleet: Fleet, samples: list[int]) -> None:
        """On rank 0 alone: what a stage costs is predicted once, and everyone learns of it by the plans."""
        costs = measure_costs(self.config, self.data.image_shape, self.data.num_classes, self.fitted)
        world_size, paced = self.ranks.world_size, method_class(self.config).paced
        self.coordinator = Coordinator(self.config, fleet, samples, costs, world_size=world_size, paced=paced)

    def run(self) -> int:
        """Collective: every rank must call this. Train to the end and return the exit code."""
        stage, ended = self._resume()
        self.preemption.arm(root=self.ranks.is_root, stop_file=self.folder.stop_path)
        if not ended:
            self.emulator.enter_stage(stage)
        told: dict[str, Any] = self.ranks.decide(self._between_rounds)
        while not ended:
            if told["stop"] is not None:
                raise PreemptedError(told["stop"])
            started = time.monotonic()
            self.preemption.round_begins()
            result = run_round(self.ranks, self.coordinator, self.window, self.emulator)
            # rank 0 writes; if it cannot, every rank leaves with the same error
            told = self.ranks.decide(partial(self._record, result, started))
            verdict = result.verdict
            if verdict.end_stage is not None:
                self.emulator.leave_stage()
                if not verdict.stop:
                    stage += 1
                    with own_code("method.name", self.config.method.name):
                        self.method.begin_stage(stage)
                    self.window.clear()
                    self.emulator.enter_stage(stage)
            if verdict.checkpoint or told["save"] or told["stop"] is not None:
                self.ranks.decide(self._checkpoint)
            ended = verdict.stop
        self.ranks.decide(lambda: self._finish(stage))
        if self.history is not None:
            self.history.tracked_to_the_end()  # after the last collective: no rank waits for an upload
        return ExitCode.DONE

    def _resume(self) -> tuple[int, bool]:
        """Collective: every rank must call this. Load the newest checkpoint, if any; share rank 0's weights."""
        stage, ended = self.ranks.decide(self._load_checkpoint)
        for tensor in self.method.state_dict().values():
            host = tensor.detach().contiguous()
            self.ranks.broadcast(host)
            tensor.copy_(host)
        return stage, ended

    def _load_checkpoint(self) -> tuple[int, bool]:
        """Return the stage to go on with, and whether there is nothing left but to deploy."""
        assert self.coordinator is not None
        assert self.history is not None
        self.folder.claim(self.config)
        caps = [None if cap is None else cap / MIB for cap in self.coordinator.fleet.memory_cap_bytes]
        self.folder.write_partition(summarise(self.parts, self.data).csv(caps))
        found = self.checkpoints.load_newest(self._restore)
        if found is not None and self.folder.metrics_bytes() < found.state["metrics_bytes"]:
            self.reporter.notice(f"{self.folder.metrics_path} is shorter than it was: lines are missing in it")
        if self.folder.forget_stop():
            self.reporter.notice(f"removed {self.folder.stop_path}, which ended the run before")
        self.folder.cut_metrics(found.state["metrics_bytes"] if found else 0)
        self.history.run_start(self.coordinator)
        self.reporter.start(self.config, self.coordinator, self.ranks, self.history, resumed=found is not None)
        return self.coordinator.stage, self.coordinator.ended

    def _restore(self, found: Checkpoint) -> None:
        assert self.coordinator is not None
        assert self.history is not None
        if not isinstance(found.state["metrics_bytes"], int):
            raise TypeError("its length of metrics.jsonl is no number")
        if found.state["inputs"] != self._inputs():
            raise ConfigError(
                f"the data or the devices (a CSV file?) have changed since {self.folder.path} was begun; put them "
                "back, or use another --run-dir"
            )
        ours = self.method.state_dict()
        if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in found.tensors.items()}:
            raise DataError(f"the checkpoints in {self.folder.path} are of another network; use another --run-dir")
        for name, tensor in ours.items():
            tensor.copy_(found.tensors[name])
        self.coordinator.load_state_dict(found.state["coordinator"])
        self.history.load_state_dict(found.state["history"])
        self.window.clear()
        for number, update in found.updates:
            self.window.updates.append((number, update))

    def _inputs(self) -> dict[str, Any]:
        """What the run is made of and config.yaml only points to: the decoded data and the devices."""
        assert self.coordinator is not None
        fleet = self.coordinator.fleet
        figures = [list(fleet.memory_cap_bytes)]
        for each in (fleet.speed_flops, fleet.up_bytes_s, fleet.down_bytes_s, fleet.availability, fleet.phase):
            figures.append(each.tolist())
        return {"data": self.store.name, "fleet": hashlib.sha256(json.dumps(figures).encode()).hexdigest()}

    def _check(self) -> None:
        """Raise why the round in progress must not go on: a rank was lost, or there is no time for the rest."""
        self.ranks.check()
        reason = self.preemption.reason_to_drop() if self.ranks.is_root else None
        if reason is not None:
            raise PreemptedError(reason)

    def _between_rounds(self) -> dict[str, Any]:
        """On rank 0 alone: whether the run shall leave or save now, for all ranks."""
        return {"stop": self.preemption.reason_to_stop(), "save": self.folder.asked_to_save()}

    def _record(self, result: RoundResult, started: float) -> dict[str, Any]:
        assert self.coordinator is not None
        assert self.history is not None
        wall_s = time.monotonic() - started
        record = self.history.round_end(self.coordinator, result, wall_s)
        self.reporter.round_end(record)
        if result.verdict.end_stage is not None:
            stage_record = self.history.stage_end(self.coordinator, result.verdict.end_stage)
            self.reporter.stage_end(stage_record)
            if not result.verdict.stop:
                self.coordinator.advance()
        self.preemption.round_ends()
        return self._between_rounds()

    def _checkpoint(self) -> None:
        assert self.coordinator is not None
        assert self.history is not None
        self.emulator.settle()
        state: dict[str, Any] = {
            "coordinator": self.coordinator.state_dict(),
            "history": self.history.state_dict(),
            "metrics_bytes": self.folder.metrics_bytes(),
            "inputs": self._inputs(),
        }
        self.checkpoints.save(self.coordinator.round, self.method.state_dict(), state, self.window.updates)

    def _finish(self, stage: int) -> None:
        """Deploy the network and close the books."""
        assert self.coordinator is not None
        assert self.history is not None
        self.folder.write_model(weight_bytes(self.method.deployed(stage).state_dict()))
        summary = self.history.finish(self.coordinator, self.data, stage, self.fitted)
        self.reporter.finish(summary, self.history.stages, self.folder.path)
