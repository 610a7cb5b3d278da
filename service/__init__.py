"""Imago over HTTP: batching, the engine, routes and the command line. Knows nothing of gradients."""
