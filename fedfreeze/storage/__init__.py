"""What lies on disk: the run folder, checkpoints, locks, files that are written whole; knows nothing of ranks."""
