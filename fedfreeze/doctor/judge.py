"""What `fedfreeze doctor` makes of what the ranks found: one finding a check. Nothing runs here."""

from collections.abc import Sequence
from typing import Any

from fedfreeze.comm.launcher import Launch
from fedfreeze.config.schema import CommConfig, TrainConfig
from fedfreeze.doctor.findings import Finding, count, failed_as
from fedfreeze.errors import ExitCode
from fedfreeze.units import MIB, duration

GIB = 2**30

# Hosts or GPUs that are told one by one; --json has all.
_SHOWN = 8

# Under these, a warning: bytes free for a run, and MiB/s between hosts (a tenth of 10 Gbit/s Ethernet is 119).
_LITTLE_SPACE_BYTES = GIB
_SLOW_MIB_S = 100.0

_HOW_MANY = {
    "none": "`srun --ntasks={0}`, `torchrun --nproc-per-node={0}`, `mpirun -n {0}` or --nproc {0} starts {0}",
    "nproc": "use --nproc {0}",
    "torchrun": "see torchrun's --nnodes and --nproc-per-node, whose product is the number of ranks",
    "srun": "see --ntasks and --nodes of sbatch and srun (`srun --ntasks={0}`)",
    "mpirun": "use `mpirun -n {0}`, of the MPI library that runs here",
}


def judge_launch(launch: Launch, hosts: int, expected: int | None) -> Finding:
    """Tell by what the ranks were started, and whether as many as expected came."""
    found = f"{launch.launcher}: {count(launch.world_size, 'rank')} on {count(hosts, 'host')}"
    if launch.launcher == "none":
        found = "none: 1 rank"
    facts = {"launcher": launch.launcher, "ranks": launch.world_size, "hosts": hosts, "attempt": launch.attempt}
    if expected is not None and expected != launch.world_size:
        advice = _HOW_MANY[launch.launcher].format(expected)
        return Finding("launcher", f"{found}; --ranks expects {expected}", advice, int(ExitCode.BAD_CONFIG), facts)
    return Finding("launcher", found, facts=facts)


def judge_ranks(records: Sequence[dict[str, Any]], threads: int) -> Finding:
    """Tell which ranks are where and on which cores, and whether their threads have as many."""
    hosts: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        hosts.setdefault(record["host"], []).append(record)
    told, crowded, bound = [], [], []
    for host, there in hosts.items():
        cores = {core for record in there for core in record["cores"]}
        each = sorted({len(record["cores"]) for record in there})
        apart = "" if each == [len(cores)] else f", {'-'.join(map(str, dict.fromkeys((each[0], each[-1]))))} each"
        told.append(f"{host}: {rank_names(there)} on {count(len(cores), 'core')}{apart}")
        bound += [record for record in there if len(record["cores"]) < threads]
        if len(there) * threads > len(cores):
            crowded.append(f"{host}: {count(len(there) * threads, 'thread')} on {count(len(cores), 'core')}")
    found, advice = _shown(told), ""
    if bound:
        found += f"; {_where(bound)}: fewer cores than the {threads} of train.threads_per_rank"
        advice = "give each rank as many (srun --cpus-per-task, mpirun --bind-to none), or lower train.threads_per_rank"
    elif crowded:
        found += f"; too many for {_shown(crowded)}"
        advice = "ranks will wait for one another: start fewer, give them more cores, or lower train.threads_per_rank"
    facts = {"threads_per_rank": threads, "by_rank": [_only(record, "host", "pid", "cores") for record in records]}
    return Finding("ranks", found, advice, facts=facts)


def judge_devices(records: Sequence[dict[str, Any]], config: TrainConfig) -> Finding:
    """Tell what each rank computes on, whether ranks share a GPU and whether all have one of a kind."""
    facts = {"by_rank": [record["device"] for record in records]}
    failed = _rank_failures("device", records, "device")
    if failed is not None:
        return failed
    gpus: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["device"]["kind"] == "cuda":
            gpus.setdefault(f"{record['host']} {record['device']['uuid']}", []).append(record)
    if not gpus:
        idle = [record for record in records if record["device"]["gpus_of_job"]]
        if idle and config.device != "cpu":
            advice = "install a torch built for CUDA, see nvidia-smi there, or set train.device=cpu"
            return Finding("device", f"cpu, though {_where(idle)} has GPUs in its job", advice, facts=facts)
        return Finding("device", "cpu", facts=facts)
    told = []
    for there in gpus.values():
        device = there[0]["device"]
        memory = f"{device['memory_bytes'] / GIB:.1f} GiB"
        told.append(f"{_where(there)}: cuda:{device['index']}, {device['name']}, {memory}, {device['uuid']}")
    advice = ""
    if sum(map(len, gpus.values())) < len(records):
        told.append(f"{_where([r for r in records if r['device']['kind'] == 'cpu'])}: cpu")
        advice = "have all ranks compute on the same: train.device=cpu, or a GPU for each rank and train.device=cuda"
    elif len(gpus) < len(records):
        advice = "ranks share a GPU, which slows each and rules out NCCL: one rank a GPU (srun --gpus-per-task=1)"
    elif len({record["device"]["name"] for record in records}) > 1:
        advice = "GPUs of several kinds: a repeated run gives other bits where ranks stand otherwise; ask for one kind"
    return Finding("device", _shown(told), advice, facts=facts)


