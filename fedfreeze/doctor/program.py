"""The program of one rank of `fedfreeze doctor`: meet the others, probe, gather, judge; rank 0 tells."""

import os
import signal
import socket
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedfreeze.comm.launcher import Launch
from fedfreeze.comm.mpi_transport import launch_by_mpi, load_mpi
from fedfreeze.comm.ranks import Ranks
from fedfreeze.comm.signals import set_handler
from fedfreeze.compute import choose_device, torch_threads
from fedfreeze.config.schema import Config
from fedfreeze.doctor import judge, probes
from fedfreeze.doctor.findings import Finding, exit_code_of, print_findings, print_json
from fedfreeze.errors import ExitCode, FedfreezeError, RankLostError, one_line

# A run may wait half an hour for a rank; here every rank is there at once, or something is wrong.
PATIENCE_S = 120.0

# Bytes summed, and how often: the median is told.
_SIZES = ((8, 21), (2**17, 5), (2**23, 5), (2**26, 3))
_ENOUGH_S = 15.0

_PERIOD = 1009


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    config: Config
    run_dir: Path
    named: bool
    """Whether a configuration was named: then its data and its run folder are looked at, too."""
    expected: int | None = None
    """The number of ranks that there should be; None: any."""
    as_json: bool = False


def run_doctor(request: Request, launch: Launch) -> int:
    """Collective: every rank must call this. Examine, have rank 0 tell, and return the exit code, the same on all.

    What fails before the ranks can talk is told as one line, as `fedfreeze run` would.
    """
    doctor = Doctor(request, launch)
    code = int(ExitCode.INTERNAL)
    try:
        code = int(_told(doctor))
    finally:
        if doctor.ranks is not None:
            doctor.ranks.leave(code)
    return code


def _told(doctor: "Doctor") -> int:
    """Collective: every rank must call this. Turn whatever ends the examination into words and an exit code."""
    try:
        with torch_threads(doctor.request.config.train.threads_per_rank):
            return doctor.run()
    except FedfreezeError as error:
        # rank 0 tells what all know; where it was lost itself, the others do, or --nproc's parent
        root_lost = doctor.ranks is not None and doctor.ranks.lifeline.root_lost
        if doctor.launch.rank == 0 or (root_lost and doctor.launch.launcher != "nproc"):
            _say(f"error: {one_line(error)}")
        return error.exit_code
    except KeyboardInterrupt:
        set_handler(signal.SIGINT, signal.SIG_IGN)  # a second one must not spoil the way out
        return ExitCode.INTERRUPTED
    except Exception:
        where = f"rank {doctor.launch.rank} on {socket.gethostname()}"
        _say(f"internal error, please report it; {where}:\n{traceback.format_exc()}")
        return ExitCode.INTERNAL


def _say(text: str) -> None:
    print(f"fedfreeze: {text}", file=sys.stderr, flush=True)


