"Calibration, conformal sets, vote intervals, familiarity: against scipy, brute force, and what theory promises."
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import mahalanobis

from hms_brain.batches import SineCache
from hms_brain.bundle import Bundle, export_bundle
from hms_brain.core import CLASSES, VOTE_COLUMNS, InputError, rng_for
from hms_brain.metrics import kl_divergence
from hms_brain.predict import Predictor
from hms_brain.metrics import softmax
from hms_brain.scaling import Scaling, cross_fit, fit_scaling, logits_of
from hms_brain.simulate import simulate_recording
from hms_brain.uncertainty import (
    FAMILIAR, MANY, conformal_limit, conformal_set, count_probabilities, decompose, doubts, entropy, fit_conformal, fit_features, fit_held_out,
    fit_precision, fit_uncertainty, leading_class, mass_above, mc_dropout, pack_uncertainty, space_of_run, unpack_uncertainty,
    vote_interval, vote_likelihood)

PUBLISHED = {"other": 6.2, "seizure": 7.6, "lpd": 7.2, "gpd": 9.2, "lrda": 23.5, "grda": 19.1}  # recomputed from the raters of Jing et al., Neurology 2023
rows = st.lists(st.floats(1e-6, 1), min_size=6, max_size=6).map(lambda x: np.array(x) / sum(x))


def answers(n, seed=0, sharp=0.6):
    "Probabilities, and a truth drawn from them."
    rng = rng_for(seed, "answers")
    p = rng.dirichlet(np.full(6, sharp), n)
    return p, np.minimum((p.cumsum(1) < rng.random((n, 1))).sum(1), 5)


def counts(p, precision, n, seed=0):
    rng = rng_for(seed, "counts")
    return np.array([rng.multinomial(n, rng.dirichlet(precision * row + 1e-9)) for row in p])


@given(rows)
def test_entropy_is_scipys(p):
    assert entropy(p) == pytest.approx(stats.entropy(p), abs=1e-12) and 0 <= entropy(p) <= np.log(6) + 1e-12


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_entropy_falls_into_two_parts(members, seed):
    p = np.random.default_rng(seed).dirichlet(np.full(6, 0.3), (members, 5))
    found = decompose(p)
    np.testing.assert_allclose(found["expected"] + found["mutual"], found["total"], atol=1e-9)
    divergence = np.mean([[stats.entropy(row, p[:, i].mean(0)) for i, row in enumerate(member)] for member in p], 0)
    np.testing.assert_allclose(found["mutual"], divergence, atol=1e-9)  # mean KL from the mixture: the definition


@given(rows, st.floats(0.1, 50), st.integers(1, 30))
@settings(max_examples=40)
def test_counts_are_beta_binomial(p, precision, n):
    ours, k = count_probabilities(p, np.full(6, precision), n), np.arange(n + 1)
    for mine, share in zip(ours, np.clip(p, 1e-9, 1 - 1e-9)):
        np.testing.assert_allclose(mine, stats.betabinom.pmf(k, n, share * precision, (1 - share) * precision), atol=1e-8)
    low, high = np.moveaxis(vote_interval(p, precision, n, 0.8), -1, 0)
    for mine, a, b in zip(ours, low, high):
        assert mine[a:b + 1].sum() >= 0.8 - 1e-9 and mine[:a].sum() <= 0.1 + 1e-9 and mine[b + 1:].sum() <= 0.1 + 1e-9


def test_likelihood_is_the_dirichlet_multinomial():
    p, _ = answers(20)
    votes = counts(p, 5.0, 9)
    brute = [sum(stats.dirichlet_multinomial.logpmf(v, s * row, 9) for v, row in zip(votes, p)) for s in (2.0, 5.0, 40.0)]
    ours = [vote_likelihood(votes, p, s) for s in (2.0, 5.0, 40.0)]
    np.testing.assert_allclose(np.diff(ours), np.diff(brute), rtol=1e-6)  # without the coefficient that no precision changes
    grid = np.exp(np.linspace(np.log(0.5), np.log(60), 400))
    best = grid[np.argmax([vote_likelihood(votes, p, s) for s in grid])]
    assert fit_precision(votes, p) == pytest.approx(best, rel=0.02)


def test_published_precisions_are_found():
    "Fourteen raters each, as in HMS; the model names the class that leads."
    mean = np.full((6, 6), 0.06) + 0.64 * np.eye(6)
    p = np.repeat(mean, 600, 0)
    votes = np.concatenate([counts(p[600 * k:600 * (k + 1)], PUBLISHED[c], 14, seed=k) for k, c in enumerate(CLASSES)])
    found = fit_uncertainty(votes, p).precision
    np.testing.assert_allclose(found, [PUBLISHED[c] for c in CLASSES], rtol=0.2)


