"""Twins in Triton for CUDA devices. One module per op with the same name as in `rsvlm_infer.ops`; the kernels are in `jit/`.

A twin's module loads no triton: it checks, chooses a configuration and launches. `jit/` is imported at the first launch.
"""
