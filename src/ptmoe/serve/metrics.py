"""What `/metrics` says, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ptmoe.serve.registry import Registry

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one server. Labels are names of adapters that are served, never a client's text."""

    def __init__(self, registry: Registry) -> None:
        self._collected = own = CollectorRegistry()
        self.requests = Counter("ptmoe_requests", "requests by HTTP status", ["status"], registry=own)
        self.waiting = Gauge("ptmoe_answers_in_progress", "answers waiting or being generated", registry=own)
        self.batch = Histogram("ptmoe_batch_rows", "rows of a step in this process", registry=own, buckets=ROWS)
        self.tokens = Counter("ptmoe_tokens", "tokens: prompt, virtual or completion", ["kind"], registry=own)
        self.first = Histogram("ptmoe_first_token_seconds", "until the first token", registry=own, buckets=SECONDS)
        self.whole = Histogram("ptmoe_answer_seconds", "until the end of an answer", registry=own, buckets=SECONDS)
        self.experts = Counter("ptmoe_expert_use", "answers by expert", ["adapter", "expert"], registry=own)
        memory = Gauge("ptmoe_adapter_bytes", "adapters in memory", registry=own)
        memory.set_function(lambda: registry.bytes_in_memory)

    def page(self) -> bytes:
        return generate_latest(self._collected)
