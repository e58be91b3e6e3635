"""``python -m scratchlm``."""

from scratchlm.cli import program

program()
