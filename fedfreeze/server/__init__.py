"""Rank 0's mind: what it plans, what it judges, and the emulated clock. Pure: no collectives, no wall time."""
