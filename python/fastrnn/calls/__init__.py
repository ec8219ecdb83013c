"""How one call runs: its route, the operators of torch, their gradients."""