def test_dice_have_no_scatter_of_their_own():
    p, _ = answers(400)
    assert fit_precision(rng_for(0, "dice").multinomial(14, p), p) > 200
    with pytest.raises(InputError, match="two votes"): fit_precision(np.eye(6), np.full((6, 6), 1 / 6))


def test_intervals_hold_new_votes():
    p, _ = answers(3000)
    fitted = fit_precision(counts(p[:1500], 8.0, 14, 1), p[:1500])
    new, inside = counts(p[1500:], 8.0, 10, 2), vote_interval(p[1500:], fitted, 10, 0.9)
    split = (p[1500:] > 0.2) & (p[1500:] < 0.8)  # where neither answer is trivial
    assert ((new >= inside[..., 0]) & (new <= inside[..., 1]))[split].mean() >= 0.89
    dice = vote_interval(p[1500:], 1e6, 10, 0.9)
    assert ((new >= dice[..., 0]) & (new <= dice[..., 1]))[split].mean() < 0.85  # dice would promise too much


@pytest.mark.parametrize(("level", "n", "good"), [(0.9, 60, True), (0.8, 41, True), (0.95, 100, False)])
def test_coverage_is_what_was_promised(level, n, good):
    "One new window per calibration: their number in the set is binomial, with the exact probability ceil((n + 1) level) / (n + 1), whatever the model is worth."
    draws = 1500
    p, truth = answers((n + 1) * draws, seed=n)
    if not good: p = rng_for(0, "bad").dirichlet(np.full(6, 0.6), len(p))
    p, truth = p.reshape(draws, n + 1, 6), truth.reshape(draws, n + 1)
    held = sum(bool(conformal_set(a[-1], fit_conformal(a[:-1], t[:-1], level)[0])[t[-1]]) for a, t in zip(p, truth))
    low, high = stats.binom.interval(0.999, draws, np.ceil((n + 1) * level) / (n + 1))
    assert low <= held <= high


def test_coverage_holds_in_each_class():
    p, truth = answers(12000, seed=3)
    _, limits = fit_conformal(p[:6000], truth[:6000], 0.9)
    inside = conformal_set(p[6000:], limits)[np.arange(6000), truth[6000:]]
    for k in range(6):
        mine = inside[truth[6000:] == k]
        low, high = stats.binom.interval(0.999, len(mine), 0.9)
        slack = 4 * np.sqrt(0.09 / (truth[:6000] == k).sum()) * len(mine)  # of the limit itself
        assert low - slack <= mine.sum() <= high + slack


@given(rows)
def test_sets_are_heads_of_the_ranking(p):
    above = mass_above(p)
    brute = [p[(p > x) | ((p == x) & (np.arange(6) < k))].sum() for k, x in enumerate(p)]
    np.testing.assert_allclose(above, brute, atol=1e-9)
    sizes = [conformal_set(p, q).sum() for q in (0, 0.3, 0.6, 1)]
    assert sizes[0] >= 1 and sizes == sorted(sizes) and sizes[-1] == 6 and conformal_set(p, 0.0)[p.argmax()]


def test_too_few_windows_exclude_nothing():
    assert conformal_limit(np.zeros(8), 0.9) == 1.0 and conformal_limit(np.zeros(9), 0.9) == 0.0
    with pytest.raises(InputError): fit_conformal(np.zeros((0, 6)), np.zeros(0, int))
    with pytest.raises(InputError): fit_conformal(np.full((9, 6), 1 / 6), np.zeros(9, int), 1.0)


def test_ties_are_broken_by_lot():
    found = leading_class(np.tile([3, 3, 0, 0, 0, 0], (400, 1)))
    assert 150 < (found == 0).sum() < 250 and set(found) == {0, 1}
    assert (leading_class(np.eye(6) * 2) == np.arange(6)).all()


def test_doubt_orders_the_errors():
    p, truth = answers(4000)
    wrong, order = p.argmax(1) != truth, np.argsort(entropy(p))
    assert wrong[order[:1000]].mean() < 0.7 * wrong.mean() < wrong.mean() < wrong[order[-1000:]].mean()


# --- temperature and bias ---

