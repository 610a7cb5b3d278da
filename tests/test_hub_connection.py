"""The connection to the Hub: missing, private and gated repositories, tokens, cut connections, offline use."""

# ruff: noqa: F811  (fixtures that are imported)

from pathlib import Path

import pytest
from support.hub_files import (  # noqa: F401  (fixtures)
    CONFIG,
    LABELS,
    NETWORK,
    REPOSITORY,
    cache,
    changed,
    files,
    hub,
    network,
    refusal,
    server,
    store,
)
from support.hub_server import Hub

from models.errors import ArchitectureNotFound, DownloadError, ModelError, WeightsError
from models.store import pull
from models.store.store import ModelStore


def test_a_repository_that_is_not_there(server: Hub, store: ModelStore, cache: Path) -> None:
    assert "does not exist, or is private: check the name, and set HF_TOKEN" in refusal(store, cache, DownloadError)


def test_a_gated_repository(hub: Hub, store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = {REPOSITORY}
    assert f"{hub.url}/{REPOSITORY} is gated: accept its licence on that page, then set HF_TOKEN" in refusal(
        store, cache, DownloadError
    )
    monkeypatch.setenv("HF_TOKEN", hub.token)
    pull.pull(f"hf-hub:{REPOSITORY}", store, cache)


def test_a_token_that_may_not(hub: Hub, store: ModelStore, cache: Path) -> None:
    hub.statuses = [403] * 9
    assert "may not be read (403): set HF_TOKEN" in refusal(store, cache, DownloadError)


def test_a_revision_that_is_not_there(hub: Hub, store: ModelStore, cache: Path) -> None:
    assert "no revision 'v9'" in refusal(store, cache, DownloadError, f"hf-hub:{REPOSITORY}@v9")


def test_a_cut_connection_is_resumed(hub: Hub, store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000
    )  # what a broken connection loses at most
    hub.cut_after = [100_000, 50_000]
    pull.pull(f"hf-hub:{REPOSITORY}", store, cache)
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_body_that_is_always_cut_is_given_up(hub: Hub, store: ModelStore, cache: Path) -> None:
    hub.cut_after = [0] * 20
    assert "could not be fetched" in refusal(store, cache, DownloadError)


def test_other_content_than_the_hash_says(hub: Hub, store: ModelStore, cache: Path) -> None:
    hub.other_content = True
    assert "is not what the Hub says: expected SHA-256" in refusal(store, cache, DownloadError)
    hub.other_content = False
    pull.pull(f"hf-hub:{REPOSITORY}", store, cache)


def test_a_hub_that_is_not_there(store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "could not be reached; check the network, or set HF_ENDPOINT" in refusal(store, cache, DownloadError)


def test_a_server_that_is_no_hub(server: Hub, store: ModelStore, cache: Path) -> None:
    server.statuses = [500] * 9
    assert "the server answered 500" in refusal(store, cache, DownloadError)


def test_offline(hub: Hub, store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in refusal(store, cache, DownloadError)
    assert hub.requests == []


def test_offline_from_the_cache(hub: Hub, store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "hub" / "models--someone--Tiny_ViT").mkdir(parents=True)  # what was there before stays
    pull.pull(f"hf-hub:{REPOSITORY}", store, cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert pull.pull(f"hf-hub:{REPOSITORY}", store, cache, as_name="again").lineage["licence"] == "cc-by-nc-4.0"
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["hf-hub:alone", "hf-hub:a/b/c", "hf-hub:../x", "hf-hub:a/..", "hf-hub:/a/b", "hf-hub:"]
)
def test_what_is_no_repository(store: ModelStore, cache: Path, name: str) -> None:
    assert "is not a repository of the Hub" in refusal(store, cache, DownloadError, name)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        pytest.param("timm/resnet51", ArchitectureNotFound, "timm/resnet50", id="network"),
        pytest.param("timm/resnet18.nope", ArchitectureNotFound, "it knows a1_in1k", id="tag"),
        pytest.param("timm/test_vit?img_size=96", WeightsError, "pull timm/test_vit", id="options"),
        pytest.param("timm/gcvit_tiny", WeightsError, "not on the Hub but a pickled file", id="not on the Hub"),
        pytest.param("timm/../x", ArchitectureNotFound, "not a name of timm's", id="path"),
    ],
)
def test_names_are_checked_without_the_network(name: str, kind: type[ModelError], message: str) -> None:
    with pytest.raises(kind, match="(?s).*" + message.replace("?", r"\?")):
        pull.check(name)
