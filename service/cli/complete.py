"""What a shell completes beyond commands and flags. Quick enough for a Tab: nothing here imports torch."""

import click

from service.settings import Settings, SettingsError


def stored_models(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names in the store that begin so, read off its folders: `models.store.store` stands on torch, which takes seconds to import."""
    try:
        folder = Settings.load(weights=context.params.get("weights")).weights / "models"
        names = [entry.name for entry in folder.iterdir()]
    except (SettingsError, OSError):
        return []
    return sorted(name for name in names if name.startswith(incomplete) and not name.startswith("."))
