"""schemathesis reads the OpenAPI document and asks every operation what it admits and what it does not."""
import os

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra dev")

from schemathesis.checks import CHECKS, load_all_checks  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402

from hms_brain.service.web import NPY, running_service  # noqa: E402

load_all_checks()
CHOSEN = [CHECKS.get_one(name) for name in ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance")]
EXAMPLES = int(os.environ.get("HMS_SCHEMA_EXAMPLES", "100"))  # of each operation, half of them as the document has it and half not


@schemathesis.serializer(NPY)
def as_it_is(_, value):
    "The bytes of an array, or of what is none."
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


def ask(operation, mode):
    "Ask one operation in many ways; how often. Raises what a check has to say."
    asked = []

    @seed(0)
    @settings(max_examples=max(1, EXAMPLES // 2), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def go(case):
        asked.append(case)
        case.call_and_validate(checks=CHOSEN, timeout=120)
    go()
    return len(asked)


@pytest.mark.slow
def test_schemathesis():
    "No 5xx; status, type, headers and body of every answer are as the document says."
    asked, failed = {}, []
    with running_service(HMS_SYSTEM_THREADS="1", HMS_DEPLOYMENT_RATE="100000") as (url, process):
        for operation in [found.ok() for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                try: asked[operation.label, mode] = ask(operation, mode)
                except Unsatisfiable: pass  # an operation without parameters has no other way to be asked
                except BaseExceptionGroup as e: failed += [f"{operation.label}, {mode.value}: {one}" for one in e.exceptions]
        assert process.poll() is None
    print(sum(asked.values()), "cases of", len(asked), "ways to ask")
    assert failed == [], "\n\n".join(failed)
    assert len({label for label, _ in asked}) >= 12 and sum(asked.values()) > 12, asked
