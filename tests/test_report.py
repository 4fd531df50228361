"Figures are pure, pages stand alone, failures are what the numbers say, neighbours are exact."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from hms_brain.catalog import soft_votes
from hms_brain.core import CLASSES, InputError, rng_for, write_json
from hms_brain.embedding import flatten, neighbour_votes, principal_components, similar_windows, standardise
from hms_brain.evaluate import evaluate, load_answers
from hms_brain.experts import average_expert, operating_points
from hms_brain.score_plots import blend_colors, plot_calibration_index, plot_class_scores, plot_confusion, plot_curves, plot_map, plot_reliability, plot_risk, plot_subgroups
from hms_brain.metrics import PROBABILITIES
from hms_brain.report import card_markdown, evaluation_sections, experts_beside, fact_rows, known_failures, run_cache, shown, trained_on_simulation, write_evaluation


@pytest.fixture(scope="module")
def table():
    rng = rng_for(0, "report tests")
    true = rng.integers(5, size=90)  # nobody ever votes Other
    labels = np.where(rng.random((90, 4)) < .8, true[:, None], rng.integers(5, size=(90, 4)))
    p = .6 * np.eye(6)[true] + .4 * rng.dirichlet(np.ones(6), 90)
    return load_answers(pd.DataFrame(labels, columns=[f"expert_{j}" for j in range(4)]).assign(**dict(zip(PROBABILITIES, p.T)), patient_id=np.arange(90) // 3))


@pytest.fixture(scope="module")
def result(table):
    return evaluate(table, n_boot=20)


def test_figures_show_their_numbers_and_change_nothing(table, result):
    before = repr(result)
    for plot in (plot_class_scores, plot_curves, plot_reliability, plot_confusion, plot_risk, plot_subgroups):
        first, again = plot(result), plot(result)
        assert first is not again and first.to_json() == again.to_json(), plot.__name__
    assert repr(result) == before
    labels = table[[f"expert_{j}" for j in range(4)]].to_numpy()
    points = operating_points(labels)
    figure = plot_curves(result, points=points, average=average_expert([[3, 1, 0, 0, 0, 0]] * 2))
    dots = [t for t in figure.data if t.name and t.name.startswith("one expert")]
    np.testing.assert_array_equal(dots[1].y, points["tpr"][:, 1])
    assert sum(t.name == "chance" for t in figure.data) == 6
    np.testing.assert_allclose(plot_confusion(result).data[0].z, 100 * np.array(result["confusion"]["row"]), atol=.06)


def test_an_interval_may_end_at_zero():
    row = {"model": -50., "raters": [-20., None], "worse": 50., "low": -100., "high": 0.}
    bars = plot_calibration_index({"calibration": dict.fromkeys(CLASSES, row)}).data[-1].error_x
    assert set(bars.array) == set(bars.arrayminus) == {50}
    bars = plot_calibration_index({"calibration": dict.fromkeys(CLASSES, row | {"low": None, "high": None})}).data[-1].error_x
    assert set(bars.array) == set(bars.arrayminus) == {0}


def test_a_page_stands_alone(table, result, tmp_path):
    hostile = result | {"source": "<script>alert(1)</script>"}
    page, data = write_evaluation(tmp_path, table, hostile, experts_beside(table, 10), simulated=True)
    text = page.read_text()
    assert "<script>alert(1)" not in text and text.count("plotly.js v") == 1 and "NaN" not in data.read_text()
    assert "simulated EEG" in text and "Research use only; not a medical device." in text
    assert len(evaluation_sections(table, result)) < len(evaluation_sections(table, result, experts_beside(table, 10)))
    page, _ = write_evaluation(tmp_path, table, evaluate(table, n_boot=0), experts_beside(table, 0))
    assert "0 bootstrap samples" in page.read_text()


def test_failures_are_what_the_numbers_say(result):
    plain = " ".join(known_failures(result))
    assert "simulator" not in plain and "simulator" in " ".join(known_failures(result, simulated=True))
    blind = result | {"per_class": result["per_class"] | {"gpd": result["per_class"]["gpd"] | {"recall": .25, "support": 8}}}
    assert "GPD is missed: 25% of 8 windows are found." in known_failures(blind)
    stress = pd.DataFrame({"condition": ["as stored", "read anew, 50 s", "noise", "mains"], "kl": [.2, .2, .5, .2], "change": [0, 0, .3, 0.], "low": [0, 0, .2, -.1], "high": [0, 0, .4, .1]})
    told = " ".join(known_failures(result, stress))
    assert "Noise costs 0.300 nats" in told and "Mains" not in told


def test_the_card_names_what_it_must(result):
    card = card_markdown("net", [{"what": "command", "value": "a | b"}], result, ["It fails."], True)
    assert all(f"## {part}" in card for part in ("Intended use", "How it was made", "Scores", "Known failures")) and "a \\| b" in card and "- It fails." in card
    assert shown(None) == shown(float("nan")) == "–" and shown(1234) == "1,234" and shown(True) == "True"


def test_origin_is_read_from_records(tmp_path):
    assert trained_on_simulation(tmp_path) is None
    for f in (0, 1):
        (tmp_path / f"fold-{f}").mkdir()
        (tmp_path / f"fold-{f}/run.json").write_text('{"data": {"simulated": true}}')
    assert trained_on_simulation(tmp_path) is True


def test_the_default_cache_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr("hms_brain.dataset.WindowCache", lambda folder, verify: SimpleNamespace(manifest={"checksum": "a"}))
    monkeypatch.setattr("hms_brain.report.setting_path", lambda name: tmp_path / name)
    write_json(tmp_path / "prepared/small/manifest.json", {})
    for data, parameters, found in (({"data": "small", "checksum": "a"}, {}, True), ({"data": "small", "checksum": "a"}, {"cache": ""}, True), ({"data": "small", "checksum": "b"}, {}, False), ({"data": "other", "checksum": "a"}, {}, False),
                                    ({"data": "small", "checksum": "a"}, {"cache": str(tmp_path / "gone")}, False), ({}, {}, False)):
        write_json(tmp_path / "run.json", {"status": "ok", "data": data, "parameters": parameters})
        assert (run_cache(tmp_path) is not None) == found, (data, parameters)


def test_the_kept_epoch_is_named_as_what_it_is():
    record = {"data": dict.fromkeys(("train_windows", "train_patients", "valid_windows", "valid_patients"), 3), "seed": 0, "started": "now", "versions": {}}
    for keep, words in (("best", "best by held-out KL"), ("last", "the last")):
        facts = fact_rows(record | {"recipe": {"model": "m", "fold": 0, "balance": 1, "keep": keep}}, {"n_params": 1, "best_epoch": 2, "epochs": 2, "weights_sha256": "0"})
        assert {"what": "epochs", "value": f"2 of 2 ({words})"} in facts


def test_neighbours_by_brute_force():
    rng = rng_for(1, "neighbours")
    features, patient, votes = rng.normal(size=(700, 8)).astype(np.float32), np.arange(700) // 7, 3 * np.eye(6)[rng.integers(6, size=700)]
    features[:, 3] = 5  # says nothing
    x = standardise(features)
    far = np.sqrt(((x[:, None] - x) ** 2).sum(-1))
    far[patient[:, None] == patient] = np.inf
    near, distance = similar_windows(features, 4, patient=patient)
    np.testing.assert_array_equal(near, far.argsort(1)[:, :4])
    np.testing.assert_allclose(distance, np.sort(far, 1)[:, :4], atol=1e-6)
    np.testing.assert_allclose(neighbour_votes(features, votes, patient, 4), .99 * soft_votes(votes)[far.argsort(1)[:, :4]].mean(1) + .01 / 6)
    with pytest.raises(InputError, match="fewer than 694 others"): similar_windows(features, 694, patient=patient)


def test_principal_components_against_sklearn():
    pca = pytest.importorskip("sklearn.decomposition").PCA(2)
    features = rng_for(2, "pca").normal(size=(50, 5)) @ rng_for(3, "pca").normal(size=(5, 5))
    np.testing.assert_allclose(np.abs(principal_components(features)), np.abs(pca.fit_transform(standardise(features))), atol=1e-8)
    assert flatten(features[:20])[1] == "pca" and flatten(features[:, :1], "pca")[0].shape == (50, 2)
    with pytest.raises(InputError, match="unknown method"): flatten(features, "tsne")
    with pytest.raises(InputError, match="cannot be laid out"): flatten(features * np.nan, "pca")
    assert len(set(blend_colors(np.eye(6)))) == len(CLASSES) and len(plot_map(features[:, :2], np.eye(6)[np.arange(50) % 6]).data) == 12


@pytest.mark.slow
def test_umap_keeps_groups_together():
    pytest.importorskip("umap")
    group = np.arange(120) % 3
    features = 8 * rng_for(4, "umap").normal(size=(3, 10))[group] + rng_for(5, "umap").normal(size=(120, 10))
    xy, method = flatten(features, "umap")
    near, _ = similar_windows(xy, 5)
    assert method == "umap" and (group[near] == group[:, None]).mean() > .95
