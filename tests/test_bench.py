"""What `hms bench` claims: the cache feeds a training, and the whole way is measured stage by stage."""
import json
import subprocess

import pytest

from hms_brain.bench import loading_row, measure_twin
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