@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found_and_changes_no_order(temperature):
    p, _ = answers(500)
    off = softmax(logits_of(p) * temperature)
    found = fit_scaling(off, p, biased=False)
    assert found.temperature == pytest.approx(temperature, rel=0.02) and found.bias == Scaling().bias
    assert (found.of(off).argmax(1) == off.argmax(1)).all()
    grid = np.linspace(0.3, 4, 200)
    assert found.temperature == pytest.approx(grid[np.argmin([kl_divergence(p, Scaling(t).of(off)) for t in grid])], abs=0.02)


def test_scaling_out_of_fold_sees_no_own_label():
    p, _ = answers(300)
    y, fold = p.copy(), np.arange(300) % 3
    fit = lambda p, y, w: fit_scaling(p, y, w).of
    before = cross_fit(fit, p, y, fold)[0]
    y[fold == 1] = np.eye(6)[0]
    after = cross_fit(fit, p, y, fold)[0]
    np.testing.assert_array_equal(before[fold == 1], after[fold == 1])
    assert not np.allclose(before[fold == 0], after[fold == 0])


@pytest.mark.parametrize("bad", [(0, (0,) * 6), (np.nan, (0,) * 6), (1, (0,) * 5), (1, (np.inf,) + (0,) * 5), (1e9, (0,) * 6)])
def test_impossible_scalings(bad):
    with pytest.raises(InputError): Scaling(*bad)


