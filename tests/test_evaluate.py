"Scores and their intervals against scikit-learn and plain loops; comparisons paired by patient; tables that cannot be used."
import json

import numpy as np
import pandas as pd
import pytest

from hms_brain.catalog import soft_votes
from hms_brain.core import CLASSES, VOTE_COLUMNS, InputError, rng_for
from hms_brain.evaluate import COMPARED, arrays, compare_models, curve_points, evaluate, load_answers, load_beside, reliability, risk_coverage, subgroups
from hms_brain.metrics import PROBABILITIES, bootstrap_by_patient, confusion, kl_rows, patient_draws, sampling_floor, scores, soft_calibration_error, weighted_scores

m = pytest.importorskip("sklearn.metrics")
N = 240


def draw(seed, mix=.7, digits=None):
    "Votes, probabilities (rounded: with ties) and patients of unequal size."
    rng = rng_for(seed, "evaluate tests")
    q = rng.dirichlet(np.full(6, .3), N)
    votes = np.array([rng.multinomial([2, 3, 14][i % 3], x) for i, x in enumerate(q)])
    p = mix * q + (1 - mix) * rng.dirichlet(np.ones(6), N)
    if digits: p = np.round(p, digits) + 1e-3
    return votes, p / p.sum(1, keepdims=True), rng.integers(0, 25, N)


def table(seed=0, mix=.7, **more):
    votes, p, patient = draw(seed, mix)
    return load_answers(pd.DataFrame(votes, columns=list(VOTE_COLUMNS)).assign(**dict(zip(PROBABILITIES, p.T)), patient_id=patient, label_id=np.arange(N), **more))


def by_sklearn(v, p):
    t, g, y = v.argmax(1), p.argmax(1), soft_votes(v)
    precision, recall, f1, support = m.precision_recall_fscore_support(t, g, labels=range(6), zero_division=0)
    out = {"kl": kl_rows(y, p).mean(), "kl_excess": (kl_rows(y, p) - sampling_floor(v)).mean(), "accuracy": m.accuracy_score(t, g), "kappa": m.cohen_kappa_score(t, g), "mcc": m.matthews_corrcoef(t, g),
           "balanced_accuracy": recall[support > 0].mean(), "macro_f1": f1[support > 0].mean(), "brier": ((p - np.eye(6)[t]) ** 2).sum(1).mean(),
           "ece_soft": np.mean([[abs((y[:, k] - p[:, k])[np.ceil(p[:, k] * 15).clip(1, 15) == b].sum()) for b in range(1, 16)] for k in range(6)], axis=0).sum() / len(p)}
    for k, c in enumerate(CLASSES):
        if not 0 < support[k] < len(t): continue
        out |= {f"{c}.recall": recall[k], f"{c}.auroc": m.roc_auc_score(t == k, p[:, k]), f"{c}.auprc": m.average_precision_score(t == k, p[:, k])}
        if (g == k).any(): out[f"{c}.precision"] = precision[k]
    return out


@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "tied"])
def test_every_weighting_is_a_resampled_table(digits):
    "All scores of all bootstrap samples at once are those of the repeated rows."
    votes, p, patient = draw(1, digits=digits)
    index, drawn = patient_draws(patient, 12, seed=3)
    fast = weighted_scores(votes, p, index, drawn)
    for b, times in enumerate(drawn):
        at = np.repeat(np.arange(N), times[index])
        for key, value in by_sklearn(votes[at], p[at]).items():
            assert fast[key][b] == pytest.approx(value, abs=1e-9), (key, b)


def test_intervals_are_those_of_the_plain_bootstrap():
    votes, p, patient = draw(2)
    found = scores(votes, p, patient, n_boot=60)["intervals"]
    plain = {"mcc": lambda v, q: m.matthews_corrcoef(v.argmax(1), q.argmax(1)), "macro_auroc": lambda v, q: m.roc_auc_score(v.argmax(1), q, multi_class="ovr"),
             "gpd.auprc": lambda v, q: m.average_precision_score(v.argmax(1) == 2, q[:, 2]), "ece_soft": lambda v, q: soft_calibration_error(soft_votes(v), q)}
    for key, fn in plain.items():
        slow = bootstrap_by_patient(fn, votes, p, patient, n=60)
        assert [found[key][k] for k in ("estimate", "low", "high")] == pytest.approx([slow[k] for k in ("estimate", "low", "high")]), key


