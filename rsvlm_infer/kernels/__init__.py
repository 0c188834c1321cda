"""Fast twins of the ops, one package per implementation. Owns no meaning: that is `rsvlm_infer.ops`."""
