"""The dashboard, the alerts and how compose.yaml runs them: every metric and label they ask for is one that the server has."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from service.observability.metrics import Metrics

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "imago.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
MONITORING = (ROOT / "docs" / "guide" / "monitoring.md").read_text()

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {rule["alert"]: rule["expr"] for rule in RULES}
EXPRESSIONS |= {panel["title"]: " ; ".join(target["expr"] for target in panel["targets"]) for panel in PANELS}
OF_THE_SCRAPE = {"instance", "job", "le"}


def labels_by_name() -> dict[str, set[str]]:
    """Every series name that `/metrics` can have, with its labels."""
    metrics = Metrics()
    known: dict[str, set[str]] = {"up": set()}
    for family in metrics.registry.collect():
        known |= {name: labels_of(metrics, family) for name in names_of(family)}
    return known


def names_of(family: Metric) -> list[str]:
    match family.type:
        case "counter":
            return [f"{family.name}_total"]
        case "histogram":
            return [f"{family.name}_{part}" for part in ("bucket", "count", "sum")]
        case _:
            return [family.name]


def labels_of(metrics: Metrics, family: Metric) -> set[str]:
    found = [metric for metric in vars(metrics).values() if getattr(metric, "_name", None) == family.name]
    return {label for metric in found for label in metric._labelnames}


KNOWN = labels_by_name()


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_every_metric_and_label_is_one_that_there_is(title: str) -> None:
    text = re.sub(r'"[^"]*"', '""', EXPRESSIONS[title])
    names = re.findall(r"\b(?:imago_\w+|up)\b", text)
    assert names
    assert [name for name in names if name not in KNOWN] == []
    used = set(re.findall(r"(\w+)=~?\"", text)) | set(
        re.findall(r"\w+", " ".join(re.findall(r"(?:by|on) \(([^)]*)\)", text)))
    )
    assert used <= OF_THE_SCRAPE.union(*(KNOWN[name] for name in names))


def test_the_dashboard_shows_every_metric() -> None:
    shown = " ".join(EXPRESSIONS[panel["title"]] for panel in PANELS)
    ours = {family.name for family in Metrics().registry.collect() if not family.name.startswith("imago_process")}
    assert [name for name in ours if name not in shown] == []


def test_panels_stand_side_by_side() -> None:
    places = set[tuple[int, int]]()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        taken = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & places
        assert max(x for x, _ in taken) < 24
        places |= taken
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_legend_and_summary_names_a_label() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(re.findall(r"\w+", target["expr"])) | {
                "device",
                "instance",
            }
    for rule in RULES:
        kept = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert kept <= {"instance", "device"}


def test_every_alert_is_documented() -> None:
    assert re.findall(r"^\| `(Imago\w+)` \|", MONITORING, re.MULTILINE) == [rule["alert"] for rule in RULES]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_accepts_the_rules_and_they_fire_when_they_should() -> None:
    asked = [["check", "rules", str(DEPLOY / "prometheus" / "alerts.yml")], ["test", "rules", "tests/alerts.yml"]]
    for words in asked:
        done = subprocess.run(["promtool", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# compose.yaml


@pytest.fixture(scope="module")
def services() -> Any:
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text())
    return yaml.safe_load(text)["services"]


@pytest.mark.abuse("J18")
@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_what_watches_may_do_as_little_as_what_is_watched(services: Any, name: str) -> None:
    service = services[name]
    assert service["profiles"] == ["monitoring"]
    assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
    for key in ("read_only", "cap_drop", "security_opt"):
        assert service[key] == services["imago"][key]
    assert service.keys().isdisjoint({"privileged", "cap_add", "network_mode", "user"})
    assert [port.rpartition(":")[0].rpartition(":")[0] for port in service["ports"]] == ["127.0.0.1"]
    assert all(re.fullmatch(r"/tmp:size=\d+m,.*", mount) for mount in service["tmpfs"])
    assert {"pids_limit", "mem_limit"} <= service.keys()


@pytest.mark.abuse("J18")
@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_what_it_mounts_is_there_and_read_only(services: Any, name: str) -> None:
    mounts = [mount.split(":") for mount in services[name]["volumes"]]
    from_host = [mount for mount in mounts if mount[0].startswith(".")]
    assert all(mount[2:] == ["ro"] and (ROOT / mount[0]).exists() for mount in from_host)
    assert [mount[0] for mount in mounts if mount not in from_host] == [name]


def test_they_find_each_other(services: Any) -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    [job] = scraped["scrape_configs"]
    assert (job["job_name"], job["static_configs"]) == ("imago", [{"targets": ["imago:8000"]}])
    [source] = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    mounted = {mount.split(":")[0]: mount.split(":")[1] for mount in services["prometheus"]["volumes"]}
    assert scraped["rule_files"] == [f"{mounted['./deploy/prometheus']}/alerts.yml"]
    [provider] = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/imago.yml").read_text())["providers"]
    assert f"./deploy/grafana/imago.json:{provider['options']['path']}/imago.json:ro" in services["grafana"]["volumes"]


def test_grafana_has_no_account_with_a_known_password(services: Any) -> None:
    environment = services["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
