"""The kernels: Triton functions without checks, one file per op. Owns arithmetic on a device; knows no contract, no allocation."""
