"Hiding: what is hidden is hidden and nothing else, evidence against models whose reasons are known, patterns whose place is known."
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from hms_brain.core import CHANNELS, CLASSES, FS, InputError
from hms_brain.occlusion import BANDS, LINES, Occlusion, columns_between, hide, hide_band, occlude, questions
from hms_brain.predict import Predictor
from hms_brain.preprocess import ModelInput
from hms_brain.metrics import softmax
from hms_brain.signal import apply_montage, bandpass, find_montage

T3 = CHANNELS.index("T3")


def window(seed=0):
    rng = np.random.default_rng(seed)
    return ModelInput(rng.normal(0, 20, (19, 10000)).astype(np.float32), rng.random((3, 224, 224), dtype=np.float32), np.ones(10000, bool), (), False, (), 25.0)


class Listens:
    "A predictor whose log odds of LPD are the RMS of T3 between 20 and 30 s, and nothing else."
    def __init__(self): self.asked = []

    def probabilities(self, inputs):
        self.asked.append(len(inputs))
        loud = np.array([np.sqrt((x.eeg[T3, 4000:6000] ** 2).mean()) for x in inputs]) / 10
        return softmax(np.stack([np.zeros_like(loud), loud, *[np.zeros_like(loud)] * 4], 1))


def test_a_chain_is_its_four_pairs():
    x = window()
    for line, inner in LINES.items():
        changed = (apply_montage(hide(x, inner).eeg) != apply_montage(x.eeg)).any(1)
        mine = [set(pair) & set(inner) != set() for pair in find_montage("double_banana")]
        assert changed.tolist() == mine and sum(mine) == (2 if line == "midline" else 4)


def test_hiding_touches_nothing_else():
    x = window()
    y = hide(x, ("F7",), ("RP",), 12.0, 14.0)
    assert (y.eeg[CHANNELS.index("F7"), 2400:2800] == 0).all() and (y.eeg != x.eeg).sum() == 400
    rows = np.unique(np.argwhere(y.image != x.image)[:, 1])
    assert rows.min() == 168 and rows.max() == 223 and (y.image[:2] != x.image[:2]).any((1, 2)).all()
    assert (y.image[2] == x.image[2]).all()  # the centre's panel begins at 20 s
    before = window()
    np.testing.assert_array_equal(x.eeg, before.eeg)
    np.testing.assert_array_equal(x.image, before.image)
    assert (hide(x, CHANNELS, ("LL", "RL", "LP", "RP")).image == -1).all()


@pytest.mark.parametrize(("span", "share"), [(600, 50 / 600), (50, 1), (10, 1)])
def test_columns_cover_their_seconds(span, share):
    assert abs(columns_between(span, 0, 50).mean() - share) < 0.01
    pieces = np.stack([columns_between(span, a, a + 5) for a in range(0, 50, 5)])
    assert (pieces.sum(0) == columns_between(span, 0, 50)).all()  # no column twice, none forgotten


def test_a_band_is_gone_and_its_neighbours_stay():
    x = replace(window(), eeg=np.concatenate([window().eeg[:, :9000], np.zeros((19, 1000), np.float32)], 1))
    y = hide_band(x, 4.0, 8.0)
    power = lambda eeg, low, high: float((bandpass(eeg, low, high)[:, 1000:8000] ** 2).sum())
    assert power(y.eeg, 5, 7) < 0.02 * power(x.eeg, 5, 7) and power(y.eeg, 12, 18) > 0.9 * power(x.eeg, 12, 18)
    assert (y.eeg[:, 9000:] == 0).all() and np.isfinite(y.eeg).all() and y.image.min() >= 0


def test_evidence_finds_the_reason_and_only_that():
    x, listener = window(), Listens()
    by_electrode = occlude(listener, x, "electrode").evidence("lpd")
    assert by_electrode.argmax() == T3 and np.allclose(np.delete(by_electrode, T3), 0) and by_electrode[T3] > 1
    by_chain = occlude(listener, x, "chain").evidence("lpd")
    assert by_chain[0] > 1 and np.allclose(by_chain[1:], 0)
    grid = occlude(listener, x, "map", step=5.0).grid("lpd")
    assert grid.shape == (5, 10) and (grid[0, 4:6] > 0.1).all() and np.allclose(grid.sum(), grid[0, 4:6].sum())
    by_time = occlude(listener, x, "time", step=10.0)
    assert by_time.evidence("lpd").argmax() == 2 and np.allclose(np.delete(by_time.evidence("lpd"), 2), 0)
    assert by_time.to_frame()["hidden"].tolist()[2] == "20 30" and max(listener.asked) <= 25


def test_evidence_is_the_change_of_log_odds():
    whole, without = np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]), np.array([[0.2, 0.4, 0.1, 0.1, 0.1, 0.1]])
    found = Occlusion("chain", (("LL",),), without, whole)
    assert found.evidence("seizure")[0] == pytest.approx(np.log(0.5 / 0.5) - np.log(0.2 / 0.8)) and found.evidence()[0] == found.evidence("seizure")[0]
    assert found.evidence("lpd")[0] == pytest.approx(np.log(0.1 / 0.9) - np.log(0.4 / 0.6))
    certain = Occlusion("chain", (("LL",),), np.eye(6)[:1], np.eye(6)[0])
    assert np.isfinite(certain.evidence()).all()


@pytest.mark.parametrize("kind", ["electrode", "chain", "time", "band", "map"])
def test_every_kind_asks_what_it_says(kind):
    expected = {"electrode": 19, "chain": 5, "time": 25, "band": len(BANDS), "map": 125}
    names = [name for name, _ in questions(replace(window(), image=np.zeros((3, 224, 224), np.float32)), kind)]
    assert len(names) == expected[kind] == len(set(names))


def test_misuse_is_named():
    for wrong, says in (("chains", "did you mean chain"), ("x", "known")):
        with pytest.raises(InputError, match=says): occlude(Listens(), window(), wrong)
    for step in (3.0, 0.0, -1.0):
        with pytest.raises(InputError, match="divide"): occlude(Listens(), window(), "map", step)
    with pytest.raises(InputError, match="cannot be judged"): occlude(Listens(), replace(window(), abstain=True, reasons=("flat",)))
    found = occlude(Listens(), window(), "chain")
    with pytest.raises(InputError, match="unknown class"): found.evidence("ldp")
    with pytest.raises(InputError, match="no map"): found.grid()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["lpd", "lrda"])
def test_evidence_lies_where_the_pattern_was_planted(pattern):
    "The packaged bundle, three seeds: at least twice chance within the true side and time, on average."
    from hms_brain.explain import concentration, place_of, planted

    predictor, ratios = Predictor(threads=1), []
    for seed in range(3):
        truth, when = planted(seed, pattern)
        grid = occlude(predictor, predictor.inputs(truth.recording), "map", step=5.0).grid(pattern)
        place = place_of(truth, when, 10)
        ratios.append(concentration(np.repeat(grid, (4, 4, 4, 4, 2), 0), place))
    assert np.mean(ratios) >= 2 and min(ratios) > 1, ratios


def test_no_torch_is_needed():
    script = ("import sys\nimport hms_brain.reasons, hms_brain.explain_plots\nfrom hms_brain.occlusion import occlude\nfrom hms_brain.predict import Predictor\nfrom hms_brain.simulate import simulate_recording\n"
              "p = Predictor(threads=1)\nprint(occlude(p, p.inputs(simulate_recording(3, duration=60)), 'chain').without.shape, 'torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.strip() == "(5, 6) False"
