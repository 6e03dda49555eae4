"""What one rank of `fedfreeze doctor` finds out by itself: no collectives, and nothing is left behind."""

import contextlib
import gc
import importlib.metadata
import math
import netrc
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

import fedfreeze
from fedfreeze.comm.slurm import seconds_left
from fedfreeze.config.schema import CheckpointConfig, Config, DataConfig, TrainConfig
from fedfreeze.data.sources import EMBEDDED
from fedfreeze.data.store import NO_SPACE_ADVICE, cache_folder, open_store, store_folder
from fedfreeze.device.cap import DeviceOutOfMemoryError, TensorByteCounter, make_cap
from fedfreeze.errors import ExitCode, FedfreezeError, UnavailableError, one_line, out_of_memory, storage_error
from fedfreeze.network.stage import LocalTrainer, Stage
from fedfreeze.storage import lock
from fedfreeze.storage.run_folder import RunFolder
from fedfreeze.track.live import make_tracker, wandb_installed
from fedfreeze.track.quiet_wandb import bounded
from fedfreeze.units import MIB

Facts = dict[str, Any]
"""Plain JSON values, or `error`: exit code and message."""

# How long the server of Weights & Biases may take to answer.
_REACH_S = 5.0


def guarded(probe: Callable[[], Facts]) -> Facts:
    """Return what a probe finds, or how it failed as `error`: a failing check must end neither this rank nor others."""
    try:
        return probe()
    except FedfreezeError as error:
        return {"error": [int(error.exit_code), one_line(error)]}
    except OSError as error:
        unusable = storage_error("use", error.filename or "a folder", error)
        return {"error": [int(unusable.exit_code), one_line(unusable)]}
    except Exception as error:
        too_large = out_of_memory(error)
        if too_large is not None:
            return {"error": [int(too_large.exit_code), one_line(too_large)]}
        said = f"{type(error).__name__}: {one_line(error)[:200]}; please report it"
        return {"error": [int(ExitCode.INTERNAL), said]}


