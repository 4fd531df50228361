"""Predictor, reports and exports: the same answer on every way, nothing unsafe in what is written."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hms_brain.core import CHANNELS, CLASSES, HMS_COLUMNS, InputError
from hms_brain.exports import safe_cell, write_csv, write_edf, write_prediction, write_report
from hms_brain.predict import Predictor, as_votes, predict_file, read_around
from hms_brain.records import Issue, read_recording
from hms_brain.simulate import simulate_recording


@pytest.fixture(scope="module")
def predictor():
    return Predictor(threads=1)


@pytest.fixture(scope="module")
def recording():
    return simulate_recording(seed=11, pattern="grda", duration=120)


def vector(prediction):
    return np.array([prediction.probabilities[c] for c in CLASSES])


def test_batch_equals_single(predictor, recording):
    centres = (25, 40.5, 60, 95)
    inputs = [predictor.inputs(recording, at) for at in centres]
    together = predictor.probabilities(inputs)
    for at, row in zip(centres, together): np.testing.assert_allclose(vector(predictor(recording, at)), row, atol=1e-6)


def test_the_same_bytes_give_the_same_answer(predictor, recording):
    first, second = predictor(recording), predictor(recording)
    assert first.probabilities == second.probabilities and first.quality == second.quality


def test_every_format_gives_the_same_answer(predictor, recording, tmp_path):
    "Parquet and CSV hold the same numbers; EDF rounds to 16 bits."
    window = replace(recording, signal=np.nan_to_num(recording.signal[:, :10000]), issues=())
    table = pd.DataFrame(window.signal.T, columns=list(HMS_COLUMNS))
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    write_edf(tmp_path / "a.edf", window)
    want = vector(predictor(window))
    for name, tolerance in (("a.parquet", 1e-6), ("a.csv", 1e-5), ("a.edf", 0.02)):
        np.testing.assert_allclose(vector(predict_file(tmp_path / name, predictor)[0]), want, atol=tolerance)


@pytest.mark.parametrize("spoil, reason", [(lambda x: x * 0, "flat"), (lambda x: x * np.nan, ""), (lambda x: x * 1e-6, ""), (lambda x: x * 1e3, ""),
                                           (lambda x: np.clip(x, -2, 2), "")])
def test_rubbish_gets_the_prior(predictor, recording, spoil, reason):
    spoilt = replace(recording, signal=spoil(recording.signal).astype(np.float32))
    answer = predictor(spoilt)
    assert answer.abstained and answer.predicted is None and reason in " ".join(answer.reasons)
    np.testing.assert_allclose(vector(answer), predictor.bundle.prior / predictor.bundle.prior.sum())
    json.dumps(answer.to_dict(), allow_nan=False)


def test_only_the_surroundings_are_read(tmp_path):
    long = simulate_recording(seed=2, pattern="lpd", duration=1500)
    write_edf(tmp_path / "long.edf", long)
    around, centre = read_around(tmp_path / "long.edf", at=1200.0)
    assert around.duration <= 640.5 and around.start + centre == 1200.0
    whole = read_recording(tmp_path / "long.edf")
    a = int(around.start * 200)
    np.testing.assert_allclose(around.signal[:, :2000], whole.signal[:, a:a + 2000], atol=1e-3)
    for at in (-1.0, np.nan, 1e6):
        with pytest.raises(InputError): read_around(tmp_path / "long.edf", at=at)


def test_labels_cannot_run(predictor, recording, tmp_path):
    evil = "<script src=//a></script>"
    marked = replace(recording, issues=(Issue("duplicate", evil, (evil,)),))
    write_report(tmp_path / "r.html", predictor(marked), marked, title=evil)
    page = (tmp_path / "r.html").read_text()
    assert evil not in page and "&lt;script src=//a&gt;" in page
    for text in ("=1+1", "+1", "-1", "@x", "\tx"): assert safe_cell(text).startswith("'")
    assert safe_cell("Fp1") == "Fp1" and safe_cell(-1.5) == -1.5


def test_report_needs_no_network(predictor, recording, tmp_path):
    import re

    write_report(tmp_path / "r.html", predictor(recording), recording)
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?(https?:)?//", page)
    assert "Research use only" in page and "simulated EEG only" in page


def test_csv_of_many(predictor, recording, tmp_path):
    write_csv(tmp_path / "p.csv", [predictor(recording, at) for at in (30, 60)])
    table = pd.read_csv(tmp_path / "p.csv")
    assert list(table.at_seconds) == [30, 60] and np.allclose(table[list(CLASSES)].sum(axis=1), 1)
    with pytest.raises(InputError, match="docx"): write_prediction(tmp_path / "p.docx", predictor(recording), recording)


def test_nothing_is_not_written(tmp_path):
    short = replace(simulate_recording(seed=1, pattern="lpd", duration=50), signal=np.zeros((20, 199), np.float32))
    with pytest.raises(InputError, match="no answer to write"): write_csv(tmp_path / "p.csv", [])
    with pytest.raises(InputError, match="less than a second"): write_edf(tmp_path / "r.edf", short)
    assert not list(tmp_path.iterdir())


def test_votes_are_probabilities():
    assert sum(as_votes(np.ones(6, np.float32) / 3).values()) == pytest.approx(1, abs=1e-12)
    for bad in (np.zeros(6), np.full(6, np.nan), np.ones(5), np.array([1, -1, 0, 0, 0, 1.0])):
        with pytest.raises(ValueError): as_votes(bad)


def test_mapping_by_hand(predictor, recording, tmp_path):
    names = [f"ch{i}" for i in range(19)]
    pd.DataFrame(recording.eeg[:, :4000].T, columns=names).fillna(0).to_csv(tmp_path / "odd.csv", index=False)
    with pytest.raises(InputError): predict_file(tmp_path / "odd.csv", predictor)
    answer, read = predict_file(tmp_path / "odd.csv", predictor, channel_map=dict(zip(names, CHANNELS)))
    assert read.channel_map["ch0"] == "Fp1" and any(f["kind"] == "short" for f in answer.quality)


def test_the_rate_does_not_change_the_class(predictor):
    "The same EEG sampled at another rate gets the same class in at least 98 % of windows."
    from fractions import Fraction

    from scipy.signal import resample_poly

    from hms_brain.records import from_arrays

    same = []
    for i in range(12):
        at_200 = np.nan_to_num(simulate_recording(seed=i, pattern=CLASSES[i % 6], duration=50).signal)
        want = predictor(from_arrays(at_200, 200, list(HMS_COLUMNS)))
        for fs in (199.7, 256, 500, 512, 1000):
            ratio = Fraction(fs / 200).limit_denominator(2000)
            other = from_arrays(resample_poly(at_200, ratio.numerator, ratio.denominator, axis=1), fs, list(HMS_COLUMNS))
            same.append(predictor(other).predicted == want.predicted)
    assert np.mean(same) >= 0.98


def test_the_packaged_sample_is_what_the_code_simulates():
    "Nothing but the simulator made it: every channel within one step of its 16 bits."
    from hms_brain.cli import sample_path

    made, read = simulate_recording(seed=1, patient=1, pattern="lpd"), read_recording(sample_path())
    step = 2 * np.ceil(np.nanmax(np.abs(made.signal), axis=1)) / 65535 + 1e-3
    assert (np.abs(read.signal - np.nan_to_num(made.signal)).max(axis=1) <= step).all()


def no_brain(kind: str, seed: int) -> np.ndarray:
    "Ten minutes of what is not an EEG, (19, 120000) uV."
    rng, t = np.random.default_rng(seed), np.arange(120_000) / 200
    white = rng.normal(0, 1, (19, len(t)))
    pink = np.fft.irfft(np.fft.rfft(white) / np.sqrt(np.maximum(np.fft.rfftfreq(len(t)), 1e-4)))
    pink /= pink.std()
    mains = rng.gamma(1, 1, (19, 1)) * np.sin(2 * np.pi * 60 * t + rng.normal(0, .2, (19, 1)))
    mixed = rng.normal(0, 1, (19, 5)) @ pink[:5]
    return {"white noise": 20 * white, "pink noise": 20 * pink, "one noise everywhere": 30 * pink[:1] + .5 * white, "few noises, mixed": 12 * mixed,
            "mains": 100 * mains, "mains and amplifier noise": 100 * mains + 2 * white, "nothing but amplifier noise": .5 * white,
            "millivolts": 1e-3 * 30 * mixed, "nanovolts": 1e3 * 30 * mixed, "volts": 1e-6 * 30 * mixed}[kind]


@pytest.mark.parametrize("kind", ["white noise", "pink noise", "one noise everywhere", "few noises, mixed", "mains", "mains and amplifier noise", "nothing but amplifier noise",
                                  "millivolts", "nanovolts", "volts"])
def test_no_confident_pattern_without_a_brain(predictor, recording, kind):
    "Other, low confidence or abstention."
    for seed in range(3):
        eeg = no_brain(kind, seed)
        answer = predictor(replace(recording, signal=np.concatenate([eeg, eeg[:1]]).astype(np.float32), issues=()))
        patterns = {c: p for c, p in answer.probabilities.items() if c != "other"}
        assert answer.abstained or answer.predicted == "other" or max(patterns.values()) < 0.5, answer.probabilities
