"""The model store on disk: models and backbones in, out and exported."""
