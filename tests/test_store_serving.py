"""Which versions of a store are served, and how versions and backbones are removed."""

# ruff: noqa: F811  (fixtures that are imported)

import json
import os
import time

import pytest
from support.small_store import (
    publish,
    put,
    store,  # noqa: F401  (a fixture)
    temporaries,
)

from models.errors import ModelNotFound, NameConflict, WeightsError
from models.store import backbones
from models.store.store import ModelStore

# Serving


def test_activation_remembers_what_it_replaces(store: ModelStore) -> None:
    publish(store)
    publish(store)
    assert store.activate("digits", 1).model_dump() == {"default": "digits", "models": {"digits": 1}, "previous": {}}
    assert store.activate("digits", 2).previous == {"digits": 1}
    assert store.activate("digits", 2).previous == {"digits": 1}
    assert store.rollback("digits").models == {"digits": 1}
    assert store.rollback("digits").models == {"digits": 2}
    assert store.serving() == ModelStore(store.root).serving()


def test_activation_needs_a_version_that_can_be_read(store: ModelStore) -> None:
    publish(store)
    with pytest.raises(ModelNotFound):
        store.activate("digits", 2)
    (store.models / "digits" / "1" / "config.json").write_text("{}")
    with pytest.raises(WeightsError):
        store.activate("digits", 1)
    assert store.serving().models == {}


def test_rollback_says_why_it_cannot(store: ModelStore) -> None:
    publish(store)
    with pytest.raises(ModelNotFound, match="not served"):
        store.rollback("digits")
    store.activate("digits", 1)
    with pytest.raises(NameConflict, match="no previous version"):
        store.rollback("digits")


def test_the_default_is_the_first_until_another_is_set(store: ModelStore) -> None:
    for name in ("one", "two"):
        publish(store, name)
        store.activate(name, 1)
    assert store.serving().default == "one"
    assert store.set_default("two").default == "two"
    assert store.deactivate("one").model_dump() == {"default": "two", "models": {"two": 1}, "previous": {}}
    with pytest.raises(ModelNotFound, match="not served"):
        store.set_default("one")
    assert store.deactivate("two").default is None


@pytest.mark.abuse("A1401")
def test_the_default_stays_while_others_are_served(store: ModelStore) -> None:
    for name in ("one", "two"):
        publish(store, name)
        store.activate(name, 1)
    for attempt in (store.deactivate, store.remove):
        with pytest.raises(NameConflict, match=r"'one' is the default model.*imago models default NAME"):
            attempt("one")
    assert (store.versions("one"), store.serving().default) == ([1], "one")


@pytest.mark.abuse("A1401")
def test_without_a_default_activation_sets_none(store: ModelStore) -> None:
    for name in ("one", "two"):
        publish(store, name)
    (store.root / "serving.json").write_text('{"models": {"two": 1}}')
    assert store.activate("one", 1).default is None


def test_what_a_folder_was_shipped_with_stands_until_the_first_change(store: ModelStore) -> None:
    publish(store)
    shipped = '{"default": "digits", "models": {"digits": 1}, "previous": {}}'
    (store.root / "shipped.json").write_text(shipped)
    assert store.serving().model_dump() == json.loads(shipped)
    store.deactivate("digits")
    assert store.serving().models == {}
    assert (store.root / "shipped.json").read_text() == shipped


def test_a_damaged_serving_record_is_an_error_that_names_it(store: ModelStore) -> None:
    publish(store)
    (store.root / "serving.json").write_text('{"models": {"digits": "one"}}')
    with pytest.raises(WeightsError, match=r"serving\.json.*models"):
        store.serving()


# Removing


def test_a_served_version_stays_until_its_model_goes(store: ModelStore) -> None:
    publish(store)
    store.activate("digits", 1)
    with pytest.raises(NameConflict, match="is served"):
        store.remove("digits", 1)
    store.remove("digits")
    assert (store.names(), store.serving().models, store.serving().default) == ([], {}, None)
    assert (list(store.backbones.root.iterdir()), temporaries(store)) == ([], [])


def test_a_backbone_goes_with_the_last_version_that_stands_on_it(store: ModelStore) -> None:
    shared = publish(store).backbones[0]
    publish(store, "other")
    own = publish(store, seed=5).backbones[0]
    store.remove("digits")
    assert [folder.name for folder in store.backbones.root.iterdir()] == [shared.key]
    assert own.key != shared.key
    store.load("other")


def test_a_backbone_put_again_is_kept_for_whoever_is_about_to_publish(store: ModelStore) -> None:
    ref = publish(store).backbones[0]
    time.sleep(0.02)
    assert put(store) == ref
    store.remove("digits")
    assert store.backbone_size(ref) > 0
    an_hour_ago = time.time() - backbones.GRACE_S - 1
    os.utime(store.backbones.folder(ref), (an_hour_ago, an_hour_ago))
    store.sweep()
    with pytest.raises(WeightsError, match="missing"):
        store.backbone_size(ref)


def test_no_backbone_is_swept_while_a_version_cannot_be_read(store: ModelStore) -> None:
    ref = publish(store).backbones[0]
    publish(store, "other", seed=1)
    (store.models / "digits" / "1" / "config.json").write_text("{}")
    store.remove("other")
    assert store.backbone_size(ref) > 0


def test_a_number_is_never_given_twice(store: ModelStore) -> None:
    publish(store)
    publish(store)
    store.activate("digits", 2)
    store.activate("digits", 1)
    store.remove("digits", 2)
    assert (store.versions("digits"), store.serving().previous) == ([1], {})
    assert publish(store).version == 3


def test_removing_what_is_not_there(store: ModelStore) -> None:
    with pytest.raises(ModelNotFound):
        store.remove("digits")
    publish(store)
    with pytest.raises(ModelNotFound):
        store.remove("digits", 2)
