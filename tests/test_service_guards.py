"""What stands before the routes: strangers who send files, callers who ask too often, what is turned away and how it is counted."""
import asyncio
import socket
import time
from collections import Counter
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.formparsers import MultiPartParser
from test_service import SECRET, count, npy, refused
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from hms_brain.service.limits import limit_rate
from hms_brain.service.tokens import Terms, make_token
from hms_brain.service.web import FILES, create_app, running_service

PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.edf"\r\n\r\n'


@pytest.fixture(scope="module")
def guarded():
    "A service with tokens, and the header of one that may."
    with running_service(HMS_SYSTEM_THREADS="1", HMS_SECRET=SECRET.decode(), HMS_DEPLOYMENT_AUTH="on", HMS_DEPLOYMENT_RATE="100000") as (url, _):
        yield url, {"authorization": f"Bearer {make_token(SECRET, ('predict', 'metrics'))}"}


class Upload:
    "A multipart body that never ends, on a socket of its own."
    def __init__(self, url, path, **headers):
        at = urlsplit(url)
        self.line = socket.create_connection((at.hostname, at.port), timeout=20)
        lines = [f"POST {path} HTTP/1.1", f"Host: {at.netloc}", "Content-Type: multipart/form-data; boundary=b", "Transfer-Encoding: chunked", *(f"{k}: {v}" for k, v in headers.items())]
        self.line.sendall("\r\n".join([*lines, "", ""]).encode())
        self.send(PART)

    def send(self, data):
        self.line.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def status(self):
        "What is answered, though the body has not ended."
        return int(self.line.recv(4096).split()[1])

    def close(self): self.line.close()


@pytest.mark.parametrize("path", ["/predict/file", "/jobs"])
def test_strangers_are_told_before_they_send(guarded, path):
    "401 at once, nothing on the disk, no slot held: whoever may send finds all of them free."
    url, allowed = guarded
    with ExitStack() as stack:
        begin = time.monotonic()
        lines = [stack.enter_context(closing(Upload(url, path, **({} if k % 2 else {"Authorization": "Bearer a.b.c"})))) for k in range(3 * FILES)]
        assert {line.status() for line in lines} == {401} and time.monotonic() - begin < 10
        assert httpx.post(url + path, files={"file": ("a.npy", npy([1.0]))}, headers=allowed, trust_env=False).status_code in (202, 422)
    with ExitStack() as stack:
        for _ in range(FILES): stack.enter_context(closing(Upload(url, path, **allowed)))
        end, status = time.monotonic() + 20, 0
        while status != 429 and time.monotonic() < end: status = httpx.post(url + path, files={"file": ("a.npy", npy([1.0]))}, headers=allowed, trust_env=False).status_code
        assert status == 429, "an upload of somebody who may send holds a slot"


