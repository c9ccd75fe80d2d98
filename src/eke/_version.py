"""The version of eke, in one place."""

__version__ = "0.1.0"
