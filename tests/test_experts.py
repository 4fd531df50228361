"Experts under the curve by brute force, calibration and agreement by hand, the published labels, and speed."
import json
import time

import numpy as np
import pandas as pd
import pytest

from hms_brain.core import CLASSES, InputError, rng_for
from hms_brain.experts import (agreement_table, average_expert, bootstrap_experts, calibration_curve, calibration_index, calibration_table, check_labels, compare_with_experts, experts_under_curve,
                               leave_one_out, operating_points, plurality, read_raters, under_curve, vote_counts)

m = pytest.importorskip("sklearn.metrics")


def draw(seed, n=300, raters=7, digits=None):
    "Raters of different skill, a model between them."
    rng = rng_for(seed, "experts tests")
    true, skill = rng.integers(6, size=n), np.linspace(.5, .95, raters)
    labels = np.where(rng.random((n, raters)) < skill, true[:, None], rng.integers(6, size=(n, raters)))
    labels[rng.random(labels.shape) < .3] = -1
    p = .5 * np.eye(6)[np.where(rng.random(n) < .7, true, rng.integers(6, size=n))] + .5 * rng.dirichlet(np.ones(6), n)
    if digits: p = np.round(p, digits) + 1e-3
    return labels, p / p.sum(1, keepdims=True)


def brute(labels, p, curve):
    "The definition, rater by rater and class by class, with scikit-learn's curves."
    out = {}
    for k, c in enumerate(CLASSES):
        under = []
        for j in range(labels.shape[1]):
            votes = vote_counts(np.delete(labels, j, axis=1))
            top = np.sort(votes, axis=1)
            known, truth = top[:, -1] > top[:, -2], votes.argmax(1)
            rated = known & (labels[:, j] >= 0)
            true, called = truth[rated] == k, labels[rated, j] == k
            if not true.any() or (curve == "roc" and true.all()) or (curve == "pr" and not called.any()): continue
            if curve == "roc":
                fpr, tpr, _ = m.roc_curve(truth[known] == k, p[known, k])
                under.append(called[true].mean() <= np.interp(called[~true].mean(), fpr, tpr) + 1e-12)
            else:
                precision, recall, _ = m.precision_recall_curve(truth[known] == k, p[known, k])
                under.append(true[called].mean() <= np.interp(called[true].mean(), recall[::-1], precision[::-1]) + 1e-12)
        out[c] = 100 * np.mean(under) if under else None
    return out


@pytest.mark.parametrize("curve", ["roc", "pr"])
@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "tied"])
def test_experts_under_the_curve_by_brute_force(curve, digits):
    for seed, n in ((0, 300), (1, 128), (2, 41), (3, 129)):
        labels, p = draw(seed, n, digits=digits)
        assert experts_under_curve(labels, p, curve) == pytest.approx(brute(labels, p, curve)), (seed, n)


@pytest.mark.parametrize("curve", ["roc", "pr"])
def test_weights_are_repeated_windows(curve):
    labels, p = draw(4, 200, digits=1)
    weight = rng_for(4, "weights").integers(0, 4, (5, 200))
    under = under_curve(labels, p, iter([weight[:3].astype(np.float32), weight[3:].astype(np.float32)]), curve)
    for b, w in enumerate(weight):
        at = np.repeat(np.arange(200), w)
        truth = leave_one_out(labels)  # of each window; drawing windows does not change it
        again = under_curve(labels[at], p[at], iter([np.ones((1, len(at)), np.float32)]), curve)[0]
        np.testing.assert_array_equal(under[b], again)
        assert truth.shape == labels.shape


def test_by_hand():
    "Two experts and a third who is always right; the model ranks one positive of two first."
    labels = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 1, 1]])
    p = np.full((4, 6), .01)
    p[:, 0] = [.9, .2, .5, .1]
    p[:, 1] = 1 - p[:, 0] - .04
    # the third expert: truth 0 0 1 1 from the other two; it finds one of two seizures and calls no other window one: (0, .5);
    # the model's ROC is (0, .5) (.5, .5) (.5, 1) (1, 1): at 0 it is .5, so the expert is under it. The first two are tied out of window 1,
    # find the seizure of the rest, (0, 1), and the model does too
    points = operating_points(labels)
    assert points["tpr"][:, 0].tolist() == [1, 1, .5] and points["fpr"][:, 0].tolist() == [0, 0, 0]
    assert experts_under_curve(labels, p)["seizure"] == 100
    worse = p.copy()
    worse[[0, 2], 0] = worse[[2, 0], 0]  # now a negative leads: at 0 the ROC is 0
    worse[:, 1] = 1 - worse[:, 0] - .04
    assert experts_under_curve(labels, worse)["seizure"] == 0
    assert experts_under_curve(labels, p)["gpd"] is None  # nobody ever had one


