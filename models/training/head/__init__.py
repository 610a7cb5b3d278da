"""Training a linear head on fixed features."""
