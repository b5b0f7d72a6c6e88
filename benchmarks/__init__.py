"""Benchmarks: each op against the peers a user would pick, side by side in one process."""
