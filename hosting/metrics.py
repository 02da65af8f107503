"""What the server did, as Prometheus metrics. The only module that imports prometheus_client.

=========================================  =========  =======================================================================
``tandem_requests_total``                  counter    answered requests by ``slot``, ``mode`` and ``outcome``
``tandem_request_seconds``                 histogram  from a request's arrival to its answer, by ``slot``
``tandem_queue_seconds``                   histogram  a call's wait for its slot
``tandem_inference_seconds``               histogram  the model call that served a call; each row of a batch counts it
``tandem_batch_size``                      histogram  rows of each model call; its count is the number of model calls
``tandem_queue_depth``                     gauge      calls that wait for the slot now
``tandem_slot_ready``                      gauge      1 where a request would be served now
``tandem_superseded_total``                counter    calls that gave way to a newer one of their session
``tandem_expired_total``                   counter    calls whose deadline passed before their turn
``tandem_overloaded_total``                counter    calls refused because the queue was full
``tandem_sessions``                        gauge      sessions that are remembered now
``tandem_subtask_age_seconds``             histogram  age of the observation behind the subtask that an action request used
``tandem_subtask_waits_total``             counter    action requests that waited for their subtask
``tandem_subtask_done_total``              counter    subtasks in replies that say that nothing is left to do
``tandem_planner_refreshes_total``         counter    background refreshes by ``outcome``: ok, stale, superseded, failed
``tandem_planner_shared_total``            counter    planner calls answered by an equal one in flight
``tandem_planner_forward_passes_total``    counter    passes of the planner's model: one per answer, and its decode steps
``tandem_planner_decode_steps_total``      counter    decode steps of all subtasks
``tandem_planner_drafted_tokens_total``    counter    guessed tokens that were checked
``tandem_planner_accepted_tokens_total``   counter    those that were right
``tandem_template_revision``               gauge      revision of the prompt settings in force
``tandem_received_bytes_total``, ``tandem_sent_bytes_total``   counters   messages by ``slot`` and ``transport``
``tandem_build_info``                      gauge      1, with the ``version``
``process_*``, ``python_info``             …          what prometheus_client tells of the process
=========================================  =========  =======================================================================

Every series is there from the start, at 0, so that a rate over its first event is not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, PlatformCollector, ProcessCollector, generate_latest

from hosting import __version__
from hosting.calls import Served, Slot
from hosting.observer import Observer, PlannerWork

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MODES = ("default", "subtask_only", "action_only", "reset", "metadata", "unknown")
OUTCOMES = (
    *("ok", "cancelled", "internal"),
    *("message", "observation", "prompt_too_long", "mode", "unauthorized"),
    *("overloaded", "deadline", "superseded", "draining", "done"),
)
"""``ok``, ``cancelled``, or the code of a :class:`hosting.failures.Failure`."""
REFRESHES = ("ok", "stale", "superseded", "failed")
TRANSPORTS = ("websocket", "quic", "unix")

# From a tiny model on a CPU to a planner that decodes 256 tokens. Around 20, 50 and 100 ms, where control loops live, they are dense.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)
_QUEUE_SECONDS = (0.0001, 0.00025, 0.0005, *_SECONDS[:-2])
_AGE_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(Observer):
    """The metrics of one service, in a registry of their own.

    Args:
        slots: those that are loaded.
        queue_depth: calls that wait for a slot; like the other callables it is asked at each :meth:`render`, on its thread.
        sessions: how many are remembered.
        template_revision: of the prompt settings in force.
        ready: whether a slot would serve a request.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        queue_depth: Callable[[Slot], int],
        sessions: Callable[[], int],
        template_revision: Callable[[], int],
        ready: Callable[[Slot], bool],
    ) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"tandem_{name}", documentation, labels, registry=registry)

        def gauge(name: str, documentation: str, *labels: str) -> Gauge:
            return Gauge(f"tandem_{name}", documentation, labels, registry=registry)

        def histogram(name: str, documentation: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"tandem_{name}", documentation, labels, buckets=buckets, registry=registry)

        def by_slot(metric: Counter) -> dict[Slot, Callable[[], None]]:
            return {slot: metric.labels(slot).inc for slot in slots}

        def observed_by_slot(metric: Histogram) -> dict[Slot, Callable[[float], None]]:
            return {slot: metric.labels(slot).observe for slot in slots}

        # Looking a child up by its labels costs more than counting, so every child that is known beforehand is looked up here.
        self._requests = counter("requests", "Answered requests.", "slot", "mode", "outcome")
        self._request = {labels: self._requests.labels(*labels).inc for labels in product(slots, MODES, OUTCOMES)}
        self._request_seconds = observed_by_slot(histogram("request_seconds", "From a request's arrival to its answer.", _SECONDS, "slot"))
        self._queue_seconds = observed_by_slot(histogram("queue_seconds", "A call's wait for its slot.", _QUEUE_SECONDS, "slot"))
        self._inference_seconds = observed_by_slot(histogram("inference_seconds", "The model call that served a call.", _SECONDS, "slot"))
        self._batch_size = observed_by_slot(histogram("batch_size", "Rows of a model call.", _ROWS, "slot"))
        self._superseded = by_slot(counter("superseded", "Calls that gave way to a newer one of their session.", "slot"))
        self._expired = by_slot(counter("expired", "Calls whose deadline passed before their turn.", "slot"))
        self._overloaded = by_slot(counter("overloaded", "Calls refused because the queue was full.", "slot"))
        self._subtask_age = histogram("subtask_age_seconds", "Age of the observation behind the subtask that was used.", _AGE_SECONDS)
        self._subtask_waits = counter("subtask_waits", "Action requests that waited for their subtask.")
        self._subtask_done = counter("subtask_done", "Subtasks in replies that say that nothing is left to do.")
        refreshes = counter("planner_refreshes", "Background refreshes of a subtask that ended.", "outcome")
        self._refreshed = {outcome: refreshes.labels(outcome).inc for outcome in REFRESHES}
        self._shared = counter("planner_shared", "Planner calls answered by an equal one in flight.")
        self._work = {
            "forward_passes": counter("planner_forward_passes", "Passes of the planner's model: one per answer, and its decode steps."),
            "decode_steps": counter("planner_decode_steps", "Decode steps of all subtasks."),
            "drafted_tokens": counter("planner_drafted_tokens", "Guessed tokens that were checked."),
            "accepted_tokens": counter("planner_accepted_tokens", "Guessed tokens that were right."),
        }
        received = counter("received_bytes", "Bytes of messages that came.", "slot", "transport")
        sent = counter("sent_bytes", "Bytes of messages handed to the transport.", "slot", "transport")
        ways = list(product(slots, TRANSPORTS))
        self._received = {way: received.labels(*way).inc for way in ways}
        self._sent = {way: sent.labels(*way).inc for way in ways}

        depth = gauge("queue_depth", "Calls that wait for the slot.", "slot")
        slot_ready = gauge("slot_ready", "Whether a request would be served.", "slot")
        for slot in slots:
            depth.labels(slot).set_function(partial(queue_depth, slot))
            slot_ready.labels(slot).set_function(partial(ready, slot))
        gauge("sessions", "Sessions that are remembered.").set_function(sessions)
        gauge("template_revision", "Revision of the prompt settings in force.").set_function(template_revision)
        gauge("build_info", "What serves.", "version").labels(__version__).set(1)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def render(self) -> tuple[bytes, str]:
        """All metrics as text, and its content type."""
        return generate_latest(_WithoutCreated(self._registry)), CONTENT_TYPE

    def request(self, slot: Slot, mode: str, outcome: str, seconds: float) -> None:
        count = self._request.get((slot, mode, outcome))
        if count is None:
            # The mode may be a client's own words, which must not make series; an outcome is the name of an error class of this process.
            count = self._requests.labels(slot, mode if mode in MODES else "unknown", outcome).inc
        count()
        self._request_seconds[slot](seconds)

    def served(self, served: Served) -> None:
        self._queue_seconds[served.slot](served.queue_s)
        self._inference_seconds[served.slot](served.infer_s)

    def batch(self, slot: Slot, rows: int) -> None:
        self._batch_size[slot](rows)

    def superseded(self, slot: Slot) -> None:
        self._superseded[slot]()

    def expired(self, slot: Slot) -> None:
        self._expired[slot]()

    def overloaded(self, slot: Slot) -> None:
        self._overloaded[slot]()

    def refreshed(self, outcome: str) -> None:
        self._refreshed[outcome]()

    def subtask_used(self, age_s: float, *, waited: bool) -> None:
        self._subtask_age.observe(age_s)
        if waited:
            self._subtask_waits.inc()

    def subtask_done(self) -> None:
        self._subtask_done.inc()

    def shared(self) -> None:
        self._shared.inc()

    def planned(self, work: PlannerWork) -> None:
        for name, count in self._work.items():
            count.inc(getattr(work, name))

    def received(self, slot: Slot, transport: str, count: int) -> None:
        self._received[slot, transport](count)

    def sent(self, slot: Slot, transport: str, count: int) -> None:
        self._sent[slot, transport](count)


class _WithoutCreated:
    """A registry less the time at which each series was made: a second series for every one, and of no use where all are made at the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
