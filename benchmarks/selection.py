"""What SmartFreeze's participant selector costs the server: seconds and memory of a refresh and of a round's choice.

    python benchmarks/selection.py [--devices 100 1000 10000] [--participants 10] [--write FILE]

Signatures are synthetic, made as fedfreeze/device/probe.py makes them: 10 classes, 64 features and a bias, sketched to
512 numbers; 50 samples a device, label mixes of a Dirichlet 0.5 draw. Each fleet is measured in a process of its own.
Seconds are those of the processor, which other work on the machine changes little; the refresh's wall time is beside.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

from fedfreeze.config.file import make_config
from fedfreeze.device.probe import make_sketch
from fedfreeze.messages import DeviceReport
from fedfreeze.seeds import derive_seed
from fedfreeze.select import Probes, Situation, make_selector
from fedfreeze.select.communities import louvain, merge_alike, neighbour_graph, split_large, unit_vectors

CLASSES, FEATURES, SIZE, SAMPLES, ALPHA, ROUNDS = 10, 64, 512, 50, 0.5, 20


def signatures_of(devices: int) -> np.ndarray:
    """Return (devices, SIZE) float32: the sketched mean of (softmax - one-hot) x (features, 1) of each device."""
    generator = np.random.default_rng(0)
    means = np.abs(generator.normal(size=(CLASSES, FEATURES)))
    weights = generator.normal(size=(CLASSES, FEATURES)) * 0.5 / FEATURES**0.5
    sketch = make_sketch(CLASSES * (FEATURES + 1), SIZE, 0)
    rows = np.empty((devices, SIZE), dtype=np.float32)
    for row in rows:
        labels = generator.choice(CLASSES, size=SAMPLES, p=generator.dirichlet([ALPHA] * CLASSES))
        inputs = np.maximum(0, means[labels] + generator.normal(size=(SAMPLES, FEATURES)))
        error = np.exp(inputs @ weights.T)
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(SAMPLES), labels] -= 1
        gradient = np.concatenate([error.T @ inputs, error.sum(axis=0)[:, None]], axis=1) / SAMPLES
        flat = torch.from_numpy(gradient.astype(np.float32).flatten())
        row[:] = (flat if sketch is None else sketch(flat)).numpy()
    return rows


def measure(devices: int, participants: int) -> dict[str, float]:
    """Return the figures of one fleet."""
    config = make_config(
        {
            "select": {"name": "smartfreeze"},
            "train": {"participants": participants},
            "fleet": {"devices": devices},
        }
    )
    limit, seed = 2 * participants, derive_seed(0, "communities", 1)
    signatures = signatures_of(devices)
    before_mib = peak_rss_mib()
    wall = time.perf_counter()
    begin = time.process_time()
    vectors = unit_vectors(signatures)
    graph = neighbour_graph(vectors, config.select.neighbours)
    after_graph = time.process_time()
    top = louvain(graph, seed)
    after_louvain = time.process_time()
    parts = [split_large(graph, community, limit, seed) for community in merge_alike(top, vectors)]
    end, wall = time.process_time(), time.perf_counter() - wall
    peak_mib = peak_rss_mib()
    figures = {
        "devices": devices,
        "edges": graph.nnz // 2,
        "communities": len(parts),
        "parts": sum(map(len, parts)),
        "graph_s": after_graph - begin,
        "louvain_s": after_louvain - after_graph,
        "split_s": end - after_louvain,
        "refresh_s": end - begin,
        "wall_s": wall,
        "rss_before_mib": before_mib,
        "rss_peak_mib": peak_mib,
    }
    figures |= measure_rounds(config, signatures, participants)
    tracemalloc.start()  # last: it makes everything slower
    vectors = unit_vectors(signatures)
    graph = neighbour_graph(vectors, config.select.neighbours)
    merge_alike(louvain(graph, seed), vectors)
    figures["python_mib"] = tracemalloc.get_traced_memory()[1] / 2**20
    return figures


def measure_rounds(config, signatures: np.ndarray, participants: int) -> dict[str, float]:
    """Return the seconds of a choice (median of ROUNDS rounds, after the refresh) and the bytes of the state."""
    devices = len(signatures)
    generator = np.random.default_rng(1)
    samples, seconds = generator.integers(20, 200, devices), generator.uniform(1, 100, devices)
    losses = generator.uniform(0.1, 3, devices)
    everyone = list(range(devices))
    selector = make_selector(config)
    taken = []
    for number in range(1, ROUNDS + 1):
        selector.prepare(Situation(number, 0, number, samples, seconds))
        if selector.wanted(everyone, participants) is not None:
            selector.learn(Probes(np.arange(devices), losses, losses**2, signatures))
        begin = time.process_time()
        chosen = selector.select(number, everyone, participants)
        taken.append(time.process_time() - begin)
        selector.observe([DeviceReport(d, int(samples[d]), loss=1.0, squared_loss=1.0) for d in chosen])
    return {"choice_s": float(np.median(taken)), "state_kib": len(json.dumps(selector.state_dict())) / 1024}


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(rows: list[dict[str, float]]) -> str:
    """Return the figures as a Markdown table."""
    columns = {
        "devices": lambda r: f"{r['devices']:,}",
        "edges": lambda r: f"{r['edges']:,}",
        "communities (parts)": lambda r: f"{r['communities']} ({r['parts']})",
        "graph s": lambda r: f"{r['graph_s']:.2f}",
        "Louvain s": lambda r: f"{r['louvain_s']:.2f}",
        "merge + split s": lambda r: f"{r['split_s']:.2f}",
        "refresh s": lambda r: f"{r['refresh_s']:.2f}",
        "wall s": lambda r: f"{r['wall_s']:.2f}",
        "a choice ms": lambda r: f"{1000 * r['choice_s']:.1f}",
        "Python and numpy MiB": lambda r: f"{r['python_mib']:.0f}",
        "process before -> peak MiB": lambda r: f"{r['rss_before_mib']:.0f} -> {r['rss_peak_mib']:.0f}",
        "state KiB": lambda r: f"{r['state_kib']:.0f}",
    }
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--participants", type=int, default=10)
    parser.add_argument("--write", type=Path, help="a Markdown file for the table, in place of the one that is in it")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options.participants)))
        return 0
    rows = []
    for devices in options.devices:
        command = [sys.executable, __file__, "--one", str(devices), "--participants", str(options.participants)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"{platform.machine()}; {options.participants} participants."
    )
    text = f"{table(rows)}\n\n{versions}\n"
    print(text)
    if options.write:
        before = options.write.read_text().partition("| devices |")[0] if options.write.exists() else ""
        options.write.write_text(f"{before.rstrip()}\n\n{text}" if before else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
