"""The command line of a training request."""

import shlex
from typing import Any

from models.decision_rules import PRECISION
from models.files.text_encodings import AUTO
from models.training.job.request import FinetuneRequest


def command(request: FinetuneRequest) -> str:
    """The command line that asks for this run, with the dataset by its name alone: it goes into the lineage."""
    bases = (request.base,) if isinstance(request.base, str) else request.base or ()
    stopping = request.early_stopping.model_dump(exclude_defaults=True)
    given: dict[str, Any] = {"mode": request.mode, "folds": request.folds, "selection_epochs": request.selection_epochs}
    given |= {"val_fraction": request.val_fraction}
    given |= {"test_fraction": request.test_fraction or None, "on_bad_file": request.on_bad_file}
    given |= {"encoding": request.encoding if request.encoding != AUTO else None}
    given |= {"near_duplicates": request.near_duplicates if request.near_duplicates != "group" else None}
    given |= {"layout": request.layout if request.layout != "auto" else None}
    given |= {"min_per_class": request.min_per_class if request.min_per_class != 2 else None}
    given |= request.hyperparameters.model_dump(exclude_none=True)
    given |= {"early_stopping" if name == "criterion" else name: value for name, value in stopping.items()}
    given |= request.budget.model_dump(exclude_none=True)
    given |= {"half": request.half or None, "channels": request.channels if request.channels != 3 else None}
    given |= {"accept_precision": request.accept_precision if request.accept_precision != PRECISION else None}
    words = ["imago", "finetune", request.dataset.resolve().name, "--name", request.name]
    words += [word for base in bases for word in ("--base", base)]
    return shlex.join(words + [word for name, value in given.items() for word in _option(name, value)])


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [] if value is None else [f"--{flag}", str(value)]
