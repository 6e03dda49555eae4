"""Weights & Biases: live while a run goes on, or afterwards by `fedfreeze sync`."""
