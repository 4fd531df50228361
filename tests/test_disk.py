"""Every writer of the package on a disk that is full and in a folder that is read-only: one line with path and reason, what was there is there, nothing half-written is left."""
import dataclasses
import os
import shutil
import subprocess
import zipfile
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_cli import hms, one_line
from test_dataset import data, make  # noqa: F401  a fixture
from test_scan import table_of

from hms_brain import catalog, dataset, kaggle_kernel
from hms_brain.annotate import annotate_edf, deidentify_edf
from hms_brain.audit import AuditLog, read_log
from hms_brain.bundle import place_bundle
from hms_brain.core import CLASSES, VOTE_COLUMNS, InputError, save_frame, sha256_file
from hms_brain.dataset import WindowCache, save_array
from hms_brain.evaluate import evaluate, load_answers
from hms_brain.events import find_events
from hms_brain.exports import write_csv, write_edf, write_prediction
from hms_brain.pages import open_reader
from hms_brain.predict import Predictor, predict_file
from hms_brain.scan_files import write_annotated, write_bids, write_scan, write_scan_pdf, write_scan_report, write_szcore, write_table
from hms_brain.reasons import Reasons, write_reasons
from hms_brain.report import Page, Section, write_evaluation, write_page
from hms_brain.results import write_archive
from hms_brain.runs import record_run, update_run
from hms_brain.scan import Piece, Scan, keep_block
from hms_brain.service.jobs import Ledger
from hms_brain.simset import simulate_dataset
from hms_brain.simulate import simulate_recording
from hms_brain.wheels import make_wheel

pytestmark = pytest.mark.fault
SIZE = 2 << 20  # bytes
REASONS = ("No space left on device", "File too large", "Read-only file system", "Permission denied")


class Disk:
    "A small disk; where none may be mounted, a limit on the size of any file and the folder's permissions do the same."
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        self.mounted = not os.environ.get("HMS_NO_MOUNT") and os.geteuid() == 0 and shutil.which("mount") is not None and subprocess.run(words, capture_output=True).returncode == 0

    @contextmanager
    def full(self, left=0):
        "So many bytes may still be written."
        import resource
        filler, limits = self.folder / ".filler", resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.mounted:
            free = os.statvfs(self.folder)
            with open(filler, "wb") as f: f.write(b"\1" * max(0, free.f_bavail * free.f_frsize - left))
        else: resource.setrlimit(resource.RLIMIT_FSIZE, (left or 1, limits[1]))
        try: yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            filler.unlink(missing_ok=True)

    @contextmanager
    def read_only(self):
        "Nothing may be written."
        def remount(how): subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)
        folders = [self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())]
        if not self.mounted and os.geteuid() == 0: pytest.skip("permissions do not bind root, and nothing may be mounted here")
        if self.mounted: remount("ro")
        else: [p.chmod(0o555) for p in folders]
        try: yield
        finally: remount("rw") if self.mounted else [p.chmod(0o755) for p in folders]


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    yield disk
    if disk.mounted: subprocess.run(["umount", "-l", str(disk.folder)], check=True)


def state(folder):
    "What is on a disk: every file with its bytes."
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".filler"}


def refused(action, folder):
    "The one line of a writer that could not write: a path on the disk, and the reason."
    with pytest.raises(InputError) as e: action()
    line = str(e.value)
    assert "\n" not in line and len(line) < 1024 and str(folder) in line and any(r in line for r in REASONS), line
    return line


# writers: each writes its k-th version into a folder

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "What writers need: an answer with its recording, a made-up scan, an EDF and a parquet."
    folder = tmp_path_factory.mktemp("made")
    recording = simulate_recording(seed=1, pattern="gpd", duration=60)
    write_edf(folder / "a.edf", recording)
    pd.DataFrame(recording.signal.T, columns=list(recording.channels)).to_parquet(folder / "a.parquet")
    for k in (1, 2):
        (folder / f"z{k}").mkdir()
        (folder / f"z{k}/a.bin").write_bytes(np.random.default_rng(k).bytes(50_000))
    prediction, read = predict_file(folder / "a.edf", Predictor(threads=1))
    about = {"format": 1, "state": "done", "step": 2.0, "gaps": [], "bundle": prediction.bundle, "recording": {"id": "1" * 16, "duration": 550.0, "reference": "referential", "channel_map": {}, "issues": []}}
    scan = Scan(about, table_of(np.r_[np.zeros(100), np.full(50, 0.9), np.zeros(100)]))
    p = np.random.default_rng(0).dirichlet(np.ones(6), 60)
    answers = load_answers(pd.DataFrame({**{f"p_{c}": p[:, k] for k, c in enumerate(CLASSES)}, **{v: (10 * p[:, k]).round() + 1 for k, v in enumerate(VOTE_COLUMNS)}}))
    return {"folder": folder, "answers": answers, "result": evaluate(answers, n_boot=20), "prediction": prediction, "recording": read, "scan": scan, "events": find_events(scan.table, scan.step)}


