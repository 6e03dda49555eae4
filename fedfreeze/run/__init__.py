"""A run: the life of a rank, the experiment, one round, its books, its voice, and when it leaves."""
