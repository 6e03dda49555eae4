"""Every architecture on real CIFAR-10: all stages under caps, falling loss, the same bits on 1 and 2 ranks."""

from pathlib import Path

import pytest
import yaml

from tests.support.launching import command, metrics, run, sha256, summary, without_wall_time

WIDTHS = {"resnet18": 8, "vgg11": 16, "vgg16": 16, "vit": 48}
ROUNDS_A_STAGE = 4


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDTHS)
def test_trains_on_cifar10_with_falling_loss_and_the_same_bits_on_two_ranks(
    name: str, cifar10_folder: Path, tmp_path: Path
) -> None:
    stages = 5 if name.startswith("vgg") else 4
    values = {
        "name": name,
        "data": {"path": str(cifar10_folder), "partition": "iid", "augment": "flip"},
        "model": {"name": name, "width": WIDTHS[name]},
        "fleet": {"devices": 40, "memory_cap_mib": "uniform(4, 40)"},
        "train": {"rounds": ROUNDS_A_STAGE * stages, "participants": 2, "batch_size": 32, "learning_rate": 0.02},
        "pace": {"policy": "fixed"},
        "eval": {"every_rounds": ROUNDS_A_STAGE},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    for ranks in (1, 2):
        done = run(command(config, tmp_path / str(ranks), ranks=ranks), timeout_s=900)
        assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "1") == sha256(tmp_path / "2")
    records = metrics(tmp_path / "1")
    assert without_wall_time(records) == without_wall_time(metrics(tmp_path / "2"))
    rounds = [record for record in records if record["kind"] == "round"]
    for stage in range(stages):
        losses = [record["train_loss"] for record in rounds if record["stage"] == stage]
        print(name, stage, " ".join(f"{loss:.3f}" for loss in losses))
        assert len(losses) == ROUNDS_A_STAGE
        assert losses[-1] < losses[0], f"stage {stage}: {losses}"
    for record in rounds:
        assert all(peak <= record["cap_mib"][device] for device, peak in record["peak_memory_mib"].items())
    told = summary(tmp_path / "1")
    print(name, told["final_accuracy"], told["full_memory_mib"], told["peak_memory_mib"], sha256(tmp_path / "1"))
    assert told["final_accuracy"] > 0.2
