"""What the server did, as a Prometheus server reads it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hosting import __version__
from hosting.calls import Served, Slot
from hosting.metrics import CONTENT_TYPE, MODES, OUTCOMES, Metrics
from hosting.observer import Observer, Observers, PlannerWork

ROOT = Path(__file__).parents[2]
BOTH: tuple[Slot, ...] = ("action", "planner")


def metrics(slots: Iterable[Slot] = BOTH) -> Metrics:
    return Metrics(tuple(slots), queue_depth=lambda _: 0, sessions=lambda: 0, template_revision=lambda: 1, ready=lambda _: False)


def scraped(source: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """(series, its labels) → value."""
    body, _ = source.render()
    samples = [sample for family in text_string_to_metric_families(body.decode()) for sample in family.samples]
    values = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(values) == len(samples), "a series is there twice"
    return values


def value(source: Metrics, name: str, **labels: str) -> float:
    return scraped(source)[name, frozenset(labels.items())]


def test_a_request() -> None:
    source = metrics()
    source.request("action", "default", "ok", 0.0191)
    source.request("action", "default", "ok", 0.3)
    source.request("planner", "reset", "message", 0.001)
    assert value(source, "tandem_requests_total", slot="action", mode="default", outcome="ok") == 2
    assert value(source, "tandem_requests_total", slot="planner", mode="reset", outcome="message") == 1
    assert value(source, "tandem_request_seconds_count", slot="action") == 2
    assert value(source, "tandem_request_seconds_sum", slot="action") == pytest.approx(0.3191)
    assert value(source, "tandem_request_seconds_bucket", slot="action", le="0.02") == 1


def test_what_the_slot_did() -> None:
    source = metrics()
    source.batch("action", 3)
    for _ in range(3):
        source.served(Served("action", queue_s=0.002, infer_s=0.25, batch=3))
    source.superseded("action")
    source.expired("action")
    source.overloaded("planner")
    assert value(source, "tandem_batch_size_count", slot="action") == 1
    assert value(source, "tandem_batch_size_sum", slot="action") == 3
    assert [value(source, "tandem_batch_size_bucket", slot="action", le=le) for le in ("2.0", "4.0", "+Inf")] == [0, 1, 1]
    assert value(source, "tandem_queue_seconds_count", slot="action") == 3
    assert value(source, "tandem_queue_seconds_sum", slot="action") == pytest.approx(0.006)
    assert value(source, "tandem_inference_seconds_sum", slot="action") == pytest.approx(0.75)
    assert value(source, "tandem_superseded_total", slot="action") == 1
    assert value(source, "tandem_expired_total", slot="action") == 1
    assert value(source, "tandem_overloaded_total", slot="planner") == 1
    assert value(source, "tandem_overloaded_total", slot="action") == 0


def test_what_the_planner_did() -> None:
    source = metrics()
    source.subtask_used(0.4, waited=False)
    source.subtask_used(0.3, waited=False)
    source.subtask_used(0.01, waited=True)
    source.subtask_done()
    source.refreshed("ok")
    source.refreshed("stale")
    source.shared()
    source.planned(PlannerWork(forward_passes=8, decode_steps=7))
    source.planned(PlannerWork(6, 5, drafted_tokens=9, accepted_tokens=4))
    assert value(source, "tandem_subtask_age_seconds_count") == 3
    assert value(source, "tandem_subtask_age_seconds_sum") == pytest.approx(0.71)
    assert value(source, "tandem_subtask_waits_total") == 1
    assert value(source, "tandem_subtask_done_total") == 1
    assert [value(source, "tandem_planner_refreshes_total", outcome=outcome) for outcome in ("ok", "stale", "superseded", "failed")] == [1, 1, 0, 0]
    assert value(source, "tandem_planner_shared_total") == 1
    assert value(source, "tandem_planner_decode_steps_total") == 12
    assert value(source, "tandem_planner_forward_passes_total") == 14
    assert value(source, "tandem_planner_drafted_tokens_total") == 9
    assert value(source, "tandem_planner_accepted_tokens_total") == 4


def test_bytes_by_transport() -> None:
    source = metrics()
    source.received("action", "websocket", 150_000)
    source.received("action", "quic", 70)
    source.sent("action", "websocket", 1500)
    source.sent("action", "websocket", 500)
    assert value(source, "tandem_received_bytes_total", slot="action", transport="websocket") == 150_000
    assert value(source, "tandem_received_bytes_total", slot="action", transport="quic") == 70
    assert value(source, "tandem_sent_bytes_total", slot="action", transport="websocket") == 2000
    assert value(source, "tandem_sent_bytes_total", slot="planner", transport="unix") == 0


def test_gauges_are_read_when_they_are_scraped() -> None:
    waiting: dict[Slot, int] = {"action": 3, "planner": 0}
    ready: set[Slot] = set()
    sessions: list[str] = ["robot-1"]
    source = Metrics(
        BOTH,
        queue_depth=waiting.__getitem__,
        sessions=lambda: len(sessions),
        template_revision=lambda: len(sessions) + 6,
        ready=lambda slot: slot in ready,
    )
    assert value(source, "tandem_queue_depth", slot="action") == 3
    assert value(source, "tandem_queue_depth", slot="planner") == 0
    assert value(source, "tandem_slot_ready", slot="planner") == 0
    assert (value(source, "tandem_sessions"), value(source, "tandem_template_revision")) == (1, 7)
    waiting["action"] = 0
    ready.add("planner")
    sessions.append("robot-2")
    assert value(source, "tandem_queue_depth", slot="action") == 0
    assert (value(source, "tandem_slot_ready", slot="planner"), value(source, "tandem_slot_ready", slot="action")) == (1, 0)
    assert (value(source, "tandem_sessions"), value(source, "tandem_template_revision")) == (2, 8)


def test_every_series_is_there_before_anything_happened() -> None:
    source = metrics()
    before = scraped(source)
    known = {"tandem_build_info": 1, "tandem_template_revision": 1}
    assert all(count == known.get(name, 0) for (name, _), count in before.items() if name.startswith("tandem_"))
    for slot in BOTH:
        for mode in MODES:
            for outcome in OUTCOMES:
                source.request(slot, mode, outcome, 0.1)
        source.served(Served(slot, 0.1, 0.1, 1))
        source.batch(slot, 1)
        source.superseded(slot)
        source.expired(slot)
        source.overloaded(slot)
        for transport in ("websocket", "quic", "unix"):
            source.received(slot, transport, 1)
            source.sent(slot, transport, 1)
    for outcome in ("ok", "stale", "superseded", "failed"):
        source.refreshed(outcome)
    source.subtask_used(0.1, waited=True)
    source.shared()
    source.planned(PlannerWork(decode_steps=1))
    assert scraped(source).keys() == before.keys()


def test_only_loaded_slots_have_series() -> None:
    assert {dict(labels)["slot"] for _, labels in scraped(metrics(["planner"])) if "slot" in dict(labels)} == {"planner"}


def test_a_clients_words_make_no_series() -> None:
    source = metrics()
    before = scraped(source).keys()
    for mode in ("rm -rf", 'x"} 1\n', "\x1b[31m", *map(str, range(100))):
        source.request("action", mode, "mode", 0.1)
    assert scraped(source).keys() == before
    assert value(source, "tandem_requests_total", slot="action", mode="unknown", outcome="mode") == 103


def test_an_outcome_that_was_not_foreseen_is_counted_all_the_same() -> None:
    source = metrics()
    source.request("action", "default", "gripper", 0.1)
    source.request("action", "default", "gripper", 0.1)
    assert value(source, "tandem_requests_total", slot="action", mode="default", outcome="gripper") == 2


def test_the_page() -> None:
    body, content_type = metrics().render()
    assert content_type == CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
    assert value(metrics(), "tandem_build_info", version=__version__) == 1
    names = {name for name, _ in scraped(metrics())}
    assert "process_resident_memory_bytes" in names and "python_info" in names
    assert b"_created" not in body
    types = {line.split()[2]: line.split()[3] for line in body.decode().splitlines() if line.startswith("# TYPE tandem_")}
    assert types["tandem_requests_total"] == "counter" and types["tandem_queue_seconds"] == "histogram" and types["tandem_sessions"] == "gauge"


def test_the_documentation_lists_all_of_them() -> None:
    rows = re.findall(r"^\| (`tandem_[^|]+) \| (counter|gauge|histogram) \| ([^|]*)\|", (ROOT / "docs/admin.md").read_text(), re.MULTILINE)
    told = {(name, kind, frozenset(re.findall(r"`(\w+)`", labels))) for names, kind, labels in rows for name in re.findall(r"`(\w+)`", names)}
    suffix = {"counter": "_total", "gauge": "", "histogram": ""}
    families = text_string_to_metric_families(metrics().render()[0].decode())
    served = {
        (family.name + suffix[family.type], family.type, frozenset(sample.labels) - {"le"})
        for family in families
        for sample in family.samples
        if family.name.startswith("tandem_")
    }
    assert told == served


def test_two_services_in_one_process_count_apart() -> None:
    one, other = metrics(), metrics()
    one.shared()
    assert (value(one, "tandem_planner_shared_total"), value(other, "tandem_planner_shared_total")) == (1, 0)


def test_it_hears_everything_that_an_observer_is_told() -> None:
    events = {name for name in vars(Observer) if not name.startswith("_")}
    told_of_robots = {"answered", "refused"}  # what it counts of them is in request()
    assert events - told_of_robots == {name for name in vars(Metrics) if not name.startswith("_")} - {"render"}
    assert events == {name for name in vars(Observers) if not name.startswith("_")}


def test_the_base_install_does_not_need_prometheus_client() -> None:
    code = "import sys, hosting.observer, hosting.cli, hosting.clients.client; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100, cwd=ROOT)
    assert done.stdout.strip() == "False"
