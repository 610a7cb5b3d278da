"""The errors of images, weights, models and devices, each with a stable code and a message with cause and remedy.

`service/errors.py` maps them to HTTP status codes.
"""


class ModelError(Exception):
    """The base class of every error that Imago raises on purpose. `code` is stable; the message gives cause and remedy."""

    code = "model_error"


# Images


class ImageError(ModelError):
    """An image that cannot be classified; other images of the request are not affected."""

    code = "invalid_image"


class InvalidImage(ImageError):
    """An allowed format whose content cannot be decoded."""

    code = "invalid_image"


class EmptyImage(ImageError):
    """An empty file."""

    code = "empty_file"


class UnsupportedImage(ImageError):
    """Bytes that are not of an allowed image format, by their content; name and declared type are ignored."""

    code = "unsupported_media_type"


class ImageTooLarge(ImageError):
    """An image with more bytes or pixels than the limit; refused before pixels are allocated."""

    code = "image_too_large"


# Weights and the store


class WeightsError(ModelError):
    """Weights that are damaged, truncated, of an unknown format, or do not fit the architecture. Nothing was loaded."""

    code = "invalid_weights"


class ReadOnlyStore(ModelError):
    """A store that cannot be written: mounted read-only, or without permission. Nothing was changed."""

    code = "store_read_only"


class DownloadError(ModelError):
    """Published weights that could not be downloaded, or that have another hash than expected."""

    code = "download_failed"


class ExportError(ModelError):
    """A model that cannot be written in a format, or a format whose packages are not installed."""

    code = "export_failed"


class InvalidName(ModelError):
    """A model name that does not match `^[a-z0-9][a-z0-9._-]{0,63}$`."""

    code = "validation_error"


class NameConflict(ModelError):
    """A name, or a version of it, that is taken or in use."""

    code = "name_conflict"


class ModelNotFound(ModelError):
    """A model, or a version of it, that does not exist."""

    code = "model_not_found"


class ArchitectureNotFound(ModelError):
    """An architecture that does not exist."""

    code = "architecture_not_found"


class DatasetError(ModelError):
    """A dataset that cannot be used for training. `param`: the field of the request that solves it, if there is one."""

    code = "invalid_dataset"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NoSuchColumn(DatasetError):
    """A table without a column of labels, or of existing images."""


class TooFewClasses(DatasetError):
    """A dataset with fewer than two classes."""

    code = "too_few_classes"


class TooFewImages(DatasetError):
    """A class with too few images for training and validation."""

    code = "too_few_images"


class TooManyBadFiles(DatasetError):
    """A dataset with more unusable files than may be left out."""

    code = "too_many_bad_files"


class TrainingError(ModelError):
    """A training that failed for the reason in the message, such as a loss that is not finite."""

    code = "training_failed"


# Devices


class DeviceUnavailable(ModelError):
    """A requested device that does not exist."""

    code = "device_unavailable"


class InferenceFailed(ModelError):
    """An exception of the network for this item, also alone in a batch."""

    code = "inference_failed"


class OutOfMemory(InferenceFailed):
    """A device without enough memory for a single image."""

    code = "out_of_memory"


class NonFiniteOutput(InferenceFailed):
    """An output of NaN or infinity for this item."""

    code = "non_finite_output"
