"""Packages of a checkpoint for other runtimes: written, rounded, proven. Imports rsvlm_infer, never the reverse."""
