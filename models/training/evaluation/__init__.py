"""Evaluation of a trained classifier on held-out images."""
