"""Owns the way from an image to packed patches: scene, plan, pack. Knows numpy and ops, no weights and no text."""
