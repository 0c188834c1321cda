"""Whole scenes: windows over one raster, what the model says about each, files that maps open, and jobs that survive."""
