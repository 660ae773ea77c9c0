"""What the server counts, in Prometheus' form, on a registry of its own: several servers may live in one process."""

import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sae_steer.runtime import StepSummary
from sae_steer_http.block_metrics import BlockMetrics

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_PROGRAMS = (0, 1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters, gauges and histograms of one server. Safe to call from any thread."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.blocks = BlockMetrics(registry)
        self._requests = Counter(
            "sae_steer_requests", "HTTP requests by route and status.", ["route", "status"], registry=registry
        )
        self._latency = Histogram(
            "sae_steer_request_seconds", "Time to answer a request.", ["route"], buckets=_LATENCY, registry=registry
        )
        self._first_token = Histogram(
            "sae_steer_first_token_seconds", "Time to a request's first token.", buckets=_LATENCY, registry=registry
        )
        self._refusals = Counter(
            "sae_steer_refusals", "Requests that ended in an error, by code.", ["code"], registry=registry
        )
        self._tokens = Counter("sae_steer_tokens", "Tokens of answered requests.", ["kind"], registry=registry)
        self._choices = Gauge("sae_steer_choices_running", "Choices that are being generated.", registry=registry)
        self._running = Gauge("sae_steer_batch_size", "Sequences in the last forward pass.", registry=registry)
        self._waiting = Gauge("sae_steer_slot_waiting", "Choices that wait for a slot.", registry=registry)
        self._slots = Gauge("sae_steer_slots_in_use", "Slots that hold a program.", registry=registry)
        self._steered = Counter(
            "sae_steer_steered_tokens", "Tokens that at least one edit may have touched.", registry=registry
        )
        self._edits = Counter("sae_steer_edits", "(token, feature) pairs that an edit changed.", registry=registry)
        self._programs = Histogram(
            "sae_steer_programs_per_step",
            "Different programs in one forward pass.",
            buckets=_PROGRAMS,
            registry=registry,
        )
        self._most_programs = Gauge(
            "sae_steer_programs_per_step_max",
            "The most different programs in one forward pass so far.",
            registry=registry,
        )
        self._most = 0
        self._lock = threading.Lock()

    def step(self, summary: StepSummary, running: int) -> None:
        """Counts one forward pass over ``running`` sequences."""
        self._running.set(running)
        self._steered.inc(summary.tokens)
        self._edits.inc(summary.edits)
        self._programs.observe(summary.programs)
        with self._lock:  # a gauge can be set, not raised to a maximum
            if summary.programs > self._most:
                self._most = summary.programs
                self._most_programs.set(summary.programs)

    def slots(self, in_use: int) -> None:
        """Slots that hold a program now."""
        self._slots.set(in_use)

    def waiting(self, n: int) -> None:
        """Choices that wait for a slot now."""
        self._waiting.set(n)

    def choices(self, running: int) -> None:
        """Choices that are being generated now."""
        self._choices.set(running)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request; ``route`` is the route's template, never a client's path."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Counts the time from a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def refused(self, code: str) -> None:
        """Counts a request that ended in an error."""
        self._refusals.labels(code).inc()

    def tokens(self, prompt: int, completion: int) -> None:
        """Counts the tokens of a request that was answered."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def render(self) -> bytes:
        """Everything, in Prometheus' text form."""
        return generate_latest(self._registry)
