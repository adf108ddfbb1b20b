"""The MLX backend: one file per layer, kernel and mixer; `engine.py` is its door, `model.py` the entry of the shipped file."""
