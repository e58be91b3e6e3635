"""Random configurations of every family: one file per group of families."""
