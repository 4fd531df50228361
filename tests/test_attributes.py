"""Measured attributes: what was put in is measured back, nothing breaks them, the written rules decide as written."""
import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kurtosis

from hms_brain.attributes import GRID, RULES, WindowAttributes, acns_term, autocorrelation, fit_rate, leading_cycle, measure_attributes, rate_evidence, rate_probabilities
from hms_brain.core import CHANNELS, CLASSES, FS, InputError
from hms_brain.signal import apply_montage, bandpass
from hms_brain.simulate import simulate, simulate_recording

T = np.arange(0, 10, 1 / FS)
LEFT = [i for i, c in enumerate(CHANNELS) if c[-1] in "13579"]


def page(wave, gains=None, noise=1.0, seed=0):
    "A wave at the electrodes, stronger in odd-numbered (left) ones by `gains`, on white noise."
    x = np.random.default_rng(seed).normal(0, noise, (19, len(wave)))
    weights = np.random.default_rng(1).normal(0, 1, 19) if gains is None else gains
    return (x + weights[:, None] * wave).astype(np.float32)


def test_autocorrelation_is_the_definition():
    x = np.random.default_rng(0).normal(size=(3, 200))
    ours = autocorrelation(x, 40)
    c = x - x.mean(1, keepdims=True)
    brute = np.array([[(row[:200 - k] * row[k:]).sum() / (row**2).sum() * 200 / (200 - k) for k in range(40)] for row in c])
    np.testing.assert_allclose(ours, brute, atol=1e-9)


@pytest.mark.parametrize("rate", [.7, 1.0, 1.6, 2.3, 3.1, 5.0, 9.0])
def test_rate_of_a_rhythm(rate):
    a = measure_attributes(page(30 * np.sin(2 * np.pi * rate * T)))
    assert abs(a.rate / rate - 1) < .03 and a.regularity > .8
    assert abs(a.cycles - 10 * rate) < .4 * rate and a.evolution < .1