def judge_versions(records: Sequence[dict[str, Any]]) -> Finding:
    """Tell the versions, and which ranks have others than most."""
    names = ("python", "torch", "fedfreeze")
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(", ".join(f"{name} {record[name]}" for name in names), []).append(record)
    facts = {"by_rank": [_only(record, *names) for record in records]}
    most, *others = sorted(groups, key=lambda group: -len(groups[group]))
    if not others:
        return Finding("versions", most, facts=facts)
    found = "; ".join([most, *(f"{_where(groups[other])}: {other}" for other in others)])
    advice = "install one environment for all hosts, and start the ranks with its Python by its full path"
    return Finding("versions", found, advice, int(ExitCode.UNAVAILABLE), facts)


def judge_instructions(records: Sequence[dict[str, Any]]) -> Finding:
    """Tell the instruction sets that torch uses, which the bits of a result depend on."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["instructions"], []).append(record)
    facts = {"by_rank": [record["instructions"] for record in records]}
    if len(groups) == 1:
        return Finding("instructions", f"{next(iter(groups))}{' on all ranks' * (len(records) > 1)}", facts=facts)
    found = "; ".join(f"{_where(there)}: {name}" for name, there in groups.items())
    advice = (
        "runs will not repeat bit for bit where ranks stand otherwise: ask for nodes of one kind (srun --constraint), "
        "or set ATEN_CPU_CAPABILITY=default on all"
    )
    return Finding("instructions", found, advice, facts=facts)


def judge_all_reduce(sizes: Sequence[dict[str, Any]], wrong: Sequence[int], hosts: int) -> Finding:
    """Tell latency and bandwidth by sizes (bytes, seconds: median), and which ranks got a wrong sum."""
    small, large = sizes[0], sizes[-1]
    rate = large["bytes"] / MIB / large["seconds"]
    found = (
        f"sums right, {small['bytes']} bytes in {1e3 * small['seconds']:.2g} ms, "
        f"{large['bytes'] / MIB:.3g} MiB in {large['seconds']:.2g} s ({rate:.3g} MiB/s)"
    )
    facts = {"sizes": list(sizes), "mib_s": rate, "wrong_on_ranks": list(wrong)}
    if wrong:
        advice = "memory or network of a host is broken, or the MPI library: leave that host out, try comm.transport"
        return Finding(
            "all-reduce", f"wrong sum on {_names(wrong)}", advice, exit_code=int(ExitCode.UNAVAILABLE), facts=facts
        )
    advice = ""
    if hosts > 1 and rate < _SLOW_MIB_S:
        advice = (
            "slow for hosts of a cluster: name the fast network (GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; "
            "`ip -brief address` lists them), or use comm.transport=mpi"
        )
    return Finding("all-reduce", found, advice, facts=facts)


def judge_lifeline(lost: Sequence[str | None], config: CommConfig) -> Finding:
    """Tell whether every rank is connected to rank 0, by what each has heard of losses."""
    told = next((text for text in lost if text), None)
    facts = {"heartbeat_s": config.heartbeat_s, "lost": told}
    if told is not None:
        return Finding(
            "heartbeat", told, "see the log of that rank, then start again", int(ExitCode.RANK_LOST), facts=facts
        )
    connected = f"{count(len(lost) - 1, 'rank')} connected to rank 0"
    return Finding("heartbeat", f"{connected}; lost after {config.heartbeat_s:g} s of silence", facts=facts)


def judge_caps(records: Sequence[dict[str, Any]], *, enforced: bool) -> Finding:
    """Tell whether caps hold on every rank."""
    failed = _rank_failures("caps", records, "caps")
    if failed is not None:
        return failed
    facts = {"by_rank": [record["caps"] for record in records]}
    first = records[0]["caps"]
    found = (
        f"{first['enforced_by']}: a step of {first['peak_bytes'] / MIB:.2f} MiB passes under "
        f"{first['fits_bytes'] / MIB:.2f}, is refused under {first['refused_bytes'] / MIB:.2f}, and memory comes back"
    )
    unused = "" if enforced else " (this configuration does not use them: fleet.enforce=false)"
    return Finding("caps", f"{found}{unused}", facts=facts)


def judge_run_folder(facts: dict[str, Any], host: str) -> Finding:
    """Tell whether rank 0 can write the run folder."""
    if "error" in facts:
        return failed_as("run folder", *facts["error"])
    found = f"{facts['folder']} can be written by {host}, {_space(facts)}, a file is safe in {_ms(facts['sync_s'])}"
    if facts["status"] is not None:
        found += f"; holds this run, {facts['status']}"
    return Finding("run folder", found, _folder_advice(facts), facts=facts)


def judge_data(records: Sequence[dict[str, Any]], name: str) -> Finding:
    """Tell whether every rank can read the decoded data, or write it at the start."""
    failed = _rank_failures("data", records, "data")
    if failed is not None:
        return failed
    facts = {"by_rank": [record["data"] for record in records]}
    folder = records[0]["data"]["folder"]
    missing = [record for record in records if not record["data"]["prepared"]]
    if not missing:
        return Finding("data", f"{name} is decoded in {folder}", facts=facts)
    space = min((record["data"] for record in missing), key=lambda found: found["free_bytes"])
    found = f"{folder} can be written, {_space(space)}"
    if missing[0]["data"]["prepared"] is None:
        return Finding("data", found, facts=facts)
    found = f"{name} is not decoded yet{'' if len(records) == 1 else f' for {_where(missing)}'}; {found}"
    if missing[0]["data"]["from_hub"]:
        advice = "nodes may have no network: `fedfreeze fetch` before, into a data.cache_dir that all hosts see"
        return Finding("data", found, advice, facts=facts)
    return Finding("data", f"{found}: decoded at the start, once a host", facts=facts)


def judge_wandb(facts: dict[str, Any]) -> Finding:
    """Tell how Weights & Biases would track."""
    if "error" in facts:
        return failed_as("wandb", *facts["error"])
    version = f"wandb {facts['version']}" if facts["version"] else "not installed (pip install 'wandb>=0.20')"
    found, advice = f"{facts['mode']}, {version}", ""
    if facts["mode"] == "online":
        found += f", {'a' if facts['key'] else 'no'} key for {facts['host']}"
        if facts["reached"] is not None:
            found += f", which {'answers' if facts['reached'] else 'does not answer'} rank 0"
        if facts["reached"] is False:
            advice = "the run would go offline: set track.wandb=offline, and `wandb sync` it later where there is a net"
        elif not facts["key"]:
            advice = "the run would go offline: `wandb login`, or set WANDB_API_KEY"
    if facts["folder_error"]:
        found, advice = f"{found}; {facts['folder_error'][1]}", advice or "without it nothing is tracked"
    return Finding("wandb", found, advice, facts=facts)


def judge_job(facts: dict[str, Any]) -> Finding:
    """Tell when the job ends, and how often it was started again."""
    if "error" in facts:
        return failed_as("job", *facts["error"])
    limit, left = facts["time_limit_s"], facts["seconds_left"]
    own = f", checkpoint.time_limit_s ends the run after {duration(limit)}" if limit is not None else ""
    if facts["job"] is None and left is None:
        return Finding("job", f"no SLURM job{own}", facts=facts)
    restarts = f"restarted {count(facts['restarts'], 'time')}" if facts["restarts"] else "not restarted"
    if left is None:
        # where squeue was there to ask, the job just has no limit
        blind = not own and not facts["asked"]
        advice = "set checkpoint.time_limit_s, or the run cannot save before the job ends" if blind else ""
        end = "nothing tells when it ends" if blind else "no end is set"
        found = f"SLURM job {facts['job']}, {restarts}, {end}{own}"
        return Finding("job", found, advice, facts=facts)
    found = f"SLURM job {facts['job']}, {restarts}, ends in {duration(max(left, 0.0))}{own}"
    short = left < facts["grace_s"] + 60
    advice = f"hardly longer than checkpoint.grace_s ({facts['grace_s']:g} s): ask for more time" if short else ""
    return Finding("job", found, advice, facts=facts)


def rank_names(records: Sequence[dict[str, Any]]) -> str:
    """Return `rank 3` or `ranks 0-3, 7`."""
    return _names([record["rank"] for record in records])


def _names(ranks: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    return f"rank{'s' * (len(ranks) > 1)} " + ", ".join("-".join(map(str, span)) for span in spans)


def _where(records: Sequence[dict[str, Any]]) -> str:
    hosts = list(dict.fromkeys(record["host"] for record in records))
    return f"{rank_names(records)} on {_shown(hosts, ', ')}"


def _shown(told: Sequence[str], between: str = "; ") -> str:
    rest = len(told) - _SHOWN
    return between.join([*told[:_SHOWN], *([f"and {rest} more (--json has all)"] if rest > 0 else [])])


def _rank_failures(check: str, records: Sequence[dict[str, Any]], key: str) -> Finding | None:
    """Return the failures of some ranks as one finding, alike ones together; None where no rank failed."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in records:
        if "error" in record[key]:
            groups.setdefault(tuple(record[key]["error"]), []).append(record)
    if not groups:
        return None
    first = failed_as(check, *next(iter(groups)))
    told = [f"{_where(there)}: {message.partition('; ')[0]}" for (_, message), there in groups.items()]
    found = first.found if len(records) == 1 else _shown(told)
    return Finding(check, found, first.advice, first.exit_code, {"by_rank": [record[key] for record in records]})


def _only(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: record[name] for name in names}


def _space(facts: dict[str, Any]) -> str:
    return f"{facts['free_bytes'] / GIB:.1f} GiB free"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.2g} s"


def _folder_advice(facts: dict[str, Any]) -> str:
    if facts["free_bytes"] < _LITTLE_SPACE_BYTES:
        return "little space: free some, or choose another --run-dir"
    if not facts["locks"]:
        return "this file system has no locks: take care yourself that no two runs use one folder"
    return ""
