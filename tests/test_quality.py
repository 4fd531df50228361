"""hms_brain.quality: every edge case has one stated outcome, and no real window is refused."""
import json

import numpy as np
import pandas as pd
import pytest
from scipy.io import loadmat

from hms_brain.core import CHANNELS, FS, InputError, rng_for
from hms_brain.quality import artefact_mask, check_window, ica_clean, measure, most_clipped, share_clipped, wavelet_denoise
from hms_brain.signal import bandpass

T = np.arange(10000) / FS


def head(seed=0, n=10000):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.5, 1.5, (19, 1))
    return (90 * bandpass(weight * rng.normal(size=n) + 0.7 * rng.normal(size=(19, n)), 0.5, 12, order=1)).astype(np.float32)


def real_windows(real):
    for f in sorted((real / "iiic/segments").glob("*.mat")):
        yield f.stem, loadmat(f)["seg"][:19]
    for f in sorted((real / "iiic/rated").glob("*.mat")):
        yield f.stem, loadmat(f)["seg_10sec"][:19]
    for f in sorted((real / "hms").glob("*_eegs/*.parquet")):
        x = pd.read_parquet(f)[list(CHANNELS)].to_numpy().T
        for i in range(0, x.shape[1] - 9999, 1000):
            yield f"{f.stem}+{i}", x[:, i:i + 10000]


def change(where, value):
    x = head()
    x[where] = value
    return x


def clipped(n):
    "So many samples of each channel at its upper rail, at another time in each."
    x = head()
    for k, row in enumerate(x): row[400 * k:400 * k + n] = row.max() + 1
    return x