class Doctor:
    """One rank's part; rank 0 collects what was found."""

    def __init__(self, request: Request, launch: Launch):
        self.request = request
        self.launch = launch
        self.ranks: Ranks | None = None
        self.findings: list[Finding] = []
        self.started = time.monotonic()

    def run(self) -> int:
        """Collective: every rank must call this. Examine and return the exit code."""
        config = self.request.config
        if config.comm.transport == "mpi":
            self.launch = launch_by_mpi(self.launch)
        device, without_device = _device(config.train.device, self.launch.local_rank)
        given = config.comm
        comm = replace(given, timeout_s=min(given.timeout_s, PATIENCE_S), join_s=min(given.join_s, PATIENCE_S))
        self.ranks = ranks = Ranks(self.launch, device, comm)
        try:
            self._examine(ranks, device, without_device)
            code: int = ranks.decide(self._tell)
            ranks.close()
            return code
        except RankLostError as error:
            if not ranks.is_root:
                raise
            what = one_line(error).partition("; ")[0]
            advice = "see the log of that rank; if it happens again, leave its host out"
            self.findings.append(Finding("lost", what, advice, int(error.exit_code)))
            return self._tell()

    def _examine(self, ranks: Ranks, device: torch.device, without_device: probes.Facts | None) -> None:
        """Collective: every rank must call this. Probe on every rank, and judge on rank 0."""
        request, config, found = self.request, self.request.config, self.findings
        threads, hosts = config.train.threads_per_rank, len(set(ranks.rank_hosts))
        if ranks.is_root:
            found.append(judge.judge_launch(self.launch, hosts, request.expected))
            found.append(_transport(ranks, self.launch))
        records = ranks.all_gather({"rank": ranks.rank} | probes.probe_process())
        if ranks.is_root:
            found.insert(1, judge.judge_ranks(records, threads))
            found.append(judge.judge_versions(records))
            found.append(judge.judge_instructions(records))
        self._all_reduce(ranks, hosts)
        lost = ranks.all_gather(ranks.lifeline.lost)
        if ranks.is_root and ranks.world_size > 1:
            found.append(judge.judge_lifeline(lost, config.comm))
        here = without_device or probes.guarded(lambda: probes.probe_device(device, os.environ))
        absent = {"error": [int(ExitCode.UNAVAILABLE), "not tried, for want of a device; see above"]}
        own = {
            "device": here,
            "caps": absent if without_device else probes.guarded(lambda: probes.probe_caps(device, config.train)),
            "data": probes.guarded(lambda: probes.probe_data(config.data, named=request.named)),
        }
        records = [record | more for record, more in zip(records, ranks.all_gather(own), strict=True)]
        if ranks.is_root:
            found.append(judge.judge_devices(records, config.train))
            found.append(judge.judge_caps(records, enforced=config.fleet.enforce))
            found.append(judge.judge_data(records, config.data.path or config.data.name))
            found += self._root_findings(ranks.host)

    def _root_findings(self, host: str) -> list[Finding]:
        """Return what rank 0 alone needs: the run folder, Weights & Biases, the job's end."""
        request, config = self.request, self.request.config
        named = config if request.named else None
        folder = probes.guarded(lambda: probes.probe_run_folder(request.run_dir, named))
        wandb = probes.guarded(lambda: probes.probe_wandb(config, request.run_dir, os.environ))
        job = probes.guarded(lambda: probes.probe_job(config.checkpoint, os.environ))
        return [judge.judge_run_folder(folder, host), judge.judge_wandb(wandb), judge.judge_job(job)]

    def _all_reduce(self, ranks: Ranks, hosts: int) -> None:
        """Collective: every rank must call this. Sum whole numbers whose sum is known, small to large, and time it."""
        if ranks.world_size == 1:
            return
        started, sizes, wrong = time.monotonic(), [], 0
        total = ranks.world_size * (ranks.world_size + 1) // 2
        for size, times in _SIZES:
            if not ranks.share(time.monotonic() - started < _ENOUGH_S):
                break  # a slow network: the sizes so far tell it
            pattern = torch.arange(size // 8).remainder_(_PERIOD).add_(1)
            tensor, seconds = torch.empty_like(pattern), []
            for _ in range(times):
                torch.mul(pattern, ranks.rank + 1, out=tensor)
                ranks.all_reduce(torch.zeros(1, dtype=torch.int64))  # all begin together
                began = time.monotonic()
                ranks.all_reduce(tensor)
                seconds.append(time.monotonic() - began)
                wrong += int(tensor.sub_(pattern, alpha=total).count_nonzero())
            sizes.append({"bytes": size, "seconds": statistics.median(seconds)})
        wrongs = ranks.all_gather(wrong)
        if ranks.is_root:
            self.findings.append(
                judge.judge_all_reduce(sizes, [rank for rank, count in enumerate(wrongs) if count], hosts)
            )

    def _tell(self) -> int:
        """Print what was found and return the exit code. Raises StorageError."""
        request, launch, findings = self.request, self.launch, self.findings
        seconds = time.monotonic() - self.started
        if request.as_json:
            print_json(
                findings,
                name=request.config.name,
                run_dir=str(request.run_dir),
                launcher=launch.launcher,
                ranks=launch.world_size,
                seconds=seconds,
            )
        else:
            ranks = f"{launch.world_size} rank{'s' * (launch.world_size > 1)}"
            print_findings(findings, f"{request.config.name}: {len(findings)} checks by {ranks} in {seconds:.1f} s")
        return exit_code_of(findings)


def _device(wanted: str, local_rank: int) -> tuple[torch.device, probes.Facts | None]:
    """Return where this rank computes; where that is missing, the CPU and why: the others wait for this rank."""
    device = torch.device("cpu")

    def choose() -> probes.Facts:
        nonlocal device
        device = choose_device(wanted, local_rank)
        return {}

    found = probes.guarded(choose)
    return device, found if "error" in found else None


def _transport(ranks: Ranks, launch: Launch) -> Finding:
    """Return what carries messages between the ranks, and where they met."""
    mpi = ranks.config.transport == "mpi"
    library = load_mpi().Get_library_version().replace("\0", "").split("\n")[0].split(",")[0].strip() if mpi else None
    facts: dict[str, Any] = {"transport": ranks.config.transport, "backend": ranks.backend, "library": library}
    if launch.world_size == 1:
        return Finding("transport", f"none is needed{f'; {library} loads' if mpi else ''}", facts=facts)
    if library is not None:
        return Finding("transport", f"mpi, by {library}", facts=facts)
    place = "by a file" if launch.store_file else f"at {launch.master_address or '127.0.0.1'} port {launch.master_port}"
    return Finding("transport", f"torch, {ranks.backend}; the ranks met {place}", facts=facts | {"met": place})
