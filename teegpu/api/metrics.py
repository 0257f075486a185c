"""What a scraper is told: numbers of requests, tokens and seconds, after vLLM's names; nothing of who asked what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from teegpu.api.worker import Worker
from teegpu.tee.sequence import Sequence

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """``ended`` takes each sequence that has ended; the rest is asked of the worker when a scraper comes."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(f"teegpu_{name}_seconds", what, registry=registry, buckets=_SECONDS)

        self._prompt = Counter("teegpu_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._made = Counter("teegpu_generation_tokens", "Tokens generated.", registry=registry)
        self._success = Counter(
            "teegpu_request_success", "Requests that ended, by how.", ["finished_reason"], registry=registry
        )
        self._ttft = seconds("time_to_first_token", "From a request's arrival to its first token.")
        self._itl = seconds("inter_token_latency", "Between two tokens of a request, its mean.")
        self._e2e = seconds("e2e_request_latency", "From a request's arrival to its last token.")
        self._queue = seconds("request_queue_time", "From a request's arrival until it was begun.")

    def serve(self, host: str, port: int, worker: Worker) -> tuple[WSGIServer, int]:
        """Answers scrapers at an address of their own, in a thread. → what ends it, and the port."""
        self._registry.register(_Now(worker))
        server, _ = start_http_server(port, host, self._registry)
        return server, server.server_port

    def ended(self, sequence: Sequence) -> None:
        done, times = sequence.done, sequence.times
        self._prompt.inc(done.prompt_tokens)
        self._made.inc(len(done.token_ids))
        reason = "abort" if done.finish_reason == "interrupted" else done.finish_reason
        self._success.labels(reason).inc()
        if times.began_ns:
            self._queue.observe((times.began_ns - times.added_ns) / 1e9)
        if times.first_ns:
            self._ttft.observe((times.first_ns - times.added_ns) / 1e9)
            self._e2e.observe((times.latest_ns - times.added_ns) / 1e9)
        if len(done.token_ids) > 1:
            self._itl.observe((times.latest_ns - times.first_ns) / 1e9 / (len(done.token_ids) - 1))


class _Now(Collector):
    """What the worker is doing now, and the sums of its record."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        runner = self._worker.runner
        if runner is None:
            return
        engine = runner.engine
        most = engine.capacity.kv_bytes
        gauges = {
            "num_requests_running": ("Requests that are computed.", engine.running),
            "num_requests_waiting": ("Requests that wait for room.", engine.waiting),
            "kv_cache_usage": ("Share of api.kv_mib in use, 0 to 1.", engine.kv_bytes / most if most else 0.0),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"teegpu_{name}", what, value=value)
        phases = list(runner.summary.phases.values())

        def total(name: str) -> float:
            return float(sum(getattr(phase, name) for phase in phases))

        counters = {
            "prefix_cache_queries": ("Tokens that were looked for in kept prefixes.", engine.prefixes.asked),
            "prefix_cache_hits": ("Tokens that were found there.", engine.prefixes.found),
            "rpc_calls": ("Requests to GPU servers.", total("rpc_calls")),
            "rpc_retries": ("Requests to GPU servers that were sent again.", total("rpc_retries")),
            "bytes_up": ("Bytes sent to GPU servers.", total("bytes_up")),
            "bytes_down": ("Bytes received from GPU servers.", total("bytes_down")),
            "tee_seconds": ("Seconds that the runner computed.", total("tee_seconds")),
            "gpu_seconds": ("Seconds that it waited for GPU servers' computation.", total("gpu_seconds")),
            "network_seconds": ("Seconds that it waited for the link.", total("network_seconds")),
            "serialization_seconds": ("Seconds of encoding and decoding.", total("serialization_seconds")),
            "busy_seconds": ("Seconds in which there was anything to do.", total("seconds")),
        }
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(f"teegpu_{name}", what, value=value)
