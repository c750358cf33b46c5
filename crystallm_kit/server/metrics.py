"""What the server counts, as Prometheus reads it: requests, queue, tokens, crystals, latencies.

    state.metrics.tokens.labels("completion").inc(42)
    state.metrics.crystals.labels("overlap").inc()        the funnel: reasons, and "valid"

Every app has a registry of its own, so that two apps in one process do not count for each other.

Not here: the route /metrics (app.py).
"""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one app.

    Attributes:
        requests: By route, method and status; refusals are the 4xx and 5xx among them.
        in_flight: Requests being answered.
        tokens: By kind, "prompt" or "completion".
        crystals: Samples by the reason of their verdict, "valid" for none.
        seconds: From a request's arrival to the end of its answer, by route.
        first_token_seconds: From arrival to the first piece of text, for streams.
        gone: Clients that left before their answer was whole.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "crystallm_kit_"
        here = self.registry
        self.requests = Counter(
            name + "requests", "HTTP requests answered.", ["route", "method", "status"], registry=here
        )
        self.in_flight = Gauge(name + "requests_in_flight", "HTTP requests being answered.", registry=here)
        self.tokens = Counter(name + "tokens", "Tokens read and drawn.", ["kind"], registry=here)
        self.completions = Counter(
            name + "completions", "Completions drawn, by how they ended.", ["finish_reason"], registry=here
        )
        self.crystals = Counter(
            name + "crystals", "Samples judged, by the reason of their verdict.", ["reason"], registry=here
        )
        self.seconds = Histogram(
            name + "request_seconds",
            "From a request's arrival to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=here,
        )
        self.first_token_seconds = Histogram(
            name + "first_token_seconds",
            "From a streamed request's arrival to its first text.",
            ["route"],
            buckets=_SECONDS,
            registry=here,
        )
        self.gone = Counter(
            name + "clients_gone",
            "Clients that left before their answer was whole.",
            ["route"],
            registry=here,
        )
        ProcessCollector(namespace=name.rstrip("_"), registry=self.registry)

    def watch(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """Add gauges that are read when they are asked for: name -> (what it says, how to read it)."""
        for name, (meaning, read) in gauges.items():
            Gauge(f"crystallm_kit_{name}", meaning, registry=self.registry).set_function(read)

    def count_tokens(self, *, prompt: int = 0, completion: int = 0) -> None:
        """Count tokens read and drawn."""
        self.tokens.labels("prompt").inc(prompt)
        self.tokens.labels("completion").inc(completion)

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format; CONTENT_TYPE is its type."""
        return generate_latest(self.registry)
