"""The commands of the command line; each function takes the arguments after its name."""
