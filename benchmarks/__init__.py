"""Speed and memory of ptmoe beside its peers: `python -m benchmarks` measures and writes `benchmarks/RESULTS.md`."""
