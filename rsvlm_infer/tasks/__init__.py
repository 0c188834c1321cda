"""Prompts in, parsed results out: caption, answer, classify, retrieve. Knows no backend's inside and no command line."""