EDGES = {
    "healthy": (lambda: head(), set(), False),
    "one flat": (lambda: change(3, 12), {"flat"}, False),
    "four flat": (lambda: change(slice(0, 4), 0), {"flat"}, False),
    "five flat": (lambda: change(slice(0, 5), 0), {"flat"}, True),
    "four flat, one absent": (lambda: np.where(np.arange(19)[:, None] == 9, np.nan, change(slice(0, 4), 0)), {"flat", "missing"}, True),
    "all flat": (lambda: np.full((19, 10000), -3.0), {"flat"}, True),
    "almost flat": (lambda: head() * 1e-3, {"unit"}, True),
    "volts": (lambda: head() * 1e-6, {"unit"}, True),
    "nanovolts": (lambda: head() * 1e3, {"unit"}, True),
    "one sample": (lambda: change(np.s_[2, 77], np.nan), {"gap"}, False),
    "1 s": (lambda: change(np.s_[:, 500:700], np.nan), {"gap"}, False),
    "5 s": (lambda: change(np.s_[:, 500:1500], np.nan), {"gap"}, False),
    "19 %": (lambda: change(np.s_[:, :1900], np.nan), {"gap"}, False),
    "21 %": (lambda: change(np.s_[:, :2100], np.nan), {"gap"}, True),
    "zeros for 30 %": (lambda: change(np.s_[:, :3000], 0), {"dropout", "gap"}, True),
    "nothing": (lambda: np.full((19, 10000), np.nan), {"missing"}, True),
    "clipped 5 %": (lambda: np.clip(head(), *np.quantile(head(), [0.025, 0.975])), {"clipped"}, False),
    "clipped 40 %": (lambda: np.clip(head(), *np.quantile(head(), [0.2, 0.8])), {"clipped"}, True),
    "clipped 1 %": (lambda: clipped(100), set(), False),
    "clipped 1.01 %": (lambda: clipped(101), {"clipped"}, False),
    "clipped 19.99 %": (lambda: clipped(1999), {"clipped"}, False),
    "clipped 20.01 %": (lambda: clipped(2001), {"clipped"}, True),
    "mains 50": (lambda: head() + 400 * np.sin(2 * np.pi * 50 * T), {"mains"}, False),
    "mains 60": (lambda: head() + 400 * np.sin(2 * np.pi * 60 * T), {"mains"}, False),
    "noise": (lambda: np.random.default_rng(0).normal(0, 30, (19, 10000)), {"noise"}, True),
    "one signal": (lambda: np.tile(head()[:1], (19, 1)), {"identical"}, True),
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_cases(name):
    make, kinds, abstain = EDGES[name]
    x = make().astype(np.float32)
    kept = x.copy()
    q = check_window(x)
    np.testing.assert_array_equal(x, kept)
    assert kinds <= {f.kind for f in q.flags}
    assert q.abstain is abstain and bool(q.reasons) is abstain
    if abstain:
        assert any(r.split(":")[0] in kinds for r in q.reasons), q.reasons
    if not kinds:
        assert not q.flags
    assert (q.mains == float(name.split()[1])) if name.startswith("mains") else q.mains is None
    json.dumps([f.to_dict() for f in q.flags])
    assert all(type(c) is str for f in q.flags for c in f.channels)
    assert all("\n" not in r for r in q.reasons)


def test_the_gap_of_a_second_is_bridged_and_a_longer_one_masked():
    for n, word in ((200, "bridged"), (201, "masked")):
        flag, = check_window(change(np.s_[4, 300:300 + n], np.nan)).flags
        assert word in flag.detail and flag.channels == (CHANNELS[4],)


def test_bad_channels_have_names():
    x = head()
    x[CHANNELS.index("O2")] *= 30
    x[CHANNELS.index("Cz")] = np.random.default_rng(1).normal(0, 60, 10000)
    found = {f.kind: f.channels for f in check_window(x).flags}
    assert found["noisy"] == ("O2",) and found["uncorrelated"] == ("Cz",)


def test_a_rhythm_is_not_clipped():
    sine = np.stack([80 * np.sin(2 * np.pi * f * T) for f in (0.5, 1, 3, 10)]).astype(np.float32)
    assert share_clipped(sine).max() < 0.01
    assert share_clipped(np.round(sine)).max() < 0.08  # whole microvolts stay on the peak for some samples


def test_no_real_window_is_refused(real):
    n = 0
    for name, x in real_windows(real):
        q = check_window(x)
        assert not q.abstain, (name, q.reasons)
        assert np.median(measure(np.asarray(x, np.float32)).correlation) > 0.6
        n += 1
    assert n >= 27


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_every_real_window_in_a_wrong_unit_is_refused(real, scale):
    assert all(check_window(x * scale).abstain for _, x in real_windows(real))


@pytest.mark.parametrize("shape", [(19, 10), (18, 10000), (10000,)])
def test_wrong_shapes(shape):
    with pytest.raises(InputError):
        check_window(np.zeros(shape))


def test_artefact_mask():
    x = head()
    x[4, 3000:3050] += 4000
    x[7, 100:110] = np.nan
    m = artefact_mask(x)
    assert m.shape == x.shape and m[4, 2990:3060].all() and m[7, 100:110].all()
    assert not m[[0, 1, 2, 3, 5, 6]].any() and m[4].mean() < 0.2


@pytest.mark.filterwarnings("ignore:FastICA did not converge")
def test_ica_takes_blinks_and_leaves_the_back_of_the_head():
    blink = np.zeros(10000)
    blink[400::700] = 1
    blink = np.convolve(blink, np.hanning(60), "same")
    spread = np.array([1.0 if c.startswith("Fp") else 0.3 if c[0] == "F" else 0.0 for c in CHANNELS])[:, None]
    x = (head() + 300 * spread * blink).astype(np.float32)
    x[3, 50:60] = np.nan
    y, flags = ica_clean(x)
    assert [f.kind for f in flags] == ["ica_blink"]
    assert abs(np.corrcoef(y[0], blink)[0, 1]) < 0.3 < np.corrcoef(x[0], blink)[0, 1]
    assert np.corrcoef(y[CHANNELS.index("O2")], x[CHANNELS.index("O2")])[0, 1] > 0.95
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_array_equal(y, ica_clean(x)[0])  # same seed, same result
    with pytest.raises(InputError, match="alive"):
        ica_clean(np.zeros((19, 4000)))


@pytest.mark.filterwarnings("ignore:FastICA did not converge")
def test_ica_leaves_frontal_rhythms_alone():
    rhythm = 80 * np.sin(2 * np.pi * 1.5 * T) * np.where([[c.startswith("F")] for c in CHANNELS], 1.0, 0.3)
    y, flags = ica_clean((head() + rhythm).astype(np.float32))
    assert not flags and np.corrcoef(y[0], (head() + rhythm)[0])[0, 1] > 0.99


def test_wavelet_denoise():
    pytest.importorskip("pywt", reason="PyWavelets is an optional extra")
    rhythm = 50 * np.sin(2 * np.pi * 1.3 * T)
    noisy = (rhythm + np.random.default_rng(0).normal(0, 20, len(T))).astype(np.float32)
    noisy[100:130] = np.nan
    y = wavelet_denoise(noisy)
    assert np.isnan(y).sum() == 30 and y.dtype == np.float32
    assert np.nanstd(y - rhythm) < 0.6 * np.nanstd(noisy - rhythm)
    assert wavelet_denoise(head()[:, :777]).shape == (19, 777)
    with pytest.raises(InputError, match="unknown wavelet 'sym'"): wavelet_denoise(noisy, "sym")


@pytest.mark.parametrize("step", [0.0, 0.1, 4.0])
def test_the_bound_on_clipping_is_one(step):
    "Never below the exact share, whatever the resolution of the numbers, and no more than the share at the extremes of each second."
    rng = rng_for(0, "rails")
    x = np.clip(rng.normal(0, 30, (19, 8000)).cumsum(1) * 0.1, -60, 60).astype(np.float32)
    x = np.round(x / step) * np.float32(step) if step else x
    x[3] = 7
    bound = most_clipped(x.reshape(19, 40, 200), 10)
    exact = np.stack([share_clipped(x[:, 200 * s:200 * (s + 10)]) for s in range(31)])
    assert bound.shape == exact.shape and (bound >= exact - 1e-9).all()
    assert bound[:, 3].min() >= 1 and exact.max() > 0.05 and np.median(bound - exact) < 0.1


def test_the_screen_knows_every_kind_of_flag():
    "A window that it lets pass without a closer look can carry none: clipping is counted apart, missing samples are a gap."
    import inspect
    import re

    from hms_brain import quality

    kinds = {k for f in (quality.bad_channels, quality.find_gaps, quality.gate, quality.check_window) for k in re.findall(r'[(]"([a-z]+)", ', inspect.getsource(f))}
    screen = quality.Screen(np.random.default_rng(0).normal(0, 30, (19, 12_000)).astype(np.float32))
    assert kinds - {"clipped", "missing"} == set(screen.free) and "muscle" in kinds and len(kinds) == 12
    assert {len(free) for free in screen.free.values()} == {11} and not screen.sound.any() and not screen.free["noise"].any()


def test_ratios_are_those_of_densities():
    "To the last bit: the slow band is 9 Hz wide, the fast one 15."
    from hms_brain.quality import band_ratios, band_seconds

    x = np.random.default_rng(0).normal(0, 30, (19, 2000)).astype(np.float32)
    slow, fast, wide, *mains = band_seconds(x, 200, 10).mean(0)
    muscle, found = band_ratios(x, 200.0)
    assert np.array_equal(muscle, (fast / 15) / (slow / 9 + 1e-12)) and np.array_equal(found, np.stack(mains) / (wide + 1e-12))


@pytest.mark.parametrize("size", [2000, 20_000])
def test_some_seconds_of_artefact_are_no_unit(size):
    "Five seconds of a common artefact far from the centre leave the unit what it is; an EEG of which most seconds are suppressed too. A whole window of it, or a wrong unit, does not."
    x, burst = head(), np.zeros(10000)
    burst[200:1200] = size * np.sin(2 * np.pi * 1.7 * T[:1000])
    stats = measure((x + burst).astype(np.float32))
    assert np.median(stats.sd) > 300 > np.median(stats.second) > 1
    assert not any("unit" in r for r in check_window(x + burst).reasons)
    quiet = np.where((np.arange(10000) // 200) % 10 < 3, x, x * 0.005)
    assert np.median(measure(quiet.astype(np.float32)).second) < 1 and not any("unit" in r for r in check_window(quiet).reasons)
    for bad in (x + size * np.sin(2 * np.pi * 1.7 * T), (x + burst) * 1e3, x * 1e-3, x * 1e-6): assert any("wrong unit" in r for r in check_window(bad).reasons)