@pytest.mark.parametrize("rate", [.6, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("jitter", [0, .08])
def test_rate_of_discharges(rate, jitter):
    rng = np.random.default_rng(2)
    times = np.arange(.2, 9.6, 1 / rate)
    wave = sum(60 * np.exp(-((T - t - rng.normal(0, jitter / rate)) / .03) ** 2) for t in times)
    a = measure_attributes(page(wave))
    assert abs(a.rate / rate - 1) < .08 and a.sharpness > 4


def test_sharpness_is_kurtosis():
    x = np.random.default_rng(0).normal(0, 20, (19, 2000))
    assert abs(measure_attributes(x).sharpness - kurtosis(np.random.default_rng(1).normal(size=10_000), fisher=False)) < .5
    assert abs(measure_attributes(page(50 * np.sin(2 * np.pi * 2 * T))).sharpness - 1.5) < .2


def test_laterality_is_the_log_ratio_and_swaps_sign():
    weights = np.random.default_rng(3).normal(0, 1, 19)
    weights[[i for i in range(19) if i not in LEFT]] *= .3
    x = page(40 * np.sin(2 * np.pi * 1.5 * T), weights)
    mirrored = x.copy()
    for a, b in ((c, c[:-1] + str(int(c[-1]) + 1)) for c in CHANNELS if c[-1] in "1357"):
        i, j = CHANNELS.index(a), CHANNELS.index(b)
        mirrored[[i, j]] = x[[j, i]]
    left, right = measure_attributes(x).laterality, measure_attributes(mirrored).laterality
    assert left > .5 and abs(left + right) < 1e-3


def test_evolution_and_slope_and_suppression():
    chirp = 30 * np.sin(2 * np.pi * np.cumsum(np.linspace(6, 3, 2000)) / FS)
    assert measure_attributes(page(chirp)).evolution > .25
    f = np.fft.rfftfreq(4000, 1 / FS)
    shaped = np.fft.irfft(np.fft.rfft(np.random.default_rng(0).normal(size=(19, 4000))) * np.r_[0, f[1:] ** -1.2])
    assert abs(measure_attributes(shaped * 1e3).slope + 2.4) < .25
    quiet = np.random.default_rng(0).normal(0, 20, (19, 2000))
    quiet[:, 500:1500] *= .02
    assert abs(measure_attributes(quiet).suppressed - .5) < .11


def test_gain_changes_size_alone():
    x = simulate_recording(0, "gpd", 10, artefacts=False).eeg
    a, b = measure_attributes(x).to_dict(), measure_attributes(3 * x).to_dict()
    assert abs(b.pop("rms") / a.pop("rms") - 3) < 1e-3
    a.pop("suppressed"), b.pop("suppressed")
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-2, atol=1e-2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([50., 100., 128., 200., 256., 500.]), st.floats(2, 20), st.sampled_from([0, 1e-9, 1., 1e4, 1e12, np.nan, np.inf]))
def test_always_finite(seed, fs, seconds, scale):
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        x = rng.normal(size=(19, int(fs * seconds) + 1)) * scale
    x[:, rng.integers(0, x.shape[1], 5)] = np.nan
    a = measure_attributes(x, fs)
    assert np.isfinite(list(a.to_dict().values())).all()
    assert 0 <= a.regularity <= 1 and 0 <= a.extent <= 1 and 0 <= a.suppressed <= 1
    assert acns_term(a).label in CLASSES
    assert a == measure_attributes(x, fs)


@pytest.mark.parametrize("shape, fs", [((18, 2000), 200), ((19, 100), 200), ((19,), 200), ((19, 2000), 20), ((19, 2000), float("nan"))])
def test_refuses(shape, fs):
    with pytest.raises(InputError):
        measure_attributes(np.zeros(shape), fs)


def test_a_few_filters_long():
    "Measuring takes about 4.5 times as long as the one filter in it; the two are timed in turn."
    x = simulate_recording(0, "lpd", 10).eeg
    both = [(clock(measure_attributes, x), clock(bandpass, x, 0.5, 20)) for _ in range(9)]
    mine, peer = (min(times) for times in zip(*both))
    assert mine < 15 * peer


def clock(function, *args):
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


LPD = WindowAttributes(rate=1.0, regularity=.6, cycles=10, sharpness=6, laterality=1.2, extent=.4, evolution=0, slope=-2.4, rms=20, suppressed=0, duration=10)


@pytest.mark.parametrize("change, label", [
    ({}, "lpd"), ({"laterality": -1.2}, "lpd"), ({"laterality": .79}, "gpd"), ({"sharpness": 2}, "lrda"), ({"sharpness": 2, "laterality": .1}, "grda"), ({"cycles": 5.9}, "other"),
    ({"regularity": .1}, "other"), ({"rate": 2.5}, "lpd"), ({"rate": 2.6}, "seizure"), ({"rate": 2.6, "duration": 9}, "lpd"), ({"evolution": .5}, "seizure"),
    ({"sharpness": 2, "rate": 4.1}, "other"), ({"rate": .4}, "other")])
def test_rules_as_written(change, label):
    term = acns_term(replace(LPD, **change))
    assert term.label == label and term.because
    assert all(r.words and r.source.startswith("Hirsch") for r in RULES.values())


def test_modifiers_name_side_and_rate():
    assert acns_term(LPD).modifiers == ("1.0/s", "left")
    assert acns_term(replace(LPD, laterality=-1, suppressed=.9)).modifiers == ("suppression", "1.0/s", "right")


def test_rules_find_what_was_simulated():
    "Far from the experts, and far above chance: clear patterns without artefacts."
    hits = {c: np.mean([acns_term(measure_attributes(simulate_recording(5, c, 50, patient=i, artefacts=False).eeg[:, 4000:6000])).label == c for i in range(10)])
            for c in ("lpd", "gpd", "lrda", "grda", "other")}
    assert np.mean(list(hits.values())) > .5, hits


def test_flat_has_no_rhythm():
    assert leading_cycle(np.zeros(100), 100.)[2] == 0
    assert acns_term(measure_attributes(np.zeros((19, 2000)))).label == "other"


@pytest.mark.parametrize("rate", [.6, 1.0, 1.4, 2.2, 3.1, 6.0])
def test_the_typical_rate_is_no_fraction_of_itself(rate):
    "Every third cycle is louder: the rate is still that of all of them."
    phase = 2 * np.pi * rate * T
    wave = 30 * np.sin(phase) * (1 + .6 * (np.floor(rate * T) % 3 == 0))
    a = measure_attributes(page(wave))
    assert abs(a.rate / rate - 1) < .04 and 0 < a.certainty <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([50., 100., 128., 200., 256., 500.]), st.floats(3, 15))
