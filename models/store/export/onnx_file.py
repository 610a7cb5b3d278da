"""Writes ONNX files by torch's exporter. Needs `pip install imago[onnx]`."""

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from models.classifier import Classifier
from models.errors import ExportError
from models.runtime.failures import is_out_of_memory
from models.store.export.graph import EXAMPLES, GraphInput, ProbabilityGraph


def check_onnx() -> None:
    """Raise ExportError if a package is missing."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ExportError(f"export to ONNX needs {' and '.join(missing)}: pip install 'imago[onnx]'")


def write_onnx(
    classifier: Classifier, inputs: Sequence[GraphInput], details: Mapping[str, str], path: Path
) -> list[Path]:
    """Write the graph for any number of images, and return the files. Weights over 2 GB, protobuf's limit, are in a second file.

    Raises ExportError.
    """
    check_onnx()
    try:
        program = _converted(ProbabilityGraph(classifier, inputs).eval(), inputs)
    except Exception as error:  # the exporter raises many kinds
        if is_out_of_memory(error):
            raise
        raise ExportError(
            f"{classifier.config.name} cannot be written as ONNX: torch's exporter does not support all its layers "
            f"({type(error).__name__}); export it with --format openvino or store"
        ) from error
    _clean(program.model)
    program.model.metadata_props.update(details)
    program.save(path)
    return [file for file in (path, path.with_name(path.name + ".data")) if file.exists()]


def _converted(graph: ProbabilityGraph, inputs: Sequence[GraphInput]) -> Any:
    """Return torch's ONNXProgram."""
    examples = tuple(each.example(EXAMPLES) for each in inputs)
    count = torch.export.Dim("N", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's warnings about its own code
        exported = torch.export.export(graph, examples, dynamic_shapes=(tuple({0: count} for _ in examples),))
        return torch.onnx.export(
            exported,
            input_names=[each.name for each in inputs],
            output_names=["probabilities"],
            dynamo=True,
            verbose=False,
        )


def _clean(model: Any) -> None:
    """Remove the exporter's metadata, which names source lines with paths of this machine."""
    for function in [model.graph, *model.functions.values()]:
        function.metadata_props.clear()
        for node in function.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
