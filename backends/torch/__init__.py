"""PyTorch backend: training on GPU and CPU, inference anywhere."""
