"""What can go wrong in serving, and the one table from every error to its HTTP status."""

from typing import Any

from models import errors as model


class ServiceError(Exception):
    """The root of what a request can be refused for. `code` is stable; the message says the limit and what to do, never what was sent.

    `param` names the field at fault. `retry_after_s` becomes `Retry-After`.
    """

    code = "internal"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


class Internal(ServiceError):
    """A bug of ours. The message is fixed; the traceback is in the log, beside the request id."""

    code = "internal"


# What the caller sent


class BadRequest(ServiceError):
    """Malformed HTTP, multipart, JSON or header; a scalar field given twice."""

    code = "bad_request"


class ValidationFailed(ServiceError):
    """A field whose value is out of range or of the wrong type."""

    code = "validation_error"


class UnknownField(ServiceError):
    """A query or form field that the route does not know."""

    code = "unknown_field"


class NotProvided(ServiceError):
    """Something that this model cannot give: a heat map, a conformal set, the nearest images."""

    code = "not_provided"


class MissingFile(ServiceError):
    """A multipart request without a `file` part."""

    code = "missing_file"


class AllImagesFailed(ServiceError):
    """Several images, and none could be classified. The answer carries the results too, so that each reason is seen."""

    code = "invalid_image"

    def __init__(self, message: str, results: dict[str, Any]) -> None:
        super().__init__(message, param="file")
        self.beside = results  # stands in the body beside the envelope


class UnsupportedMediaType(ServiceError):
    """A content type or encoding that the route does not read."""

    code = "unsupported_media_type"


class PayloadTooLarge(ServiceError):
    """More bytes than the limit."""

    code = "payload_too_large"


class HeadersTooLarge(ServiceError):
    """A request head beyond its limit."""

    code = "headers_too_large"


class TransferCodingUnknown(ServiceError):
    """A transfer coding other than chunked."""

    code = "transfer_coding_unknown"


class RequestTimeout(ServiceError):
    """A head or body that did not arrive in time."""

    code = "request_timeout"


class NotFound(ServiceError):
    """No such path."""

    code = "not_found"


class MethodNotAllowed(ServiceError):
    """The path has no such method; `allow` are those it has, comma separated."""

    code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.headers = {"Allow": allow}


# Who may


class Unauthorized(ServiceError):
    """No key, or a wrong one."""

    code = "unauthorized"


class Misdirected(ServiceError):
    """A Host that is not this server's, as a web page sends whose name was made to resolve to this machine (DNS rebinding)."""

    code = "misdirected_request"


class Forbidden(ServiceError):
    """A valid key that does not reach this far."""

    code = "forbidden"


class TooManyAttempts(ServiceError):
    """More wrong keys from one address than are answered with a delay; a right key passes."""

    code = "too_many_attempts"


# Jobs


class JobNotFound(ServiceError):
    """No job with that id."""

    code = "job_not_found"


class ReportNotFound(ServiceError):
    """The job has no report, or none yet."""

    code = "report_not_found"


class JobFinished(ServiceError):
    """The job is at its end, or about to be: too late to cancel or stop it."""

    code = "job_finished"


class JobNotStarted(ServiceError):
    """The job still waits, so that it has nothing to keep."""

    code = "job_not_started"


class JobActive(ServiceError):
    """The job is not at its end yet, and cannot be deleted."""

    code = "job_active"


class IdempotencyMismatch(ServiceError):
    """An Idempotency-Key that came with another request before."""

    code = "idempotency_mismatch"


class InsufficientStorage(ServiceError):
    """Less free disk than a job may need."""

    code = "insufficient_storage"


class TrainerUnavailable(ServiceError):
    """The jobs database cannot be used, or belongs to another server."""

    code = "trainer_unavailable"


class ExportBusy(ServiceError):
    """Another model is being exported: there is one export at a time."""

    code = "export_busy"


# What the server can take on now


class QueueFull(ServiceError):
    """As many images wait as the server admits."""

    code = "queue_full"


class NotReady(ServiceError):
    """The model is still being loaded, or the device was lost."""

    code = "not_ready"


class Draining(ServiceError):
    """The server is shutting down and takes no new work."""

    code = "draining"


class DeviceLost(ServiceError):
    """The device failed for good; the process has to be started again."""

    code = "device_lost"


class DeadlineExceeded(ServiceError):
    """The answer was not there in the time the request had."""

    code = "deadline_exceeded"


STATUS: dict[type[Exception], int] = {
    model.ModelError: 500,
    model.ImageError: 422,
    model.InvalidImage: 422,
    model.EmptyImage: 400,
    model.UnsupportedImage: 415,
    model.ImageTooLarge: 413,
    model.WeightsError: 422,
    model.ReadOnlyStore: 507,
    model.DownloadError: 502,
    model.ExportError: 422,
    model.InvalidName: 422,
    model.NameConflict: 409,
    model.ModelNotFound: 404,
    model.ArchitectureNotFound: 404,
    model.DatasetError: 422,
    model.NoSuchColumn: 422,
    model.TooFewClasses: 422,
    model.TooFewImages: 422,
    model.TooManyBadFiles: 422,
    model.TrainingError: 500,
    model.DeviceUnavailable: 503,
    model.InferenceFailed: 500,
    model.OutOfMemory: 503,
    model.NonFiniteOutput: 500,
    ServiceError: 500,
    Internal: 500,
    BadRequest: 400,
    ValidationFailed: 422,
    UnknownField: 422,
    NotProvided: 422,
    MissingFile: 422,
    AllImagesFailed: 422,
    UnsupportedMediaType: 415,
    PayloadTooLarge: 413,
    HeadersTooLarge: 431,
    RequestTimeout: 408,
    TransferCodingUnknown: 501,
    NotFound: 404,
    MethodNotAllowed: 405,
    Unauthorized: 401,
    Misdirected: 421,
    Forbidden: 403,
    TooManyAttempts: 429,
    JobNotFound: 404,
    ReportNotFound: 404,
    JobFinished: 409,
    JobNotStarted: 409,
    JobActive: 409,
    IdempotencyMismatch: 409,
    InsufficientStorage: 507,
    TrainerUnavailable: 503,
    ExportBusy: 503,
    QueueFull: 429,
    NotReady: 503,
    Draining: 503,
    DeviceLost: 503,
    DeadlineExceeded: 504,
}


def status_of(error: model.ModelError | ServiceError) -> int:
    """The HTTP status of an error raised on purpose. KeyError means that the table misses a row."""
    return STATUS[type(error)]


def error_of(code: str, message: str, param: str | None = None) -> model.ModelError:
    """The error that another process of ours reported by its code; what has no class of its own is a TrainingError."""
    kinds = (kind for kind in STATUS if issubclass(kind, model.ModelError) and kind.code == code)
    kind = next(kinds, model.TrainingError)
    return kind(message, param) if issubclass(kind, model.DatasetError) else kind(message)


def envelope(code: str, message: str, param: str | None = None, request_id: str | None = None) -> dict[str, Any]:
    """The one shape of every failure."""
    return {"error": {"code": code, "message": message, "param": param, "request_id": request_id}}
