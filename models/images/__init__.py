"""Image files: formats, limits, decoding to uint8 tensors."""
