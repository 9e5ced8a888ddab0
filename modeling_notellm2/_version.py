"""The package's version, in a file of its own so that building a wheel need not import torch."""

__version__ = "0.1.0"
