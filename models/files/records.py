"""Records as JSON files: read with limits, checked against their own hash, and validated. Every error names the file.

The records of a store contain `record_sha256`, the SHA-256 of their other fields as canonical JSON, so that an edit by hand is
rejected. A record without it is older than the hashes, or was changed on purpose.
"""

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import WeightsError

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class Record(BaseModel):
    """A value stored as JSON beside weights: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def check_without_hash(self) -> None:
        """Raises ValueError for values that are accepted only in a record with its hash."""


CONFIG = "config.json"
SEAL = "record_sha256"
MAX_BYTES = 16 * 2**20  # 10,000 long class names are 1 MB
MAX_DEPTH = 200  # of nested lists and objects; pydantic writes 255
MAX_DIGITS = 18  # of a whole number, so that it fits into 64 bits

RecordT = TypeVar("RecordT", bound=Record)


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Reads a record. Raises WeightsError that names the file and its first fault."""
    return parse_record(_content(path), kind, str(path))


def parse_record(data: bytes, kind: type[RecordT], source: str) -> RecordT:
    """Parses the JSON of a record, with or without its hash. `source` is for messages. Raises WeightsError."""
    try:
        fields = _fields(data)
        is_sealed, seal = SEAL in fields, fields.pop(SEAL, None)
        if seal != _hash(fields) and is_sealed:
            raise WeightsError(
                f"{source} was changed after it was written: it does not have its hash; restore it, or publish the version again "
                f"(a change on purpose drops `{SEAL}`)"
            )
        record = kind.model_validate(fields)
        if not is_sealed:
            record.check_without_hash()
        return record
    except ValidationError as error:
        raise WeightsError(f"{source} is damaged, or of another version of Imago: {fault_of(error)}") from error
    except RecursionError as error:
        raise WeightsError(f"{source} is damaged: it is nested too deeply") from error
    except ValueError as error:
        raise WeightsError(f"{source} is damaged: {error}") from error


def has_hash(path: Path) -> bool:
    """Returns whether the record contains its hash. Raises ValueError where it is no record."""
    return SEAL in _fields(_content(path))


def fault_of(error: ValidationError) -> str:
    """Returns the first fault as `field: message`."""
    fault = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the record'}: {fault['msg']}"


def to_json(record: Record) -> bytes:
    """Returns the record as JSON, without a hash."""
    return (record.model_dump_json(indent=2) + "\n").encode()


def to_sealed_json(record: Record) -> bytes:
    """Returns the record as JSON with its hash. Raises WeightsError for a record that could not be read again."""
    try:
        fields = _fields(record.model_dump_json().encode())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"this record cannot be stored: {error}") from error
    return (json.dumps({**fields, SEAL: _hash(fields)}, indent=2, ensure_ascii=False) + "\n").encode()


def _content(path: Path) -> bytes:
    """Returns at most MAX_BYTES of a regular file; never waits for a FIFO or a device."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise WeightsError(f"{path} is not a file; restore it, or publish the version again")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise WeightsError(f"{path} is refused: larger than {MAX_BYTES} bytes")
    return data


def _fields(data: bytes) -> dict[str, Any]:
    """Parses an object in UTF-8 without NaN, infinity, repeated names or numbers over 64 bits. Raises ValueError, RecursionError."""
    try:
        text = data.decode()
        fields = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_whole, parse_float=_finite
        )
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON, in line {error.lineno}") from None
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    _check_depth(fields)
    return fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field stands in it twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _whole(digits: str) -> int:
    if len(digits.removeprefix("-")) > MAX_DIGITS:
        raise ValueError(f"a whole number has more than {MAX_DIGITS} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is infinite")
    return number


def _check_depth(fields: dict[str, Any]) -> None:
    level: list[Any] = [fields]
    for _ in range(MAX_DEPTH):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _hash(fields: dict[str, Any]) -> str:
    """Returns the SHA-256 of the fields as canonical JSON. Raises ValueError for text that is not Unicode."""
    try:
        data = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text in it is not Unicode") from None
    return hashlib.sha256(data).hexdigest()
