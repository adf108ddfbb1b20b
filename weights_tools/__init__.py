"""Foreign formats, transfer from a teacher, and model files that stand alone. Computing is the backends' affair."""
