"Whatever a hospital's rate, names and reference are: the same EEG, and the same answer."
import numpy as np
import pytest

from hms_brain.core import CLASSES, InputError
from hms_brain.elsewhere import NAMINGS, store_elsewhere
from hms_brain.exports import write_edf
from hms_brain.predict import Predictor
from hms_brain.records import read_recording
from hms_brain.signal import apply_montage, bandpass
from hms_brain.simulate import simulate_recording


def chains(recording):
    return bandpass(apply_montage(recording.eeg), 0.5, 20)[:, 400:-400]


@pytest.mark.parametrize("fs, naming, montage", [(128, "capitals", "average"), (256, "edf", "average"), (500, "10-10", "double_banana"), (512, "edf", "double_banana"), (1000, "short", "referential")])
def test_stored_elsewhere_read_here(tmp_path, fs, naming, montage):
    predictor, path = Predictor(threads=1), tmp_path / "there.edf"
    for k, pattern in enumerate(CLASSES):
        here = simulate_recording(seed=60 + k, pattern=pattern, duration=50, artefacts=False)
        write_edf(path, store_elsewhere(here, fs, naming, montage))
        there = read_recording(path, sandbox=False)
        assert there.fs == 200 and there.reference == ("bipolar" if montage == "double_banana" else "referential")
        assert np.abs(chains(there) - chains(here)).mean() < 0.01 * chains(here).std()
        p, q = (np.array(list(predictor(r).probabilities.values())) for r in (here, there))
        assert np.abs(p - q).max() < 0.05 and p.argmax() == q.argmax()


@pytest.mark.parametrize("naming", NAMINGS)
def test_missing_samples_stay_missing(naming):
    here = simulate_recording(seed=2, duration=20, artefacts=False)
    here.signal[3, 1000:1400] = np.nan
    stored = store_elsewhere(here, 400, naming, "referential")
    assert np.isnan(stored.signal[3, 2100:2700]).all() and np.isfinite(stored.signal[4]).all() and len(stored.labels) == len(stored.signal)


def test_a_transverse_montage_does_not_tell_the_chains(tmp_path):
    write_edf(tmp_path / "t.edf", store_elsewhere(simulate_recording(seed=2, duration=20), 200, "edf", "transverse"))
    with pytest.raises(InputError, match=r"t\.edf: its bipolar channels do not say how Fp1 differs from"): read_recording(tmp_path / "t.edf")


@pytest.mark.parametrize("fs", [0, -5.0, float("nan")])
def test_a_rate_that_is_none_is_refused(fs):
    with pytest.raises(InputError, match="fs: must be"): store_elsewhere(simulate_recording(duration=2), fs=fs)
