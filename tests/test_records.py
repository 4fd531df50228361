"Recording, channel table, units, resampling, repairs: against scipy, MNE and algebra."
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_allclose

from hms_brain.core import CHANNELS, EKG, InputError, rng_for
from hms_brain.electrodes import clean_labels, electrode, electrode_pair, from_differences, interpolate_electrodes, plan_channels, spline_weights
from hms_brain.records import ISSUE_KINDS, Issue, Raw, Request, from_arrays, infer_unit, known_unit, resample, span

BANANA = [("Fp1", "F7"), ("F7", "T3"), ("T3", "T5"), ("T5", "O1"), ("Fp2", "F8"), ("F8", "T4"), ("T4", "T6"), ("T6", "O2"), ("Fp1", "F3"),
          ("F3", "C3"), ("C3", "P3"), ("P3", "O1"), ("Fp2", "F4"), ("F4", "C4"), ("C4", "P4"), ("P4", "O2"), ("Fz", "Cz"), ("Cz", "Pz")]


def noise(n_chans=19, n_times=2000, sd=40.0, seed=0):
    "White noise in uV."
    return rng_for(seed, "records").normal(0, sd, (n_chans, n_times))


def kinds(recording):
    "Kinds of issues of a recording."
    return [i.kind for i in recording.issues]


@pytest.mark.parametrize(("label", "expected"), [
    ("EEG Fp1-REF", "Fp1"), ("EEG FP1-LE", "Fp1"), ("FP1-AR", "Fp1"), ("EEG T7-Ref", "T3"), ("POL T3", "T3"), ("Fp1-A2", "Fp1"), ("Fp1.", "Fp1"), ("Fc5.", ""),
    ("ECG EKG", EKG), ("EEG EKG1-REF", EKG), ("ECG", EKG), ("EKG EKG", EKG), ("ECG1-ECG2", EKG), ("ECG II", EKG), ("SEEG Cz", "Cz"), ("P8-M1", "T6"), ("p7", "T5"), ("T5", "T5"), ("T6-AVG", "T6"),
    ("T9", ""), ("T10", ""), ("FP1-F7", ""), ("EEG Effort-Ref", ""), ("1", ""), ("", ""), ("EDF Annotations", ""), ("EEG", ""), ("O1-0", "O1"), ("EMG submental", "")])
def test_electrode(label, expected):
    "Names of real files."
    assert electrode(label) == expected


@given(st.sampled_from(CHANNELS), st.sampled_from(["", "EEG ", "POL ", "SEEG ", "eeg "]), st.sampled_from(["", "-REF", "-LE", "-AR", "-AVG", "-A1", "-A2", "-M1", "-M2", "-0", "-ref"]),
       st.sampled_from([str, str.upper, str.lower]), st.sampled_from(["", ".", ".."]))
def test_decorated_electrodes(name, prefix, suffix, case, dots):
    "Every combination of prefix, case, dots and reference leads to the electrode."
    assert electrode(prefix + case(name) + dots + suffix) == name


@given(st.text(max_size=60))
def test_any_label(label):
    "No label raises, and cleaned labels are short and printable."
    assert electrode(label) in (*CHANNELS, EKG, "")
    electrode_pair(label)
    (clean,) = clean_labels([label])
    assert 0 < len(clean) <= 40 and clean.isprintable()


@pytest.mark.parametrize("labels", [["C3 (2)", "C3"], ["C3", "C3", "C3 (2)"], ["x" * 50] * 12])
def test_labels_are_keys(labels):
    "Cleaned labels are unique and short, whatever suffixes the file's own have."
    clean = clean_labels(labels)
    assert len(set(clean)) == len(labels) and max(map(len, clean)) <= 40


def test_issue_vocabulary():
    "Kinds are closed."
    with pytest.raises(ValueError, match="unknown kind"):
        Issue("surprise", "?")
    assert len(set(ISSUE_KINDS)) == len(ISSUE_KINDS)


def test_plan_missing_and_map():
    "Three may be missing, four are refused by name, a map mends."
    names = [c for c in CHANNELS if c not in ("Fz", "Cz", "Pz")]
    assert plan_channels(names).missing == ("Fz", "Cz", "Pz")
    with pytest.raises(InputError, match=r"4 of the 19 electrodes are missing: Fp1, Fz, Cz, Pz"):
        plan_channels(names[1:])
    assert plan_channels(["front", *names[1:]], {"front": "Fp1"}).channel_map["front"] == "Fp1"
    with pytest.raises(InputError, match="did you mean front"):
        plan_channels(["front", *names[1:]], {"frond": "Fp1"})
    with pytest.raises(InputError, match="no electrode"):
        plan_channels(["front", *names[1:]], {"front": "Q9"})


