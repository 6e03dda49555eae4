"""Data: sources, the decoded memory-mapped store, partitions over devices, and batches."""
