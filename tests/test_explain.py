"Attributions: axioms, sanity under randomised weights and labels, and patterns whose place is known."
import re
import subprocess

import numpy as np
import pytest
import torch

from hms_brain.core import CHANNELS, CLASSES, InputError, rng_for
from hms_brain.explain import METHODS, ORDER, PAIRS, FromPairs, attention_of, attribute, concentration, log_odds, place_of, planted, randomise, similarity
from hms_brain.explain_plots import evidence_levels, head_points, head_surface, pairs_of_lines, pieces, plot_evidence_page, plot_head
from hms_brain.models.core import create_model
from hms_brain.reasons import METHOD_NAMES, find_reasons
from hms_brain.models.resnet1d_gru import LEFT, MIDLINE, RIGHT
from hms_brain.simulate import simulate_recording

SMALL = {"stem": 4, "width": 16, "hidden": 8, "dropout": 0.0}


def noise(seed=0):
    return rng_for(seed, "noise").normal(0, 20, (19, 10000)).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return create_model("resnet1d_gru", **SMALL).eval()


def test_log_odds_are_log_odds():
    logits = torch.randn(5, 6, dtype=torch.double)
    p = logits.softmax(-1)
    torch.testing.assert_close(log_odds(logits), (p / (1 - p)).log())


def test_rows_are_the_montage():
    network = [tuple(CHANNELS[i] for i in pair) for pair in LEFT + RIGHT + MIDLINE]
    assert [network[i] for i in ORDER] == list(PAIRS)


def test_the_network_from_its_pairs_is_the_network(small):
    eeg = noise()
    network = FromPairs(small, eeg)
    with torch.no_grad(): torch.testing.assert_close(network(network.pairs), log_odds(small(torch.as_tensor(eeg)[None]).logits), atol=1e-5, rtol=1e-5)
    fused = create_model("fusion", eeg_settings=SMALL).eval()
    image = np.random.default_rng(0).random((3, 224, 224), dtype=np.float32)
    network = FromPairs(fused, eeg, image)
    with torch.no_grad(): want = log_odds(fused(torch.as_tensor(eeg)[None], torch.as_tensor(image)[None]).logits)
    with torch.no_grad(): torch.testing.assert_close(network(network.pairs.expand(3, -1, -1, -1)), want.expand(3, -1), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="is needed"): FromPairs(fused, eeg)


def test_integrated_gradients_are_complete(small):
    eeg = noise(1)
    network = FromPairs(small, eeg)
    with torch.no_grad(): gained = (network(network.pairs) - network(torch.zeros_like(network.pairs)))[0]
    for k in (0, 3): assert attribute(small, eeg, label=CLASSES[k], steps=64).pairs.sum() == pytest.approx(float(gained[k]), abs=0.03)


def test_shap_from_flat_agrees_with_integrated(small):
    eeg = noise(2)
    a, b = (attribute(small, eeg, label="gpd", method=m, steps=64).smooth(2.0) for m in ("integrated", "shap"))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.8
    others = attribute(small, eeg, label="gpd", method="shap", steps=8, background=[noise(5), noise(6)])
    assert np.isfinite(others.pairs).all() and not np.allclose(others.pairs, b.mean())


def test_the_model_is_left_as_it_was(small):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    for method in METHODS: attribute(small, noise(), method=method, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in small.modules()) and all(p.requires_grad for p in small.parameters())
    small(torch.as_tensor(noise())[None]).logits.sum().backward()
    small.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_a_mirrored_recording_has_a_mirrored_picture(small, method):
    "The network cannot tell left from right, and its pictures still can."
    from hms_brain.core import mirror_index

    eeg = noise(3)
    eeg[[CHANNELS.index(c) for c in ("F7", "T3", "T5")]] *= 6
    a, b = (attribute(small, e, label="lpd", method=method, steps=8, seed=0).pairs for e in (eeg, eeg[mirror_index()]))
    swap = [PAIRS.index(tuple(CHANNELS[mirror_index()[CHANNELS.index(c)]] for c in pair)) for pair in PAIRS]
    np.testing.assert_allclose(b, a[swap], atol=1e-4 * np.abs(a).max() + 1e-6)


def test_electrodes_share_what_the_pairs_have(small):
    found = attribute(small, noise(), steps=4)
    assert found.electrodes().sum() == pytest.approx(np.maximum(found.pairs, 0).sum(), rel=1e-4) and (found.electrodes() >= 0).all()
    np.testing.assert_allclose(found.smooth(0.01), np.maximum(found.pairs, 0), atol=1e-6)