def test_there_is_one_rate(seed, fs, seconds):
    "Whatever the gain, the polarity, and the electrodes that are dead or missing."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(19, 1)) * 30 * np.sin(2 * np.pi * 2.1 * np.arange(int(fs * seconds)) / fs) + rng.normal(0, 3, (19, int(fs * seconds)))
    x[rng.choice(19, 3, replace=False)] = rng.choice([0, np.nan])
    a, b = measure_attributes(x, fs), measure_attributes(-7 * x, fs)
    assert abs(a.rate - 2.1) < .1 and 0 < a.certainty <= 1
    np.testing.assert_allclose((b.rate, b.certainty), (a.rate, a.certainty), rtol=1e-3)


def test_silence_has_no_rate():
    flat, gone = measure_attributes(np.zeros((19, 2000))), measure_attributes(np.full((19, 2000), np.nan))
    assert (flat.rate, flat.certainty) == (0.0, 0.0) == (gone.rate, gone.certainty)
    for bad in (np.zeros((18, 2000)), np.zeros((19, 100)), np.zeros(19)):
        with pytest.raises(InputError): measure_attributes(bad)


def test_evidence_is_how_alike_the_wave_is():
    "At a whole cycle a sinusoid is itself, at half of one its opposite."
    evidence = rate_evidence(np.sin(2 * np.pi * 2.0 * np.arange(1000) / 100)[None] * np.arange(1, 17)[:, None], 100.)
    at = np.abs(GRID - 2).argmin()
    np.testing.assert_allclose(evidence[at, [0, 2, 6, 9, 10]], [0, -1, 1, -1, 1], atol=.1)
    assert evidence.shape == (240, 34) and np.allclose(evidence[:, 33], np.log(GRID))


def test_a_fit_finds_the_weights_that_made_the_rates():
    rng = np.random.default_rng(0)
    evidence, weights = rng.normal(size=(600, len(GRID), 3)), np.array([4., -2., 0.])
    rates = np.array([rng.choice(GRID, p=p) for p in rate_probabilities(evidence, weights)])
    found = fit_rate(evidence, rates, decay=0)
    assert np.corrcoef(found, weights)[0, 1] > .99


@pytest.mark.slow
def test_rate_and_side_of_simulated_patterns():
    """Ten seconds without artefacts that hold at least six cycles of a clear pattern, 24 patients of each class and nine seeds that no weight was fitted on:
    the rate is within 0.25 Hz of the typical interval's in nine of ten (a single seed: .86 to .97), and the side is right in nine of ten wherever one side clearly has more."""
    rates, sides = [], []
    for seed, pattern, patient in itertools.product((77, *range(2000, 2008)), ("lpd", "gpd", "lrda", "grda", "seizure"), range(24)):
        truth = simulate(seed, pattern, 30, patient=patient, artefacts=False)
        cycles = truth.cycles[(truth.cycles >= 10) & (truth.cycles < 20)]
        if len(cycles) < 6: continue
        a, alone = measure_attributes(truth.recording.eeg[:, 2000:4000]), (apply_montage(truth.pattern[:, 2000:4000]) ** 2).sum(1)
        rates.append(abs(a.rate - 1 / np.median(np.diff(cycles))) <= .25)
        side = np.log(alone[[*range(4), *range(8, 12)]].sum() / alone[[*range(4, 8), *range(12, 16)]].sum())
        if abs(side) > RULES["lateralized"].limit: sides.append(np.sign(a.laterality) == np.sign(side))
    assert len(rates) > 900 and np.mean(rates) >= .9 and len(sides) > 450 and np.mean(sides) >= .9


def test_side_of_published_lpd(real):
    "Three LPD windows of a public repository: the louder side is the one that is described. (Their rates are not asserted.)"
    for window in json.loads((real / "attributes/figure_lpd_examples_data.json").read_text()):
        a = measure_attributes(np.array(window["mono_data"]), 100.)
        assert ("left" if a.laterality > 0 else "right") == window["pred_lat"] and f"{window['pred_lat']} sided" in window["verbal_description"]
