"""The recipe that makes the default checkpoint. Not installed with the package."""