def test_the_published_labels(real):
    "The figures of the definition on the shared rows of Jing et al. (2023)."
    labels, p, name = read_raters(real / "iiic/expert_votes.parquet")
    assert labels.shape == (5000, 20) and name == "sparcnet"
    assert list(experts_under_curve(labels, p, curve="roc").values()) == [45, 30, 60, 70, 40, 35]
    assert experts_under_curve(labels, p, "roc") == pytest.approx(brute(labels, p, "roc"))
    assert experts_under_curve(labels, p, "pr") == pytest.approx(brute(labels, p, "pr"))


def test_plurality_of_the_others():
    labels, _ = draw(5, 60)
    truth = leave_one_out(labels)
    for i, j in np.ndindex(labels.shape):
        others = [c for r, c in enumerate(labels[i]) if r != j and c >= 0]
        counts = sorted(((others.count(k), k) for k in range(6)), reverse=True)
        assert truth[i, j] == (counts[0][1] if counts[0][0] > counts[1][0] else -1)
    assert plurality(np.array([0, 0, 0, 0, 0, 0])) == -1


def test_calibration_index_by_hand():
    share = np.array([0, 0, .5, 1])
    assert calibration_index([0, 0, 1, 1], share) == pytest.approx(100 * .5 / 2.5)     # over: the most possible is 4 - 1.5
    assert calibration_index([0, 0, 0, 1], share) == pytest.approx(100 * -.5 / 1.5)    # under: the least possible is -1.5
    assert calibration_index([1, 1, 1, 1], share) == pytest.approx(100) and calibration_index([0] * 4, share) == pytest.approx(-100)
    assert calibration_index([0, 1], [.5, .5]) == 0 and calibration_index([1, 0], [1, 0]) == 0
    assert calibration_index([], []) is None
    rng = rng_for(0, "calibration")
    x, called = np.round(rng.random(500), 2), rng.random(500) < .4
    mean, y, n = calibration_curve(called, x)
    s = (n * (y - mean)).sum()
    assert calibration_index(called, x) == pytest.approx(100 * s / ((n * (1 - mean)).sum() if s > 0 else (n * mean).sum()))
    for i, b in enumerate(np.unique(np.clip(np.ceil(x * 10), 1, 10))):
        at = np.clip(np.ceil(x * 10), 1, 10) == b
        assert (n[i], mean[i], y[i]) == (at.sum(), pytest.approx(x[at].mean()), pytest.approx(called[at].mean()))


def test_calibration_of_raters_and_model_by_loops():
    labels, p = draw(6, 120)
    found = calibration_table(labels, p, n_boot=20)
    for k, c in enumerate(CLASSES):
        raters = []
        for j in range(labels.shape[1]):
            others = np.delete(labels, j, axis=1)
            at = (labels[:, j] >= 0) & (others >= 0).any(1)
            raters.append(calibration_index(labels[at, j] == k, (others[at] == k).sum(1) / (others[at] >= 0).sum(1)))
        at = (labels >= 0).any(1)
        model = calibration_index(p[at].argmax(1) == k, (labels[at] == k).sum(1) / (labels[at] >= 0).sum(1))
        assert found[c]["raters"] == pytest.approx(raters, abs=1e-3) and found[c]["model"] == pytest.approx(model, abs=1e-3)
        assert found[c]["worse"] == pytest.approx(100 * np.mean(np.abs(raters) > abs(model))) and found[c]["low"] <= found[c]["high"]


