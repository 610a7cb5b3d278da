"""What is counted, and under which labels."""

import pytest

from service.observability.metrics import Metrics


def test_names_start_with_imago() -> None:
    lines = Metrics().exposition().decode().splitlines()
    assert {line.split()[2].split("_")[0] for line in lines if line.startswith("# TYPE")} == {"imago"}


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.reject("queue_full")
    assert other.registry.get_sample_value("imago_rejected_total", {"reason": "queue_full"}) is None


@pytest.mark.abuse("H18")
def test_a_made_up_method_becomes_other() -> None:
    metrics = Metrics()
    metrics.request("/predict", "BREW", 200, 0.1)
    labels = {"route": "/predict", "method": "other", "status": "200"}
    assert metrics.registry.get_sample_value("imago_requests_total", labels) == 1


def test_serving_replaces_what_served() -> None:
    metrics = Metrics()
    metrics.serve([("pets", 1, "resnet18-aa")])
    metrics.serve([("pets", 2, "resnet18-aa")])
    text = metrics.exposition().decode()
    assert 'version="2"' in text
    assert 'version="1"' not in text


def test_a_forgotten_backbone_leaves_no_series() -> None:
    metrics = Metrics()
    metrics.waiting("resnet18-aa").set(3)
    metrics.batch("resnet18-aa", 8)
    metrics.forget("resnet18-aa")
    assert "resnet18-aa" not in metrics.exposition().decode()


def test_jobs_that_cannot_be_counted_have_no_series() -> None:
    metrics = Metrics()
    metrics.count_jobs({"queued": 2, "failed": 0})
    assert metrics.registry.get_sample_value("imago_jobs", {"status": "queued"}) == 2
    metrics.count_jobs({})
    assert 'status="queued"' not in metrics.exposition().decode()
