"""deploy/kubernetes: valid by Kubernetes' own schemas, whole, and as narrow as compose.yaml."""

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS = [
    manifest for name in KUSTOMIZATION["resources"] for manifest in yaml.safe_load_all((FOLDER / name).read_text())
]
VERSIONS = ("1.29", kubernetes_validate.latest_version())


def of_kind(kind: str) -> list[Any]:
    return [manifest for manifest in MANIFESTS if manifest["kind"] == kind]


DEPLOYMENT, SERVICE = of_kind("Deployment")[0], of_kind("Service")[0]
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,), (INIT,) = POD["containers"], POD["initContainers"]


def test_every_file_is_in_the_kustomization() -> None:
    listed = {*KUSTOMIZATION["resources"], "kustomization.yaml"}
    assert {path.name for path in FOLDER.glob("*.yaml")} == listed


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: f"{m['kind']} {m['metadata']['name']}")
def test_it_is_what_kubernetes_expects(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_misspelt_field_is_found() -> None:
    wrong = {**SERVICE, "spec": {**SERVICE["spec"], "prots": []}}
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_what_one_part_names_another_has() -> None:
    labels, port = DEPLOYMENT["spec"]["template"]["metadata"]["labels"], CONTAINER["ports"][0]["name"]
    assert SERVICE["spec"]["selector"].items() <= labels.items()
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert SERVICE["spec"]["ports"][0]["targetPort"] == port
    assert {CONTAINER[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "liveness", "readiness")} == {port}
    secrets = {secret["name"] for secret in KUSTOMIZATION["secretGenerator"]}
    assert {source["secretRef"]["name"] for source in CONTAINER["envFrom"]} == secrets


def test_every_volume_is_mounted_and_claimed() -> None:
    claims = {claim["metadata"]["name"] for claim in of_kind("PersistentVolumeClaim")}
    named = {volume["persistentVolumeClaim"]["claimName"] for volume in POD["volumes"] if "emptyDir" not in volume}
    assert named == claims
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


@pytest.mark.abuse("J18")
@pytest.mark.parametrize("container", [CONTAINER, INIT], ids=["imago", "init"])
def test_a_container_gets_nothing_it_does_not_need(container: dict[str, Any]) -> None:
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (POD["securityContext"]["runAsNonRoot"], POD["securityContext"]["runAsUser"]) == (True, 10001)
    assert POD["automountServiceAccountToken"] is False
    assert "memory" in container["resources"]["limits"]


@pytest.mark.abuse("J18")
def test_the_pod_has_the_mounts_of_compose() -> None:
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in CONTAINER["volumeMounts"]}
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["imago"]
    volumes = [volume.split(":") for volume in compose["volumes"]]
    assert mounts == {"/tmp": False, "/dev/shm": False} | {volume[1]: volume[2:] == ["ro"] for volume in volumes}
    assert environment_of(CONTAINER)["TMPDIR"] == compose["environment"]["TMPDIR"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_ingress_of_the_docs_leads_to_the_service(version: str) -> None:
    page = (ROOT / "docs" / "guide" / "proxies.md").read_text()
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "kind: Ingress" in block]
    ingress = yaml.safe_load(text)
    kubernetes_validate.validate(ingress, version, strict=True)
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": SERVICE["metadata"]["name"], "port": {"name": SERVICE["spec"]["ports"][0]["name"]}}


def test_no_variable_of_a_service_looks_like_a_setting() -> None:
    assert POD["enableServiceLinks"] is False


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def test_a_gpu_that_is_requested_must_work() -> None:
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert environment_of(CONTAINER)["IMAGO_DEVICE"] == "cuda"


def test_the_device_plugin_alone_hands_out_gpus() -> None:
    """Where nvidia is the default runtime, a container that says nothing else may get every GPU."""
    assert environment_of(INIT) == {"NVIDIA_VISIBLE_DEVICES": "void"}
    assert "NVIDIA_VISIBLE_DEVICES" not in environment_of(CONTAINER)


def test_there_is_shared_memory_for_nccl() -> None:
    [mount] = [mount for mount in CONTAINER["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    [volume] = [volume for volume in POD["volumes"] if volume["name"] == mount["name"]]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


@pytest.mark.abuse("J18")
def test_the_pod_is_asked_and_ended_as_the_server_wants_it() -> None:
    assert POD["terminationGracePeriodSeconds"] > Settings.model_fields["drain_seconds"].default + 5
    assert (
        CONTAINER["livenessProbe"]["httpGet"]["path"] == CONTAINER["startupProbe"]["httpGet"]["path"] == "/health/live"
    )
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/health/ready"


def fill(claim: Path) -> None:
    """What the init container does, with the checkout as its image."""
    script = INIT["args"][0].replace("/store", str(claim))
    subprocess.run([*INIT["command"], script], cwd=ROOT, check=True)


def test_an_empty_claim_gets_the_embedded_default(tmp_path: Path) -> None:
    fill(tmp_path)
    assert (tmp_path / "shipped.json").read_bytes() == (ROOT / "weights" / "shipped.json").read_bytes()
    assert (tmp_path / "models" / "cifar10" / "1" / "config.json").exists()
    assert list((tmp_path / "backbones").glob("preact_resnet-*/model.safetensors"))


@pytest.mark.parametrize("record", ["serving.json", "shipped.json"])
def test_a_store_that_has_something_is_left_alone(record: str, tmp_path: Path) -> None:
    (tmp_path / record).write_text("mine")
    fill(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [record]
    assert (tmp_path / record).read_text() == "mine"
