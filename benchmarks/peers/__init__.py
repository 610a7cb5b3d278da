"""Other servers of image classifiers, each as its own documentation would have it, and tuned."""
