"""The checks and measurements of `imago doctor --gpu`."""
