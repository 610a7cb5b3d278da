"""A training job: its request, its files, its process."""
