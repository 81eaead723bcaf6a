"""Writes the dashboards beside this file: `python deploy/compose/grafana/make_dashboards.py`.

A panel is a title, a unit, and queries with their legends; places and all the rest that Grafana wants follow from that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

DIRECTORY = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
#: Panels beside each other, and how high they are, in Grafana's grid of 24.
COLUMNS, HEIGHT = 2, 8


class Panel(NamedTuple):
    """Curves over time."""

    title: str
    unit: str
    #: Query and legend.
    curves: list[tuple[str, str]]
    description: str = ""


def quantiles(metric: str, name: str) -> list[tuple[str, str]]:
    """Median and 99th percentile of a histogram over all who have it."""
    rate = f"sum by (le) (rate({metric}_bucket[1m]))"
    return [(f"histogram_quantile({share}, {rate})", f"{name} {text}") for share, text in ((0.5, "p50"), (0.99, "p99"))]


#: Invokers that wait, fold, commit and publish.
STAGES = [curve for stage in ("wait", "fold", "commit", "publish")
          for curve in quantiles(f"thalweg_invoker_{stage}_seconds", stage)]

OVERVIEW = [
    Panel("Invokers", "short", [
        ("sum by (state) (thalweg_autoscaler_invokers)", "{{state}}"),
        ("sum(max by (pool) (thalweg_autoscaler_target_invokers))", "wanted"),
    ], "How many there are and should be. `docs/autoscaling.md` has the policy."),
    Panel("Contributions that wait", "short", [
        ("sum(max by (pool) (thalweg_autoscaler_depth_messages))", "messages"),
    ], "Published and not yet acknowledged. Those that wait for the rest of their round are among them."),
    Panel("Gradients folded", "Bps", [("sum(rate(thalweg_invoker_folded_bytes_total[1m]))", "folded")]),
    Panel("Rounds per second", "short", [("sum(rate(thalweg_job_rounds_total[1m]))", "rounds")]),
    Panel("Where the time of a shard's round goes", "s", STAGES,
          "wait: from the last contribution's arrival to the fold; commit: until durable at the job's level."),
    Panel("Decisions on the number of invokers", "short", [
        ("sum by (reason) (increase(thalweg_autoscaler_decisions_total[5m]))", "{{reason}}"),
    ], "In five minutes, by reason."),
    Panel("Jobs and workers", "short", [
        ("max(thalweg_gateway_jobs)", "jobs"),
        ("max(thalweg_gateway_workers)", "workers"),
    ]),
    Panel("Troubles", "short", [
        ("max(thalweg_dead_letters)", "dead letters"),
        ("sum(increase(thalweg_invoker_rejects_total[5m])) or vector(0)", "rejected contributions in 5 min"),
        ("sum(increase(thalweg_gateway_workers_expired_total[5m]))", "workers expired in 5 min"),
        ("sum(increase(thalweg_nats_disconnects_total[5m]))", "lost connections in 5 min"),
        ("sum(thalweg_invariant_violations_total)", "invariants violated"),
    ], "All of it should be zero. docs/operations.md says what to do about each."),
]

JOB = [
    Panel("Time from round to round", "s", [('thalweg_job_round_seconds{job=~"$job"}', "{{tenant}}/{{job}}")]),
    Panel("Of that: from the last contribution to the commit", "s", [
        ('thalweg_job_aggregation_seconds{job=~"$job"}', "{{tenant}}/{{job}}"),
    ], "What the job waits for. The rest is the workers' own time."),
    Panel("Slowdown by sharing", "percentunit", [('thalweg_job_slowdown_ratio{job=~"$job"}', "{{tenant}}/{{job}}")],
          "Against autoscaler.policy.reference_invokers invokers of its own. The policy keeps it below slowdown_limit."),
    Panel("Rounds per second", "short", [
        ('sum by (tenant, job) (rate(thalweg_job_rounds_total{job=~"$job"}[1m]))', "{{tenant}}/{{job}}"),
    ]),
    Panel("Gradients folded", "Bps", [
        ('sum by (tenant, job) (rate(thalweg_job_folded_bytes_total{job=~"$job"}[1m]))', "{{tenant}}/{{job}}"),
    ]),
    Panel("Cost so far", "s", [
        ('sum by (tenant, job) (thalweg_job_invoker_seconds_total{job=~"$job"})', "{{tenant}}/{{job}}"),
    ], "Seconds of invokers that were busy for it, times their CPU quota."),
]

CAPACITY = [
    Panel("Invokers' worth of work, and invokers", "short", [
        ("sum(max by (pool) (thalweg_autoscaler_busy_invokers))", "work"),
        ('sum(thalweg_autoscaler_invokers{state="ready"})', "ready"),
        ("sum(max by (pool) (thalweg_autoscaler_target_invokers))", "wanted"),
    ], "Work far below ready, for long: the policy holds more for jobs' limits than for their load."),
    Panel("What an invoker folds in a busy second", "Bps", [
        ("max by (pool) (thalweg_autoscaler_service_bytes_per_second)", "bytes"),
    ]),
    Panel("Queues by partition", "bytes", [
        ("topk(8, max by (partition) (thalweg_autoscaler_partition_bytes))", "partition {{partition}}"),
    ], "The eight fullest. One that is always among them has a heavy job."),
    Panel("Moves and starts", "short", [
        ("sum(increase(thalweg_autoscaler_placement_moves_total[5m]))", "partitions moved in 5 min"),
        ('sum(increase(thalweg_autoscaler_starts_total{worked="true"}[5m]))', "invokers started in 5 min"),
        ('sum(increase(thalweg_autoscaler_starts_total{worked="false"}[5m])) or vector(0)', "starts that failed in 5 min"),
    ]),
    Panel("Store: disk", "bytes", [
        ("max(thalweg_store_slab_bytes)", "slab files"),
        ("max(thalweg_store_live_bytes)", "live"),
        ("min(thalweg_store_disk_free_bytes)", "free"),
    ], "Slab files take three versions of everything live."),
    Panel("Store: what a power loss could take", "bytes", [("max(thalweg_store_unsynced_bytes)", "not synced")],
          "Committed at level process since the last flush cycle."),
    Panel("Store: flush cycles", "s", quantiles("thalweg_store_flush_seconds", "cycle")),
    Panel("Store: commits per second", "short", [
        ("sum by (outcome) (rate(thalweg_store_commits_total[1m]))", "{{outcome}}"),
    ]),
    Panel("Broker: kept", "bytes", [
        ("max(thalweg_broker_memory_bytes)", "in memory"),
        ("max(thalweg_broker_storage_bytes)", "on disk"),
        ("max(thalweg_gateway_window_bytes)", "granted to workers"),
    ]),
    Panel("Broker: round trip", "s", quantiles("thalweg_broker_round_trip_seconds", "JetStream")),
    Panel("Most expensive jobs", "short", [
        ("topk(10, sum by (tenant, job) (rate(thalweg_job_invoker_seconds_total[5m])))", "{{tenant}}/{{job}}"),
    ], "Invokers that each keeps busy."),
    Panel("Memory held by invokers", "bytes", [("sum(thalweg_invoker_held_bytes)", "held")],
          "Contributions that wait for their round."),
]

#: A list to choose a job from.
CHOICE = {
    "name": "job",
    "type": "query",
    "datasource": SOURCE,
    "query": "label_values(thalweg_job_rounds_total, job)",
    "refresh": 2,
    "includeAll": True,
    "multi": True,
    "current": {"text": "All", "value": "$__all"},
}


def panel(index: int, wanted: Panel) -> dict[str, Any]:
    """As Grafana wants it."""
    width = 24 // COLUMNS
    return {
        "id": index + 1,
        "title": wanted.title,
        "description": wanted.description,
        "type": "timeseries",
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": width, "x": index % COLUMNS * width, "y": index // COLUMNS * HEIGHT},
        "fieldConfig": {"defaults": {"unit": wanted.unit, "min": None if wanted.unit == "percentunit" else 0}},
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend}
            for place, (query, legend) in enumerate(wanted.curves)
        ],
    }


def dashboard(name: str, title: str, panels: list[Panel], choices: list[dict[str, Any]]) -> dict[str, Any]:
    """As Grafana reads it from a file."""
    return {
        "uid": f"thalweg-{name}",
        "title": f"Thalweg: {title}",
        "tags": ["thalweg"],
        "links": [{"type": "dashboards", "tags": ["thalweg"], "title": "Thalweg", "keepTime": True}],
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "editable": False,
        "templating": {"list": choices},
        "panels": [panel(index, wanted) for index, wanted in enumerate(panels)],
    }


def files() -> dict[str, str]:
    """All files with what is in them."""
    made = {
        "overview.json": dashboard("overview", "overview", OVERVIEW, []),
        "job.json": dashboard("job", "jobs", JOB, [CHOICE]),
        "capacity.json": dashboard("capacity", "capacity", CAPACITY, []),
    }
    return {name: json.dumps(content, indent=1) + "\n" for name, content in made.items()}


if __name__ == "__main__":
    for file, text in files().items():
        (DIRECTORY / file).write_text(text)
