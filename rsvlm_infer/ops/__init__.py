"""The ops: what each one means. Owns the eager definitions and the registry; knows no kernel, no layer, no weight."""
