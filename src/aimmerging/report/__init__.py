"""Committed stages to one HTML page; it reads a run directory and nothing else."""
