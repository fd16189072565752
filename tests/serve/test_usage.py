"""How usage is told."""

from __future__ import annotations

import csv
import io

from prometheus_client import generate_latest

from fastserve.serve.key_file import Terms
from fastserve.serve.tenant_table import Tenant
from fastserve.serve.usage import TenantMetrics, describe_usage, write_csv


def make_tenant(name: str) -> Tenant:
    tenant = Tenant(name, Terms(weight=2.0))
    tenant.usage.begin(10)
    tenant.usage.serve(3, 0.25)
    tenant.usage.serve(0, 0.5)
    tenant.usage.joules = 12.3456
    tenant.usage.refused.update({"max_concurrent": 2, "requests_per_minute": 1})
    return tenant


ROW = {
    "name": "a",
    "weight": 2.0,
    "num_running": 0,
    "requests": 1,
    "prompt_tokens": 10,
    "completion_tokens": 3,
    "service_seconds": 0.75,
    "joules": 12.346,
    "refused": 3,
}


def test_a_row_has_what_a_tenant_has_had() -> None:
    assert describe_usage(make_tenant("a"), has_energy=True) == ROW
    assert describe_usage(make_tenant("a"), has_energy=False) == {**ROW, "joules": None}


def test_csv_has_a_row_a_tenant_and_nothing_where_nothing_is_known() -> None:
    tenants = [make_tenant("a"), make_tenant('b,"c"')]
    rows = list(csv.DictReader(io.StringIO(write_csv(tenants, has_energy=True))))
    assert rows[0] == {name: str(value) for name, value in ROW.items()}
    assert rows[1]["name"] == 'b,"c"'
    assert next(csv.DictReader(io.StringIO(write_csv(tenants, has_energy=False))))["joules"] == ""


def test_metrics_have_the_same_by_tenant() -> None:
    text = generate_latest(TenantMetrics([make_tenant("a")], has_energy=True)).decode()
    for line in (
        'fastserve_tenant_requests_under_way{tenant="a"} 0.0',
        'fastserve_tenant_requests_total{tenant="a"} 1.0',
        'fastserve_tenant_prompt_tokens_total{tenant="a"} 10.0',
        'fastserve_tenant_completion_tokens_total{tenant="a"} 3.0',
        'fastserve_tenant_service_seconds_total{tenant="a"} 0.75',
        'fastserve_tenant_joules_total{tenant="a"} 12.3456',
        'fastserve_tenant_refused_requests_total{limit="max_concurrent",tenant="a"} 2.0',
    ):
        assert line in text.splitlines()
    assert "joules" not in generate_latest(TenantMetrics([make_tenant("a")], has_energy=False)).decode()