def checkpoint(folder, k, made):
    torch = pytest.importorskip("torch")
    from test_train import SMALL

    from hms_brain.checkpoints import Training, save_checkpoint
    from hms_brain.recipe import Recipe
    torch.manual_seed(k)
    training = Training(Recipe(), SMALL)
    training.epoch = k
    for p in training.model.parameters(): training.optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    save_checkpoint(training, folder)


def block(folder, k, made):
    keep_block(folder, {"blocks": {}, "gaps": [], "k": k}, 0, made["scan"].table.assign(at=float(k)), Piece(np.zeros((19, 1)), 0))


def archive(folder, k, made):
    write_archive(folder / "a.zip", made["folder"] / f"z{k}")


def pack(folder, k, made):
    with pytest.MonkeyPatch.context() as patch:  # its wheels have a line of their own
        patch.setattr(kaggle_kernel, "collect_wheels", lambda *_: [])
        kaggle_kernel.pack(folder / "pack", user=f"user{k}")


def table(suffix):
    return lambda folder, k, made: write_table(folder / f"t{suffix}", pd.DataFrame({"x": np.arange(5000.0) * k}))


WRITERS = {
    "checkpoint": checkpoint,
    "run.json": lambda folder, k, made: update_run(folder / "r", what="x" * 20_000 * k),
    "bundle": lambda folder, k, made: place_bundle({"bundle.json": b"{}", "model.onnx": bytes([k]) * 200_000}, folder / "b"),
    "array of a shard": lambda folder, k, made: save_array(folder / "shards/eeg-00000.npy", np.full(100_000, k, np.float16)),
    "block of a scan": block,
    "page of an answer": lambda folder, k, made: write_prediction(folder / "r.html", made["prediction"], made["recording"]),
    "csv of an answer": lambda folder, k, made: write_csv(folder / "r.csv", [made["prediction"]] * 100 * k),
    "json of an answer": lambda folder, k, made: write_prediction(folder / "r.json", made["prediction"], made["recording"]),
    "page of a scan": lambda folder, k, made: write_scan_report(folder / "s.html", made["scan"], made["events"]),
    "print of a scan": lambda folder, k, made: write_scan_pdf(folder / "s.pdf", made["scan"], made["events"] * k),
    "csv": table(".csv"), "tsv": table(".tsv"), "parquet": table(".parquet"),
    "bids": lambda folder, k, made: write_bids(folder / "bids", made["events"] * 300 * k, made["scan"]),
    "szcore": lambda folder, k, made: write_szcore(folder / "s.tsv", made["events"] * 300 * k, made["scan"]),
    "edf": lambda folder, k, made: write_edf(folder / "e.edf", dataclasses.replace(made["recording"], signal=made["recording"].signal * np.float32(k))),
    "annotated copy": lambda folder, k, made: annotate_edf(made["folder"] / "a.edf", folder / "n.edf", [(1.0, 1.0, f"hms: {k}")]),
    "annotated copy of a parquet": lambda folder, k, made: write_annotated(folder / "n.edf", made["folder"] / "a.parquet", made["events"] * k),
    "de-identified copy": lambda folder, k, made: deidentify_edf(made["folder"] / "a.edf", folder / f"d{k}.edf"),
    "archive": archive,
    "page of a run": lambda folder, k, made: write_page(folder / "p.html", Page(f"Run {k}", "One.", "Research use only.", (), [Section("Scores", "They were measured. " * 2000)])),
    "table of answers": lambda folder, k, made: save_frame(folder / "oof.parquet", pd.DataFrame({"p": np.random.default_rng(k).random(20_000)})),
    "page of reasons": lambda folder, k, made: write_reasons(folder / "w.html", Reasons(made["prediction"], CLASSES[k], {}), made["recording"]),
    "evaluation": lambda folder, k, made: write_evaluation(folder / "e", made["answers"].iloc[k:], made["result"]),
    "pack for Kaggle": pack,
    "wheel for a kernel": lambda folder, k, made: make_wheel(distribution("jinja2"), folder),
}


