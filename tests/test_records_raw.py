"What is measured before resampling: units from seconds, rails and drop-outs."
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from hms_brain.core import CHANNELS, rng_for
from hms_brain.preprocess import Preprocess
from hms_brain.quality import check_window, share_clipped
from hms_brain.records import from_arrays, infer_unit, resample
from hms_brain.signal import bandpass


def head(fs=200, seconds=50, seed=0):
    "Coloured noise with something in common, uV."
    rng, n = rng_for(seed, "raw"), fs * seconds
    weight = rng.uniform(0.5, 1.5, (19, 1))
    return 90 * np.sqrt(fs / 200) * bandpass(weight * rng.normal(size=n) + 0.7 * rng.normal(size=(19, n)), 0.5, 12, fs, order=1)


@pytest.mark.parametrize("spread", [250, 555, 3000])
@pytest.mark.parametrize(("unit", "factor"), [("uV", 1), ("mV", 1e-3), ("V", 1e-6), ("nV", 1e3)])
@pytest.mark.parametrize("fs", [128, 256, 1000])
def test_drift_is_no_unit(fs, unit, factor, spread):
    "A drift of many times the EEG's size leaves the unit what it is; so do a trend, an offset and missing samples."
    x = head(fs, 30)
    t = np.arange(x.shape[1]) / fs
    for slow in (spread * np.sqrt(2) * np.sin(2 * np.pi * 0.05 * t), np.linspace(0, 4 * spread, len(t)), np.full(len(t), 10.0 * spread)):
        y = (x + slow) * factor
        y[:, 100:3 * fs] = np.nan
        assert infer_unit(y, fs)[0] == unit
        assert_allclose(np.nanstd(from_arrays(y, fs, CHANNELS, unit=None, fs_out=None).eeg), np.nanstd(x + slow), rtol=0.1)


@pytest.mark.parametrize("size", [1.5, 10, 100, 300])
def test_every_amplitude_of_a_scalp(size):
    "1 to 300 uV within a second, in every unit; rates may differ between channels."
    x = rng_for(1, "raw").normal(0, size, (19, 3000))
    for unit, factor in (("uV", 1), ("mV", 1e-3), ("V", 1e-6)):
        assert infer_unit(x * factor)[0] == unit
        assert infer_unit(list(x * factor), [100.0 + k for k in range(19)])[0] == unit
    assert infer_unit(x[:, :50])[0] == "uV" and infer_unit([])[1] == infer_unit(x[:, :0])[1] == infer_unit(np.full((3, 900), 7.0))[1] == 0


@pytest.mark.parametrize("fs", [200, 250, 256, 500, 512, 1000])
def test_clipping_is_found_at_every_rate(fs):
    "A recording whose amplifier was at its rail for 28 % abstains, one of 8 % is flagged; the shares are those of the file."
    x = head(fs)
    for low, high, abstain in ((0.04, 0.96, False), (0.14, 0.86, True)):
        cut = np.clip(x, *(q[:, None] for q in np.quantile(x, [low, high], axis=1)))
        r = from_arrays(cut, fs, CHANNELS)
        assert_allclose(share_clipped(r.eeg).mean(), share_clipped(cut).mean(), rtol=0.12)
        for recording in (r, from_arrays(cut, fs, CHANNELS, fs_out=None)):
            seen = Preprocess()(recording)
            assert seen.abstain == abstain and any("clipped" in why for why in seen.reasons) == abstain and "clipped" in [f.kind for f in seen.flags]
    assert "clipped" not in [f.kind for f in Preprocess()(from_arrays(x, fs, CHANNELS)).flags]


@pytest.mark.parametrize("fs", [200, 250, 256, 500])
def test_drop_outs_are_found_at_every_rate(fs):
    "An amplifier that repeats its last value for 30 % of the window."
    x = head(fs)
    x[:, 10 * fs:25 * fs] = x[:, 10 * fs:10 * fs + 1]
    q = check_window(from_arrays(x, fs, CHANNELS).eeg)
    assert q.abstain and {"dropout", "gap"} <= {f.kind for f in q.flags}


def test_rounded_signals_are_resampled_as_before():
    "Steps of a microvolt do not make rails: the difference stays that of the rounding."
    x = head(256)
    assert np.sqrt(np.mean((resample(np.round(x), 256) - resample(x, 256)) ** 2)) < 0.3
    r = from_arrays(np.round(x), 256, CHANNELS)
    assert_allclose(replace(r, signal=resample(x, 256)).eeg, r.eeg, atol=8)
    flat = resample(np.full((2, 512), 3.3), 256)
    assert (flat == np.float32(3.3)).all()
