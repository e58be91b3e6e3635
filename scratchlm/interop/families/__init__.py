"""One file per family of the hub, or per group of families that differ in a few lines: data, read in both directions."""
