"""Distils text-to-image teachers into few-step generators with the SenseFlow method."""

__version__ = "0.1.0"
