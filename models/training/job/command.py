"""The command line of a training request."""

import shlex
from typing import Any

from models.training.job.request import FinetuneRequest

SAID = {"mode", "val_fraction", "on_bad_file"}  # also where they are as by default
UNSAID = {"dataset", "name", "base", "hyperparameters", "early_stopping", "budget", "deploy", "metadata"}


def command(request: FinetuneRequest) -> str:
    """Returns the command line that asks for this run, for the lineage: the dataset by its name without its folder."""
    bases = (request.base,) if isinstance(request.base, str) else request.base or ()
    given: dict[str, Any] = {
        **request.model_dump(include=SAID),
        **request.model_dump(exclude=UNSAID, exclude_defaults=True),
        **request.hyperparameters.model_dump(exclude_none=True),
        **request.early_stopping.model_dump(exclude_defaults=True),
        **request.budget.model_dump(exclude_none=True),
    }
    if "criterion" in given:
        given["early_stopping"] = given.pop("criterion")
    words = ["imago", "finetune", request.dataset.resolve().name, "--name", request.name]
    words += [word for base in bases for word in ("--base", base)]
    return shlex.join(words + [word for name, value in given.items() for word in _option(name, value)])


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
