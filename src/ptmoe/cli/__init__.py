"""The command line."""

from ptmoe.cli.main import main

__all__ = ["main"]
