"""Benchmarks of the operations: `pytest bench`, then `python -m bench.report`. Never installed, imported by nothing."""
