"""Settings: where they come from, and which are refused."""

from pathlib import Path

import pytest

from models.images.cost import Limits
from service.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # away from any .env
    for name in Settings.model_fields:
        monkeypatch.delenv(f"IMAGO_{name.upper()}", raising=False)


@pytest.mark.abuse("H18")
def test_the_defaults_need_nothing() -> None:
    settings = Settings.load()
    assert (settings.host, settings.port, settings.models) == ("127.0.0.1", 8000, ())


def test_a_flag_wins_over_the_environment_over_dotenv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("IMAGO_PORT=1\nIMAGO_TOP_K=1\nIMAGO_HOST=dotenv\nCOMPOSE_PROJECT_NAME=other\n")
    monkeypatch.setenv("IMAGO_PORT", "2")
    monkeypatch.setenv("IMAGO_TOP_K", "2")
    settings = Settings.load(port=3, top_k=None)
    assert (settings.port, settings.top_k, settings.host) == (3, 2, "dotenv")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        pytest.param("IMAGO_PRT", "IMAGO_PORT", id="near"),
        pytest.param("IMAGO_ZZZZZZZZ", "imago serve --help", id="far"),
    ],
)
def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, near: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=f"{name} in the environment.*{near}"):
        Settings.load()


def test_an_unknown_variable_in_dotenv_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("IMAGO_MODEL=a\n")
    with pytest.raises(SettingsError, match=r"IMAGO_MODEL in \.env .*IMAGO_MODELS"):
        Settings.load()


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGO_MODELS", "resnet50, pets,")
    monkeypatch.setenv("IMAGO_EXTRA_FORMATS", " TIFF , avif")
    settings = Settings.load(cors_origins="https://a.example,https://b.example")
    assert settings.models == ("resnet50", "pets")
    assert settings.extra_formats == ("tiff", "avif")
    assert settings.cors_origins == ("https://a.example", "https://b.example")


def test_an_empty_variable_is_as_if_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGO_ADMIN_KEY", "")
    assert Settings.load().admin_key is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("IMAGO_PORT", "eighty", id="port"),
        pytest.param("IMAGO_ADMIN_KEY", "too-short-a-secret", id="short key"),
        pytest.param("IMAGO_DEVICE", "gpu", id="device"),
        pytest.param("IMAGO_EXTRA_FORMATS", "jpeg2000", id="format"),
        pytest.param("IMAGO_MAX_IMAGE_MEGAPIXELS", "179", id="megapixels"),
    ],
)
def test_a_wrong_value_names_the_variable_and_not_the_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name) as refused:
        Settings.load()
    assert value not in str(refused.value)


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_a_key_does_not_show() -> None:
    settings = Settings.load(admin_key="s" * 40)
    assert "s" * 40 not in f"{settings!r} {settings}"


def test_limits_are_in_bytes_and_pixels() -> None:
    limits = Settings.load(max_image_mb=2, max_image_megapixels=3, max_image_side=4, extra_formats="Tiff").limits()
    assert limits == Limits(2 * 2**20, 3_000_000, 4, frozenset({"TIFF"}))


def test_the_largest_image_there_can_be_is_one_that_can_be_decoded() -> None:
    assert Settings.load(max_image_megapixels=178).limits().max_pixels == 178_000_000


def test_runtime_options_carry_what_was_forced() -> None:
    options = Settings.load(engine="torch", precision="bfloat16", threads=2, max_batch=8).runtime_options()
    assert (options.engine, options.precision, options.threads, options.max_batch) == ("torch", "bfloat16", 2, 8)