def test_misuse_is_named(small):
    for settings, says in (({"method": "integrate"}, "did you mean integrated"), ({"label": "ldp"}, "did you mean lpd")):
        with pytest.raises(InputError, match=says): attribute(small, noise(), **settings)
    with pytest.raises(InputError, match="reads no signal"): attribute(create_model("specnet"), noise(), np.zeros((3, 224, 224)))
    for picture, mask in ((np.zeros((2, 2)), np.eye(2, dtype=bool)), (np.ones((2, 2)), np.zeros((2, 2), bool))):
        with pytest.raises(InputError): concentration(picture, mask)


def test_attention_is_the_networks_own(small):
    with torch.no_grad(): want = small(torch.as_tensor(noise())[None]).attention[0].numpy()
    np.testing.assert_allclose(attention_of(small, noise())["time"], want, atol=1e-6)
    fused = create_model("fusion", eeg_settings=SMALL).eval()
    found = attention_of(fused, noise(), np.full((3, 224, 224), -1, np.float32))
    np.testing.assert_allclose(found["belief"], [[1] * 6, [0] * 6], atol=1e-6)  # no image: nothing to believe in it
    assert set(attention_of(create_model("specnet").eval(), noise(), np.zeros((3, 224, 224)))) == set()


def test_chance_is_one():
    rng = rng_for(0, "chance")
    mask = rng.random((18, 125)) < 0.12
    ratios = [concentration(rng.random((18, 125)), mask) for _ in range(50)]
    assert abs(np.mean(ratios) - 1) < 0.02 and concentration(mask * 1.0, mask) == pytest.approx(1 / mask.mean())
    assert concentration(-np.ones((18, 125)) + 2 * mask, mask) == pytest.approx(1 / mask.mean())


def test_a_planted_pattern_is_where_it_is_said_to_be():
    for seed in range(3):
        truth, (a, b) = planted(seed, "lpd", 12.0)
        assert b - a == pytest.approx(12) and 10 <= a <= 28 and truth.recording.duration == 60
        quiet = np.r_[0:round((5 + a) * 200), round((5 + b) * 200):12000]
        assert (truth.pattern[:, quiet] == 0).all() and place_of(truth, (a, b)).mean() == pytest.approx(8 / 18 * 12 / 50, abs=0.01)


def train_small(windows, labels, seed, epochs=12):
    torch.manual_seed(seed)
    model = create_model("resnet1d_gru", **SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    x, y = torch.as_tensor(windows), torch.as_tensor(labels)
    for epoch in range(epochs):
        order = torch.as_tensor(rng_for(seed, epoch).permutation(len(x)))
        for part in order.split(12):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]).logits, y[part]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def lesson():
    "Noise, half of it with a sharp wave on one side for ten seconds: its place is known. A network that learned it, one of other labels."
    t = np.arange(10000) / 200
    def make(i, spiked):
        rng = rng_for(i, "lesson")
        eeg, side, begin = rng.normal(0, 10, (19, 10000)), int(rng.integers(2)), float(rng.uniform(12, 28))
        names = (("F7", "T3", "T5"), ("F8", "T4", "T6"))[side]
        if spiked: eeg[[CHANNELS.index(c) for c in names]] += 120 * np.exp(-(((t % 1) - 0.5) / 0.04) ** 2) * ((t >= begin) & (t < begin + 10))
        rows = np.array([set(pair) & set(names) != set() for pair in PAIRS])
        centre = (np.arange(2500) + 0.5) / 50
        return eeg.astype(np.float32), rows[:, None] & ((centre >= begin) & (centre < begin + 10))
    made = [make(i, i % 2 == 0) for i in range(72)]
    windows, labels = np.stack([m[0] for m in made]), np.array([1, 5] * 36)
    shuffled = rng_for(0, "shuffle").permutation(labels)
    tests = [make(1000 + i, True) for i in range(4)]
    return tests, train_small(windows, labels, 0), train_small(windows, shuffled, 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_pictures_depend_on_weights_and_on_labels(lesson, method):
    "What was learned is shown; weights of chance, and a training on shuffled labels, show something else."
    tests, learned, misled = lesson
    ratios, kept, other = [], [], []
    for eeg, place in tests:
        a, b, c = (attribute(m, eeg, label="lpd", method=method, steps=16) for m in (learned, randomise(learned), misled))
        ratios.append(concentration(a.smooth(), place))
        kept.append(similarity(a.smooth(), b.smooth()))
        other.append(similarity(a.smooth(), c.smooth()))
    assert np.mean(ratios) >= 2, ratios
    assert np.mean(kept) < 0.5 and np.mean(other) < 0.6, (kept, other)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["integrated", "shap", "cam"])
