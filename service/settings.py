"""Every knob, its unit, its default. A flag wins over an `IMAGO_*` environment variable, that over `.env`, that over the default."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import DotEnvSettingsSource, EnvSettingsSource

from models.files.cgroup import memory_limit
from models.images import heif
from service.system.platform_variables import injected
from service.system.prefix import prefix_of

if TYPE_CHECKING:
    from models.images.decoding import Limits
    from models.runtime import Options

PREFIX = "IMAGO_"
NOT_SETTINGS = frozenset({"IMAGO_TEST_DATA"})  # read by the tests alone


class SettingsError(ValueError):
    """A setting that is unknown or has a value it cannot have; the message names the variable, never a value."""


def _split(value: object) -> object:
    """`"a, b"` -> `("a", "b")`; anything but a string is left for pydantic to judge."""
    if isinstance(value, str):
        return tuple(part for part in (piece.strip() for piece in value.split(",")) if part)
    return value


def _prefix(value: str) -> str:
    try:
        return prefix_of(value)
    except ValueError as error:
        raise PydanticCustomError("root_path", "{error}", {"error": str(error)}) from None


def _lowered(value: object) -> object:
    """`"TIFF, Avif"` -> `("tiff", "avif")`."""
    parts = _split(value)
    return tuple(str(part).strip().lower() for part in parts) if isinstance(parts, tuple | list) else parts


NameList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def _readable(formats: tuple[str, ...]) -> tuple[str, ...]:
    if "heif" in formats and not heif.is_installed():
        raise PydanticCustomError("not_installed", "heif needs the extra of that name: pip install 'imago[heif]'")
    return formats


Formats = Annotated[
    tuple[Literal["tiff", "avif", "heif"], ...], NoDecode, BeforeValidator(_lowered), AfterValidator(_readable)
]


class Settings(BaseSettings):
    """What `imago serve` can be told. Every field is a flag, an environment variable and a line in docs/reference/settings.md."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    # The server
    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe message to log")
    log_format: Literal["text", "json"] = Field("text", description="Lines for people, or one JSON object per line")
    access_log: bool = Field(False, description="Log one line per request, whatever `log_level` is")
    trace_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="OpenTelemetry collector (OTLP over HTTP) that gets a trace of each request, as http://localhost:4318; by default none",
    )
    allowed_hosts: NameList = Field(
        (),
        description="Further names of this server in `Host`, comma separated, or `*`; unset, only a loopback `host` checks them",
    )
    root_path: Annotated[str, AfterValidator(_prefix)] = Field(
        "",
        description="Path under which a proxy serves Imago, as /imago; by default what `X-Forwarded-Prefix` of `trusted_proxies` says",
    )
    cors_origins: NameList = Field(
        (), description="Origins whose pages may call the user routes, comma separated; none by default"
    )
    trusted_proxies: NameList = Field(
        (),
        description="Addresses or networks of reverse proxies whose `X-Forwarded-For` and `X-Forwarded-Prefix` are read, comma separated; "
        "none by default",
    )
    admin_key: SecretStr | None = Field(
        None,
        min_length=32,
        description="Key of the admin routes, at least 32 characters; by default one is made in the data folder",
    )
    api_key: SecretStr | None = Field(
        None, min_length=16, description="Key of the user routes, at least 16 characters; by default they are open"
    )

    # Where things are
    weights: Path = Field(Path("weights"), description="Folder of the model store")
    data: Path = Field(Path("data"), description="Folder of the server's own state: the admin key, measurements, jobs")
    datasets: Path = Field(Path("datasets"), description="Folder under which datasets are looked for")

    # What is served, and on what
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    models: NameList = Field(
        (), description="Models to serve, comma separated; by default all that the store says are served"
    )
    default_model: str | None = Field(
        None, description="Model that answers when a request names none; by default the store's"
    )
    pull_missing: bool = Field(False, description="Download a model named in `models` that the store lacks")
    weights_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Mirror to download published weights from; by default their publisher's",
    )
    engine: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="What runs the backbones; auto measures at load"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Arithmetic of the backbones"
    )
    memory_format: Literal["auto", "channels_last", "contiguous"] = Field(
        "auto", description="Layout of images in memory"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of one forward pass; by default measured")
    max_batch: int | None = Field(
        None, ge=1, le=4096, description="Most images in one forward pass; by default measured"
    )

    # Fine-tuning
    jobs_database: SecretStr | None = Field(
        None,
        description="URL of a PostgreSQL database for the jobs; by default they are in jobs.sqlite in the data folder",
    )
    server_name: str = Field(
        "imago",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Name of this server among those that share `jobs_database`: each goes on with its own jobs after a restart",
    )
    max_queued_jobs: int = Field(100, ge=1, description="Most fine-tuning jobs waiting; beyond it requests get 429")
    trainer_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of a fine-tuning job; by default half of the cores"
    )
    trainer_memory_mb: int | None = Field(
        None,
        ge=64,
        description="Most memory of a fine-tuning job or a dry run, in megabytes; beyond it the job fails. By default three quarters "
        "of what the machine or the container has",
    )

    # Admission
    max_queue_images: int = Field(
        1024, ge=1, description="Most images waiting in the server; beyond it requests get 429"
    )
    max_queue_mb: int = Field(
        512, ge=1, description="Most megabytes of images waiting in the server; beyond it requests get 429"
    )
    timeout_ms: int = Field(
        10_000, ge=1, le=600_000, description="Milliseconds within which a request is answered, or gets 504"
    )
    drain_seconds: float = Field(
        30, ge=0, le=3600, description="Seconds that requests under way are given to finish on SIGTERM"
    )
    top_k: int = Field(5, ge=1, description="Predictions per image when a request does not say")

    # Limits on what arrives
    max_body_mb: int = Field(16, ge=1, description="Largest request body of one raw image, in megabytes")
    max_multipart_mb: int = Field(64, ge=1, description="Largest request body of several images, in megabytes")
    max_dataset_mb: int = Field(10_240, ge=1, description="Largest upload of a dataset, in megabytes")
    max_files: int = Field(32, ge=1, le=1000, description="Most images in one request")
    max_image_mb: int = Field(10, ge=1, description="Largest encoded image, in megabytes")
    max_image_megapixels: int = Field(  # at most what models.images.cost.PIXEL_CEILING lets through
        50, ge=1, le=178, description="Largest image, in millions of pixels that are decoded: of a large JPEG, 1/64"
    )
    max_megapixels_in_flight: int = Field(
        200, ge=1, description="Most millions of pixels decoded at a time, over all requests; beyond it images wait"
    )
    max_image_side: int = Field(65_535, ge=1, description="Longest side of an image, in pixels")
    extra_formats: Formats = Field(
        (),
        description="Image formats to accept besides the usual: tiff, avif, heif (HEIC; the extra `heif`), comma separated",
    )
    decode_threads: int | None = Field(
        None, ge=1, le=1024, description="Threads that decode images; by default one per core"
    )
    head_timeout_s: float = Field(
        10, gt=0, description="Seconds within which a request's head must arrive, or it gets 408"
    )
    body_timeout_s: float = Field(
        60, gt=0, description="Seconds within which a request's body must arrive, or it gets 408"
    )
    write_timeout_s: float = Field(
        30, gt=0, description="Seconds within which a client must take bytes of its answer, or its connection is closed"
    )
    keep_alive_s: int = Field(
        75, ge=1, description="Seconds that an idle connection stays open; longer than a proxy keeps its own"
    )
    max_connections: int = Field(
        1024, ge=1, description="Most connections open at a time, less where the open-files limit is lower"
    )
    max_client_connections: int = Field(
        256,
        ge=1,
        description="Most connections from one address (IPv6: from one /64) but `trusted_proxies`, at most half of all",
    )
    max_held_mb: int = Field(
        256,
        ge=1,
        description="Most megabytes of answers that clients have not read, with pipelined requests; half of it for one address",
    )
    max_head_kb: int = Field(
        32, ge=1, le=1024, description="Largest request head, in kilobytes; beyond it requests get 431"
    )

    @classmethod
    def load(cls, **flags: Any) -> "Settings":
        """Settings from flags, environment, `.env` and defaults; a flag that is None was not given. Raises SettingsError."""
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            reasons = (f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors(include_input=False))
            raise SettingsError("; ".join(reasons)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        if isinstance(env_settings, EnvSettingsSource):
            ours = set(env_settings.env_vars) - set(injected(env_settings.env_vars))
            env_settings.env_vars = {name: env_settings.env_vars[name] for name in ours}
        for source, where in ((env_settings, "the environment"), (dotenv_settings, ".env")):
            if isinstance(source, EnvSettingsSource | DotEnvSettingsSource):
                _refuse_unknown(source.env_vars, set(settings_cls.model_fields), where)
        return init_settings, env_settings, dotenv_settings

    def limits(self) -> "Limits":
        """What one image may weigh and measure."""
        from models.images.decoding import Limits

        return Limits(
            max_bytes=self.max_image_mb * 2**20,
            max_pixels=self.max_image_megapixels * 10**6,
            max_side=self.max_image_side,
            extra_formats=frozenset(name.upper() for name in self.extra_formats),
        )

    def runtime_options(self) -> "Options":
        """How backbones are to be made fast; what is None or auto is measured, and remembered under `data`."""
        from models.runtime import Options

        return Options(
            engine=self.engine,
            precision=self.precision,
            memory_format=self.memory_format,
            threads=self.threads,
            max_batch=self.max_batch,
            cache_dir=self.data / "runtime",
        )

    @property
    def decoders(self) -> int:
        """Threads that decode images: by default one per core that this process may use."""
        return self.decode_threads or _cores()

    @property
    def trainer_cores(self) -> int:
        """CPU threads of a training job: by default half of the cores that this process may use, at least one."""
        return self.trainer_threads or max(1, _cores() // 2)

    @property
    def trainer_bytes(self) -> int:
        """Memory that a training job may take: by default three quarters of what this process may use, so that the server has the rest."""
        return self.trainer_memory_mb * 2**20 if self.trainer_memory_mb else memory_limit() * 3 // 4


def _cores() -> int:
    """Cores by affinity and container quota. Imports torch, so it is called when a setting needs it."""
    from models.runtime.device import cpu_count

    return cpu_count()


def _refuse_unknown(variables: Mapping[str, Any] | Iterable[str], fields: set[str], where: str) -> None:
    """Raises SettingsError for an `IMAGO_*` variable that is no setting, and names the nearest one."""
    known = {f"{PREFIX}{field}".upper() for field in fields} | NOT_SETTINGS
    for name in sorted(variable.upper() for variable in variables):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known - NOT_SETTINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else "`imago serve --help` lists the settings"
            raise SettingsError(f"{name} in {where} is not a setting; {hint}")
