"""Channel groups: which axes of which tensors carry the same channels."""
