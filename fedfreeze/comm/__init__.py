"""The only package with collectives: the ranks, what carries their messages, and the line that tells who is alive."""

from fedfreeze.comm.mpi_transport import launch_by_mpi
from fedfreeze.comm.ranks import Ranks

__all__ = ["Ranks", "launch_by_mpi"]
