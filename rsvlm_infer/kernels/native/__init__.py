"""Twins in C++, built from csrc into `rsvlm_infer._C`. One module per op, the same name as in `rsvlm_infer.ops`."""
