"""Writes OpenVINO's format by its own converter. Needs `pip install imago[openvino]`."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from models.classifier import Classifier
from models.errors import ExportError
from models.runtime.failures import is_out_of_memory
from models.runtime.openvino_engine import import_openvino, openvino_version
from models.store.export.graph import EXAMPLES, GraphInput, ProbabilityGraph


def check_openvino() -> None:
    """Raise ExportError if the package is missing."""
    if openvino_version() is None:
        raise ExportError("export to OpenVINO needs openvino: pip install 'imago[openvino]'")


def write_openvino(
    classifier: Classifier, inputs: Sequence[GraphInput], details: Mapping[str, str], path: Path
) -> list[Path]:
    """Write the float32 graph for any number of images; return the .xml and the .bin with the weights. Raises ExportError."""
    check_openvino()
    openvino = import_openvino()
    graph = ProbabilityGraph(classifier, inputs).eval()
    examples = tuple(each.example(EXAMPLES) for each in inputs)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # TorchScript's deprecation, and tracing's warnings about constants
            traced = torch.jit.trace(graph, examples, check_trace=False)  # type: ignore[no-untyped-call]
            shapes = [[-1, *each.shape[1:]] for each in examples]
            model = openvino.convert_model(traced, example_input=examples, input=shapes)
    except Exception as error:  # the converter raises many kinds
        if is_out_of_memory(error):
            raise
        raise ExportError(
            f"{classifier.config.name} cannot be written for OpenVINO: its converter does not support all layers "
            f"({type(error).__name__}); export it with --format onnx or store"
        ) from error
    for each, port in zip(inputs, model.inputs, strict=True):
        port.get_tensor().set_names({each.name})
    model.outputs[0].get_tensor().set_names({"probabilities"})
    for name, text in details.items():
        model.set_rt_info(text, ["imago", name])
    openvino.save_model(model, path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]
