"""Functions over a whole model: convert, patch_torch, freeze, gradient_flow, from_keras."""