def probe_process() -> Facts:
    """Return where this process runs, on which cores and with which programs."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cores": sorted(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fedfreeze": fedfreeze.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def probe_device(device: torch.device, environment: Mapping[str, str]) -> Facts:
    """Return what this rank computes on; on a CPU also whether its job has GPUs."""
    if device.type != "cuda":
        given = environment.get("SLURM_GPUS_ON_NODE", "0")
        return {"kind": "cpu", "gpus_of_job": int(given) if given.isdecimal() else 0}
    properties = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "index": device.index,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "uuid": str(properties.uuid),
    }


def probe_caps(device: torch.device, config: TrainConfig) -> Facts:
    """Train a tiny stage under a cap that holds it, one that does not, and again one that does.

    Raises UnavailableError where that is not how it goes, or memory is not given back.
    """
    cap = make_cap(device)
    cap.begin_stage()
    with torch.random.fork_rng(devices=[]):
        active = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        output = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        stage = Stage(0, [], active, output, device)
        trainer = LocalTrainer(stage, config)
        values = stage.flat.buffer.clone()

        def train(cap_bytes: int | None) -> int:
            with cap.device(cap_bytes) as memory:
                images, labels = torch.ones(32, 3, 32, 32).to(device), torch.zeros(32, dtype=torch.int64).to(device)
                trainer.begin(values, 0.1)
                cap.step(
                    memory,
                    "step",
                    lambda: [*trainer.held_tensors(), images, labels],
                    lambda: trainer.step(images, labels),
                )
            return memory.peak_bytes

        def held() -> int:
            gc.collect()
            return torch.cuda.memory_allocated(device) if device.type == "cuda" else counter.live_bytes

        counter = TensorByteCounter()
        with counter:
            train(None)
            cap.begin_stage()  # what libraries keep for themselves from now on is no device's
            peak = train(None)
            before, fits, short = held(), peak + peak // 4, peak // 2
            refusal = None
            try:
                train(fits)
                try:
                    train(short)
                except DeviceOutOfMemoryError as error:
                    refusal = one_line(error)
                    trainer.drop_gradients()
                train(fits)
            except DeviceOutOfMemoryError as error:
                raise UnavailableError(
                    f"a training step of {peak / MIB:.2f} MiB does not fit its cap of {fits / MIB:.2f} MiB "
                    f"({one_line(error)}); see whether another program uses this GPU, or please report it"
                ) from None
            after = held()
        if refusal is None:
            raise UnavailableError(
                f"a training step of {peak / MIB:.2f} MiB passed under a cap of {short / MIB:.2f} MiB: {cap.name} does "
                "not enforce caps here; use another version of torch, and please report it"
            )
        if after > before:
            raise UnavailableError(
                f"a step that was refused kept {(after - before) / MIB:.2f} MiB; use another version of torch, and "
                "please report it"
            )
    return {"enforced_by": cap.name, "peak_bytes": peak, "fits_bytes": fits, "refused_bytes": short, "said": refusal}


def try_folder(folder: Path, action: str, remedy: str = "free space or choose another folder") -> Facts:
    """Write, sync, lock, rename and remove a file where `folder` is or would be made; return seconds and free bytes.

    Raises StorageError, whose message says that it cannot `action` the folder.
    """
    descriptors: list[int | None] = []
    name = f".fedfreeze-doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        place = folder.absolute()
        while not place.exists():  # making folders to remove them again could get in the way of another rank
            place = place.parent
        first, second = place / name, place / f"{name}-renamed"
        try:
            descriptors.append(lock.take(first, wait=False))
            descriptors.append(lock.take(first, wait=False))  # must be refused
            started = time.monotonic()
            with open(first, "wb") as file:
                file.write(b"fedfreeze doctor\n" * 256)
                file.flush()
                os.fsync(file.fileno())
            seconds = time.monotonic() - started
            first.rename(second)
            if second.stat().st_size != 256 * 17:
                raise OSError(f"{second} does not hold what was written")
        finally:
            for descriptor in descriptors:
                if descriptor is not None:
                    os.close(descriptor)
            for path in (first, second):
                with contextlib.suppress(OSError):
                    path.unlink()
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise storage_error(action, folder, error, remedy) from None
    return {"free_bytes": free, "sync_s": seconds, "locks": descriptors[-1] is None}


def probe_run_folder(run_dir: Path, config: Config | None) -> Facts:
    """Return whether the run folder can be written and, where a configuration was named, whether its run may use it.

    Raises StorageError, and ConfigError where the folder is another run's or in use.
    """
    facts: Facts = {"folder": str(run_dir), "status": None} | try_folder(run_dir, "use run folder")
    if config is not None:
        folder = RunFolder(run_dir)
        folder.open(config)
        try:
            facts["status"] = (folder.read_summary() or {}).get("status")
        finally:
            folder.close()
    return facts


def probe_data(config: DataConfig, *, named: bool) -> Facts:
    """Return whether the data is decoded for this host and can be read, or else whether it could be written.

    `named`: a configuration says which data; else only the folder is tried. Raises DataError, StorageError.
    """
    folder = cache_folder(config)
    facts: Facts = {"folder": str(folder), "prepared": None, "from_hub": False}
    if named:
        store = store_folder(config)
        facts["prepared"] = (store / "meta.json").is_file()
        facts["from_hub"] = config.path is None and config.name not in EMBEDDED
        if facts["prepared"]:
            open_store(store)
            return facts
    return facts | try_folder(folder, "write decoded data to", NO_SPACE_ADVICE)


def probe_wandb(config: Config, run_dir: Path, environment: Mapping[str, str]) -> Facts:
    """Return how Weights & Biases would track, and whether a key is there, not which. Raises UnavailableError."""
    mode = make_tracker(config, run_dir, lambda text: None).mode
    server = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    host = server.hostname or ""
    facts: Facts = {
        "mode": mode,
        "version": importlib.metadata.version("wandb") if wandb_installed() else None,
        "host": host,
        "key": bool(environment.get("WANDB_API_KEY")) or _in_netrc(host, environment),
        "reached": None,
        "folder_error": None,
    }
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if mode == "online" and not any(environment.get(name) for name in proxies):
        port = server.port or (80 if server.scheme == "http" else 443)
        try:
            bounded(lambda: socket.create_connection((host, port), _REACH_S).close(), _REACH_S)
            facts["reached"] = True
        except OSError:  # TimeoutError too
            facts["reached"] = False
    if mode != "off" and config.track.dir is not None:
        facts["folder_error"] = guarded(lambda: try_folder(Path(str(config.track.dir)), "use track.dir")).get("error")
    return facts


def _in_netrc(host: str, environment: Mapping[str, str]) -> bool:
    with contextlib.suppress(OSError, netrc.NetrcParseError, RuntimeError):
        path = environment.get("NETRC") or Path.home() / ".netrc"
        return netrc.netrc(str(path)).authenticators(host) is not None
    return False


def probe_job(config: CheckpointConfig, environment: Mapping[str, str]) -> Facts:
    """Return which SLURM job this is, when it ends and how often it was restarted; None for what nothing tells."""
    left = seconds_left(environment)
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    return {
        "job": environment.get("SLURM_JOB_ID"),
        "seconds_left": left if math.isfinite(left) else None,
        "asked": shutil.which("squeue") is not None,
        "restarts": int(restarts) if restarts.isdecimal() else 0,
        "time_limit_s": config.time_limit_s,
        "grace_s": config.grace_s,
    }
