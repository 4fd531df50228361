"""The service: bad requests, forged tokens, strangers, the same answer on every way, load, signals."""
import asyncio
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import jwt
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from hms_brain.bundle import default_bundle
from hms_brain.core import CHANNELS, CLASSES, InputError
from hms_brain.predict import Predictor, predict_file
from hms_brain.records import from_arrays, read_recording
from hms_brain.service.core import input_hash, problem
from hms_brain.monitor import Metrics
from hms_brain.service.jobs import Ledger, do_one
from hms_brain.service.stream import Streams, serve_stream, write_block
from hms_brain.service.tokens import AUDIENCE, SCOPES, Terms, make_token, read_terms
from hms_brain.service.web import NPY, create_app, listen, running_service
from hms_brain.simulate import simulate_recording

SECRET = b"a secret of more than thirty-two bytes"
OPEN = {"/health", "/health/live", "/health/ready", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/static-offline-docs"}
CANARY = "canary-7f3a"


def npy(x):
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def eeg():
    "50 s at 200 Hz, float32, without a gap."
    return np.nan_to_num(simulate_recording(seed=3, pattern="lpd", duration=50).eeg)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    app = create_app(Terms(rate=1e6), threads=1, jobs=tmp_path_factory.mktemp("jobs"))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client: yield client


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    app = create_app(Terms(rate=1e6, secret=SECRET), threads=1, jobs=tmp_path_factory.mktemp("jobs"))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client: yield client


@pytest.fixture(scope="module")
def service():
    with running_service(HMS_SYSTEM_THREADS="1", HMS_DEPLOYMENT_RATE="100000") as (url, _): yield url


def refused(answer, *codes):
    "An error of the agreed form: small, without what was sent."
    assert answer.status_code in codes, (answer.status_code, answer.text[:300])
    assert answer.headers["content-type"] == "application/problem+json" and len(answer.content) <= 1024
    assert answer.json()["status"] == answer.status_code and CANARY not in answer.text
    return answer.json()["detail"]


def rows(n=19, m=10000, value=0):
    return json.dumps({"eeg_data": [[value] * m] * n}).encode()


JSON = "application/json"
BAD = {
    "empty": (b"", JSON, 400), "no JSON": (b"eeg_data=" + CANARY.encode(), JSON, 400), "no object": (b"[1, 2]", JSON, 400), "null": (b"null", JSON, 400),
    "NaN": (rows(value=0).replace(b"[0,", b"[NaN,", 1), JSON, 400), "Infinity": (rows().replace(b"[0,", b"[Infinity,", 1), JSON, 400), "1e999": (rows().replace(b"[0,", b"[1e999,", 1), JSON, 422),
    "1e39": (rows().replace(b"[0,", b"[1e39,", 1), JSON, 422), "no UTF-8": (b'{"eeg_data": "\xff\xfe"}', JSON, 400), "deep": (b'{"eeg_data":' + b"[" * 50_000, JSON, 400),
    "no eeg_data": (json.dumps({CANARY: 1}).encode(), JSON, 422), "unknown field": (rows()[:-1] + f', "{CANARY}": 1}}'.encode(), JSON, 422),
    "18 rows": (rows(18), JSON, 422), "20 rows": (rows(20), JSON, 422), "ragged": (rows().replace(b"[0, ", b"[", 1), JSON, 422), "one second": (rows(m=200), JSON, 422), "no samples": (rows(m=0), JSON, 422),
    "words": (rows().replace(b"[0,", f'["{CANARY}",'.encode(), 1), JSON, 422), "nested": (rows().replace(b"[0,", b"[{},", 1), JSON, 422), "truth": (json.dumps({"eeg_data": [[True] * 10000] * 19}).encode(), JSON, 422),
    "volts times a million": (rows(value=2e6), JSON, 422), "fs 0": (rows()[:-1] + b', "fs": 0}', JSON, 422), "fs 1": (rows()[:-1] + b', "fs": 1}', JSON, 422), "fs of words": (rows()[:-1] + f', "fs": "{CANARY}"}}'.encode(), JSON, 422),
    "at outside": (rows()[:-1] + b', "at": 4000}', JSON, 422), "small spectrogram": (rows()[:-1] + b', "spectrogram_data": [[[1]]]}', JSON, 422),
    "another type": (rows(), "text/plain", 415), "no type": (rows(), "", 415), "array cut": (npy(np.zeros((19, 10000), np.float32))[:-4], NPY, 422), "array of objects": (npy(np.array([{CANARY: 1}])), NPY, 422),
    "array of 21 GiB": (b"\x93NUMPY\x01\x00v\x00" + f"{{'descr': '<f4', 'fortran_order': False, 'shape': (19, {300_000_000})}}".ljust(117).encode() + b"\n", NPY, 422),
    "array of steps": (npy(np.zeros((19, 10000), np.int16)), NPY, 422), "array with infinity": (npy(np.full((19, 10000), np.inf, np.float32)), NPY, 422), "array of text": (npy(np.array([CANARY])), NPY, 422),
    "no array": (CANARY.encode(), NPY, 422), "one number": (npy(np.float32(1)), NPY, 422), "60 MB": (b"[" + b"0," * 30_000_000, JSON, 413),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(client, name):
    body, kind, code = BAD[name]
    refused(client.post("/predict", content=body, headers={"content-type": kind}), code)


@pytest.mark.parametrize("body, code", [({"samples": []}, 422), ({"samples": [{}]}, 422), ({"samples": [{"eeg_data": [[0] * 20] * 19}] * 65}, 422), ({"samples": 3}, 422), ({}, 422), ({"samples": [None]}, 422)])
def test_bad_batches(client, body, code):
    refused(client.post("/predict_batch", json=body), code)


def test_bad_parameters_and_routes(client, eeg):
    array = {"content": npy(eeg), "headers": {"content-type": NPY}}
    for query in ("fs=inf", "fs=nan", f"fs={CANARY}", "fs=-200", "fs=1e12", "at=nan", "at=-1", "scale=0", "scale=nan", "scale=-1"): refused(client.post(f"/predict?{query}", **array), 422)
    refused(client.post("/predict?fs=200", content=rows(), headers={"content-type": JSON}), 422)
    refused(client.post("/predict", content=rows(), headers={"content-type": JSON, "content-encoding": "gzip"}), 415)
    for method, path, code in (("GET", "/predict", 405), ("GET", f"/{CANARY}", 404), ("POST", "/predict/", 404), ("GET", "/jobs/0123456789abcdef", 404), ("GET", f"/jobs/{CANARY}", 422), ("DELETE", "/jobs/0123456789abcdef", 404), ("POST", "/health", 405)):
        refused(client.request(method, path), code)


def test_bad_uploads(client, tmp_path):
    before = sorted(p.name for p in client.app.state.ledger.folder.iterdir())
    for route in ("/predict/file", "/jobs"):
        refused(client.post(route), 422)
        refused(client.post(route, data={"file": CANARY}), 422)
        refused(client.post(route, content=b"--x\r\nnonsense", headers={"content-type": "multipart/form-data; boundary=x"}), 400, 422)
        refused(client.post(route, files=[("file", (f"{i}.edf", b"x")) for i in range(9)]), 400)
        refused(client.post(route, files=[("file", ("a.edf", b"x"))] * 2), 422)
    for name, content in ((f"{CANARY}.edf", b"0       " + b"x" * 500), ("a.npy", npy(np.zeros((19, 200)))), ("../../a.edf", b"nothing"), ("a", b""), ("a.pkl", b"\x80\x04.")):
        refused(client.post("/predict/file", files={"file": (name, content)}), 422)
    assert sorted(p.name for p in client.app.state.ledger.folder.iterdir()) == before, "an upload stayed on the disk"


def test_an_error_is_small():
    assert len(problem(422, "\x00\u20ac\"\\" * 5000).body) <= 1024


def forged():
    now = int(time.time())
    good = {"sub": "x", "aud": AUDIENCE, "iat": now, "exp": now + 600, "scope": " ".join(SCOPES)}
    sign = lambda claims, key=SECRET, algorithm="HS256", **more: jwt.encode(claims, key, algorithm=algorithm, **more)
    without = lambda name: sign({k: v for k, v in good.items() if k != name})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyJWT finds the secret short for it
        hs512 = sign(good, SECRET, "HS512")
    head, body, mark = make_token(SECRET, ("predict",)).split(".")
    return {"none at all": "", "rubbish": "a.b.c", "no dots": CANARY, "alg none": sign(good, None, "none"), "alg HS512": sign(good, SECRET * 2, "HS512"), "HS512 with the secret": hs512,
            "another secret": sign(good, SECRET[::-1]), "short secret": sign(good, b"x" * 32), "expired": sign(good | {"exp": now - 1}), "from the future": sign(good | {"iat": now + 600}), "not yet": sign(good | {"nbf": now + 600}),
            "no exp": without("exp"), "no iat": without("iat"), "no aud": without("aud"), "no sub": without("sub"), "other audience": sign(good | {"aud": "another"}), "exp of words": sign(good | {"exp": "never"}),
            "empty subject": sign(good | {"sub": ""}), "number as subject": f"{head}.{jwt.utils.base64url_encode(json.dumps(good | {'sub': 1}).encode()).decode()}.{mark}",
            "other body": f"{head}.{jwt.utils.base64url_encode(json.dumps(good).encode()).decode()}.{mark}", "no signature": f"{head}.{body}.", "scope of lists": sign(good | {"scope": ["admin"]}), "key from a header": sign(good, b"y" * 32, headers={"kid": "../../dev/null", "jwk": {"k": "eXl5"}})}


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
@pytest.mark.parametrize("name", forged())
def test_forged_tokens(guarded, name):
    answer = guarded.get("/model", headers={"authorization": f"Bearer {forged()[name]}"})
    refused(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


def every_route(app):
    "Path and method of every route, those of the routers too."
    for route in app.openapi()["paths"].items():
        for method in route[1]: yield route[0], method.upper()


def test_every_route_asks_for_a_token(guarded):
    "All paths of the application, whatever router they came from; a new one is guarded or stands in OPEN."
    walked = 0
    for path, method in every_route(guarded.app):
        url = path.replace("{id}", "0123456789abcdef")
        answer = guarded.request(method, url)
        assert (answer.status_code == 401) == (path not in OPEN), (method, path, answer.status_code)
        walked += 1
        if path in OPEN: continue
        for variant in (url + "/", url.upper(), f"/{url}", url + "?x=/health", f"/health/..{url}", url.replace("p", "%70")):
            assert guarded.request(method, variant).status_code in (401, 404, 405, 307), variant
        weak = make_token(SECRET, tuple({"predict", "metrics", "admin"} - {"metrics" if path == "/metrics" else "admin" if path == "/model/reload" else "predict"}))
        refused(guarded.request(method, url, headers={"authorization": f"Bearer {weak}"}), 403)
    assert walked >= 12
    with pytest.raises((WebSocketDenialResponse, WebSocketDisconnect)) as e, guarded.websocket_connect("ws://127.0.0.1/ws/stream/a"): pass
    assert getattr(e.value, "status_code", 401) == 401
    for scheme in ("Basic eA==", "Bearer", "bearer  ", make_token(SECRET, ("predict",))): assert guarded.get("/model", headers={"authorization": scheme}).status_code == 401


def test_no_route_escapes_the_walk(guarded):
    "What the OpenAPI document does not list is a WebSocket or the documentation."
    def paths(routes):
        for route in routes:
            if hasattr(route, "path"): yield route.path
            inner = getattr(route, "routes", None)
            if inner and not hasattr(route, "path"): yield from paths(inner)
    listed = {p for p, _ in every_route(guarded.app)}
    assert set(paths(guarded.app.routes)) - listed <= OPEN | {"/ws/stream/{id}"}


def test_a_token_opens(guarded, eeg):
    head = {"authorization": f"Bearer {make_token(SECRET, ('predict',))}"}
    assert guarded.get("/model", headers=head).json()["bundle"]["simulated"] is True
    token = make_token(SECRET, ("predict",))
    with guarded.websocket_connect("ws://127.0.0.1/ws/stream/a", subprotocols=["hms", token]) as socket: assert socket.receive_json()["type"] == "hello" and socket.accepted_subprotocol == "hms"
    job = guarded.post("/jobs", files={"file": ("a.npy", npy(eeg))}, headers=head).json()["id"]
    other = {"authorization": f"Bearer {make_token(SECRET, ('predict',), subject='somebody else')}"}
    assert guarded.get(f"/jobs/{job}", headers=head).status_code == 200
    refused(guarded.get(f"/jobs/{job}", headers=other), 404)
    assert b"hms_requests_total" in guarded.get("/metrics", headers={"authorization": f"Bearer {make_token(SECRET, ('metrics',))}"}).content


def test_strangers(client):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil.example", "[", ""): refused(client.get("/health", headers={"host": host}), 400)
    for host in ("localhost", "127.0.0.1:9", "[::1]:8000"): assert client.get("/health", headers={"host": host}).status_code == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "http://127.0.0.1:3000", "http://["): refused(client.post("/model/reload", headers={"origin": origin}), 403)
    for header in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
        with pytest.raises(WebSocketDenialResponse) as e, client.websocket_connect("ws://127.0.0.1/ws/stream/a", headers=header): pass
        assert e.value.status_code == (403 if "origin" in header else 400)


def test_other_origins_that_are_named(tmp_path):
    with TestClient(create_app(Terms(origins=("https://ward.example",)), threads=1, jobs=tmp_path), base_url="http://127.0.0.1") as client:
        ask = lambda origin: client.options("/predict", headers={"origin": origin, "access-control-request-method": "POST"}).headers.get("access-control-allow-origin")
        assert ask("https://ward.example") == "https://ward.example" and ask("https://evil.example") is None
    client.app.state.ledger.close()


@pytest.mark.parametrize("env, host, said", [({}, "0.0.0.0", "auth = on"), ({"AUTH": "on"}, "0.0.0.0", "auth = on"), ({"HOSTS": "a.example"}, "::", "auth = on"), ({"AUTH": "on", "HOSTS": "a.example"}, "0.0.0.0", "32"),
                                             ({"AUTH": "on"}, "127.0.0.1", "32"), ({"AUTH": "on", "HOSTS": "*"}, "0.0.0.0", "plain names"), ({"ORIGINS": "*"}, "127.0.0.1", "origins"), ({"AUTH": "maybe"}, "127.0.0.1", "auth")])
def test_refuses_to_start(env, host, said):
    "One line, code 2, before anything listens."
    words = [sys.executable, "-c", "from hms_brain.cli import main; main()", "serve", "--host", host, "--port", "0"]
    clean = {k: v for k, v in os.environ.items() if k != "HMS_SECRET"}
    done = subprocess.run(words, env=clean | {f"HMS_DEPLOYMENT_{k}": v for k, v in env.items()}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1 and said in done.stderr, done.stderr


def test_an_answer_does_not_wait_for_its_receipt():
    "Without this every answer takes 40 ms longer: a listening socket passes it on to its connections."
    with listen("127.0.0.1", 0) as door, socket.create_connection(door.getsockname()):
        with door.accept()[0] as connection: assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_secrets_in_files(tmp_path, monkeypatch):
    from hms_brain.core import get_settings

    path = tmp_path / "secret"
    path.write_text("x" * 40)
    monkeypatch.delenv("HMS_SECRET", raising=False)
    for key, value in (("AUTH", "on"), ("SECRET_FILE", str(path)), ("HOSTS", "a.example")): monkeypatch.setenv(f"HMS_DEPLOYMENT_{key}", value)
    try:
        get_settings.cache_clear()
        path.chmod(0o644)
        with pytest.raises(InputError, match="others"): read_terms("0.0.0.0")
        path.chmod(0o600)
        assert read_terms("0.0.0.0").secret == b"x" * 40
    finally:
        monkeypatch.undo()
        get_settings.cache_clear()


def vector(answer):
    return np.array([answer["probabilities"][c] for c in CLASSES])


def test_one_recording_every_way(service, eeg, tmp_path):
    "The command, the app, an upload, an array, JSON, a batch, a stream: equal probabilities, and the model saw the same bytes."
    assert eeg.shape == (19, 10_000) and eeg.dtype == np.float32
    np.save(tmp_path / "a.npy", eeg)
    predictor = Predictor(threads=1)
    want = predict_file(tmp_path / "a.npy", predictor)[0].to_dict()
    seen = input_hash(predictor.inputs(read_recording(tmp_path / "a.npy")))
    for path, p in {"the command": by_command(tmp_path / "a.npy"), **in_the_app(tmp_path / "a.npy", tmp_path / "app")}.items(): np.testing.assert_allclose(p, vector(want), atol=1e-6, err_msg=path)
    with httpx.Client(base_url=service, timeout=120, trust_env=False) as http:
        answers = [http.post("/predict/file", files={"file": ("a.npy", npy(eeg))}).json(), http.post("/predict", content=npy(eeg), headers={"content-type": NPY}).json(),
                   http.post("/predict", json={"eeg_data": eeg.tolist()}).json(), http.post("/predict_batch", json={"samples": [{"eeg_data": eeg.tolist()}] * 2}).json()["predictions"][1],
                   http.post("/predict_batch", content=npy(np.stack([eeg] * 3)), headers={"content-type": NPY}).json()["predictions"][2]]
    with connect(service.replace("http", "ws") + "/ws/stream/every-way", max_size=None) as socket:
        hello = json.loads(socket.recv())
        assert hello["next_sample"] == 0 and hello["channels"] == list(CHANNELS) and hello["bundle"]["sha256"] == want["bundle"]["sha256"]
        for start in range(0, 10000, 1000): socket.send(write_block(start, eeg[:, start:start + 1000]))
        answers.append(json.loads(socket.recv()))
    for answer in answers:
        np.testing.assert_allclose(vector(answer), vector(want), atol=1e-6)
        assert answer["input_sha256"] == seen and answer["predicted"] == want["predicted"]
        assert answer["bundle"] == want["bundle"] and answer["preprocess"] == predictor.preprocess.version and answer["seconds"] > 0
        assert "Research use only" in answer["notice"] and "Trained on simulated EEG only." in answer["warnings"]
        assert set(want) < set(answer) and {f["kind"] for f in answer["quality"]} >= {"no_context"}


def by_command(path):
    "What `hms predict` prints for programs."
    words = [sys.executable, "-c", "from hms_brain.cli import main; main()", "predict", str(path), "--json"]
    return vector(json.loads(subprocess.run(words, check=True, capture_output=True, text=True, timeout=300).stdout))


def in_the_app(path, folder):
    "What the app shows of a recording with one window, and what it gives away: the scan, the page, the file of probabilities."
    pytest.importorskip("gradio", reason="the app needs its extra")
    import pandas as pd
    from hms_brain.app import Desk
    from hms_brain.results import write_downloads
    from hms_brain.session import Sessions, predict_at

    sessions = Sessions()
    try:
        desk = Desk(sessions, "viewer/")
        draft = desk.open([shutil.copy(path, sessions.folder() / path.name)], {})[0]
        session = sessions.get(desk.start(draft, "a window every 2 s")[0]["token"])
        session.thread.join(300)
        table = pd.read_csv(next(f for f in write_downloads(session, folder) if f.endswith("probabilities.csv")))
        assert [r["at"] for r in session.rows] == table["at"].tolist() == [25.0] and session.state == "done"
        shown, p = np.frombuffer(bytes(session.packed), np.uint8), [session.rows[0][c] for c in CLASSES]
        assert np.abs(shown[:6] / 255 - p).max() <= 0.5 / 255 + 1e-9 and shown[6] == 0
        return {"the app's scan": p, "the app's page": vector(predict_at(session, 25.0).to_dict()), "the app's file": table[list(CLASSES)].to_numpy()[0]}
    finally: sessions.close_all()


def test_steps_of_an_amplifier(client, eeg):
    steps, scale = np.round(eeg / 0.05).astype(np.int16), 0.05
    answer = client.post(f"/predict?scale={scale}", content=npy(steps), headers={"content-type": NPY}).json()
    np.testing.assert_allclose(vector(answer), vector(Predictor(threads=1)(from_arrays(steps * np.float32(scale), 200, CHANNELS)).to_dict()), atol=1e-6)


def test_the_first_examples(service):
    "What a newcomer pastes into a notebook: random numbers, no options."
    requests = pytest.importorskip("requests")

    eeg_data = np.random.randn(19, 10000).tolist()  # noqa: NPY002
    spectrogram_data = np.random.randn(3, 224, 224).tolist()  # noqa: NPY002
    response = requests.post(f"{service}/predict", json={"eeg_data": eeg_data, "spectrogram_data": spectrogram_data})
    answer = response.json()
    assert response.status_code == 200 and answer["abstained"] and answer["predicted"] is None and any("noise" in r for r in answer["reasons"])
    assert any(f["kind"] == "spectrogram" and "not used" in f["detail"] for f in answer["quality"])

    eeg1 = eeg2 = eeg_data
    spec1 = spec2 = spectrogram_data
    response = requests.post(f"{service}/predict_batch", json={"samples": [{"eeg_data": eeg1, "spectrogram_data": spec1}, {"eeg_data": eeg2, "spectrogram_data": spec2}]})
    assert response.status_code == 200 and len(response.json()["predictions"]) == 2
    assert requests.get(f"{service}/health").json()["status"] == "ok"


def test_a_given_spectrogram_reaches_the_model(client, eeg):
    predictor = Predictor(threads=1)
    image = predictor.inputs(from_arrays(np.roll(eeg, 3, axis=0), 200, CHANNELS)).image
    plain, given, own = (client.post("/predict", json={"eeg_data": eeg.tolist()} | extra).json() for extra in
                         ({}, {"spectrogram_data": image.tolist()}, {"spectrogram_data": predictor.inputs(from_arrays(eeg, 200, CHANNELS)).image.tolist()}))
    assert np.abs(vector(plain) - vector(given)).max() > 1e-4 and given["input_sha256"] != plain["input_sha256"]
    np.testing.assert_allclose(vector(own), vector(plain), atol=1e-6)


def test_documents_need_no_network(client):
    page = client.get("/docs").text
    links = re.findall(r"(?:src|href)=\"([^\"]+)\"", page)
    assert links and not any(link.startswith(("http", "//")) for link in links)
    for link in links: assert client.get(link).status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"application/json", NPY} == set(paths["/predict"]["post"]["requestBody"]["content"])


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2))


def from_schema(schema, defs):
    "Values that fit a JSON schema, or nearly."
    if "$ref" in schema: return from_schema(defs[schema["$ref"].rsplit("/", 1)[1]], defs)
    if "anyOf" in schema: return st.one_of([from_schema(s, defs) for s in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "object":
        fields = {k: st.one_of(from_schema(s, defs), values) for k, s in schema.get("properties", {}).items()}
        return st.one_of(st.fixed_dictionaries({}, optional=fields), values)
    if kind == "array": return st.lists(from_schema(schema.get("items", {}), defs), max_size=20)
    return {"number": st.floats(), "integer": st.integers(), "null": st.none(), "string": st.text(max_size=30), "boolean": st.booleans()}.get(kind, values)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz(client, data):
    "Bodies of the wrong type, arrays, forms and values of any kind, in seconds: an answer or a small problem without what was sent, never a 5xx. What the document says is asked by test_service_schema."
    document = client.app.openapi()
    path, operation = data.draw(st.sampled_from([(p, (m, o)) for p, methods in document["paths"].items() for m, o in methods.items()]))
    method, about = operation
    texts = st.one_of(values.map(str), st.text(max_size=40), st.sampled_from(["nan", "inf", "1e400", "0", "-1", "200"]))
    query = {p["name"]: data.draw(texts) for p in about.get("parameters", []) if p["in"] == "query" and data.draw(st.booleans())}
    url = path.replace("{id}", quote(data.draw(st.text(min_size=1, max_size=20)), safe="", errors="replace"))
    content, kind = b"", None
    if body := about.get("requestBody"):
        kind = data.draw(st.sampled_from([*body["content"], "application/json", "text/plain", ""]))
        schema = body["content"].get(kind, {}).get("schema", {})
        defs = document.get("components", {}).get("schemas", {}) | schema.get("$defs", {})
        content = data.draw(st.one_of(st.binary(max_size=200), from_schema(schema, defs).map(lambda v: json.dumps(v).encode()), values.map(lambda v: npy(np.array(v, dtype=object if v is None else None)))))
        if kind == "multipart/form-data": kind, content = "multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + content + b"\r\n--b--\r\n"
    answer = client.request(method.upper(), url, params=query, content=content, headers={"content-type": kind} if kind is not None else {})
    assert answer.status_code < 500, (method, url, answer.status_code, answer.text[:200])
    if answer.status_code >= 400: refused(answer, answer.status_code)


def wait_for_job(http, id, seconds=120):
    end = time.monotonic() + seconds
    while (job := http.get(f"/jobs/{id}").json())["state"] in ("waiting", "running") and time.monotonic() < end: time.sleep(0.1)
    return job


def test_jobs(client, eeg):
    accepted = client.post("/jobs", files={"file": ("Miller.npy", npy(eeg))})
    assert accepted.status_code == 202 and accepted.headers["location"] == f"/jobs/{accepted.json()['id']}"
    done, failed = wait_for_job(client, accepted.json()["id"]), wait_for_job(client, client.post("/jobs", files={"file": ("b.edf", b"nothing")}).json()["id"])
    np.testing.assert_allclose(window_of(done["result"]), vector(client.post("/predict", content=npy(eeg), headers={"content-type": NPY}).json()), atol=6e-5)
    assert done["state"] == "done" and failed["state"] == "failed" and "EDF" in failed["result"]["error"] and "Miller" not in json.dumps(done)
    assert not [p for p in client.app.state.ledger.folder.iterdir() if p.is_dir()], "a file outlived its job"
    assert client.delete(f"/jobs/{done['id']}").status_code == 204
    refused(client.get(f"/jobs/{done['id']}"), 404)
    refused(client.delete(f"/jobs/{done['id']}"), 404)


def window_of(result, i=0):
    "The probabilities of one window of a job's result; they have four places."
    return np.array([result["windows"][c][i] for c in CLASSES])


def count(text, name, **labels):
    "Sum of a counter over all labels that match."
    lines = [line for line in text.splitlines() if line.startswith(name + "{") or line.startswith(name + " ")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(f'{k}="{v}"' in line for k, v in labels.items()))


def test_metrics_count(client, eeg):
    before = client.get("/metrics").text
    assert client.post("/predict", content=npy(eeg), headers={"content-type": NPY}).status_code == 200
    client.post("/predict", content=npy(eeg * 0), headers={"content-type": NPY})
    client.post("/predict", content=b"", headers={"content-type": JSON})
    client.get("/health", headers={"host": "evil.example"})
    after = client.get("/metrics").text
    grown = lambda name, **labels: count(after, name, **labels) - count(before, name, **labels)
    assert grown("hms_requests_total", route="/predict", status="200") == 2 and grown("hms_requests_total", route="/predict", status="400") == 1
    assert grown("hms_predictions_total") == 2 and grown("hms_predictions_total", predicted="abstained") == 1 and grown("hms_rejects_total", reason="host") == 1
    assert grown("hms_request_seconds_count", route="/predict") == 3 and count(after, "hms_ready") == 1 and count(after, "hms_in_flight") == 0
    assert Predictor(threads=1).bundle.sha256 in after and CANARY not in after


def test_another_bundle_without_a_pause(tmp_path, eeg):
    "A damaged one changes nothing; a sound one answers from the next request on."
    place = tmp_path / "bundle"
    shutil.copytree(default_bundle(), place)
    with running_service("--bundle", str(place), HMS_SYSTEM_THREADS="1") as (url, process), httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        ask = lambda: http.post("/predict", content=npy(eeg), headers={"content-type": NPY}).json()
        before = ask()
        (place / "bundle.json").write_text((place / "bundle.json").read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
        assert "sha256" in refused(http.post("/model/reload"), 422)
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert ask()["probabilities"] == before["probabilities"] and http.get("/health").json()["status"] == "ok"
        from hms_brain.bundle import MANIFEST, seal_files

        (place / MANIFEST).write_bytes(seal_files({p.name: p.read_bytes() for p in place.iterdir() if p.name != MANIFEST}))
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 60
        while http.get("/model").json()["bundle"]["sha256"] == before["bundle"]["sha256"] and time.monotonic() < end: time.sleep(0.2)
        after = ask()
        assert after["bundle"]["sha256"] != before["bundle"]["sha256"] and max(after["probabilities"].values()) < max(before["probabilities"].values())


def answers_of(socket, n):
    return [m for m in (json.loads(socket.recv(timeout=120)) for _ in range(n)) if m["type"] == "prediction"]


def test_a_stream_resumes(service):
    "The line breaks twice; the answers are those of an unbroken stream."
    eeg = np.nan_to_num(simulate_recording(seed=8, pattern="gpd", duration=60).eeg)
    url = service.replace("http", "ws") + "/ws/stream/"
    with connect(url + "whole", max_size=None) as socket:
        socket.send(write_block(0, eeg))
        whole = answers_of(socket, 7)
    with connect(url + "broken", max_size=None) as socket:
        assert json.loads(socket.recv())["next_sample"] == 0
        socket.send(write_block(0, eeg[:, :10_500]))
        parts = answers_of(socket, 2)
    with connect(url + "broken?after=10000", max_size=None) as socket:
        assert json.loads(socket.recv())["next_sample"] == 10_500
        assert answers_of(socket, 1)[0] == parts[-1]
        socket.send(json.dumps({"start": 10_400, "eeg": eeg[:, 10_400:11_100].tolist()}))
        parts += answers_of(socket, 1)
        with connect(url + "broken?after=10800", max_size=None) as second:
            assert json.loads(second.recv())["next_sample"] == 11_100
            second.send(write_block(11_100, eeg[:, 11_100:]))
            parts += answers_of(second, 3)
            second.send('{"type": "end"}')
            with pytest.raises(ConnectionClosed) as e: second.recv(timeout=60)
            assert e.value.rcvd.code == 1000
        with pytest.raises(ConnectionClosed) as e: socket.recv(timeout=60)
        assert e.value.rcvd.code == 1008
    assert [a["end_sample"] for a in parts] == [a["end_sample"] for a in whole] == [10_000 + 400 * k for k in range(6)]
    for a, b in zip(parts, whole):
        np.testing.assert_allclose(vector(a), vector(b), atol=1e-6)
        assert a["input_sha256"] == b["input_sha256"]


@pytest.mark.parametrize("frame, code", [("{}", 1008), ("nonsense", 1008), (b"", 1008), (b"\0" * 20, 1008), ('{"start": 0, "eeg": [[NaN]]}', 1008), (write_block(0, np.full((19, 10), 1e7)), 1008), (write_block(2**60, np.zeros((19, 1))), 1008), (b"\0" * ((2 << 20) + 1), 1009)])
def test_close_codes(service, frame, code):
    with connect(service.replace("http", "ws") + "/ws/stream/bad", max_size=None, compression=None) as socket:
        socket.recv()
        with pytest.raises(ConnectionClosed) as e:
            socket.send(frame)  # what is too big may be refused before its last byte has left
            socket.recv(timeout=60)
    assert e.value.rcvd.code == code and CANARY not in e.value.rcvd.reason


def test_sixteen_streams(service):
    url = service.replace("http", "ws") + "/ws/stream/"
    def refused_with(path, **more):
        with pytest.raises(InvalidStatus) as e, connect(url + path, **more): pass
        return e.value.response.status_code
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(f"{url}{i}")) for i in range(16)]
        assert refused_with("17") == 429
        for socket in sockets: socket.send('{"type": "end"}')
    for query in ("fs=9", "fs=x", "after=x"): assert refused_with(f"a?{query}") in (403, 422)
    assert refused_with("a", origin="https://evil.example") == 403


class Line:
    "A WebSocket without a network: its handshake takes a moment, then nothing is said until it is closed."
    def __init__(self): self.code, self.closed, self.scope = None, asyncio.Event(), {}
    async def accept(self, protocol): await asyncio.sleep(0.01)
    async def send_json(self, value): pass
    async def send_denial_response(self, answer): self.code = answer.status_code
    async def close(self, code, reason): self.code = code; self.closed.set()
    async def receive(self):
        await self.closed.wait()
        return {"type": "websocket.disconnect"}


async def connected(streams, *calls):
    "Connect each (id, fs) with the next beginning in the same moment; how many places are taken, and what each line heard."
    engine = SimpleNamespace(metrics=Metrics(), predictor=SimpleNamespace(bundle=SimpleNamespace(identity=dict, simulated=True)))
    lines = [Line() for _ in calls]
    tasks = [asyncio.create_task(serve_stream(line, streams, engine, ("me", id), fs)) for line, (id, fs) in zip(lines, calls)]
    await asyncio.sleep(0.1)
    taken, heard = streams.connected(), [line.code for line in lines]
    for line in lines: line.closed.set()
    await asyncio.gather(*tasks)
    return taken, heard


def test_a_place_is_taken_before_the_handshake_ends():
    assert asyncio.run(connected(Streams(most=2), ("a", 200), ("b", 200), ("c", 200))) == (2, [None, None, 429])


def test_another_rate_takes_over_too():
    "Else each rate under one id would be a connection that nobody counts."
    assert asyncio.run(connected(Streams(most=2), ("a", 200), ("a", 250), ("b", 200), ("a", 256))) == (2, [1008, 1008, None, None])


def test_a_body_without_a_length_is_counted(service):
    def drip():
        for _ in range(20): yield b"0" * (1 << 20)
    refused(httpx.post(f"{service}/predict", content=drip(), headers={"content-type": JSON}, timeout=120, trust_env=False), 413)


def under_load(service, clients, seconds):
    from hms_brain.bench import load

    eeg = np.nan_to_num(simulate_recording(seed=0, pattern="gpd", duration=50).eeg)
    before = httpx.get(f"{service}/metrics", trust_env=False).text
    got = asyncio.run(load(service, clients, seconds, npy(eeg), NPY))
    after = httpx.get(f"{service}/metrics", trust_env=False).text
    for status, n in got["statuses"].items(): assert count(after, "hms_requests_total", route="/predict", status=status) - count(before, "hms_requests_total", route="/predict", status=status) == n
    assert count(after, "hms_predictions_total") - count(before, "hms_predictions_total") == got["statuses"]["200"]
    return got


def test_more_clients_than_slots(service):
    "Only answers and 429; what the service counts is what the clients count."
    got = under_load(service, 40, 4)
    assert len(set(got["pauses"])) > 1, "all who were turned away come back at once"
    assert set(got["statuses"]) <= {"200", "429"} and got["statuses"]["200"] > 0 and got["statuses"]["429"] > 0


LOAD_SECONDS = float(os.environ.get("HMS_LOAD_SECONDS", "60"))


@pytest.mark.alone
@pytest.mark.slow
def test_load():
    "A minute each. Eight clients: no error, p99 within ten times the median of one. Sixty-four: only answers and 429, /health within half a second. Memory grows by 300 MiB at most."
    psutil = pytest.importorskip("psutil", reason="the memory of the service is read with psutil")
    with running_service(HMS_SYSTEM_THREADS="1", HMS_DEPLOYMENT_RATE="100000") as (url, process):
        one, memory = under_load(url, 1, LOAD_SECONDS / 3), psutil.Process(process.pid).memory_info
        begin = memory().rss
        eight, many = (under_load(url, n, LOAD_SECONDS) for n in (8, 64))
        grown = (memory().rss - begin) / 2**20
    figures = {"p50 of one": np.median(one["times"]), "p99 of eight": np.percentile(eight["times"], 99), "/health p99": np.percentile(many["health"], 99), "MiB grown": grown}
    print({k: round(float(v), 3) for k, v in figures.items()}, dict(eight["statuses"]), dict(many["statuses"]))
    assert set(one["statuses"]) == set(eight["statuses"]) == {"200"} and set(many["statuses"]) <= {"200", "429"} and many["statuses"]["200"] > 0
    assert figures["p99 of eight"] <= 10 * figures["p50 of one"] and figures["/health p99"] <= 0.5 and grown <= 300, figures


@pytest.mark.fault
def test_sigterm_cuts_no_answer(eeg):
    "Clients under way are answered, later ones hear 503, the process ends with code 0."
    outcomes, ready = Counter(), []
    with running_service("--grace", "20", HMS_SYSTEM_THREADS="1") as (url, process):
        def ask():
            with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
                while True:
                    try: answer = http.post("/predict", content=npy(eeg), headers={"content-type": NPY})
                    except httpx.ConnectError: return
                    except httpx.HTTPError as e: outcomes[type(e).__name__] += 1; return
                    outcomes[answer.status_code] += 1
                    if answer.status_code == 503: return
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for t in threads: t.start()
        while not outcomes[200]: time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        for path in ("/health/live", "/health/ready"): ready.append(httpx.get(url + path, trust_env=False).status_code)
        for t in threads: t.join(120)
        assert process.wait(60) == 0
    assert ready == [200, 503] and set(outcomes) == {200, 503} and outcomes[503] == 8, outcomes


def test_a_result_that_cannot_be_written_fails_alone(tmp_path):
    "It ends the job, not the thread that does the jobs."
    ledger = Ledger(tmp_path)
    path = ledger.place() / "a.txt"
    path.write_text("a")
    id = ledger.add(path)
    assert do_one(ledger, lambda path: {"p": float("nan")}) and ledger.find(id)["result"] == {"error": "an internal error"} and not path.exists()
    ledger.close()


def test_a_service_that_complains_is_not_stopped_by_it(tmp_path, monkeypatch):
    "More on standard error than a pipe holds, and nobody who reads it."
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho http://here\nhead -c 300000 /dev/zero >&2\ntouch {tmp_path}/done\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    with running_service() as (url, _):
        end = time.monotonic() + 10
        while not (tmp_path / "done").exists() and time.monotonic() < end: time.sleep(0.05)
        assert url == "http://here" and (tmp_path / "done").exists()
    script.write_text("#!/bin/sh\necho no bundle >&2\n")
    with pytest.raises(RuntimeError, match="no bundle"), running_service(): pass


WORK = """
import os, sys, time
from pathlib import Path
from threading import Event
from hms_brain.service.jobs import Ledger, work_through
ledger, log = Ledger(sys.argv[1]), open(sys.argv[2], "a")
def work(path):
    time.sleep(0.02)
    return {"text": path.read_text()}
print("up", flush=True)
work_through(ledger, work, Event(), Event())
"""


@pytest.mark.fault
def test_twenty_kills_one_result_each(tmp_path):
    "SIGKILL at random moments while jobs are done: every job has exactly one result, that of its own file."
    folder, rng = tmp_path / "jobs", np.random.default_rng(0)
    ledger, ids = Ledger(folder), {}
    for i in range(200):
        path = ledger.place() / "a.txt"
        path.write_text(f"text {i}")
        ids[ledger.add(path)] = f"text {i}"
    ledger.close()
    start = lambda: subprocess.Popen([sys.executable, "-c", WORK, str(folder), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        process = start()
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.wait()
    process = start()
    process.stdout.readline()
    end = time.monotonic() + 120
    import sqlite3

    with sqlite3.connect(folder / "jobs.sqlite") as db:
        while db.execute("SELECT count(*) FROM jobs WHERE state IN ('waiting', 'running')").fetchone()[0] and time.monotonic() < end: time.sleep(0.2)
    process.kill()
    process.wait()
    ledger = Ledger(folder)
    assert {id: ledger.find(id)["result"].get("text") for id in ids} == ids and ledger.count() == {"waiting": 0, "running": 0, "done": 200, "failed": 0}
    assert not [p for p in folder.iterdir() if p.is_dir()]
    ledger.close()


@pytest.mark.fault
@pytest.mark.slow
def test_twenty_kills_of_the_service(tmp_path, eeg):
    "SIGKILL of `hms serve`, by turns at a random moment and after a result: every job that was accepted is done by one of the next, and has one result, its own."
    env, rng, accepted = {"HMS_PATHS_JOBS": str(tmp_path), "HMS_SYSTEM_THREADS": "1"}, np.random.default_rng(1), {}
    loud = [np.float32(1 + 0.2 * k) * eeg for k in range(3)]
    state = lambda http, id: http.get(f"/jobs/{id}").json()["state"]
    for kill in range(21):
        with running_service(**env) as (url, process), httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            new = {http.post("/jobs", files={"file": ("a.npy", npy(x))}).json()["id"]: k for k, x in enumerate(loud)} if kill < 20 else {}
            first, accepted = next(iter(new), None), accepted | new
            while kill % 2 and state(http, first) != "done": time.sleep(0.05)
            if kill < 20: time.sleep(rng.uniform(0, 0.5)); process.kill(); process.wait()
            else: results = {id: wait_for_job(http, id) for id in accepted}
    predictor = Predictor(threads=1)
    want = [vector(predictor(from_arrays(x, 200, CHANNELS)).to_dict()) for x in loud]
    assert len(results) == 60 and {r["state"] for r in results.values()} == {"done"}
    for id, k in accepted.items(): np.testing.assert_allclose(window_of(results[id]["result"]), want[k], atol=6e-5)
    ledger = Ledger(tmp_path)
    assert ledger.count() == {"waiting": 0, "running": 0, "done": 60, "failed": 0} and not [p for p in tmp_path.iterdir() if p.is_dir()]
    ledger.close()
