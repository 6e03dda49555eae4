"""On what is computed: GPUs that are missing or cannot be used after a fork; determinism. By fakes, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedfreeze import compute
from fedfreeze.cli import main
from fedfreeze.errors import ConfigError, ExitCode, UnavailableError
from tests.support.checks import assert_one_line
from tests.support.launching import write_config

ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


@pytest.fixture
def deterministic_again():
    """Put torch's settings back."""
    before = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch._C._set_deterministic_algorithms(before, warn_only=False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_a_gpu_that_is_missing():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert compute.device_kind("auto") == compute.device_kind("cpu") == "cpu"
    with pytest.raises(UnavailableError, match=r"use train\.device=cpu"):
        compute.device_kind("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_process_forked_from_one_that_has_used_cuda_says_so(wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UnavailableError, match="forked from one that has used CUDA"):
        compute.device_kind(wanted)
    assert compute.device_kind("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # asked, but there is none: nothing is lost
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute.device_kind("auto") == "cpu"


def test_no_ranks_are_forked_from_a_process_that_has_used_cuda(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    compute.check_can_fork("cpu", 2)
    with pytest.raises(ConfigError):
        compute.check_can_fork("auto", 2)
    code = main(["run", str(write_config(tmp_path)), "--run-dir", str(tmp_path / "run"), "--nproc", "2"])
    assert code == ExitCode.BAD_CONFIG
    assert_one_line(capfd.readouterr().err.rstrip("\n"), "--nproc 2 in a process that has used CUDA")
    assert not (tmp_path / "run").exists()


def test_nothing_of_the_parent_starts_cuda_and_its_environment_stays(monkeypatch):
    monkeypatch.delenv(ASK_NVML, raising=False)
    with compute.cuda_not_started():
        assert os.environ[ASK_NVML] == "1"
    assert ASK_NVML not in os.environ
    monkeypatch.setenv(ASK_NVML, "0")  # whoever has set it knows why
    with compute.cuda_not_started():
        assert os.environ[ASK_NVML] == "0"
    assert os.environ[ASK_NVML] == "0"
    code = "import fedfreeze.run.session, fedfreeze.cli, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_gpu_that_torch_cannot_use_is_one_line(monkeypatch, deterministic_again):
    def broken(device: object) -> None:
        raise RuntimeError("CUDA driver version is insufficient\nfor CUDA runtime version")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", broken)
    with pytest.raises(UnavailableError, match=r"cannot use it \(CUDA driver version is insufficient for CUDA"):
        compute.choose_device("cuda", 1)


def test_the_gpu_of_a_rank_is_set_up_before_anything_computes(monkeypatch, deterministic_again):
    seen = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: seen.append((device.index, os.environ["CUBLAS_WORKSPACE_CONFIG"]))
    )
    assert compute.choose_device("auto", 3) == torch.device("cuda", 1)
    assert seen == [(1, ":4096:8")]  # CUDA may start with this call
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert compute.choose_device("cpu", 0) == torch.device("cpu")


def test_determinism_needs_no_compiler():
    code = (
        "import sys; from fedfreeze import compute; compute.compute_deterministically(); import torch\n"
        "assert torch.are_deterministic_algorithms_enabled() and 'torch._inductor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
