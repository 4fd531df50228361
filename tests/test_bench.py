"""What `hms bench` claims: the cache feeds a training, and the whole way is measured stage by stage."""
import json
import subprocess

import numpy as np
import pytest

from hms_brain.bench import loading_row, machine_row, measure_twin
from hms_brain.bench_scan import keep_rows, measure_archive, measure_memory, measure_scan
from hms_brain.core import InputError, read_json
from test_cli import HMS, one_line


def test_the_cache_is_twenty_times_faster_than_files(tmp_path):
    "Three tries, because other tests run beside this one."
    assert any(loading_row(tmp_path / str(k), patients=2, windows=32)["times_faster"] >= 20 for k in range(3))


@pytest.mark.slow
def test_the_whole_way_on_a_twin(tmp_path):
    subprocess.run([HMS, "simulate", tmp_path / "toy", "--patients", "10", "--recordings", "1", "--workers", "1"], check=True, capture_output=True)
    done = subprocess.run([HMS, "bench", "twin", "--like", tmp_path / "toy/train.csv", "--share", "0.5", "--folder", tmp_path / "twin", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [s["stage"] for s in found["stages"]] == ["simulate", "prepare", "train, one epoch", "evaluate"]
    assert all(s["seconds"] > 0 and s["largest_process_mb"] > 50 for s in found["stages"]) and all(mb > 0 for mb in found["disk_mb"].values())
    assert found["part"]["patients"] == 5 and found["fifth"]["part"]["patients"] == 2 and found["whole"]["patients"] == 10
    full = {e["what"]: e["estimated"] for e in found["estimate"]}
    assert full["train_eegs"] >= found["disk_mb"]["train_eegs"] / 1e3 - 0.01 and set(full) == {"simulate", "prepare", "train, one epoch", "evaluate", "train_eegs", "train_spectrograms", "cache", "run"}
    assert read_json(tmp_path / "twin/measured.json") == found


def test_a_stage_that_fails_is_told(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        measure_twin(tmp_path / "train.csv", tmp_path / "twin")
    assert "--like" in one_line(subprocess.run([HMS, "bench", "twin"], capture_output=True, text=True))


def test_rows_are_kept_to_compare_releases(tmp_path, monkeypatch):
    monkeypatch.setenv("HMS_PATHS_REPORTS", str(tmp_path))
    rows = [machine_row(), {"name": "a", "what": "A", "seconds": 2.0, "peer": "b", "peer_seconds": 6.0, "times_faster": 3.0}, {"name": "m", "what": "M", "seconds": 9.0, "megabytes": 700}]
    kept = read_json(keep_rows("scan", rows))
    assert kept["rows"] == [{"name": "a", "ours": 2.0, "peer": 6.0, "unit": "s", "ratio": 3.0}, {"name": "m", "ours": 700, "peer": None, "unit": "MB", "ratio": None}]
    assert "cores" in kept["machine"] and kept["measured_rows"] == rows


@pytest.mark.slow
def test_scans_beside_their_peers():
    rows = measure_scan(minutes=5, n=3)[1:]
    assert [r["name"] for r in rows] == ["image_model", "scan_fusion_vs_windows", "scan_fusion_vs_sparcnet", "scan_compact_vs_windows", "scan_compact_vs_sparcnet"]
    assert all(r["seconds"] > 0 for r in rows) and all(r["peer_seconds"] > 0 for r in rows[1:])


@pytest.mark.slow
def test_memory_is_that_of_a_process_that_scanned_all():
    held = np.ones(1 << 28)  # 2 GiB of this process, which must not count
    row = measure_memory((0.5,), step=4)[1]
    assert held.size
    assert row["windows"] == (1800 - 50) // 4 + 1 and 150 < row["megabytes"] < 1536


@pytest.mark.slow
def test_two_workers_beside_one():
    row = measure_archive(n=4, seconds=60)[1]
    assert row["name"] == "archive_two_workers" and row["times_faster"] > 0
