"""Hostile bodies by content type, and requests for every route of an OpenAPI document."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from support.attack_driver import Hostile

JSON = "application/json"
BOUNDARY = "b"
SIZE = 2**20 - 2**12  # bytes: under the limit of a route without images


def filled(unit: str, size: int, before: str = "[", after: str = "]", between: str = ",") -> str:
    """`unit` as often as it fits into `size` bytes."""
    count = max(1, (size - len(before) - len(after)) // (len(unit) + len(between)))
    return before + between.join([unit] * count) + after


def values(size: int = SIZE) -> dict[str, str]:
    """JSON values of about `size` bytes that are slow to parse, to convert, to validate or to complain about."""
    deep = size // 12
    return {
        "empty lists": filled("[]", size),
        "lists of one": filled("[1]", size),
        "lists of lists": filled("[[[[[[1]]]]]]", size),
        "empty objects": filled("{}", size),
        "numbers": filled("1", size),
        "fractions": filled("0.12345678901234567", size),
        "long fractions": filled("0." + "123456789" * 80, size),
        "exponents": filled("1e308", size),
        "nulls": filled("null", size),
        "empty texts": filled('""', size),
        "escapes": '"' + "\\u00e9" * (size // 6) + '"',
        "surrogates": '"' + "\\ud83d\\ude00" * (size // 12) + '"',
        "one text": '"' + "x" * size + '"',
        "one integer": "9" * size,
        "4000 digits": "9" * 4000,
        "2**63": str(2**63),
        "big integers": filled("9" * 4000, size),
        "one fraction": "0." + "3" * size,
        "infinity": "1" + "0" * size + ".0",
        "deep lists": "[" * deep + "]" * deep,
        "200 deep": filled("[" * 200 + "]" * 200, size),
        "deep objects": '{"a":' * deep + "1" + "}" * deep,
        "keys": "{" + ",".join(f'"{i}":1' for i in range(size // 12)) + "}",
        "one key often": filled('"a":1', size, "{", "}"),
        "blanks": " " * size + "1",
        "unclosed": filled("[", size, "", "", ""),
        "not a number": filled("NaN", size),
    }


def json_bodies(
    fields: Mapping[str, Any], required: Mapping[str, Any], size: int = SIZE
) -> Iterator[tuple[str, bytes]]:
    """Each value alone, as an unknown field, and as each field of the schema, beside the required ones."""
    some = values(size)
    for name, value in some.items():
        yield name, value.encode()
        yield f"unknown: {name}", b'{"unknown":' + value.encode() + b"}"
    for field in fields:
        others = json.dumps({k: v for k, v in required.items() if k != field})[1:-1]
        for name, value in some.items():
            yield f"{field}: {name}", f'{{{others}{"," if others else ""}"{field}:{value}}}'.encode()


def infer_bodies(size: int) -> Iterator[tuple[str, bytes]]:
    """Of the Open Inference Protocol: each value as each part of a request for one small image."""
    for name, value in values(size).items():
        for datatype in ("UINT8", "FP32", "BYTES"):
            yield f"data of {datatype}: {name}", _inference(datatype, "[1,3,32,32]", value)
        yield f"shape: {name}", _inference("UINT8", value, "[1]")
        yield f"id: {name}", b'{"id":' + value.encode() + b"," + _inference("UINT8", "[1,3,32,32]", "[1]")[1:]
        yield f"unknown: {name}", b'{"x":' + value.encode() + b"," + _inference("UINT8", "[1,3,32,32]", "[1]")[1:]
        yield f"data beside the input: {name}", b'{"data":' + value.encode() + b"}"
    width, height = size // 60 - 10, size // 82 - 10
    yield "flat pixels", _inference("UINT8", f"[1,3,10,{width}]", "[" + ",".join("0" * 30 * width) + "]")
    row = filled("[0,0,0]", 82)
    yield "nested pixels", _inference("UINT8", f"[1,{height},10,3]", "[[" + ",".join([row] * height) + "]]")


def _inference(datatype: str, shape: str, data: str) -> bytes:
    return f'{{"inputs":[{{"name":"input","datatype":"{datatype}","shape":{shape},"data":{data}}}]}}'.encode()


def multipart_bodies(size: int = SIZE) -> Iterator[tuple[str, bytes]]:
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    end = f"--{BOUNDARY}--\r\n"
    file = '; filename="a"'
    yield "many fields", (part % ("top_k", "", "1") * (size // 70) + end).encode()
    yield "many files", (part % ("file", file, "x") * (size // 80) + end).encode()
    yield "a large field", (part % ("model", "", "x" * size) + end).encode()
    yield "a long name", (part % ("n" * size, "", "1") + end).encode()
    yield "a long filename", (part % ("file", f'; filename="{"é" * (size // 2)}"', "x") + end).encode()
    yield "quotes", (part % ("file", '; filename="' + '\\"' * (size // 2) + '"', "x") + end).encode()
    yield "semicolons", (part % ("file", ";" * size, "x") + end).encode()
    yield "headers", (f"--{BOUNDARY}\r\n" + "a: b\r\n" * (size // 6) + "\r\n").encode()
    yield "almost boundaries", (part % ("file", file, f"\r\n--{BOUNDARY[:-1]}" * (size // 4)) + end).encode()
    yield "line ends", b"\r\n" * (size // 2)
    yield "dashes", b"-" * size


def queries() -> Iterator[tuple[str, str]]:
    yield "many fields", "&".join(f"f{i}=1" for i in range(4000))
    yield "one field often", "&".join(["model=x"] * 4000)
    yield "empty fields", "&" * 32000
    yield "escapes", "model=" + "%ff" * 10000
    yield (
        "huge numbers",
        "&".join(f"{name}={'9' * 6000}" for name in ("after", "limit", "top_k", "timeout_ms", "alpha")),
    )
    yield "2**63", "&".join(f"{name}={2**63}" for name in ("after", "limit", "top_k", "timeout_ms"))
    yield "nan", "&".join(f"{name}=nan" for name in ("after", "limit", "alpha", "top_k"))


def requests(document: Mapping[str, Any], headers: Mapping[str, str], size: int = SIZE) -> Iterator[Hostile]:
    """For every route and method of the document; paths that reach nothing are left alone."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parameters = [_resolved(document, p) for p in operation.get("parameters", ())]
            for parameter in parameters:
                if parameter["in"] == "path":
                    path = path.replace(f"{{{parameter['name']}}}", str(_example(parameter)))
            yield from _of_route(document, method.upper(), path, operation, headers, size)