def test_a_form_that_finds_no_room(tmp_path, monkeypatch):
    "503 and when to come back, while the parts are spooled as while they are kept; nothing stays."
    from hms_brain.service import uploads

    def full(*_): raise OSError(28, "No space left on device")
    async def spool(self): full()
    with TestClient(create_app(Terms(rate=1e6), threads=1, jobs=tmp_path), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        for target, name, fault in ((MultiPartParser, "parse", spool), (uploads.shutil, "copyfileobj", full)):
            with monkeypatch.context() as m:
                m.setattr(target, name, fault)
                for path in ("/predict/file", "/jobs"):
                    answer = client.post(path, files={"file": ("a.npy", b"x")})
                    refused(answer, 503)
                    assert answer.headers["retry-after"] == "60"
        assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_forms_are_small(tmp_path):
    "Few files, few fields, short ones; the files of a form that is refused are closed."
    with TestClient(create_app(Terms(rate=1e6), threads=1, jobs=tmp_path), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        for path in ("/predict/file", "/jobs"):
            refused(client.post(path, files=[("file", (f"{i}.edf", b"x")) for i in range(9)]), 400)
            refused(client.post(path, files={"file": ("a.edf", b"x")}, data={f"f{i}": "x" for i in range(5)}), 400)
            refused(client.post(path, files={"file": ("a.edf", b"x")}, data={"f": "x" * 2000}), 400)
            refused(client.post(path, files={"other": ("a.edf", b"x")}), 422)
            send = lambda kind, path=path: client.post(path, content=PART + b"x\r\n--b--\r\n", headers={"content-type": kind.encode("latin-1")})
            for kind in ("multipart/form-data", "multipart/form-data; boundary=" + "b" * 500, "multipart/form-data; boundary=\xff"): refused(send(kind), 400, 422)
            for charset in ("hex", "idna", "\xff"): assert send(f"multipart/form-data; boundary=b; charset={charset}").status_code < 500


def test_twice_the_rate_is_answered_at_the_rate():
    "What is refused costs nothing; else a client above the rate would get nothing at all."
    now, heard = 0.0, Counter()
    async def yes(scope, receive, send): await send({"type": "http.response.start", "status": 200, "headers": []})
    app = limit_rate(yes, rate=10, clock=lambda: now)
    async def ask(path="/predict"):
        sent = []
        async def send(message): sent.append(message)
        await app({"type": "http", "method": "GET", "path": path, "headers": [], "client": ("10.0.0.1", 1)}, None, send)
        return sent[0]["status"]
    async def run():
        nonlocal now
        for k in range(400):
            heard[int(now), await ask()] += 1
            now = (k + 1) / 20
            assert await ask("/metrics") == await ask("/health") == 200
    asyncio.run(run())
    assert all(9 <= heard[second, 200] <= 11 and 9 <= heard[second, 429] <= 11 for second in range(3, 20)), heard


def test_what_is_turned_away_is_counted(guarded):
    "WebSockets that are denied or closed, bodies that are too large."
    url, allowed = guarded
    ws, token = url.replace("http", "ws") + "/ws/stream/", allowed["authorization"].partition(" ")[2]
    look = lambda: httpx.get(f"{url}/metrics", headers=allowed, trust_env=False).text
    before = look()
    def denied(path, **more):
        at = urlsplit(ws)
        place = {"sock": socket.create_connection((at.hostname, at.port)), "proxy": None} if more.pop("stranger", False) else {}
        with pytest.raises(InvalidStatus) as e, connect((ws if not place else "ws://evil.example/ws/stream/") + path, **place, **more): pass
        return e.value.response.status_code
    weak = make_token(SECRET, ("metrics",))
    assert [denied("a"), denied("a", subprotocols=["hms", weak]), denied("a", origin="https://evil.example", additional_headers=allowed), denied("a", stranger=True)] == [401, 403, 403, 400]
    with ExitStack() as stack:
        lines = [stack.enter_context(connect(f"{ws}{i}", subprotocols=["hms", token])) for i in range(16)]
        assert denied("17", subprotocols=["hms", token]) == 429
        for line in lines: line.send('{"type": "end"}')
    for frame in ("nonsense", b"\0" * ((2 << 20) + 1)):
        with connect(f"{ws}bad", subprotocols=["hms", token], max_size=None, compression=None) as line, pytest.raises(ConnectionClosed):
            line.recv()
            line.send(frame)
            line.recv(timeout=60)
    assert httpx.post(f"{url}/predict", content=b"0" * ((16 << 20) + 1), headers=allowed | {"content-type": "application/json"}, trust_env=False, timeout=60).status_code == 413
    after = look()
    grown = {r: count(after, "hms_rejects_total", reason=r) - count(before, "hms_rejects_total", reason=r) for r in ("unauthorized", "forbidden", "origin", "host", "busy", "not a stream", "size", "request entity too large", "content too large")}
    assert grown == {"unauthorized": 1, "forbidden": 1, "origin": 1, "host": 1, "busy": 1, "not a stream": 1, "size": 2, "request entity too large": 0, "content too large": 0}


def test_a_slow_body_is_counted_as_slow(tmp_path, monkeypatch):
    "A reason is a word of ours, whether a guard refuses or the body is found wanting while it is read."
    from hms_brain.service import limits

    monkeypatch.setitem(limits.LIMITS, "/predict", limits.Limit(100, 0.0, "predict"))
    with TestClient(create_app(Terms(rate=1e6), threads=1, jobs=tmp_path), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        def drip():
            for _ in range(3): yield b"0" * 60
        assert client.post("/predict", content=drip(), headers={"content-type": "application/json"}).status_code in (408, 413)
        text = client.get("/metrics").text
    assert count(text, "hms_rejects_total", reason="slow") + count(text, "hms_rejects_total", reason="size") == 1
