"""`fedfreeze doctor`: whether this allocation can run what is asked of it, tried for real in under a minute."""
