"""Seeded faults: each takes one guard away, and the test named beside it must fail. `make mutation` tries all; names after it try some."""
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    "One guard less."
    row: int  # of the table in nbs/safety.ipynb
    name: str
    file: str  # of the project
    old: str  # text that stands there once
    new: str
    test: str  # below tests/


FAULTS = [Fault(row, name, file if file.endswith(".lock") else f"hms_brain/{file}.py", old, new, f"tests/{test}") for row, name, file, old, new, test in (
    (1, "no abstention", "quality", "(*flags, *gaps, *stop), bool(stop),", "(*flags, *gaps, *stop), False,", "test_quality.py::test_edge_cases[all flat]"),
    (1, "no check of finite numbers", "records", "    if not wild.any(): return x", "    return x", "test_records.py::test_refusals"),
    (2, "folds by row", "catalog", '.split(v, y, runs["patient_id"].to_numpy()[order])', ".split(v, y, np.arange(len(v)))", "test_leakage.py::test_folds_are_disjoint"),
    (2, "a patient on both sides", "batches", "    if both: raise InputError", "    if False: raise InputError", "test_train.py::test_a_patient_on_both_sides_is_refused"),
    (3, "uv read as volts", "records", '"uv": "uV", "µv"', '"uv": "V", "µv"', "test_formats.py::test_edf_units[uv-1]"),
    (3, "any duration of a record", "formats/edf", "    if seconds <= 0: raise", "    if False: raise", "test_formats.py::test_edf_record_durations[-1      ]"),
    (3, "no limit of the child's memory", "formats/sandbox", 'resource.setrlimit(resource.RLIMIT_AS, (memory, memory))', "pass", "test_formats.py::test_child_limits"),
    (3, "no limit of the child's time", "formats/sandbox", '        late.start()\n', "", "test_formats.py::test_child_limits"),
    (4, "no cap of a body", "service/limits", "            if n > limit.cap: raise HTTPException(413, large)\n", "", "test_service.py::test_a_body_without_a_length_is_counted"),
    (4, "NaN in JSON", "service/core", "allow_inf_nan=False", "allow_inf_nan=True", "test_service.py::test_bad_requests[NaN]"),
    (4, "long errors", "service/core", "[:600]", "[:6000]", "test_service.py::test_an_error_is_small"),
    (5, "no slots", "service/limits", "if slots.used[pool] >= slots.sizes[pool]:", "if False:", "test_service.py::test_more_clients_than_slots"),
    (6, "random numbers are not restored", "steps", 'torch.manual_seed(int(rng_for(seed, "dropout", epoch).integers(2**31)))', "pass", "test_killed.py::test_control_without_fresh_chance_a_resumed_run_differs"),
    (6, "checkpoints saved in place", "checkpoints", 'with atomic_path(folder / "checkpoints" / name) as tmp: save_file(',
     'name = "epoch.safetensors"; tmp = folder / "checkpoints" / name; tmp.parent.mkdir(parents=True, exist_ok=True); save_file(', "test_killed.py::test_killed_in_the_middle_of_a_write"),
    (6, "a rotten checkpoint counts", "checkpoints", 'path.is_file() and sha256_file(path) == entry["sha256"]', "path.is_file()", "test_train.py::test_a_rotten_checkpoint_is_passed_over"),
    (7, "names of parameters are not checked", "runs", "        if name not in known: raise", "        if False: raise", "test_runs.py::test_wrong_parameters"),
    (7, "the dead are believed to run", "runs", 'and not process_alive(record.get("pid", -1)):', "and False:", "test_runs.py::test_a_killed_process_reads_as_failed"),
    (8, "no hash of a bundle's files", "bundle", "    if seal == seal_files(files): return", "    return", "test_bundle.py::test_bit_flips_are_found"),
    (9, "half a file is left", "core", "        with suppress(OSError): tmp.unlink(missing_ok=True)", "        pass", "test_disk.py::test_a_full_disk[edf-half of it fits]"),
    (9, "the disk's reason without a path", "core", "        if (reason := disk_reason(e)) is None: raise\n", "        raise\n", "test_disk.py::test_a_full_disk[run.json-nothing left]"),
    (10, "external data of ONNX", "runtime", 'if b"location" in model: raise', "if False: raise", "test_bundle.py::test_external_data_are_refused"),
    (11, "no cap of what a table becomes", "records", "    if not n_values * 4 <= MAX_DECODED: raise", "    if False: raise", "test_formats.py::test_parquet_bombs"),
    (11, "the header of an array is believed", "formats/tables", "any(n < 0 for n in shape) or expected != size: raise", "False: raise", "test_formats.py::test_array_bombs"),
    (12, "names of files are kept", "service/jobs", "if not alone and re.fullmatch(", "if re.fullmatch(", "test_privacy.py::test_the_service"),
    (12, "the patient stays in a copy", "annotate", '(8, 80, b"X X X X"), ', "", "test_privacy.py::test_deidentified_copies[edf]"),
    (13, "a token without an end", "service/tokens", 'options={"require": ["exp", ', 'options={"require": [', "test_service.py::test_forged_tokens[no exp]"),
    (13, "another algorithm", "service/tokens", 'algorithms=["HS256"]', 'algorithms=["HS256", "HS512"]', "test_service.py::test_forged_tokens[HS512 with the secret]"),
    (13, "a short secret", "service/tokens", "    if len(secret) < MIN_SECRET: raise", "    if False: raise", "test_service.py::test_refuses_to_start[env4-127.0.0.1-32]"),
    (14, "no list of hosts", "service/web", "    app.add_middleware(check_host, hosts=terms.hosts)\n", "", "test_service.py::test_strangers"),
    (14, "no check of Origin", "service/web", "    app.add_middleware(check_origin, origins=terms.origins)\n", "", "test_service.py::test_strangers"),
    (14, "large frames", "service/web", "ws_max_size=2 << 20", "ws_max_size=16 << 20", "test_service.py::test_close_codes[frame7-1009]"),
    (14, "another rate is another connection", "service/stream", "        if old: new.socket,", "        if False: new.socket,", "test_service.py::test_another_rate_takes_over_too"),
    (15, "pages that come at once are not counted", "dash", "        self.coming.add(asyncio.current_task())\n", "", "test_dash.py::test_pages_that_are_asked_for_at_once_share_the_places"),
    (15, "dashboards without a token", "dash", '"token": token,', '"token": "",', "test_dash.py::test_the_launcher_is_closed_by_default"),
    (15, "dashboards show tracebacks", "dash", '"show_tracebacks": False', '"show_tracebacks": True', "test_dash.py::test_the_launcher_is_closed_by_default"),
    (16, "labels are markup", "exports", "Environment(autoescape=True)", "Environment(autoescape=False)", "test_predict.py::test_labels_cannot_run"),
    (16, "cells are formulas", "exports", "return f\"'{value}\" if", "return value if", "test_predict.py::test_labels_cannot_run"),
    (17, "the service centres what training did not", "service/core", "Window(from_arrays(eeg, FS", "Window(from_arrays(eeg - np.float32(np.nanmean(eeg)), FS", "test_service.py::test_one_recording_every_way"),
    (17, "an export that differs is written", "bundle", "    if not max(parity.values()) <= PARITY: raise", "    if False: raise", "test_bundle.py::test_export_refuses_what_does_not_agree"),
    (18, "no drain", "service/limits", "        if slots.draining: return await refuse(", "        if False: return await refuse(", "test_service.py::test_sigterm_cuts_no_answer"),
    (18, "jobs of the dead are forgotten", "service/jobs", "    ledger.run(\"UPDATE jobs SET state = 'waiting' WHERE state = 'running'\")\n", "", "test_service.py::test_twenty_kills_one_result_each"),
    (18, "a job stays waiting while it runs", "service/jobs", "UPDATE jobs SET state = 'running', tries", "UPDATE jobs SET state = 'waiting', tries", "test_service.py::test_jobs"),
    (19, "a part reads the whole", "formats/edf", "start, stop = span(request, file.duration, file.path, margin=1.0)", "start, stop = 0.0, file.duration", "test_formats.py::test_edf_72_hours"),
    (20, "an old library", "base.lock", "\npyarrow==26", "\npyarrow==14", "test_hygiene.py::test_floors"),
)]


