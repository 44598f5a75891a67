"""The plain PyTorch meaning of every op, block and model."""
