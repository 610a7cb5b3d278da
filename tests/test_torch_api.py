"""Names of torch that the code uses exist, and calls of torch.cuda fit their signatures, since no test runs them on a GPU."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed  # imported by torch in part only

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("models", "service", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
BUILT_WITH_CUDA = torch.version.cuda is not None


def dotted(node: ast.expr) -> str | None:
    """`torch.cuda.Stream`, of an expression that is such a name."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def resolved(name: str) -> Any:
    """Raises AttributeError."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def names(path: Path) -> Iterator[tuple[str, ast.Call | None]]:
    """The longest names that begin with `torch.`, and the call where one is called."""
    tree = ast.parse(path.read_text())
    if not any(isinstance(node, ast.Import) and any(a.name == "torch" for a in node.names) for node in ast.walk(tree)):
        return
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = dotted(node)
            if name is not None and name.startswith("torch."):
                yield name, calls.get(id(node))


def misfit(name: str, call: ast.Call) -> str | None:
    """How a call does not fit; None where it does, or where torch does not tell the signature."""
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(k.arg is None for k in call.keywords):
        return None
    try:
        signature = inspect.signature(resolved(name))
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*[None] * len(call.args), **{str(keyword.arg): None for keyword in call.keywords})
    except TypeError as error:
        return str(error)
    return None


def unknown(path: Path) -> list[str]:
    wrong = []
    for name, call in names(path):
        try:
            resolved(name)
        except AttributeError as error:
            wrong.append(f"{name}: {error}")
            continue
        if call is not None and name.startswith("torch.cuda.") and (fault := misfit(name, call)) is not None:
            wrong.append(f"{name}: {fault}")
    return wrong


def test_names_and_calls_fit_the_installed_torch() -> None:
    assert {str(path.relative_to(ROOT)): wrong for path in FILES if (wrong := unknown(path))} == {}


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("torch.cuda.mem_get_inf(device)", id="wrong name"),
        pytest.param("torch.cuda.mem_get_info(device, 1)", id="too many arguments"),
        pytest.param("torch.cuda.graph(graph, pools=pool)", id="wrong keyword"),
        pytest.param("torch.cuda.CUDAGraph(keep=True)", id="wrong keyword of a class"),
    ],
)
def test_a_wrong_call_is_found(line: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(f"import torch\n{line}\n")
    assert unknown(path)


@pytest.mark.skipif(not BUILT_WITH_CUDA, reason="this torch is built without CUDA")
def test_what_has_no_signature_is_there() -> None:
    """Bindings that a name alone does not show: the CUDA runtime, and the properties of a GPU."""
    bindings: Any = torch._C
    assert all(hasattr(bindings._cudart, name) for name in ("cudaHostRegister", "cudaHostUnregister"))
    properties = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    assert all(hasattr(bindings._CudaDeviceProperties, name) for name in properties)