def test_confusion_against_sklearn():
    votes, p, _ = draw(3)
    t, g = votes.argmax(1), p.argmax(1)
    for kind, how in (("count", None), ("row", "true"), ("column", "pred")):
        np.testing.assert_allclose(confusion(votes, p, kind), np.nan_to_num(m.confusion_matrix(t, g, labels=range(6), normalize=how)))
    np.testing.assert_allclose(confusion(votes, p, "soft").sum(1), 1)
    with pytest.raises(InputError, match="did you mean row"): confusion(votes, p, "rows")


def test_curves_against_sklearn():
    votes, p, _ = draw(4, digits=2)
    for k in range(6):
        line, positive = curve_points(p[:, k], votes.argmax(1) == k, most=10_000), votes.argmax(1) == k
        fpr, tpr, _ = m.roc_curve(positive, p[:, k], drop_intermediate=False)
        np.testing.assert_allclose([line["fpr"], line["tpr"]], [fpr, tpr])
        precision, recall, _ = m.precision_recall_curve(positive, p[:, k])
        np.testing.assert_allclose([line["precision"], line["tpr"]], [precision[::-1], recall[::-1]])
        short = curve_points(p[:, k], positive, most=20)
        assert len(short["fpr"]) <= 21 and set(short["fpr"]) <= set(line["fpr"]) and short["tpr"][-1] == 1
    assert curve_points(p[:, 0], np.ones(N, bool)) is None


def test_reliability_and_risk_by_loops():
    votes, p, patient = draw(5)
    index, drawn = patient_draws(patient, 20)
    y = soft_votes(votes)
    for row in reliability(votes, p, index, drawn)["other"]:
        at = np.ceil(p[:, 5] * 10) == np.ceil(row["said"] * 10)
        assert row["windows"] == at.sum() and row["said"] == pytest.approx(p[at, 5].mean()) and row["came"] == pytest.approx(y[at, 5].mean())
        known = [np.average(y[at, 5], weights=d[index][at]) for d in drawn if d[index][at].sum()]
        assert [row["low"], row["high"]] == pytest.approx(np.quantile(known, [.025, .975]))
    risk = risk_coverage(votes, p, index, drawn)
    order, wrong = np.argsort(-p.max(1)), votes.argmax(1) != p.argmax(1)
    assert risk["aurc"] == pytest.approx(np.mean([wrong[order[:i]].mean() for i in range(1, N + 1)]))
    for point in risk["points"]: assert point["error"] == pytest.approx(wrong[order[:round(point["coverage"] * N)]].mean())


def test_paired_bootstrap_by_brute_force():
    a, b = table(6, .6), table(6, .8)
    rows = {r["score"]: r for r in compare_models({"a": a, "b": b.sample(frac=1, random_state=1)}, n_boot=40, seed=5)}
    (v, p), (_, q) = arrays(a), arrays(b)
    index, drawn = patient_draws(a["patient_id"], 40, 5)
    for key, fn in {"kl": lambda at: (kl_rows(soft_votes(v), q) - kl_rows(soft_votes(v), p))[at].mean(), "accuracy": lambda at: ((q.argmax(1) == v.argmax(1)) * 1. - (p.argmax(1) == v.argmax(1)))[at].mean(),
                    "macro_auroc": lambda at: m.roc_auc_score(v[at].argmax(1), q[at], multi_class="ovr") - m.roc_auc_score(v[at].argmax(1), p[at], multi_class="ovr")}.items():
        gaps = [fn(np.repeat(np.arange(N), d[index])) for d in drawn]
        assert rows[key]["difference"] == pytest.approx(fn(np.arange(N))) and [rows[key]["low"], rows[key]["high"]] == pytest.approx(np.quantile(gaps, [.025, .975]))
        assert rows[key]["better"] == pytest.approx(np.mean([(g < 0) if key == "kl" else (g > 0) for g in gaps]))
    assert set(rows) == set(COMPARED)


def test_models_are_compared_on_shared_windows_only():
    a, b = table(7), table(7).iloc[40:]
    assert compare_models({"a": a, "b": b}, n_boot=5)[0]["windows"] == N - 40
    with pytest.raises(InputError, match="share no window"): compare_models({"a": a.iloc[:40], "b": b}, n_boot=5)
    with pytest.raises(InputError, match="votes differ"): compare_models({"a": a, "b": table(8)}, n_boot=5)
    with pytest.raises(InputError, match="two or more"): compare_models({"a": a})


