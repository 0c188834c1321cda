"""What users would pick instead, on the same weights, images and prompts. Start with `python -m benchmarks.peers --help`."""
