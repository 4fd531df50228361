"""hms_brain.signal against scipy, numpy and brute force."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import butter, sosfiltfilt

from hms_brain.core import CHANNELS, InputError
from hms_brain.signal import (CHAINS, MONTAGES, apply_montage, bandpass, clip, fill_gaps, find_runs, montage_labels, notch, robust_scale)


@pytest.fixture
def eeg():
    return np.random.default_rng(0).normal(5, 30, (19, 3000)).astype(np.float32)


def test_double_banana_is_the_labellers_screen():
    assert " ".join(montage_labels("double_banana")) == (
        "Fp1-F7 F7-T3 T3-T5 T5-O1 Fp2-F8 F8-T4 T4-T6 T6-O2 Fp1-F3 F3-C3 C3-P3 P3-O1 Fp2-F4 F4-C4 C4-P4 P4-O2 Fz-Cz Cz-Pz")
    assert list(CHAINS) == ["LL", "RL", "LP", "RP"]
    for pairs in MONTAGES.values():
        assert {e for p in pairs for e in p} <= {*CHANNELS, "AVG", "REF"}
        assert len(set(pairs)) == len(pairs)
    assert {e for p in MONTAGES["transverse"] for e in p} == set(CHANNELS)


@pytest.mark.parametrize("name", MONTAGES)
def test_montage_against_brute_force(eeg, name):
    kept = eeg.copy()
    out = apply_montage(eeg, name)
    mean = eeg.astype(float).mean(0)
    for row, (a, b) in zip(out, MONTAGES[name]):
        minus = {"AVG": mean, "REF": 0}.get(b) if b in ("AVG", "REF") else eeg[CHANNELS.index(b)]
        np.testing.assert_allclose(row, eeg[CHANNELS.index(a)] - minus, atol=1e-4)
    assert out.dtype == np.float32 and len(out) == len(montage_labels(name))
    out[:] = 0
    np.testing.assert_array_equal(eeg, kept)  # a copy, never a view


def test_a_missing_electrode_spoils_only_its_own_pairs(eeg):
    eeg[CHANNELS.index("Cz")] = np.nan
    for name in MONTAGES:
        bad = np.isnan(apply_montage(eeg, name)).any(1)
        assert bad.tolist() == ["Cz" in p for p in MONTAGES[name]]


@pytest.mark.parametrize("low,high,order", [(0.5, 40, 3), (0.5, 20, 4), (None, 30, 2), (1, None, 5)])
def test_bandpass_is_scipys(eeg, low, high, order):
    edges, kind = ([low, high], "bandpass") if low and high else (low, "highpass") if low else (high, "lowpass")
    expected = sosfiltfilt(butter(order, edges, kind, fs=200, output="sos"), eeg.astype(float))
    np.testing.assert_allclose(bandpass(eeg, low, high, 200, order), expected, atol=1e-4)


def test_blocks_of_rows_change_nothing():
    x = np.random.default_rng(1).normal(size=(3, 1_500_000)).astype(np.float32)  # more than one block
    np.testing.assert_array_equal(bandpass(x)[2], bandpass(x[2]))


@pytest.mark.parametrize("edges", [(1e-300, 70), (0.5, 100), (40, 0.5), (0, 20), (None, None), (5, 5), (-1, 4), (0.5, np.nan), (np.nan, 40)])
def test_impossible_edges_are_refused_in_one_line(eeg, edges):
    with pytest.raises(InputError) as e:
        bandpass(eeg, *edges)
    assert "\n" not in str(e.value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 499), st.integers(1, 300)), max_size=8), st.integers(1, 500))
def test_no_filter_spreads_a_gap(gaps, n):
    x = np.random.default_rng(n).normal(0, 40, (4, n)).astype(np.float32)
    for c, a, length in gaps:
        x[c, a:a + length] = [np.nan, np.inf, -np.inf][length % 3]
    missing = ~np.isfinite(x)
    filled, found = fill_gaps(x)
    assert np.isfinite(filled).all() and (found == missing).all()
    np.testing.assert_array_equal(filled[~missing], x[~missing])
    for f in (bandpass, notch, robust_scale):
        y = f(x)
        assert y.dtype == np.float32 and y.shape == x.shape
        np.testing.assert_array_equal(np.isnan(y), missing)
        assert np.isfinite(y[~missing]).all()
    for row in missing:
        assert sum(b - a for a, b in find_runs(row)) == row.sum()


@pytest.mark.parametrize("shape", [(19, 0), (0,), (0, 100)])
def test_no_samples_are_no_samples(shape):
    assert fill_gaps(np.zeros(shape))[0].shape == bandpass(np.zeros(shape)).shape == shape


def test_fill_gaps_is_linear_inside_and_held_at_the_ends():
    x = np.array([[np.nan, np.nan, 2, np.nan, np.nan, 8, np.nan], [np.nan] * 7], np.float32)
    np.testing.assert_allclose(fill_gaps(x)[0], [[2, 2, 2, 4, 6, 8, 8], [0] * 7])


def test_one_missing_sample_hardly_matters(eeg):
    smooth = bandpass(eeg, 0.5, 20)
    holed = smooth.copy()
    holed[:, 1500] = np.nan
    diff = np.abs(bandpass(holed, 0.5, 40) - bandpass(smooth, 0.5, 40))
    assert np.nanmax(diff) < 0.1 * smooth.std()


def test_notch_takes_mains_and_leaves_the_rest():
    t = np.arange(0, 20, 1 / 200)
    kept = 30 * np.sin(2 * np.pi * 10 * t)
    out = notch(kept + 500 * np.sin(2 * np.pi * 50 * t), 50)
    assert np.abs(out - kept)[1000:3000].max() < 1
    with pytest.raises(InputError):
        notch(kept, 60, fs=100)


def test_clip_and_robust_scale(eeg):
    eeg[0, :20] = 5e4
    assert np.abs(clip(eeg, 100)).max() == 100
    y = robust_scale(eeg)
    mad = np.median(np.abs(eeg - np.median(eeg, -1, keepdims=True)), -1, keepdims=True)
    np.testing.assert_allclose(y, (eeg - np.median(eeg, -1, keepdims=True)) / (1.4826 * mad), rtol=1e-4, atol=1e-4)
    assert (robust_scale(np.full((1, 50), 3.0)) == 0).all()


def test_montage_wants_nineteen_rows(eeg):
    with pytest.raises(InputError, match="19 channels"):
        apply_montage(eeg[:18])
    with pytest.raises(InputError, match="did you mean transverse"):
        apply_montage(eeg, "traverse")