def test_a_held_out_table_says_what_scaling_gains():
    p, _ = answers(600)
    votes = counts(p, 50.0, 14)
    table = pd.DataFrame(votes, columns=list(VOTE_COLUMNS)).assign(abstain=False, patient_id=np.arange(600) // 4)
    table[[f"p_{c}" for c in CLASSES]] = softmax(logits_of(p) * 2 + [1, 0, 0, 0, 0, 0])
    table.loc[:9, "abstain"] = True
    none, temperature, bias = (fit_held_out(table, s) for s in ("none", "temperature", "bias"))
    assert none[0] == Scaling() and none[2] == {"scale": "none", "windows": 590} and none[1].windows == 590
    assert bias[2]["kl_scaled"] < temperature[2]["kl_scaled"] < temperature[2]["kl"]
    assert bias[1].precision.mean() > none[1].precision.mean()  # a wrong mean reads as scatter
    with pytest.raises(InputError, match="choose none"): fit_held_out(table, "all")
    single = table.assign(**dict(zip(VOTE_COLUMNS, np.eye(6)[votes.argmax(1)].T)))
    assert fit_held_out(single)[1] is None


# --- familiarity ---

def cloud(n, seed, shift=0.0):
    rng, mix = rng_for(seed, "cloud"), rng_for(0, "mix").normal(size=(8, 8))
    label = rng.integers(6, size=n)
    return rng.normal(size=(n, 8)) @ mix + 4 * np.eye(8)[label] * 3 + shift, label


def test_distance_is_mahalanobis():
    from sklearn.covariance import ledoit_wolf

    (x, label), (held, _) = cloud(800, 1), cloud(200, 2)
    space = fit_features(x, label, held)
    means = np.stack([x[label == k].mean(0) for k in range(6)])
    inverse = np.linalg.inv(ledoit_wolf(x - means[label], assume_centered=True)[0])
    brute = [min(mahalanobis(row, m, inverse) for m in means) for row in held]
    np.testing.assert_allclose(space.distance(held), brute, rtol=1e-3)


def test_familiar_windows_are_rarely_called_strange():
    (x, label), (held, _), (new, _), (far, _) = cloud(800, 1), cloud(400, 2), cloud(2000, 3), cloud(200, 4, shift=60.0)
    space = fit_features(x, label, held)
    typical = space.typical(space.distance(new))
    for share in (0.01, 0.1, 0.5): assert (typical <= share).mean() < share + 3 * np.sqrt(share / 400) + 0.005
    assert (space.typical(space.distance(far)) < FAMILIAR).all() and typical.min() > 0
    with pytest.raises(InputError): fit_features(x[:5], label[:5], held)
    with pytest.raises(InputError): fit_features(x * np.nan, label, held)


# --- what travels ---

@pytest.fixture(scope="module")
def fitted():
    (x, label), (held, _) = cloud(300, 1), cloud(100, 2)
    p, _ = answers(300)
    return fit_uncertainty(counts(p, 9.0, 10), p, space=fit_features(x, label, held))


def test_what_is_stored_is_what_was_fitted(fitted):
    p, features = answers(1)[0][0], cloud(1, 5)[0][0].astype(np.float32)
    again = unpack_uncertainty(pack_uncertainty(fitted))
    assert again.describe(p, features) == fitted.describe(p, features) and again.windows == 300
    bare = dataclasses.replace(fitted, space=None)
    assert unpack_uncertainty(pack_uncertainty(bare)).describe(p, features)["typical"] is None
    json.dumps(fitted.describe(p, features), allow_nan=False)


def test_doubts_are_data(fitted):
    wide = fitted.describe(np.full(6, 1 / 6), np.full(8, 1e3))
    assert [d["kind"] for d in doubts(wide)] == ["unfamiliar", "undecided"] and doubts(wide)[0]["value"] < FAMILIAR and doubts(wide)[1]["limit"] == MANY
    assert doubts({"entropy": 0.1}) == ()


def test_damaged_files_are_refused(fitted):
    good, rng = pack_uncertainty(fitted), rng_for(0, "flips")
    for _ in range(200):
        at = int(rng.integers(len(good)))
        bad = good[:at] + bytes([good[at] ^ 1 << int(rng.integers(8))]) + good[at + 1:]
        try: assert np.isfinite(unpack_uncertainty(bad).precision).all()
        except InputError: pass
    for bad in (b"", good[:50], b"\x80\x04."):
        with pytest.raises(InputError): unpack_uncertainty(bad)
    for change in ({"precision": np.full(6, -1.0)}, {"level": 2.0}, {"limit": np.nan}, {"precision": np.ones(5)}):
        with pytest.raises(InputError): unpack_uncertainty(pack_uncertainty(dataclasses.replace(fitted, **change)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from hms_brain.train import Recipe, train

    return train(SineCache(480), Recipe(epochs=1, batch_size=12, limit=72), folder=tmp_path_factory.mktemp("runs") / "r", model_settings={"stem": 4, "width": 16, "hidden": 8}, threads=1, say=None)


def test_a_bundle_knows_what_is_strange(run, tmp_path):
    space = space_of_run(run, SineCache(480))
    bundle = export_bundle(run, tmp_path / "b", space=space)
    assert bundle.uncertainty.space.means.shape == (6, 16) and bundle.uncertainty.windows == 120
    recording = simulate_recording(0, duration=60)
    answer = Predictor(bundle, threads=1)(recording)
    assert 0 < answer.uncertainty["typical"] <= 1 and set(answer.uncertainty["votes"]) == set(CLASSES)
    assert "unfamiliar" in [d["kind"] for d in answer.doubts]  # trained on sine waves
    json.dumps(answer.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="not the cache"): space_of_run(run, SineCache(48))


def test_a_bundle_without_it_still_answers(run, tmp_path):
    bundle = export_bundle(run, tmp_path / "b")
    bare = dataclasses.replace(bundle, uncertainty=None)
    answer = Predictor(bare, threads=1)(simulate_recording(0, duration=60))
    assert set(answer.uncertainty) == {"entropy"} and Bundle.load(bundle.folder).uncertainty.space is None


def test_rules_against_the_model_are_flagged(run, tmp_path):
    "A bias makes the model say one thing whatever it sees; the rules decide by themselves."
    bundle, recording = export_bundle(run, tmp_path / "b"), simulate_recording(3, "grda", 60, artefacts=False)
    for k, c in enumerate(CLASSES):
        stubborn = dataclasses.replace(bundle, about=bundle.about | {"bias": list(np.where(np.arange(6) == k, 9.0, -1.8))}, uncertainty=None)
        answer = Predictor(stubborn, threads=1)(recording)
        flagged = [d for d in answer.doubts if d["kind"] == "rules"]
        assert answer.predicted == c and bool(flagged) == (answer.measured["label"] != c)
        if flagged: assert flagged[0]["value"] == answer.measured["label"] and flagged[0]["limit"] == c
    assert answer.measured["attributes"]["rate"] > 0 and answer.measured["because"]


def test_dropout_gives_members(run):
    model = run.model()
    eeg = SineCache(4).batch(np.arange(4))[0]
    members = mc_dropout(model, {"eeg": eeg}, members=5)
    assert members.shape == (5, 4, 6) and np.allclose(members.sum(-1), 1) and (decompose(members)["mutual"] > 0).all()
    np.testing.assert_array_equal(members, mc_dropout(model, {"eeg": eeg}, members=5))
    assert not model.training and not any(m.training for m in model.modules())
    for m in model.modules():
        if hasattr(m, "p"): m.p = 0.0
    with pytest.raises(InputError, match="no dropout"): mc_dropout(model, {"eeg": eeg})


def test_no_torch_is_needed():
    script = "import sys; sys.modules['torch'] = None\nimport hms_brain.uncertainty, hms_brain.scaling, hms_brain.predict"
    subprocess.run([sys.executable, "-c", script], check=True)
