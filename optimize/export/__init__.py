"""Formats that other runtimes serve; one method, one file."""

from optimize.lazy import submodules

__getattr__, __dir__ = submodules(__name__)
