"""Side-by-side benchmarks of flashtile and its peers: `python -m benchmarks --help`, benchmarks/README.md."""
