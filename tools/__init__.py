"""Benchmarks, evidence and embedded data: `python -m tools.bench.train`, from the repository."""
