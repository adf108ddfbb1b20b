"""Measuring what a student kept of its teacher: items of local tasks, recall, and intervals. Knows only the Engine protocol."""
