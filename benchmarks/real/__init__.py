"""Measurements on real text with models that people know."""