def prepared(name, disk, made, tmp_path):
    "The disk with a first version on it, or with something in its place where that is too large; the size of the largest file."
    first = tmp_path / "first"
    first.mkdir()
    WRITERS[name](first, 1, made)
    files = [p for p in first.rglob("*") if p.is_file()]
    largest = max(p.stat().st_size for p in files)
    for p in files:
        to = disk.folder / p.relative_to(first)
        to.parent.mkdir(parents=True, exist_ok=True)
        if sum(q.stat().st_size for q in files) < SIZE // 3: shutil.copy(p, to)
        else: to.write_bytes(b"what was there before")
    return largest


def needs_mount(disk):
    if not disk.mounted: pytest.skip("a limit on the size of files binds the decoder's process too; nothing may be mounted here")


@pytest.mark.parametrize("share", [0, 0.5], ids=["nothing left", "half of it fits"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name, share, disk, made, tmp_path):
    if name == "annotated copy of a parquet": needs_mount(disk)
    largest = prepared(name, disk, made, tmp_path)
    before = state(disk.folder)
    with disk.full(int(share * min(largest, SIZE // 2)) // 4096 * 4096):
        refused(lambda: WRITERS[name](disk.folder, 2, made), disk.folder)
        assert state(disk.folder) == before
    if disk.mounted and largest > SIZE // 3: return
    WRITERS[name](disk.folder, 2, made)
    assert set(state(disk.folder)) >= set(before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder(name, disk, made, tmp_path):
    prepared(name, disk, made, tmp_path)
    before = state(disk.folder)
    with disk.read_only(): refused(lambda: WRITERS[name](disk.folder, 2, made), disk.folder)
    assert state(disk.folder) == before


def test_every_file_of_a_scan_is_whole(disk, made):
    "The writer of many files stops at the first that does not fit; each of the others is the old or the new one."
    write_scan(disk.folder / "s", made["scan"], None) if not disk.mounted else (disk.folder / "s").mkdir()
    for _ in range(2):
        with disk.full(200_000): assert "s/report.html" in refused(lambda: write_scan(disk.folder / "s", made["scan"], made["folder"] / "a.edf"), disk.folder)
        assert not [n for n in state(disk.folder) if Path(n).name.startswith(".") or "tmp" in n]
        assert len(pd.read_csv(disk.folder / "s/probabilities.csv")) == len(made["scan"].table)


def test_a_training_goes_on_when_there_is_space_again(disk, tmp_path):
    "The last checkpoint survives, the run says that it failed once it can, and the weights are those of a training that met no full disk."
    pytest.importorskip("torch")
    from test_train import Stop, fit, stop_after, weights

    whole = weights(fit(tmp_path / "whole", epochs=2))
    with pytest.raises(Stop): fit(disk.folder / "r", epochs=2, say=stop_after(1))
    before = {n: sha for n, sha in state(disk.folder).items() if "checkpoints" in n}
    with disk.full(16_384):
        assert "r/checkpoints/epoch-0002.safetensors" in refused(lambda: fit(disk.folder / "r", epochs=2, resume=True), disk.folder)
        assert {n: sha for n, sha in state(disk.folder).items() if "checkpoints" in n} == before and len(before) == 2
    assert weights(fit(disk.folder / "r", epochs=2, resume=True)) == whole


def test_a_cache_goes_on_when_there_is_space_again(disk, data, tmp_path, monkeypatch):  # noqa: F811
    "The space that was asked for went to somebody else: the first shard is whole, the second is not there."
    if not disk.mounted: pytest.skip("a limit on the size of a file does not fill a disk")
    monkeypatch.setattr(dataset, "check_space", lambda *_: None)
    small = {"shard_size": 2, "limit": 6}
    line = refused(lambda: make(data, disk.folder / "c", **small), disk.folder)
    there = state(disk.folder)
    assert "c/shards/" in line and there and "c/manifest.json" not in there and not [n for n in there if "tmp" in n]
    make(data, tmp_path / "c", **small)
    assert all(sha == sha256_file(tmp_path / name) for name, sha in there.items())
    with disk.read_only(): assert "manifest" not in refused(lambda: make(data, disk.folder / "other", **small), disk.folder)
    shutil.copytree(disk.folder / "c", tmp_path / "on")
    make(data, tmp_path / "on", **small)
    assert len(WindowCache(tmp_path / "on")) == 6


def test_a_simulated_data_set_goes_on_when_there_is_space_again(disk, tmp_path):
    how = {"patients": 1, "recordings": 1, "short": 1.0, "n_test": 1, "workers": 1, "progress": False}
    simulate_dataset(tmp_path / "whole", **how)
    with disk.full(100_000): refused(lambda: simulate_dataset(disk.folder / "d", **how), disk.folder)
    there = state(disk.folder)
    assert "d/simulated.json" in there and "d/train.csv" not in there and not [n for n in there if "tmp" in n]
    shutil.copytree(disk.folder / "d", tmp_path / "on")
    simulate_dataset(tmp_path / "on", **how)
    assert state(tmp_path / "on") == state(tmp_path / "whole")
    with disk.read_only(): refused(lambda: simulate_dataset(disk.folder / "e", **how), disk.folder)


def test_a_download_goes_on_when_there_is_space_again(disk, tmp_path, monkeypatch):
    "The space that was asked for went to somebody else: what is unpacked is whole, and is not unpacked again."
    if not disk.mounted: pytest.skip("a limit on the size of a file does not fill a disk")
    monkeypatch.setattr(catalog, "check_space", lambda *_: None)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for k in range(3): z.writestr(f"train_eegs/{k}.parquet", bytes([k]) * 300_000)
    with disk.full(500_000): assert "train_eegs/1.parquet" in refused(lambda: catalog.unpack(tmp_path / "a.zip", disk.folder / "raw"), disk.folder)
    there = state(disk.folder)
    assert list(there) == ["raw/train_eegs/0.parquet"]
    catalog.unpack(tmp_path / "a.zip", disk.folder / "raw")
    assert len(state(disk.folder)) == 3 and state(disk.folder).items() >= there.items()
    with disk.read_only(): refused(lambda: catalog.unpack(tmp_path / "a.zip", disk.folder / "other"), disk.folder)


def test_the_audit_log(disk):
    log = AuditLog(disk.folder / "a.jsonl")
    kept = [log.add("answer", k=k)["n"] for k in range(3)]
    with disk.full(1 if disk.mounted else 1000):
        with pytest.raises(InputError, match=r"a\.jsonl: cannot be written .(No space left|File too large)"):
            while True: kept.append(log.add("answer", k="x" * 300)["n"])
    log.add("answer", k="after")
    log.close()
    records = list(read_log(disk.folder / "a.jsonl"))
    assert [r["n"] for r in records if r["kind"] == "answer"][:len(kept)] == kept and records[-1]["k"] == "after"
    with disk.read_only(): assert "a.jsonl" in refused(lambda: AuditLog(disk.folder / "b" / "a.jsonl"), disk.folder)


def test_the_ledger_of_jobs(disk):
    with disk.read_only(): refused(lambda: Ledger(disk.folder / "jobs"), disk.folder)
    ledger = Ledger(disk.folder / "jobs")
    def job():
        place = ledger.place()
        (place / "recording0.edf").write_bytes(b"")
        return ledger.add(place / "recording0.edf")
    first = job()
    with disk.full():
        with pytest.raises(InputError, match=r"jobs\.sqlite: cannot be written"):
            while True: job()
    assert ledger.find(first)["state"] == "waiting"
    assert ledger.find(job())["state"] == "waiting"
    ledger.close()


def test_the_apps_copy(disk, made):
    needs_mount(disk)
    with disk.full(40_000): refused(lambda: open_reader(made["folder"] / "a.parquet", disk.folder), disk.folder)
    assert state(disk.folder) == {}


def test_a_run_that_cannot_tell(disk):
    "A run that fails because of the disk fails because of the disk: what was to be written does not hide it."
    def go():
        with record_run(disk.folder / "r", kind="x"), disk.full(): write_csv_of_nothing(disk.folder / "r/a.csv")
    refused(go, disk.folder)


def write_csv_of_nothing(path):
    write_table(path, pd.DataFrame({"x": np.arange(10_000.0)}))


@pytest.mark.parametrize("words", [("predict", "-o", "r.html"), ("predict", "-o", "r.csv"), ("spectrogram", "-o", "s.parquet"), ("scan", "-o", "s", "--step", "20"), ("deidentify", "-o", "d.edf")], ids=lambda w: f"{w[0]} {w[2]}")
def test_commands(words, disk, made):
    "One line, exit code 2, nothing left."
    command, flag, name, *more = words
    go = lambda: one_line(hms(command, made["folder"] / "a.edf", flag, disk.folder / name, *more))
    with disk.read_only(): assert "Read-only" in go() or "Permission denied" in go()
    if disk.mounted:
        with disk.full(): assert "No space left" in go()
    assert state(disk.folder) == {}
