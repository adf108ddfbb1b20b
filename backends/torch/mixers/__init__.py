"""Mixers in PyTorch, one file each, with the names of radlads.mixers."""
