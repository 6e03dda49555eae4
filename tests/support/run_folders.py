"""Makes run folders by hand, with figures that are known, for the tests of `fedfreeze compare`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedfreeze.config.file import dump_config, make_config
from fedfreeze.config.schema import Config

CAPS_MIB = (2.0, 4.0, 6.0, 8.0)


def write_run(
    folder: Path,
    *,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    accuracies: Sequence[float | None] = (0.5, 0.7, 0.8),
    emulated_s: Sequence[float | None] | None = None,
    peaks_mib: Sequence[Mapping[int, float]] | None = None,
    perturbations: Sequence[float | None] | None = None,
    ways: Sequence[Mapping[int, str] | None] | None = None,
    stages: Sequence[tuple[int, str]] = (),
    caps_mib: Sequence[float | None] = CAPS_MIB,
    status: str = "finished",
    classes: int = 10,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write the folder of a run, a round for each accuracy; `stages` are (rounds, reason).

    Each round takes 10 s and moves 600 bytes up and 400 down; devices 1 and 2 take part with 3 and 4 MiB, the full
    model needs 5, and three of four devices hold a stage.
    """
    count = len(accuracies)
    folder.mkdir(parents=True, exist_ok=True)
    config = make_run_config(sections or {}, seed, len(caps_mib))
    (folder / "config.yaml").write_text(dump_config(config))
    facts = {"method": config.method.name, "device": "cpu (x86_64)", "cap_enforcement": "tensor_bytes", "seed": seed}
    lines: list[dict[str, Any]] = [{"kind": "run_start", "name": config.name, "round": 0, **facts}]
    ends = {}
    for stage, (rounds, reason) in enumerate(stages):
        ends[sum(number for number, _ in stages[: stage + 1])] = (stage, rounds, reason)
    for number in range(1, count + 1):
        peaks = peaks_mib[number - 1] if peaks_mib else {1: 3.0, 2: 4.0}
        lines.append(
            {
                "kind": "round",
                "round": number,
                "stage": sum(end < number for end in ends),
                "stage_round": number,
                "selected": sorted(peaks),
                "failed": {},
                "train_loss": 1.0,
                "accuracy": accuracies[number - 1],
                "perturbation": perturbations[number - 1] if perturbations else None,
                "slope": None,
                "peak_memory_mib": {str(device): peak for device, peak in peaks.items()},
                "cap_mib": {str(device): caps_mib[device] for device in peaks},
                "elements_reduced": 100,
                "bytes_up": 600,
                "bytes_down": 400,
                "emulated_s": emulated_s[number - 1] if emulated_s else 10.0,
                "flops": 2.5e12,
                "wall_s": 1.0,
            }
        )
        taken = ways[number - 1] if ways else None  # earlier versions did not note them
        if taken is not None:
            lines[-1]["way"] = {str(device): way for device, way in taken.items()}
        if number in ends:
            stage, rounds, reason = ends[number]
            lines.append(
                {"kind": "stage", "stage": stage, "blocks": f"block {stage}", "reason": reason, "rounds": rounds}
            )
    if status == "finished":
        lines.append({"kind": "run_end", "rounds": count})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {
        "status": status,
        "exit_code": 0 if status == "finished" else None,
        **facts,
        "world_size": 2,
        "git_revision": "0123456789ab",
        "versions": {"fedfreeze": "0.1.0", "torch": "2.13.0"},
        "rounds": count if status == "finished" else 0,
        "full_memory_mib": 5.0,
        "inclusion": 0.75,
    }
    if status == "finished":
        figures |= {"num_classes": classes, "image_shape": [1, 8, 8]}
    (folder / "summary.json").write_text(json.dumps(figures | dict(summary or {})))
    head = ["device,memory_cap_mib,samples,labels," + ",".join(f"label_{label}" for label in range(classes))]
    rows = [
        f"{device},{'' if cap is None else cap},{classes},{classes}{',1' * classes}"
        for device, cap in enumerate(caps_mib)
    ]
    (folder / "partition.csv").write_text("\n".join([*head, *rows]) + "\n")
    return folder


def make_run_config(sections: Mapping[str, Mapping[str, Any]], seed: int, devices: int) -> Config:
    """Return the defaults with changes by section; what no configuration may hold raises ConfigError."""
    values: dict[str, Any] = {name: dict(change) for name, change in sections.items()}
    values["fleet"] = {"devices": devices} | values.get("fleet", {})
    values["train"] = {"participants": 1} | values.get("train", {})
    return replace(make_config(values | {"name": "made"}), seed=seed)
