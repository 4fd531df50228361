"""Loopback stand-ins of the services that the house downloads from and uploads to."""
import contextlib
import hashlib
import http.server
import json
import threading
from pathlib import PurePosixPath
from typing import ClassVar


@contextlib.contextmanager
def serving(handler):
    "Serve a handler class on a free port of this machine; yields the address."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Quiet(http.server.BaseHTTPRequestHandler):
    "What the stand-ins share."

    def log_message(self, *_):
        pass

    def reply(self, code, body=b"{}", cut=None, **headers):
        "Send a reply; `cut` closes the connection after so many bytes of the body."
        self.send_response(code)
        for k, v in ({"Content_Type": "application/json", "Content_Length": str(len(body))} | headers).items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def reply_json(self, value, code=200, **headers):
        self.reply(code, json.dumps(value).encode(), **headers)


class Kaggle(Quiet):
    "The calls of Kaggle's API that the house makes, an upload address, and a file server with ranges."
    status, retry_after, refusals = 200, None, 10**9  # how the API answers, and how often it refuses before it relents
    body, cuts, short = b"", 0, 0  # the archive; how often its transfer is cut; bytes that a resumed transfer lacks
    datasets: ClassVar[dict] = {}  # ref -> files of the newest version
    states: ClassVar[list] = []  # of the kernel, one per question; the last stays
    refuses: ClassVar[dict] = {}  # method -> reply that says no
    upload_status = 200
    calls: ClassVar[list] = []
    uploads: ClassVar[dict] = {}  # name -> bytes

    @classmethod
    def fresh(cls):
        "A class of its own for a test."
        return type("Kaggle", (cls,), {"datasets": {}, "states": ["COMPLETE"], "refuses": {}, "calls": [], "uploads": {}})

    def do_POST(self):
        cls, method = type(self), self.path.rpartition("/")[2]
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        cls.calls.append((method, sent))
        if method == "IntrospectToken":
            return self.reply_json({"active": True, "username": "tester"})
        if cls.status != 200 and cls.refusals > 0:
            cls.refusals -= 1
            return self.reply_json({"code": cls.status, "message": "no"}, cls.status, **({"Retry_After": cls.retry_after} if cls.retry_after else {}))
        if method in cls.refuses:
            return self.reply_json(cls.refuses[method])
        getattr(self, method)(sent)

    def DownloadDataFiles(self, _):
        self.reply(302, b"", Location=f"http://127.0.0.1:{self.server.server_port}/files/archive.zip?signature=CANARY")

    def GetDatasetStatus(self, sent):
        if f"{sent['ownerSlug']}/{sent['datasetSlug']}" not in self.datasets:
            return self.reply_json({"code": 403, "message": "no"}, 403)
        self.reply_json({"status": "READY"})

    def StartBlobUpload(self, sent):
        self.reply_json({"token": sent["name"], "createUrl": f"http://127.0.0.1:{self.server.server_port}/upload/{sent['name']}?signature=CANARY"})

    def CreateDataset(self, sent):
        self.datasets[f"{sent['ownerSlug']}/{sent['slug']}"] = [f["token"] for f in sent.get("files", [])]
        self.reply_json({"status": "ok", "url": "https://kaggle.test/dataset", "ref": "x"})

    def CreateDatasetVersion(self, sent):
        self.datasets[f"{sent['ownerSlug']}/{sent['datasetSlug']}"] = [f["token"] for f in sent["body"].get("files", [])]
        self.reply_json({"status": "ok", "url": "https://kaggle.test/dataset", "ref": "x"})

    def SaveKernel(self, sent):
        self.reply_json({"ref": sent["slug"], "url": "https://kaggle.test/kernel", "versionNumber": 3})

    def GetKernelSessionStatus(self, _):
        state = self.states[0] if len(self.states) == 1 else self.states.pop(0)
        self.reply_json({"status": state, **({"failureMessage": "it broke"} if state == "ERROR" else {})})

    def CreateCodeSubmission(self, _):
        self.reply_json({"message": "Successfully submitted", "ref": 77})

    def do_PUT(self):
        type(self).uploads[PurePosixPath(self.path.partition("?")[0]).name] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(self.upload_status)

    def do_GET(self):
        cls, asked = type(self), self.headers.get("Range", "")
        cls.calls.append(("GET", asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        body = self.body[start:len(self.body) - (self.short if asked else 0)]
        cut, cls.cuts = (len(body) // 2, cls.cuts - 1) if cls.cuts > 0 else (None, 0)
        headers = {"Content_Type": "application/zip", "Accept_Ranges": "bytes", "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "ETag": '"one"'}
        self.reply(206 if asked else 200, body, cut, **headers)


class Hub(Quiet):
    "The Hugging Face hub as its client sees it when it downloads a file: a head with etag and commit, then the bytes."
    status = 200
    files: ClassVar[dict] = {}  # path -> bytes
    calls: ClassVar[list] = []

    @classmethod
    def fresh(cls):
        "A class of its own for a test."
        return type("Hub", (cls,), {"files": {}, "calls": []})

    def do_GET(self):
        path = self.path.partition("?")[0]
        type(self).calls.append((self.command, path))
        if self.status != 200:
            return self.reply(self.status)
        if path not in self.files:
            return self.reply_json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit="0" * 40)
        body = self.files[path]
        self.reply(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit="0" * 40, Content_Type="application/octet-stream", Accept_Ranges="bytes")

    do_HEAD = do_GET


@contextlib.contextmanager
def kaggle_api(monkeypatch, home):
    "The stand-in behind the Kaggle client, with a token; yields the handler class, on which tests set what they want."
    import kagglesdk.kaggle_env as env

    handler = Kaggle.fresh()
    with serving(handler) as address:
        monkeypatch.setitem(env._env_to_endpoint, env.KaggleEnv.PROD, address)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home / ".kaggle"))
        monkeypatch.setenv("KAGGLE_API_TOKEN", "SECRET-CANARY")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
            monkeypatch.delenv(name, raising=False)
        yield handler
