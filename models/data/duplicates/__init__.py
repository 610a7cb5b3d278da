"""Duplicate and near-duplicate images of a dataset."""