def _of_route(
    document: Mapping[str, Any],
    method: str,
    path: str,
    operation: Mapping[str, Any],
    headers: Mapping[str, str],
    size: int,
) -> Iterator[Hostile]:
    for name, query in queries():
        yield Hostile(method, f"{path}?{query}", b"", headers, f"query: {name}")
    content = _resolved(document, operation.get("requestBody", {})).get("content", {})
    if JSON in content:
        schema = _object_of(document, content[JSON].get("schema", {}))
        bodies = json_bodies(schema.get("properties", {}), _example_of(content[JSON], schema), size)
        yield from (Hostile(method, path, body, {**headers, "Content-Type": JSON}, name) for name, body in bodies)
    if set(content) - {JSON}:
        form = {**headers, "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        yield from (Hostile(method, path, body, form, name) for name, body in multipart_bodies(size))
    if content:
        for kind in ("application/x-www-form-urlencoded", "text/plain", "application/octet-stream"):
            yield Hostile(method, path, b"a=1&" * (size // 4), {**headers, "Content-Type": kind}, kind)
    else:
        yield Hostile(method, path, values(size)["empty lists"].encode(), {**headers, "Content-Type": JSON}, "a body")


def _resolved(document: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in part:
        found: Any = document
        for step in part["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        part = found
    return part


def _object_of(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = _resolved(document, schema)
    for choice in schema.get("anyOf", ()):
        if _resolved(document, choice).get("type") == "object":
            return _resolved(document, choice)
    return schema


def _example(parameter: Mapping[str, Any]) -> Any:
    if "example" in parameter:
        return parameter["example"]
    [example, *_] = parameter.get("examples") or parameter.get("schema", {}).get("examples") or [1]
    return example


def _example_of(media: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    examples = media.get("schema", {}).get("examples") or schema.get("examples") or [media.get("example", {})]
    return examples[0] if isinstance(examples[0], dict) else {}
