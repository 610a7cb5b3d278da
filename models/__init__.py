"""What a classifier is, and how one is made. Knows nothing of HTTP."""
