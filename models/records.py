"""Records as JSON files: read with a limit, validated, and every failure told with the file's name."""

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from models.classifier import Record
from models.errors import WeightsError

CONFIG = "config.json"
MAX_BYTES = 16 * 2**20  # 10,000 long class names are 1 MB

RecordT = TypeVar("RecordT", bound=Record)


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Raises WeightsError that names the file and its first fault."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise WeightsError(f"{path} is refused: larger than {MAX_BYTES} bytes")
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise WeightsError(f"{path} is damaged, or of another version of Imago: {where}: {fault['msg']}") from error


def to_json(record: Record) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()
