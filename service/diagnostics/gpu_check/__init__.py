"""Checks a GPU: `imago doctor --gpu`.

    runner (no torch) --one process per check--> child --> check(session) -> Measurement --outcome.json--> CheckResult -> Document

Each check runs in a process of its own with a time limit, because a GPU error can leave a process without a usable device.
"""
