"""Exports a model version as a file that other programs run, or that another Imago imports.

    onnx       NAME.onnx and predict.py     uint8 (N, H, W, C) -> calibrated float32 probabilities (N, classes)
    openvino   NAME.xml and NAME.bin        the same graph, for OpenVINO
    store      NAME.zip                     the version and its backbones, see `models.store.bundle`

`graph` is what is converted, `details` makes the metadata, and `files` writes the files.
`python -m models.store.export` is the process in which the server exports.
"""