def test_order_and_duplicates():
    "Rows are in HMS order whatever the file's order; the first of two wins."
    x = noise(20)
    order = rng_for(1, "order").permutation(19)
    r = from_arrays(np.vstack([x[:19][order], x[19:]]), 200, [*(CHANNELS[i] for i in order), CHANNELS[order[0]]])
    assert r.channels == CHANNELS
    assert_allclose(r.eeg, x[:19], rtol=1e-6)
    assert kinds(r) == ["duplicate", "missing_ekg"]


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1), ("µV", 1), ("μV", 1), ("mV", 1e-3), ("V", 1e-6), ("nV", 1e3), ("UV", 1), ("uv", 1), ("microV", 1), ("", 1), ("", 1e-3), ("", 1e-6), ("DegC", 1)])
def test_units(unit, factor):
    "Every unit gives the same microvolts; all but the exact spellings are reported."
    x = noise()
    r = from_arrays(x * factor, 200, CHANNELS, unit=unit)
    assert_allclose(r.eeg, x, rtol=1e-4, atol=1e-3)
    assert ("unit" in kinds(r)) == (unit not in ("uV", "µV", "μV", "mV", "V", "nV"))


def test_flat_unit_and_ambiguous():
    "A flat signal says nothing; MV is not guessed from its spelling."
    assert infer_unit([np.zeros(100)]) == ("uV", 0.0)
    assert known_unit("MV") == (None, False)
    r = from_arrays(np.zeros((19, 400)), 200, CHANNELS, unit=None)
    assert np.all(r.eeg == 0) and "unit" in kinds(r)


@pytest.mark.parametrize("fs", [80.5, 128, 199.7, 250, 256, 500, 512, 1000, 1024, 2048])
def test_resample_sine(fs):
    "A 10-Hz sine keeps its amplitude and phase away from the edges."
    t = np.arange(int(20 * fs)) / fs
    y = resample(np.sin(2 * np.pi * 10 * t + 0.3), fs)
    u = np.arange(len(y)) / 200
    assert len(y) == round(len(t) * 200 / fs)
    assert_allclose(y[200:-200], np.sin(2 * np.pi * 10 * u + 0.3)[200:-200], atol=4e-3)


@pytest.mark.parametrize(("fs", "up", "down"), [(256, 25, 32), (500, 2, 5), (250, 4, 5)])
def test_resample_is_scipy(fs, up, down):
    "Where nothing is missing the result is scipy's."
    from scipy.signal import resample_poly
    x = noise(3, 10 * fs)
    assert_allclose(resample(x, fs), resample_poly(x, up, down, axis=1, padtype="line")[:, :2000], rtol=1e-5, atol=1e-4)


@given(st.integers(1, 400), st.sampled_from([100, 199.7, 256, 512]), st.lists(st.tuples(st.integers(0, 399), st.integers(1, 60)), max_size=4))
@settings(max_examples=60, deadline=None)
def test_resample_gaps(n, fs, gaps):
    "Gaps stay where they are in time, and nothing else is lost."
    x = noise(1, n)[0]
    for a, b in gaps: x[a:a + b] = np.nan
    y = resample(x, fs)
    nearest = np.minimum(np.arange(len(y)) * fs / 200, n - 1)
    lost = np.isnan(x)
    assert np.array_equal(np.isnan(y), lost[np.floor(nearest).astype(int)] | lost[np.ceil(nearest).astype(int)])


def test_spline_weights_are_mne():
    "Spherical splines agree with MNE's on the same sphere."
    from mne.channels.interpolation import _make_interpolation_matrix
    from hms_brain.electrodes import electrode_positions
    bad = [2, 8]
    good = [i for i in range(19) if i not in bad]
    place = electrode_positions()
    assert_allclose(np.linalg.norm(place, axis=1), 1)
    assert_allclose(spline_weights(good, bad), _make_interpolation_matrix(place[good], place[bad], alpha=1e-5), atol=1e-6)


def test_interpolation_reported():
    "A smooth field is recovered, and the electrodes are named."
    from hms_brain.electrodes import electrode_positions
    x = (electrode_positions() @ np.array([20.0, -10, 30]))[:, None] * np.sin(np.arange(400) / 9)
    keep = [i for i, c in enumerate(CHANNELS) if c not in ("C3", "Pz")]
    r = from_arrays(x[keep], 200, [CHANNELS[i] for i in keep])
    assert next(i for i in r.issues if i.kind == "interpolated").channels == ("C3", "Pz")
    assert np.abs(r.eeg - x).max() < 0.1 * np.abs(x).max()
    x[0] = np.nan
    assert np.isfinite(interpolate_electrodes(x, ["C3"])[2]).all()


