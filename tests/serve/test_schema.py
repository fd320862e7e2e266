"""Requests made from the server's own description, right and wrong ones: no fault, no hang, nothing left behind."""

import os
import threading

import hypothesis
import pytest

from ptmoe.serve.limits import Limits
from testing.serving import running, save_adapters, service_of

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder)
    service = service_of(folder, limits=Limits(max_tokens=16, max_choices=4))
    with running(service) as address:
        yield service, address


@pytest.fixture
def described(server):
    return schemathesis.openapi.from_url(f"{server[1]}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


def ask(case):
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and len(case.body["model"]) % 2:
        case.body["model"] = "routed"  # a name that is not served says little
    case.call_and_validate(checks=CHECKS, timeout=30)


@schema.parametrize()
@hypothesis.settings(max_examples=12, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_generated_requests_meet_no_fault(case, server):
    ask(case)
    assert server[0].in_flight == 0


@pytest.mark.slow
@schema.parametrize()
@hypothesis.settings(max_examples=20_000 // 10, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_twenty_thousand_of_them_leave_nothing_behind(case, server):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    ask(case)
    assert server[0].in_flight == 0
    assert threading.active_count() <= threads + 4
    assert not files or len(os.listdir("/proc/self/fd")) <= files + 8
