"""Requests made from the server's own description, right and wrong ones: no fault, no hang, nothing left behind."""

import threading

import httpx
import hypothesis
import psutil
import pytest

from ptmoe.serve.limits import Limits
from ptmoe.serve.service import PREPARED_AT_ONCE
from testing.serving import running, save, service_of, until

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = save(tmp_path_factory.mktemp("served"))
    service = service_of(model, limits=Limits(max_tokens=16, max_choices=4))
    with running(service) as address:
        yield service, address


def ask_everything(address, examples, after):
    """So many requests of each operation, right and wrong ones; their number."""
    asked = 0
    for found in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
        operation = found.ok()
        varies = operation.method == "post"
        for mode in GenerationMode if varies else [GenerationMode.POSITIVE]:

            @hypothesis.settings(
                max_examples=examples if varies else 20, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.given(case=operation.as_strategy(mode))
            def ask(case):
                nonlocal asked
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and asked % 2:
                    case.body["model"] = "routed"  # a name that is not served says little
                asked += 1
                case.call_and_validate(checks=CHECKS, timeout=30)
                after()

            ask()
    return asked


@pytest.mark.ci
@pytest.mark.parametrize(("examples", "least"), [(15, 60), pytest.param(5000, 20_000, marks=pytest.mark.slow)])
def test_generated_requests_meet_no_fault_and_leave_nothing_behind(server, examples, least):
    service, address = server
    httpx.post(f"{address}/v1/completions", json={"model": "routed", "prompt": "a"}).raise_for_status()
    here = psutil.Process()
    threads, files = threading.active_count(), here.num_fds()

    def after():
        until(lambda: service.in_flight == 0)
        assert threading.active_count() <= threads + PREPARED_AT_ONCE
        assert here.num_fds() <= files + 16

    assert ask_everything(address, examples, after) >= least
