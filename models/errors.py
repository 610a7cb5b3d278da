"""What can go wrong with images, weights, models and devices, each with a stable code and a message for the person who caused it.

`service/errors.py` holds the one table from these to HTTP status codes.
"""


class ModelError(Exception):
    """The root of every error that Imago raises on purpose. `code` is stable; the message names the cause and what to do."""

    code = "model_error"


# Images


class ImageError(ModelError):
    """An image that cannot be classified. It concerns that image alone."""

    code = "invalid_image"


class InvalidImage(ImageError):
    """An allowed format whose content cannot be decoded."""

    code = "invalid_image"


class EmptyImage(ImageError):
    """No bytes at all."""

    code = "empty_file"


class UnsupportedImage(ImageError):
    """The bytes are not of an allowed image format; content decides, never a name or a declared type."""

    code = "unsupported_media_type"


class ImageTooLarge(ImageError):
    """More bytes or pixels than the limit; refused before pixels are allocated."""

    code = "image_too_large"


# Weights and the store


class WeightsError(ModelError):
    """Weights that are damaged, truncated, foreign, or do not fit the architecture. Nothing was loaded."""

    code = "invalid_weights"


class ReadOnlyStore(ModelError):
    """The store cannot be written to: its folder is mounted read-only, or its permissions say so. Nothing was changed."""

    code = "store_read_only"


class DownloadError(ModelError):
    """Published weights could not be fetched, or were not what their name promises."""

    code = "download_failed"


class ExportError(ModelError):
    """A model that cannot be written in a format, or a format whose packages are not installed."""

    code = "export_failed"


class InvalidName(ModelError):
    """A model name that does not match `^[a-z0-9][a-z0-9._-]{0,63}$`."""

    code = "validation_error"


class NameConflict(ModelError):
    """The name, or the version under it, is taken or in use."""

    code = "name_conflict"


class ModelNotFound(ModelError):
    """No model, or no version of it, under that name."""

    code = "model_not_found"


class ArchitectureNotFound(ModelError):
    """No architecture under that name."""

    code = "architecture_not_found"


class DatasetError(ModelError):
    """A dataset that cannot be trained on. `param`: the field of a request that settles it, where one does."""

    code = "invalid_dataset"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NoSuchColumn(DatasetError):
    """A table without a column of labels, or of images that are there."""


class TooFewClasses(DatasetError):
    """A dataset of fewer than two classes."""

    code = "too_few_classes"


class TooFewImages(DatasetError):
    """A class without images enough to train and to validate on."""

    code = "too_few_images"


class TooManyBadFiles(DatasetError):
    """More files that are no usable images than may be left out."""

    code = "too_many_bad_files"


class TrainingError(ModelError):
    """Training went wrong in a way that its message explains: a loss that is not finite, say."""

    code = "training_failed"


# Devices


class DeviceUnavailable(ModelError):
    """The device asked for is not there."""

    code = "device_unavailable"


class InferenceFailed(ModelError):
    """The network raised for this item, alone in its batch."""

    code = "inference_failed"


class OutOfMemory(InferenceFailed):
    """The device has no memory left for even this one image."""

    code = "out_of_memory"


class NonFiniteOutput(InferenceFailed):
    """The network answered NaN or infinity for this item."""

    code = "non_finite_output"
