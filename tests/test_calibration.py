"""The simulator against published figures: the arithmetic of the figures against oracles, then the table on a fixed sample."""
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from hms_brain.calibration import CONFUSION, agreement, calibration_sample, calibration_table, precision, signal_targets, vote_targets

CORE = ["votes >= 10: leave-one-out", "1-2 votes: unanimous", ">=10 votes: unanimous", "3-9 votes: prior seizure", "slope: mean", "slope: SD", "adjacent electrodes: correlation",
        "gpd: |ln left/right|", "grda: |ln left/right|", "gpd: bipolar RMS, uV", "grda: bipolar RMS, uV", "other: bipolar RMS, uV",
        *(f"{band} Hz: 50 %, dB" for band in ("0.5-1.5", "1.5-3", "3-5", "5-8", "8-13", "13-20"))]


# the figures
def test_agreement_of_the_like_minded_and_of_the_random():
    assert agreement(10 * np.eye(6, dtype=int)) == pytest.approx({"entropy": 0, "top share >= .8": 1, "unanimous": 1, "pairwise kappa": 1, "majority kappa": 1, "leave-one-out": 1}, abs=1e-6)
    random = np.random.default_rng(0).multinomial(14, np.ones(6) / 6, 4000)
    assert abs(agreement(random)["pairwise kappa"]) < .01


def test_pairwise_kappa_is_cohens_between_exchangeable_raters():
    rng = np.random.default_rng(1)
    calls = np.array([rng.choice(6, 2, p=p) for p in rng.dirichlet(np.full(6, .4), 30_000)])
    votes = np.stack([(calls == k).sum(1) for k in range(6)], 1)
    assert abs(agreement(votes)["pairwise kappa"] - cohen_kappa_score(*calls.T)) < .01


def test_leave_one_out_by_brute_force():
    votes = np.random.default_rng(2).multinomial(7, [.4, .3, .1, .1, .05, .05], 50)
    hits = []
    for row in votes:
        calls = np.repeat(np.arange(6), row)
        hits.append(np.mean([np.bincount(np.delete(calls, j), minlength=6).argmax() == c for j, c in enumerate(calls)]))
    assert agreement(votes)["leave-one-out"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("true", [6.0, 20.0])
def test_precision_is_recovered(true):
    rng = np.random.default_rng(3)
    votes = np.array([rng.multinomial(14, p) for p in rng.dirichlet(true * np.array([.6, .1, .1, .1, .05, .05]), 6000)])
    assert abs(precision(votes) / true - 1) < .12
    assert np.isnan(precision(votes[:5]))


def test_targets_are_consistent():
    np.testing.assert_allclose(CONFUSION.sum(1), 1, atol=.011)
    assert all(tolerance > 0 for _, tolerance in (vote_targets() | signal_targets()).values())
    assert not set(vote_targets()) & set(signal_targets())


# the simulator
@pytest.fixture(scope="module")
def sample():
    return calibration_sample(patients=36, seed=0)


def test_most_figures_are_within_tolerance(sample):
    table = calibration_table(sample)
    assert list(table) == ["figure", "target", "tolerance", "simulated", "ok"] and table["figure"].is_unique
    missed = table[~table["ok"]].round(2)
    assert table["ok"].mean() >= .75, missed.to_string()
    core = table.set_index("figure").loc[CORE]
    assert core["ok"].mean() >= .85, core[~core["ok"]].to_string()


def test_sample_is_seeded(sample):
    again = calibration_sample(patients=2, seed=0)
    first = sample[sample["patient"] < 2]
    assert len(again) == len(first)
    pd.testing.assert_frame_equal(again[["rms", "slope", "rate", "n_votes"]], first[["rms", "slope", "rate", "n_votes"]])
    assert all(np.array_equal(a, b) for a, b in zip(again["votes"], first["votes"]))
