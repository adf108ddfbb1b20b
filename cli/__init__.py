"""The command line: one file per verb, and the one place where all parts of the package are combined."""