def copy_project(to: Path):
    "What tests need: package and tests as files that may be changed, large folders as links."
    skip = shutil.ignore_patterns("__pycache__", "assets", ".ipynb_checkpoints")
    for name in ("hms_brain", "tests"): shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=skip)
    for name in ("nbs", "hms_brain/assets", "deploy"): (to / name).symlink_to(ROOT / name)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git": shutil.copy(path, to / path.name)


def run_tests(folder: Path, tests: list[str], seconds: float) -> tuple[int, str]:  # exit code of pytest (-1: it hangs), its last lines
    "Run tests of a copy."
    env = os.environ | {"PYTHONPATH": str(folder), "HMS_REAL": os.environ.get("HMS_REAL", str(ROOT.parent / "shared" / "real"))}
    try: done = subprocess.run([sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider", *tests], cwd=folder, env=env, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired: return -1, "no end"
    return done.returncode, "\n".join(done.stdout.strip().splitlines()[-1 if done.returncode != 1 else 0:])


STAMPS = itertools.count(10**9)


def put(path: Path, text: str):
    "Write a file with a time of its own: byte code of the text before, of the same second and length, would count otherwise."
    path.write_text(text)
    os.utime(path, (stamp := next(STAMPS), stamp))


def try_fault(folder: Path, fault: Fault) -> str:
    "What the named test says about a fault."
    path = folder / fault.file
    sound = path.read_text()
    if sound.count(fault.old) != 1: return "OUTDATED: its text stands there no more, or twice"
    put(path, sound.replace(fault.old, fault.new))
    try: code, last = run_tests(folder, [fault.test], 600)
    finally: put(path, sound)
    return "fails, as it should" if code == 1 else f"SURVIVED ({last})" if code == 0 else f"DID NOT RUN ({last})"


def main(names: list[str]) -> int:
    "Try faults, print a line for each. Returns the number of those that were not found."
    if unknown := set(names) - {f.name for f in FAULTS}: sys.exit(f"no fault is called {sorted(unknown)[0]!r}")
    chosen = [f for f in FAULTS if not names or f.name in names]
    with tempfile.TemporaryDirectory(prefix="hms_faults_") as folder:
        copy_project(Path(folder))
        code, last = run_tests(Path(folder), sorted({f.test for f in chosen}), 3600)
        print(f"without a fault: {last}", flush=True)
        if code != 0: return 1
        lost = 0
        for f in chosen:
            began = time.monotonic()
            said = try_fault(Path(folder), f)
            lost += said != "fails, as it should"
            print(f"{f.row:2}  {f.name:45} {f.test:85} {said}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(chosen) - lost} of {len(chosen)} faults are found")
    return lost


if __name__ == "__main__": sys.exit(min(1, main(sys.argv[1:])))