def test_tables_of_one_name_are_all_compared(tmp_path):
    tables = {}
    for k, folder in enumerate("abc"):
        (tmp_path / folder / "run").mkdir(parents=True)
        tables[folder] = table(7, mix=.7 - k / 10)
        tables[folder].to_parquet(tmp_path / folder / "run/validation.parquet")
    first = load_answers(tmp_path / "a/run")
    beside = load_beside(first, [tmp_path / "b/run", tmp_path / "c/run"])
    assert list(beside) == ["run", "run (2)", "run (3)"] and beside["run"] is first
    for got, folder in zip(beside.values(), "abc"): np.testing.assert_allclose(arrays(got)[1], arrays(tables[folder])[1])


def test_no_bootstrap_no_intervals():
    whole, bare = evaluate(table(13), n_boot=5), evaluate(table(13), n_boot=0)
    json.dumps(bare, allow_nan=False)
    assert bare["kl"] == whole["kl"] and bare["risk_coverage"]["points"][9]["error"] == whole["risk_coverage"]["points"][9]["error"]
    assert {v["low"] for v in bare["intervals"].values()} == {None} and bare["intervals"]["kl"]["n_patients"] == whole["patients"]
    row = compare_models({"a": table(7), "b": table(7, mix=.5)}, n_boot=0)[0]
    assert row["low"] is None and row["better"] is None and row["difference"] == row["value"] - row["first"]


def test_subgroups_are_parts():
    t = table(9, simulated=np.arange(N) % 3 == 0, ward=["a", "b", "c", "d"] * (N // 4))
    rows = subgroups(t, ["simulated", "ward"], n_boot=30)
    v, p = arrays(t)
    for value, part in t.groupby("ward"):
        row = next(r for r in rows if r["value"] == value)
        at = part.index
        slow = bootstrap_by_patient(lambda y, _: y.mean(), kl_rows(soft_votes(v), p)[at], p[at], part["patient_id"], n=30)
        assert [row[k] for k in ("kl", "kl_low", "kl_high")] == pytest.approx([slow[k] for k in ("estimate", "low", "high")])
    assert sum(r["windows"] for r in rows if r["by"] == "simulated") == N
    alone = subgroups(t.assign(ward="x", patient_id=1), ["ward"], n_boot=5)[0]
    assert alone["kl_low"] is None and alone["patients"] == 1


def test_evaluation_is_strict_json_whatever_the_table():
    for t in (table(10), table(10).assign(**dict.fromkeys(VOTE_COLUMNS, 0)).assign(lpd_vote=3), table(10).iloc[:1]): json.dumps(evaluate(load_answers(t), n_boot=5), allow_nan=False)
    soft = table(11)
    soft[list(VOTE_COLUMNS)] = soft_votes(arrays(soft)[0])
    found = evaluate(load_answers(soft.drop(columns="stratum")), n_boot=5)
    json.dumps(found, allow_nan=False)
    assert found["kl_excess"] is None and "stratum" not in {r["by"] for r in found["subgroups"]}


def test_tables_that_cannot_be_used(tmp_path):
    t = table(12)
    (tmp_path / "broken.parquet").write_text("no")
    cases = {"no probabilities": t[list(VOTE_COLUMNS)], "no votes": t[PROBABILITIES], "no rows": t.iloc[:0], "sums to": t.assign(p_lpd=.9), "NaN": t.assign(p_lpd=np.nan), "no votes, a negative": t.assign(lpd_vote=-1), "row 3 names no patient": t.assign(patient_id=[None if i == 3 else f"p{i}" for i in range(N)]), "not a number": t.assign(lpd_vote="a"),
             "not readable as parquet": tmp_path / "broken.parquet", "neither validation.parquet": tmp_path, "is not there": tmp_path / "none.csv"}
    for words, source in cases.items():
        with pytest.raises(InputError, match=words) as e: load_answers(source)
        assert "\n" not in str(e.value)
    nobody = load_answers(t.drop(columns="patient_id"))
    assert nobody.attrs["patients_known"] is False and nobody["patient_id"].is_unique