def test_bipolar_is_exact():
    "Differences of every pair survive, whatever the potentials were; groups keep their own zero."
    x = noise(19)
    at = CHANNELS.index
    pairs = [*BANANA, ("T4", "FT10"), ("T4", "T6")]
    d = np.array([x[at(a)] - (x[at(b)] if b in CHANNELS else 7.0) for a, b in pairs])
    r = from_arrays(d, 200, ["-".join(p).replace("T3", "T7").replace("T4", "T8") for p in pairs])
    assert r.reference == "bipolar" and not any("contradict" in i.detail for i in r.issues if i.kind == "bipolar")
    for a, b in BANANA: assert_allclose(r.eeg[at(a)] - r.eeg[at(b)], x[at(a)] - x[at(b)], atol=2e-3)
    d[16, 5] = np.nan
    y = from_differences(d, pairs)
    assert np.isnan(y[at("Fz"), 5]) and np.isnan(y).sum() == 1
    assert_allclose(y[at("Cz"), 5] - y[at("Pz"), 5], x[at("Cz"), 5] - x[at("Pz"), 5], atol=2e-3)


def test_one_reference_that_is_no_electrode_of_the_19():
    "Fp1-FCz ... O2-FCz are differences without a loop."
    x = noise(19)
    r = from_arrays(x, 200, [f"{c}-FCz" for c in CHANNELS])
    assert r.reference == "bipolar" and not any("contradict" in i.detail for i in r.issues)
    assert_allclose(r.eeg - r.eeg[:1], x - x[:1], atol=2e-3)


def test_one_rate_and_unit_per_channel():
    "Rates may be an array; too few of them are an input error."
    assert from_arrays(noise(19), np.full(19, 200), CHANNELS).fs == 200
    with pytest.raises(InputError, match="fs: 19 channels but 2 values"): from_arrays(noise(19), [200.0] * 2, CHANNELS)
    with pytest.raises(InputError, match="unit: 19 channels but 2 values"): from_arrays(noise(19), 200, CHANNELS, unit=["uV"] * 2)


def test_refusals():
    "Rates, infinities and impossible amplitudes of EEG are refused; the EKG may be anything."
    x = noise(20)
    labels = [*CHANNELS, EKG]
    x[19, :3] = np.inf, -np.inf, 1e9
    x[19, 3:] *= 1000
    r = from_arrays(x, 200, labels)
    assert np.isnan(r.ekg[:3]).all() and np.isfinite(r.ekg[3:]).all() and "ekg" in kinds(r)
    for bad in (np.inf, 2e5):
        y = x.copy()
        y[3, 7] = bad
        with pytest.raises(InputError, match="channel P3 holds"):
            from_arrays(y, 200, labels)
    for fs in (79.9, 20.0):
        with pytest.raises(InputError, match="sampling rate"):
            from_arrays(x, fs, labels)
    for fs in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError):
            from_arrays(x, fs, labels)
    x[3, 7] = 7000
    assert from_arrays(x, 200, labels).eeg[3, 7] == 7000


def test_uneven_rates_and_nan():
    "Channels at their own rates meet at 200 Hz; missing samples are counted."
    signals = [np.full(1000 if i % 2 else 500, float(i)) for i in range(19)]
    signals[0][10:20] = np.nan
    r = from_arrays(signals, [100.0 if i % 2 == 0 else 200.0 for i in range(19)], CHANNELS, fs_out=None)
    assert r.fs == 200 and r.n_times == 1000
    assert_allclose(np.nanmean(r.eeg, axis=1), np.arange(19), atol=1e-3)
    assert {"nan", "resampled"} <= set(kinds(r))


@given(st.floats(0.1, 1e5), st.none() | st.floats(0, 2e5), st.none() | st.floats(1e-3, 1e5))
def test_span(total, start, duration):
    "A span lies within the file and is never longer than asked for."
    request = Request(start=start, duration=duration)
    if start is not None and start >= total:
        with pytest.raises(InputError): span(request, total)
        return
    a, b = span(request, total)
    assert 0 <= a < b <= total and (duration is None or b - a <= duration * (1 + 1e-9) + 1e-9)
    if start is None: assert abs((a + b) - total) < 1e-6 * total


@pytest.mark.parametrize("bad", [dict(start=-1), dict(duration=0), dict(duration=float("nan")), dict(fs=0), dict(unit="parsec"), dict(start="x")])
def test_bad_requests(bad):
    "Wrong arguments are input errors."
    with pytest.raises(InputError): Request(**bad)


@pytest.mark.parametrize("kind", [np.int64, np.float32])
def test_numbers_of_numpy(kind):
    "Seconds out of an array are seconds, and travel to another process as JSON."
    assert json.loads(json.dumps(asdict(Request(start=kind(5), duration=kind(50)))))["start"] == 5


def test_recording_is_plain_data():
    "repr, summary and to_dict; the id depends on the numbers only."
    x = noise()
    r = from_arrays(x, 200, CHANNELS)
    assert r.id == from_arrays(x, 200, CHANNELS).id != from_arrays(x + 1, 200, CHANNELS).id
    assert len(r.id) == 16 and "19 channels x 10 s" in repr(r)
    assert json.loads(json.dumps(r.to_dict()))["channel_map"]["Fp1"] == "Fp1"
    assert list(r.summary().columns) == ["what", "name", "meaning"]
    with pytest.raises(AttributeError): r.fs = 100
    assert Raw(["a"], [None], [1.0], [None]).issues == []
