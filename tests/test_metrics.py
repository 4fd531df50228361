"""Scores against scipy, scikit-learn and brute force; submissions as Kaggle checks them."""
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr
from scipy.stats import entropy

from hms_brain.core import VOTE_COLUMNS, InputError, rng_for
from hms_brain.metrics import (bootstrap_by_patient, calibration_error, expected_kl, kl_divergence, kl_rows, sampling_floor, score_submission,
                               scores)

counts = st.integers(1, 20).flatmap(lambda n: arrays(int, (n, 6), elements=st.integers(0, 20))).filter(lambda v: (v.sum(1) > 0).all())


def probabilities(n, seed=0, alpha=.5):
    return rng_for(seed, "p").dirichlet(np.full(6, alpha), n)


@settings(max_examples=100, deadline=None)
@given(counts, st.integers(0, 99))
def test_kl_against_scipy_and_a_loop(v, seed):
    y, p = v / v.sum(1, keepdims=True), probabilities(len(v), seed)
    np.testing.assert_allclose(kl_rows(y, p), rel_entr(y, np.clip(p, 1e-15, 1 - 1e-15)).sum(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(kl_rows(y, p), entropy(y, p, axis=1), rtol=1e-6, atol=1e-9)
    total = 0.0
    for a, b in zip(y, p):
        for yk, pk in zip(a, b):
            if yk > 0:
                total += yk * math.log(yk / min(max(pk, 1e-15), 1 - 1e-15))
    assert math.isclose(kl_divergence(y, p), total / len(v), rel_tol=1e-10, abs_tol=1e-12)


def test_kl_clips_and_does_not_renormalise():
    y = np.eye(6)[:1]
    assert kl_divergence(y, np.eye(6)[1:2]) == math.log(1 / 1e-15)
    assert math.isclose(kl_divergence(y, y), 1e-15, rel_tol=.2)
    for bad in (np.full((1, 6), np.nan), np.full((1, 5), .2), np.full(6, 1 / 6)):
        with pytest.raises(ValueError):
            kl_divergence(y, bad)
    with pytest.raises(ValueError, match="no rows"):
        kl_divergence(np.empty((0, 6)), np.empty((0, 6)))


def test_expected_kl_against_enumeration():
    q, n = np.array([.6, .3, .1]), 4
    total = 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            k = np.array([a, b, n - a - b])
            ways = math.factorial(n) / np.prod([math.factorial(i) for i in k])
            total += ways * np.prod(q ** k) * rel_entr(k / n, q).sum()
    np.testing.assert_allclose(expected_kl(q[None], n), total, rtol=1e-12)


def test_floor_is_right_where_the_prior_holds():
    q = rng_for(1, "q").dirichlet(np.full(6, .15), 6000)
    for n in (1, 2, 3, 9, 14):
        v = np.array([rng_for(1, "v", n, i).multinomial(n, p) for i, p in enumerate(q)])
        assert abs((kl_rows(v / n, q) - sampling_floor(v)).mean()) < .03
    with pytest.raises(InputError, match="counts"):
        sampling_floor([[.5, .5, 0, 0, 0, 0]])


def test_floor_on_real_votes(real):
    from hms_brain.catalog import label_runs, read_train
    runs = label_runs(read_train(real / "hms"))
    floor = sampling_floor(runs[runs["n_votes"] >= 10][list(VOTE_COLUMNS)].to_numpy()).mean()
    assert .08 < floor < .15


def test_scores_against_sklearn():
    m = pytest.importorskip("sklearn.metrics")
    q = probabilities(400, 3, .3)
    v = np.array([rng_for(3, "v", i).multinomial([2, 3, 14][i % 3], p) for i, p in enumerate(q)])
    p = .8 * q + .2 * probabilities(400, 4)
    s, t, g = scores(v, p), v.argmax(1), p.argmax(1)
    for key, expected in dict(accuracy=m.accuracy_score(t, g), balanced_accuracy=m.balanced_accuracy_score(t, g), kappa=m.cohen_kappa_score(t, g),
                              mcc=m.matthews_corrcoef(t, g), macro_f1=m.f1_score(t, g, average="macro"), brier=((p - np.eye(6)[t]) ** 2).sum(1).mean(),
                              macro_auroc=m.roc_auc_score(t, p, multi_class="ovr"), macro_auprc=m.average_precision_score(np.eye(6)[t], p)).items():
        assert math.isclose(s[key], expected, rel_tol=1e-9), key
    precision, recall, f1, support = m.precision_recall_fscore_support(t, g, labels=range(6))
    for k, row in enumerate(s["per_class"].values()):
        np.testing.assert_allclose([row["precision"], row["recall"], row["f1"], row["support"]], [precision[k], recall[k], f1[k], support[k]], rtol=1e-9)
    assert math.isclose(sum(x["kl"] * x["n"] for x in s["strata"].values()) / 400, s["kl"])
    assert s["undefined"] == {} and set(s["strata"]) == {"1-2", "3-9", ">=10"}


def test_calibration_error_against_a_loop():
    p, t = probabilities(300, 5), rng_for(5, "t").integers(6, size=300)
    total, c = 0.0, p.max(1)
    for b in range(15):
        at = (c > b / 15) & (c <= (b + 1) / 15)
        if at.any():
            total += at.mean() * abs((p.argmax(1) == t)[at].mean() - c[at].mean())
    assert math.isclose(calibration_error(t, p), total, rel_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 99))
def test_no_nan_comes_out(v, seed):
    s = scores(v, probabilities(len(v), seed), patient=np.arange(len(v)) // 2, n_boot=5)
    json.dumps(s, allow_nan=False)
    nones = {f"{c}.{k}" for c, row in s["per_class"].items() for k, x in row.items() if x is None} | {k for k, x in s.items() if x is None}
    assert nones <= set(s["undefined"]), nones - set(s["undefined"])


def test_true_probabilities_have_no_floor():
    s = scores(np.full((2, 6), 1 / 6), probabilities(2))
    assert s["kl_floor"] is None and s["kl_excess"] is None and s["strata"] == {} and "number of votes" in s["undefined"]["kl_floor"]


def test_bootstrap():
    y, patient = rng_for(0, "y").normal(size=600), np.repeat(np.arange(60), 10)
    y = y + rng_for(0, "shift").normal(size=60)[patient]
    b = bootstrap_by_patient(lambda y, p: y.mean(), y, y, patient, n=2000)
    by_patient = y.reshape(60, 10).mean(1)
    assert math.isclose(b["high"] - b["low"], 2 * 1.96 * by_patient.std() / 60 ** .5, rel_tol=.1)
    rows = bootstrap_by_patient(lambda y, p: y.mean(), y, y, np.arange(600), n=2000)
    assert b["high"] - b["low"] > 1.5 * (rows["high"] - rows["low"])  # patients, not windows
    assert b == bootstrap_by_patient(lambda y, p: y.mean(), y, y, patient, n=2000)
    never = bootstrap_by_patient(lambda y, p: None, y, y, patient, n=10)
    assert never["estimate"] is never["low"] is None and never["n_undefined"] == 10


@pytest.fixture
def files(tmp_path):
    def write(name, ids, values, **extra):
        pd.DataFrame(values, columns=list(VOTE_COLUMNS)).assign(eeg_id=ids, **extra)[["eeg_id", *extra, *VOTE_COLUMNS]].to_csv(tmp_path / name, index=False)
        return tmp_path / name
    return write


def test_submission(files):
    v, p = np.array([[3, 0, 0, 0, 0, 0], [0, 7, 7, 0, 0, 0], [1, 1, 1, 1, 1, 1]]), probabilities(3, 7)
    truth, sub = files("truth.csv", [5, 6, 4294958358], v), files("sub.csv", [4294958358, 5, 6], p[[2, 0, 1]])
    assert math.isclose(score_submission(truth, sub)["kl"], kl_divergence(v / v.sum(1, keepdims=True), p), rel_tol=1e-14)
    soft = files("soft.csv", [5, 6, 4294958358], v / v.sum(1, keepdims=True))
    assert math.isclose(score_submission(soft, sub)["kl"], score_submission(truth, sub)["kl"], rel_tol=1e-14)
    repeated = files("train.csv", [5, 5, 6, 4294958358], v[[0, 0, 1, 2]], patient_id=1)
    assert score_submission(repeated, sub) == score_submission(truth, sub)


U = np.full((2, 6), 1 / 6)


@pytest.mark.parametrize("ids, values, words", [
    ([5], U[:1], ["1 of 2 ids are missing: 6"]), ([5, 6, 6], np.full((3, 6), 1 / 6), ["6 stands there more than once"]),
    ([5, 6, 7], np.full((3, 6), 1 / 6), ["not in the truth: 7"]), ([5, 6], U * [[1], [np.nan]], ["eeg_id 6", "NaN"]),
    ([5, 6], U * [[1], [np.inf]], ["eeg_id 6", "infinite"]), ([5, 6], [[1 / 6] * 6, [.5, .6, -.1, 0, 0, 0]], ["gpd_vote of eeg_id 6 is below 0"]),
    ([5, 6], [[1 / 6] * 6, [1.000001, 0, 0, 0, 0, 0]], ["seizure_vote of eeg_id 6 is above 1"]), ([5, 6], U * [[1], [1.0001]], ["eeg_id 6 sums to 1.0001"]),
    ([5, 6], U * [[1], [0]], ["sums to 0"]), ([5, 6], [["a"] * 6, [0] * 6], ["not a number"]), ([], np.empty((0, 6)), ["no rows"]),
])
def test_bad_submissions(files, ids, values, words):
    truth = files("truth.csv", [5, 6], [[3, 0, 0, 0, 0, 0], [0, 7, 7, 0, 0, 0]])
    with pytest.raises(InputError) as e:
        score_submission(truth, files("sub.csv", ids, values))
    assert all(w in str(e.value) for w in ["sub.csv", *words]) and "\n" not in str(e.value), str(e.value)


def test_kaggles_tolerance(files):
    truth = files("truth.csv", [5, 6], [[3, 0, 0, 0, 0, 0], [0, 7, 7, 0, 0, 0]])
    for scale in (1 + 9e-6, 1 - 9e-6):
        assert np.allclose((U * scale).sum(1), 1)
        score_submission(truth, files("sub.csv", [5, 6], U * scale))


def test_bad_truths(files, tmp_path):
    sub = files("sub.csv", [5, 6], U)
    for v, words in (([[3, 0, 0, 0, 0, 0], [0] * 6], "eeg_id 6"), ([[3, 0, 0, 0, 0, 0], [-1, 2, 0, 0, 0, 0]], "eeg_id 6"), ([[.5, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], "sums to 0.5")):
        with pytest.raises(InputError, match=words):
            score_submission(files("truth.csv", [5, 6], v), sub)
    with pytest.raises(InputError, match="different votes"):
        score_submission(files("truth.csv", [5, 5, 6], [[3, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]), sub)
    with pytest.raises(InputError, match="is not there"):
        score_submission(tmp_path / "none.csv", sub)
    (tmp_path / "cols.csv").write_text("eeg_id,seizure_vote\n5,1\n")
    with pytest.raises(InputError, match="lpd_vote is missing"):
        score_submission(tmp_path / "cols.csv", sub)
    with pytest.raises(InputError, match="extra is not known"):
        score_submission(files("truth.csv", [5, 6], U), files("more.csv", [5, 6], U, extra=1))
