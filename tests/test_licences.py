from typing import Any

import pytest

from models.architectures.licences import UNKNOWN, licences_of, warning, warnings_of

FREE = [
    *("Apache-2.0", "apache-2.0", "Apache License 2.0", "Apache License, Version 2.0", "MIT", "MIT License"),
    *("BSD-3-Clause", "bsd-2-clause", "BSD", "ISC", "CC0-1.0", "cc-by-4.0", "MIT OR GPL-3.0-only", "(MIT AND ISC)"),
]
RESTRICTED = [
    *("cc-by-nc-4.0", "CC-BY-NC-SA-4.0", "CC-BY-SA-4.0", "gpl-3.0", "other", "dinov3-license", "Apple ML Research"),
    *("MIT AND CC-BY-NC-4.0", "not MIT", "MIT or so, but never on Sundays"),
]


@pytest.mark.parametrize("licence", FREE)
def test_a_free_licence_is_no_warning(licence: str) -> None:
    assert warning(licence) is None


@pytest.mark.parametrize("licence", RESTRICTED)
def test_any_other_licence_is_a_warning_that_names_it(licence: str) -> None:
    assert repr(licence) in str(warning(licence))


@pytest.mark.parametrize("licence", [None, "", " ", "unknown"])
def test_an_unknown_licence_is_a_warning(licence: str | None) -> None:
    assert warning(licence) == UNKNOWN


def test_a_text_is_cut_to_a_line() -> None:
    message = warning("Research\nonly. " * 50)
    assert message is not None
    assert "\n" not in message
    assert len(message) < 200


def test_a_trained_version_has_the_licences_of_its_bases() -> None:
    pulled, other = {"licence": "cc-by-nc-4.0"}, {"mode": "head", "base_model": [{"lineage": {"licence": "MIT"}}]}
    trained = {"mode": "head", "base_model": [{"lineage": pulled}, {"lineage": other}, {"lineage": pulled}]}
    assert licences_of(trained) == ["cc-by-nc-4.0", "MIT"]
    assert licences_of({"mode": "scratch", "base_model": None}) == []
    assert licences_of({"source": "mine.pth"}) == [None]


@pytest.mark.parametrize(
    "lineage",
    [
        pytest.param({"licence": ["a"]}, id="a list"),
        pytest.param({"licence": {"a": 1}}, id="an object"),
        pytest.param({"base_model": "abc"}, id="a base model that is a text"),
        pytest.param({"base_model": [1, {"lineage": 2}]}, id="ancestors that are no objects"),
    ],
)
def test_what_is_no_text_in_a_lineage_is_an_unknown_licence(lineage: dict[str, Any]) -> None:
    assert licences_of(lineage) == [None]
    assert warnings_of(lineage) == [UNKNOWN]


def test_ancestors_are_followed_for_so_many_generations() -> None:
    lineage: dict[str, Any] = {"licence": "MIT"}
    for _ in range(100):
        lineage = {"base_model": [{"lineage": lineage}]}
    assert licences_of(lineage) == [None]
