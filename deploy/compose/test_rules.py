"""Every alert fires when it should and is silent when it should be, as `promtool` says; every one has its runbook entry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
RULES = HERE / "rules" / "thalweg.yml"
MANUAL = HERE.parent.parent / "docs" / "operations.md"

#: Alert, minutes after which it is looked at, series that make it fire, and series that do not. Values are Prometheus's
#: notation, a sample every 15 seconds: `3x60` is 3, sixty times more; `0+1x60` counts up.
CASES: list[tuple[str, int, dict[str, str], dict[str, str]]] = [
    ("ThalwegDown", 5, {'up{job="thalweg", component="store"}': "1x4 0x60"}, {'up{job="thalweg"}': "1x4 0x2 1x60"}),
    (
        "ThalwegInvariantViolated",
        5,
        {'thalweg_invariant_violations_total{invariant="two_holders"}': "0x8 1x60"},
        {'thalweg_invariant_violations_total{invariant="two_holders"}': "0x60"},
    ),
    ("ThalwegDisconnected", 5, {"thalweg_nats_connected": "1x8 0x60"}, {"thalweg_nats_connected": "1x8 0x1 1x60"}),
    (
        "ThalwegNoGatewayLeads",
        5,
        {'thalweg_gateway_leads{instance="a"}': "1x4 0x60", 'thalweg_gateway_leads{instance="b"}': "0x60"},
        {'thalweg_gateway_leads{instance="a"}': "1x4 0x60", 'thalweg_gateway_leads{instance="b"}': "0x4 1x60"},
    ),
    (
        "ThalwegNoAutoscalerLeads",
        5,
        {'thalweg_autoscaler_leads{pool="a"}': "0x60", "thalweg_autoscaler_leads": "1x60"},
        {'thalweg_autoscaler_leads{pool="a"}': "1x60", "thalweg_autoscaler_leads": "1x60"},
    ),
    (
        "ThalwegNobodyWorks",
        5,
        {"thalweg_autoscaler_depth_messages": "9x60", 'thalweg_autoscaler_invokers{state="ready"}': "0x60"},
        {"thalweg_autoscaler_depth_messages": "9x60", 'thalweg_autoscaler_invokers{state="ready"}': "1x60"},
    ),
    ("ThalwegJobsLost", 5, {"thalweg_store_lost_jobs": "2x60"}, {"thalweg_store_lost_jobs": "0x60"}),
    (
        "ThalwegInvokersDoNotStart",
        5,
        {'thalweg_autoscaler_starts_total{worked="false"}': "0+1x60"},
        {'thalweg_autoscaler_starts_total{worked="false"}': "0x8 1x60"},
    ),
    (
        "ThalwegQueuesUnobserved",
        5,
        {"thalweg_autoscaler_failed_observations_total": "0+5x60"},
        {"thalweg_autoscaler_failed_observations_total": "0x8 3x60"},
    ),
    ("ThalwegDiskNearlyFull", 10, {"thalweg_store_disk_free_bytes": "1e9x60"}, {"thalweg_store_disk_free_bytes": "9e9x60"}),
    (
        "ThalwegFlushesSlowly",
        12,
        {
            'thalweg_store_flush_seconds_bucket{le="1.0"}': "0x60",
            'thalweg_store_flush_seconds_bucket{le="2.5"}': "0+9x60",
            'thalweg_store_flush_seconds_bucket{le="+Inf"}': "0+9x60",
        },
        {
            'thalweg_store_flush_seconds_bucket{le="1.0"}': "0+9x60",
            'thalweg_store_flush_seconds_bucket{le="2.5"}': "0+9x60",
            'thalweg_store_flush_seconds_bucket{le="+Inf"}': "0+9x60",
        },
    ),
    (
        "ThalwegBrokerSlow",
        12,
        {
            'thalweg_broker_round_trip_seconds_bucket{le="1.0"}': "0x60",
            'thalweg_broker_round_trip_seconds_bucket{le="+Inf"}': "0+9x60",
        },
        {
            'thalweg_broker_round_trip_seconds_bucket{le="0.01"}': "0+9x60",
            'thalweg_broker_round_trip_seconds_bucket{le="+Inf"}': "0+9x60",
        },
    ),
    ("ThalwegSubscriptionOverflowed", 5, {"thalweg_nats_overflows_total": "0x8 1x60"}, {"thalweg_nats_overflows_total": "7x60"}),
    ("ThalwegDeadLetters", 5, {"thalweg_dead_letters": "1x60"}, {"thalweg_dead_letters": "0x60"}),
    (
        "ThalwegRejects",
        12,
        {'thalweg_invoker_rejects_total{code="stale_round"}': "0+9x60"},
        {'thalweg_invoker_rejects_total{code="stale_round"}': "0x8 1x60"},
    ),
    (
        "ThalwegJobSlow",
        8,
        {'thalweg_job_slowdown_ratio{tenant="default", job="a"}': "0.8x60"},
        {'thalweg_job_slowdown_ratio{tenant="default", job="a"}': "0.1x60"},
    ),
    (
        "ThalwegConfigurationRefused",
        5,
        {'thalweg_config_reloads_total{outcome="refused"}': "0x8 1x60"},
        {'thalweg_config_reloads_total{outcome="applied"}': "0x8 1x60"},
    ),
]


def rules() -> list[dict[str, Any]]:
    """All alerts."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_every_alert_has_cases_and_a_runbook_entry() -> None:
    names = [rule["alert"] for rule in rules()]
    assert names == [case[0] for case in CASES]
    entries = re.findall(r"^### (Thalweg\w+)$", MANUAL.read_text(), re.MULTILINE)
    assert entries == names
    assert all(rule["labels"]["severity"] in ("page", "ticket") for rule in rules())


def test_alerts_fire_and_are_silent(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        assert not os.environ.get("REQUIRE_PROMETHEUS"), "promtool is missing"
        pytest.skip("promtool is not installed (make deps)")
    tests = []
    for alert, minutes, fires, silent in CASES:
        for series, expected in ((fires, True), (silent, False)):
            tests.append(
                {
                    "interval": "15s",
                    "input_series": [{"series": name, "values": values} for name, values in series.items()],
                    # Counting says more than comparing texts, which are for people.
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)',
                            "eval_time": f"{minutes}m",
                            "exp_samples": [{"labels": "{}", "value": 1 if expected else 0}],
                        }
                    ],
                }
            )
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "15s", "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
