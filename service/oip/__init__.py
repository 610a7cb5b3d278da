"""The Open Inference Protocol: tensors and metadata, without routes."""
