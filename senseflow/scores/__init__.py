"""Scores of pictures as the field measures them: one file per family of metrics, found by name in registry.py."""
