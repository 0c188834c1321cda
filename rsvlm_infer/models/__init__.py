"""Whole models, weight tables and loaders."""
