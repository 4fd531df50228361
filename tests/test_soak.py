"""The service for a long time under everything at once: minutes in `make test-all`, an hour by `make soak`."""
import json
import os
import threading
import time
from collections import Counter
from contextlib import suppress

import httpx
import numpy as np
import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

psutil = pytest.importorskip("psutil", reason="memory and descriptors of the service are read with psutil")

from hms_brain.core import rng_for  # noqa: E402
from hms_brain.service.stream import write_block  # noqa: E402
from hms_brain.service.web import NPY, running_service  # noqa: E402
from hms_brain.simulate import simulate_recording  # noqa: E402
from test_service import BAD, JSON, npy, wait_for_job  # noqa: E402

SECONDS = float(os.environ.get("HMS_SOAK_SECONDS", "300"))
CLIENTS = 4


class Client:
    "One client: asks for one thing after the other, in an order of its own, and counts what it hears."
    def __init__(self, url: str, number: int, eeg: np.ndarray):
        self.url, self.rng, self.eeg, self.heard = url, rng_for(number, "soak"), eeg, Counter()
        self.http = httpx.Client(base_url=url, timeout=120, trust_env=False)

    def note(self, what, answer):
        self.heard[what, answer.status_code] += 1
        return answer

    def array(self): self.note("array", self.http.post("/predict", content=npy(self.eeg), headers={"content-type": NPY}))
    def numbers(self): self.note("JSON", self.http.post("/predict", json={"eeg_data": self.eeg.round(1).tolist()}))
    def batch(self): self.note("batch", self.http.post("/predict_batch", content=npy(np.stack([self.eeg] * 3)), headers={"content-type": NPY}))
    def file(self): self.note("file", self.http.post("/predict/file", files={"file": ("a.npy", npy(self.eeg))}))
    def bad_file(self): self.note("bad file", self.http.post("/predict/file", files={"file": ("a.edf", self.rng.bytes(20_000))}))

    def bad(self):
        name = list(BAD)[int(self.rng.integers(len(BAD)))]
        body, kind, _ = BAD[name]
        self.note("bad", self.http.post("/predict", content=body, headers={"content-type": kind}))

    def job(self):
        accepted = self.note("job", self.http.post("/jobs", files={"file": ("a.npy", npy(self.eeg if self.rng.random() < 0.7 else self.eeg[:, :200]))}))
        if accepted.status_code != 202: return
        ended = wait_for_job(self.http, accepted.json()["id"])
        self.heard["job", ended["state"]] += 1
        self.note("job", self.http.delete(f"/jobs/{ended['id']}"))

    def look(self):
        for path in ("/model", "/metrics", "/docs", "/nothing"): self.note("look", self.http.get(path))

    def stream(self):
        "Two answers, then a goodbye, a bad frame or no word at all."
        with suppress(WebSocketException), connect(f"{self.url.replace('http', 'ws')}/ws/stream/s{self.rng.integers(30)}", max_size=None) as socket:
            begin = json.loads(socket.recv(timeout=60))["next_sample"]
            for k in range(11): socket.send(write_block(begin + 1000 * k, self.eeg[:, 1000 * (k % 10):1000 * (k % 10) + 1000]))
            self.heard["stream", json.loads(socket.recv(timeout=60))["type"]] += 1
            if (how := int(self.rng.integers(3))) < 2: socket.send(('{"type": "end"}', "nonsense")[how])

    def hang_up(self):
        "A body that never ends, from a caller who goes away."
        def half():
            yield b"[" * 1000
            raise ConnectionError
        with suppress(ConnectionError, httpx.HTTPError): self.http.post("/predict", content=half(), headers={"content-type": JSON})
        self.heard["hang up", ""] += 1

    def run(self, end: float):
        acts = (self.array, self.array, self.numbers, self.batch, self.file, self.bad_file, self.bad, self.bad, self.job, self.look, self.stream, self.hang_up)
        while time.monotonic() < end:
            try: acts[int(self.rng.integers(len(acts)))]()
            except Exception as e: self.heard["fault of the client", f"{type(e).__name__}: {e}"[:200]] += 1
        self.http.close()


def sample(process, url) -> tuple[float, int, int]:  # s until /health answers, bytes in memory, open descriptors
    began = time.monotonic()
    assert httpx.get(f"{url}/health", timeout=30, trust_env=False).status_code == 200
    return time.monotonic() - began, process.memory_info().rss, process.num_fds()


@pytest.mark.slow
def test_soak(tmp_path):
    "No 5xx, /health answers, memory and descriptors do not grow after the first fifth, nothing is left on the disk."
    eeg, seen = np.nan_to_num(simulate_recording(seed=3, pattern="lpd", duration=50).eeg), []
    with running_service(HMS_SYSTEM_THREADS="1", HMS_DEPLOYMENT_RATE="100000", HMS_PATHS_JOBS=str(tmp_path / "jobs")) as (url, started):
        process, end = psutil.Process(started.pid), time.monotonic() + SECONDS
        clients = [Client(url, k, eeg) for k in range(CLIENTS)]
        threads = [threading.Thread(target=c.run, args=(end,)) for c in clients]
        for t in threads: t.start()
        while any(t.is_alive() for t in threads):
            seen.append(sample(process, url))
            time.sleep(1)
        time.sleep(5)  # what was under way ends
        last = sample(process, url)
        left = [p for p in (tmp_path / "jobs").iterdir() if p.is_dir()]
        assert started.poll() is None
    heard, (waits, rss, fds) = sum((c.heard for c in clients), Counter()), np.array([*seen, last]).T
    early = slice(len(seen) // 5, 2 * len(seen) // 5 + 1)
    grown = (np.median(rss[-len(seen) // 5:]) - np.median(rss[early])) / 2**20
    print(json.dumps({"seconds": SECONDS, "requests": sum(n for (_, s), n in heard.items() if isinstance(s, int)), "statuses": dict(Counter(str(s) for (_, s), n in heard.items() for _ in range(n) if isinstance(s, int))), "jobs": heard["job", "done"] + heard["job", "failed"],
                      "streams": heard["stream", "prediction"], "health p99 s": round(float(np.percentile(waits, 99)), 3), "RSS MiB": round(rss.max() / 2**20), "grown MiB": round(float(grown), 1), "descriptors": [int(np.median(fds[early])), int(fds.max()), int(fds[-1])]}))
    assert not [k for k in heard if k[0] == "fault of the client" or (isinstance(k[1], int) and k[1] >= 500)], heard
    assert {s for (what, s) in heard if what in ("array", "JSON", "batch", "file")} <= {200, 429} and {s for (what, s) in heard if what in ("bad", "bad file")} <= {400, 413, 415, 422, 429}
    assert grown <= 100 and rss.max() <= 2 << 30 and fds[-1] <= np.median(fds[early]) and left == []
