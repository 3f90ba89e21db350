"""Tracing: the spans that a collector receives by OTLP/HTTP, and what they must not contain."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.errors import ConfigError
from tests.fakes.collector import Collector, attributes, run_collector
from tests.fakes.faults import Fault

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ON = {"server": {"tracing": True}}
MANIFEST = "/v2/{name}/manifests/{reference}"
BLOB = "/v2/{name}/blobs/{reference}"


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    async with run_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield collector


async def test_the_spans_of_a_cold_pull_show_what_it_waited_for(make_program, registry, collector):
    image = registry.add_image(layers=[b"x" * 100_000])
    program = await make_program(**ON)
    await program.pull(image)
    await program.wait_for_downloads()
    await program.pull(image)
    await program.stop()

    trees = [collector.tree(root) for root in collector.roots()]
    # The manifest takes a challenge, a token and a GET; a blob a redirect to the CDN.
    cold_manifest = [f"HEAD {MANIFEST}", ["GET"], ["GET"], ["GET"], ["commit"]]
    download = ["download", ["GET"], ["GET"], ["verify"], ["commit"]]
    cold_blob = [f"GET {BLOB}", download]
    warm = [[f"HEAD {MANIFEST}"], [f"GET {MANIFEST}"], [f"GET {BLOB}"], [f"GET {BLOB}"]]
    assert trees == [cold_manifest, [f"GET {MANIFEST}"], cold_blob, cold_blob, *warm]
    assert collector.services == {"pullcache"}

    (layer,) = [
        span
        for span in collector.named("download")
        if attributes(span)["pullcache.digest"] == image.layers[0]
    ]
    assert attributes(layer)["pullcache.bytes"] == 100_000
    request, *_ = collector.named(f"GET {BLOB}")
    recorded = attributes(request)
    assert recorded["http.response.status_code"] == 200
    assert recorded["url.path"].startswith("/v2/library/app/blobs/sha256:")
    assert recorded["pullcache.cache_status"] == "pullcache; fwd=miss; stored"
    assert recorded["pullcache.request"]


async def test_upstream_is_sent_the_trace_of_the_client_but_no_tracestate_or_baggage(
    make_program, registry, collector
):
    image = registry.add_image()
    program = await make_program(**ON)
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b", "baggage": "user=amy"}
    async with program.opened(f"/v2/{image.repository}/manifests/latest", headers=sent) as answer:
        assert answer.status == 200
    await program.stop()

    (root,) = collector.roots()
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    spans = {span.span_id.hex() for span in collector.named("GET")}
    parents = [seen.headers["traceparent"].split("-") for seen in registry.requests]
    assert {trace for _, trace, _, _ in parents} == {TRACE}
    assert {span for _, _, span, _ in parents} == spans
    assert not any({"tracestate", "baggage"} & set(seen.headers) for seen in registry.requests)


async def test_errors_are_recorded_by_class_and_secrets_are_not_exported(
    make_program, registry, collector
):
    image = registry.add_image()
    registry.fail("GET /registry-v2/", Fault(status=403), times=None)
    program = await make_program(**ON)
    await program.manifest(image)
    assert (await program.blob(image.config)).status == 404
    await program.wait_for_downloads()
    await program.stop()

    assert attributes(collector.named("download")[0])["error.type"] == "UpstreamUnavailableError"
    refused = [one for one in collector.named("GET") if "/registry-v2/" in str(attributes(one))]
    assert {attributes(one)["http.response.status_code"] for one in refused} == {403}
    # The URLs of the CDN carry a signature in the query, requests a token in a header.
    signed = [seen.target.partition("?")[2] for seen in registry.seen("GET /registry-v2/")]
    tokens = [
        seen.headers["Authorization"]
        for seen in registry.seen("GET /v2/")
        if "Authorization" in seen.headers
    ]
    secrets = [*signed, *(token.partition(" ")[2] for token in tokens)]
    assert all(len(secret) > 8 for secret in secrets)
    assert len(secrets) > 1
    exported = b"".join(collector.bodies)
    assert [secret for secret in secrets if secret.encode() in exported] == []


async def test_monitoring_requests_are_not_traced(make_program, collector):
    program = await make_program(**ON)
    for path in ("/healthz", "/readyz", "/metrics"):
        assert (await program.ask(path)).status == 200
    await program.stop()
    assert collector.spans == []


async def test_the_environment_variables_of_opentelemetry_apply(
    make_program, registry, collector, monkeypatch
):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "hub-cache")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    program = await make_program(**ON)
    await program.manifest(registry.add_image())
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    await program.restart()
    await program.manifest("me/other")
    await program.stop()
    assert (collector.services, collector.encodings) == ({"hub-cache"}, {"gzip"})
    assert len(collector.roots()) == 1


async def test_a_silent_collector_delays_neither_responses_nor_the_stop(
    make_program, registry, collector, monkeypatch
):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        program = await make_program(**ON)
        await program.pull(registry.add_image())
        # The collector accepts the connection but never responds; the SDK would wait for 30 s.
        async with asyncio.timeout(15):
            await program.stop()
    # The thread of the SDK does not keep retrying.
    for thread in threading.enumerate():
        if thread.name == "traces":
            await asyncio.to_thread(thread.join, 20)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_BSP_MAX_QUEUE_SIZE", "1")],
)
async def test_an_invalid_variable_is_an_error_at_the_start_that_names_it(
    make_program, collector, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"server\.tracing: .*OTEL_"):
        await make_program(**ON)


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PULLCACHE_SERVER_TRACING": "true"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("command", [["serve", "--listen", "127.0.0.1:0"], ["config", "check"]])
def test_without_the_extra_the_error_names_it(tmp_path: Path, command):
    script = (
        "import sys; sys.modules['opentelemetry'] = None\n"  # as if it were not installed
        "from proxy.cli import main; main(sys.argv[1:])"
    )
    done = run_python(script, *command, "--store", str(tmp_path / "store"))
    assert done.returncode == 2
    assert "pip install 'pullcache[opentelemetry]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_opentelemetry_is_not_imported_unless_tracing_is_on():
    script = (
        "import sys, proxy.daemon; sys.exit(any('opentelemetry' in name for name in sys.modules))"
    )
    assert run_python(script).returncode == 0