def test_the_packaged_network_points_at_planted_patterns(method):
    "Side and time of simulated patterns: at least twice chance for every one of two seeds and two patterns."
    from hms_brain.predict import Predictor
    from hms_brain.reasons import load_network

    predictor = Predictor(threads=1)
    network = load_network(predictor.bundle)
    for pattern in ("lpd", "lrda"):
        for seed in range(2):
            truth, when = planted(seed, pattern)
            x = predictor.inputs(truth.recording)
            found = attribute(network, x.eeg, x.image, pattern, method, steps=16)
            assert concentration(found.smooth(), place_of(truth, when)) >= 2, (pattern, seed)


# --- figures ---

def test_levels_rise_with_evidence():
    weight = np.zeros((18, 50))
    weight[3, 10:20] = np.linspace(0, 1, 10)
    levels = evidence_levels(weight, np.arange(0, 50, 0.5))
    assert set(np.flatnonzero(levels.any(1))) == {3} and (np.diff(levels[3, 20:40]) >= 0).all() and levels.max() == 4
    assert evidence_levels(-np.ones((18, 5)), np.zeros(3)).max() == 0
    for bad in (np.ones((17, 5)), np.full((18, 5), np.nan), np.ones(18)):
        with pytest.raises(InputError): evidence_levels(bad, np.zeros(3))


def test_pieces_lose_and_double_nothing():
    rng = rng_for(0, "pieces")
    chosen = rng.random((4, 60)) < 0.5
    xs, ys = pieces(np.arange(60.0), np.tile(np.arange(4.0)[:, None], (1, 60)), chosen)
    drawn = {(x, y) for x, y in zip(xs, ys) if x is not None}
    wanted = {(float(t), float(r)) for r in range(4) for t in range(60) if chosen[r, t] or (t and chosen[r, t - 1])}
    assert drawn == wanted and len(xs) == len(ys)


def test_a_page_holds_every_sample_of_the_trace():
    recording = simulate_recording(3, "lpd", 60)
    weight = rng_for(0, "w").random((18, 125))
    figure = plot_evidence_page(recording, weight, 30.0)
    assert sum(len({(x, y) for x, y in zip(t.x, t.y) if x is not None}) for t in figure.data[:5]) >= 18 * 1990
    assert min(v for t in figure.data[:5] for v in t.x if v is not None) == pytest.approx(25, abs=0.01)


def test_a_head_shows_the_electrode_that_stands_out():
    for name in ("T3", "Fz", "O2"):
        axis, z = head_surface(np.eye(19)[CHANNELS.index(name)])
        at = np.unravel_index(np.nanargmax(z), z.shape)
        nearest = np.hypot(*(head_points() - [axis[at[1]], axis[at[0]]]).T).argmin()
        assert CHANNELS[nearest] == name
    assert np.hypot(*head_points().T).max() < 1 and len({tuple(p) for p in head_points().round(3)}) == 19
    with pytest.raises(InputError): plot_head(np.full(19, np.nan))
    assert pairs_of_lines(np.arange(5)[:, None])[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 2


@pytest.mark.slow
def test_the_page_opens_without_a_network(tmp_path):
    "hms explain on a bundle and a file: one page, no address in it, and the run says so."
    from hms_brain.bundle import default_bundle
    from hms_brain.exports import write_edf
    from test_cli import hms

    write_edf(tmp_path / "r.edf", simulate_recording(3, "lpd", 60))
    (tmp_path / "settings.ini").write_text("[system]\nworkers = 1\nthreads = 1\n")
    result = hms("explain", "-p", f"bundle={default_bundle()}", "-p", f"file={tmp_path / 'r.edf'}", "-p", "methods= cam", "-p", "step=10", "-p", "out=why", cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "why/explain.html").read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?(https?:)?//", page) and "Research use only" in page


def test_an_unknown_method_is_told_before_anything_is_asked():
    assert set(METHOD_NAMES) == set(METHODS)
    with pytest.raises(InputError, match="did you mean cam"): find_reasons(None, None, methods=("integrated", "cma"))
