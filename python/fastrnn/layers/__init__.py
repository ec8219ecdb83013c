"""The layers and cells as modules, without their public classes (nn.py)."""
