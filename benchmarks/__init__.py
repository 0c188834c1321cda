"""Measurements of the whole engine that a person starts by hand: each writes rows below `benchmarks/results/`."""
