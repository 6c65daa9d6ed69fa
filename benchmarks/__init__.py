"""Time and memory of every rule beside the machine's limits and two peers: `python -m benchmarks`."""