def test_agreement_against_sklearn():
    labels, p = draw(7, 150, raters=4)
    found, said = agreement_table(labels, p), p.argmax(1)
    pairs = [(labels[at, i], labels[at, j]) for i in range(4) for j in range(4) if i != j and (at := (labels[:, i] >= 0) & (labels[:, j] >= 0)).any()]
    truth = leave_one_out(labels)
    majority = [(truth[at, j], labels[at, j]) for j in range(4) if (at := (truth[:, j] >= 0) & (labels[:, j] >= 0)).any()]
    final = plurality(vote_counts(labels))
    cases = {"experts pairwise": pairs, "experts majority": majority, "model pairwise": [(labels[at, j], said[at]) for j in range(4) if (at := labels[:, j] >= 0).any()], "model majority": [(final[final >= 0], said[final >= 0])]}
    for name, both in cases.items():
        assert found[name]["all"]["percent"] == pytest.approx(100 * np.mean([(a == b).mean() for a, b in both])), name
        assert found[name]["all"]["kappa"] == pytest.approx(np.mean([m.cohen_kappa_score(a, b) for a, b in both])), name
        for k, c in enumerate(CLASSES):
            assert found[name][c]["percent"] == pytest.approx(100 * np.mean([(b[a == k] == k).mean() for a, b in both if (a == k).any()]))
            assert found[name][c]["kappa"] == pytest.approx(np.mean([m.cohen_kappa_score(a == k, b == k) for a, b in both]))


def test_the_average_expert_is_the_mean_of_drawn_ones():
    rng = rng_for(8, "average")
    votes = rng.integers(0, 4, (40, 6)) + np.eye(6, dtype=int)[rng.integers(6, size=40)] * 3
    found, hit, true, wrong, false = average_expert(votes), 0., 0., 0., 0.
    for v in votes:
        for a in range(6):
            rest = v - np.eye(6, dtype=int)[a]
            if not v[a] or (t := plurality(rest)) < 0: continue
            w = v[a] / v.sum()
            true, hit, false, wrong = true + w * (t == 1), hit + w * (t == 1 and a == 1), false + w * (t != 1), wrong + w * (t != 1 and a == 1)
    assert found["tpr"]["lpd"] == pytest.approx(hit / true) and found["fpr"]["lpd"] == pytest.approx(wrong / false) and found["precision"]["lpd"] == pytest.approx(hit / (hit + wrong))
    with pytest.raises(InputError, match="two votes"): average_expert([[1, 0, 0, 0, 0, 0]])


def test_everything_is_strict_json_and_intervals_are_ordered():
    labels, p = draw(9, 90)
    labels[:, 3], labels[labels == 4] = -1, -1  # one never rated; nobody ever said GRDA
    found = compare_with_experts(labels, p, n_boot=10, patient=np.arange(90) // 3)
    json.dumps(found, allow_nan=False)
    assert found["roc"]["grda"]["estimate"] is None and found["calibration"]["lpd"]["raters"][3] is None
    assert all(v["low"] <= v["median"] <= v["high"] for v in found["roc"].values() if v["estimate"] is not None)
    assert bootstrap_experts(labels, p, n_boot=10) == bootstrap_experts(labels, p, n_boot=10)
    bare = compare_with_experts(labels, p, n_boot=0)
    assert bare["pr"]["lpd"] == found["pr"]["lpd"] | dict.fromkeys(("median", "low", "high"))


def test_labels_that_cannot_be_used(tmp_path):
    labels, p = draw(10, 20)
    (tmp_path / "broken.parquet").write_text("no")
    for words, call in {"shape": lambda: check_labels([0, 1]), "not a class": lambda: check_labels([[0, 7]]), "not a class ": lambda: check_labels([["a", "b"]]), "six per window": lambda: experts_under_curve(labels, p[:5]),
                        "not six probabilities": lambda: experts_under_curve(labels, p * 2), "unknown curve": lambda: experts_under_curve(labels, p, "auc"), "holds no rater": lambda: read_raters(pd.DataFrame({"p_lpd": [1.]})), "not a class  ": lambda: read_raters(pd.DataFrame({"expert_1": ["lpd"], "expert_2": ["gpd"]})),
                        "not readable as parquet": lambda: read_raters(tmp_path / "broken.parquet")}.items():
        with pytest.raises(InputError, match=words.strip()): call()


@pytest.mark.slow
def test_a_thousand_bootstraps_of_the_published_size():
    labels, p = draw(11, 35_740, raters=20)
    begin = time.process_time()  # of all threads: other programs do not count
    found = bootstrap_experts(labels, p, n_boot=1000)
    seconds = time.process_time() - begin
    assert all(v["low"] <= v["high"] for v in found.values())
    assert seconds < 60, f"{seconds:.0f} s"
