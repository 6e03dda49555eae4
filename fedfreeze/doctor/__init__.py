"""`fedfreeze doctor`: whether this allocation can run what is asked of it, tried for real in under a minute."""

from fedfreeze.doctor.program import Request, run_doctor

__all__ = ["Request", "run_doctor"]
