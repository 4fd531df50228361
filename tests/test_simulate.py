"""The simulator: same seed same bytes, attributes that can be measured back, no shortcut through nuisances, the HMS layout."""
import filecmp
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from hms_brain.catalog import label_runs, read_test, read_train, soft_votes
from hms_brain.core import CHANNELS, CLASSES, VOTE_COLUMNS, InputError, rng_for
from hms_brain.head import background, bipolar, draw_traits, make_head, sphere_gain
from hms_brain.records import read_context, read_recording
from hms_brain.signal import bandpass
from hms_brain.bench import simulation_rate
from hms_brain.simset import PRIMES, call_probabilities, draw_plan, joint_prior, measure, scatter, simulate_dataset
from hms_brain.patterns import CLARITY, Attributes, cycle_times, draw_attributes
from hms_brain.simulate import cut_timeline, period_at, plant, simulate, simulate_recording, simulate_stream, simulate_timeline

N = 16  # recordings per pattern


@pytest.fixture(scope="module")
def gallery():
    "Fifty clean seconds of every pattern from many patients."
    return {c: [simulate(11, c, 50, patient=i, artefacts=False) for i in range(N)] for c in CLASSES}


def sides(x):
    p = (bandpass(bipolar(x), .5, 20) ** 2).mean(1).reshape(4, 4).mean(1)  # LL RL LP RP
    return np.log((p[0] + p[2]) / (p[1] + p[3]))


# head
def test_sphere_without_shells_is_the_homogeneous_sphere():
    "Oracle: the closed form of a radial dipole in a homogeneous sphere (Brody 1973), up to one constant scale."
    rng = np.random.default_rng(0)
    e = rng.normal(size=(40, 3)); e /= np.linalg.norm(e, axis=1, keepdims=True)
    for moment in np.eye(3):
        r0 = np.array([0, 0, .5])
        d = e - r0
        dist = np.linalg.norm(d, axis=1)
        cos = e @ r0
        exact = (2 * (d @ moment) / dist**3 + (e @ moment + ((e @ moment) * cos - (r0 @ moment)) / (dist + 1 - cos)) / dist)
        series = sphere_gain(e, r0[None], moment[None], skull=1, terms=80)[:, 0]
        np.testing.assert_allclose(series, exact, rtol=1e-6, atol=1e-8)


def test_a_skull_smears():
    e = np.array([[np.sin(a), 0, np.cos(a)] for a in np.linspace(0, 1.5, 30)])
    widths = []
    for skull in (1, 1 / 20, 1 / 80):
        v = sphere_gain(e, np.array([[0, 0, .8]]), np.array([[0, 0, 1.]]), skull)[:, 0]
        widths.append((v > v[0] / 2).sum())
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_background_amplitude_and_slope():
    rms, slopes, white = [], [], []
    for i in range(12):
        rng = rng_for(i, "test")
        x = background(rng, make_head(rng), draw_traits(rng), 12_000)
        rms.append(np.sqrt((bandpass(bipolar(x), .5, 20) ** 2).mean()))
        f = np.fft.rfftfreq(800, 1 / 200)
        p = (np.abs(np.fft.rfft(bipolar(x).reshape(16, 15, 800) * np.hanning(800))) ** 2).mean((0, 1))
        k = (f >= 2) & (f <= 30)
        slopes.append(np.polyfit(np.log(f[k]), np.log(p[k]), 1)[0])
        white.append(np.isfinite(x).all())
    assert all(white) and 5 < np.median(rms) < 16
    assert -3.2 < np.mean(slopes) < -1.5


# patterns
@pytest.mark.parametrize("rate", [.6, 1., 2., 4.])
def test_cycles_have_the_rate_and_regularity_asked_for(rate):
    t = cycle_times(np.random.default_rng(0), Attributes(rate=rate, rate_end=rate, cv=.2), 400)
    gaps = np.diff(t)
    assert abs(1 / gaps.mean() - rate) < .05 * rate
    assert abs(gaps.std() / gaps.mean() - .2) < .04


def test_laterality_and_place(gallery):
    lat = {c: np.median([abs(sides(s.recording.eeg)) for s in gallery[c]]) for c in CLASSES}
    assert lat["lpd"] > .9 and lat["lrda"] > .9
    assert lat["gpd"] < .4 and lat["grda"] < .35
    signs = [np.sign(s.attributes.side) == -np.sign(sides(s.pattern)) for s in gallery["lpd"]]
    assert np.mean(signs) > .9  # side -1 is left, and left is louder there
    front, back = ([CHANNELS.index(c) for c in names] for names in (("Fp1", "Fp2", "F3", "F4"), ("O1", "O2", "T5", "T6")))
    frontal = [s.pattern[front].std() > s.pattern[back].std() for s in gallery["grda"]]
    assert np.mean(frontal) > .8


def test_sharpness_shows_as_kurtosis(gallery):
    def kurtosis(s):
        x = bipolar(s.pattern)
        x = x[x.std(1).argmax()]
        return ((x - x.mean()) ** 4).mean() / x.var() ** 2
    k = {c: np.median([kurtosis(s) for s in gallery[c]]) for c in ("lpd", "gpd", "lrda", "grda")}
    assert min(k["lpd"], k["gpd"]) > 3.5 > 3 > max(k["lrda"], k["grda"])


@pytest.mark.parametrize("pattern", ["lpd", "gpd", "lrda", "grda"])
def test_rate_recovered_by_autocorrelation(gallery, pattern):
    "In steady clear cases the first strong peak of the signal's own autocorrelation is the cycle."
    hits = []
    for s in gallery[pattern]:
        a = s.attributes
        whole = period_at(s.timeline, 25)
        if whole.start > 5 or whole.stop < 45 or a.snr < 4: continue
        x = bandpass(bipolar(s.recording.eeg[:, 1000:9000]), .5, 20)
        x = x[np.argsort((bipolar(s.pattern) ** 2).mean(1))[-4:]]
        ac = sum(np.fft.irfft(np.abs(np.fft.rfft(c, 2 * len(c))) ** 2)[:500] for c in x)
        rate = 1 / np.median(np.diff(s.cycles[(s.cycles > 5) & (s.cycles < 45)]))
        lo, hi = int(200 / 3.2), int(200 / .42)
        top = lo + ac[lo:hi].argmax()
        hits.append(min(abs(200 / top * k / rate - 1) for k in (1, 2)) < .2)  # or twice the cycle
    assert len(hits) >= 4 and np.mean(hits) >= .75


def test_amplitudes(gallery):
    rms = {c: np.median([np.sqrt((bandpass(bipolar(s.recording.eeg), .5, 20) ** 2).mean()) for s in gallery[c]]) for c in CLASSES}
    assert 5 < rms["other"] < 16
    assert 11 < rms["gpd"] < 34 and 10 < rms["grda"] < 33
    assert rms["seizure"] > rms["other"]
    common = np.median([bandpass(s.recording.eeg, .5, 20).std() for s in gallery["other"]])
    assert common > rms["other"]  # referential is larger than bipolar


def test_reflection_makes_two_sides_and_generalised_is_symmetric(gallery):
    assert all(a.reflection < .35 for a in (draw_attributes(rng_for(i), "lpd") for i in range(20)))
    assert all(a.reflection > .75 for a in (draw_attributes(rng_for(i), "gpd") for i in range(20)))


@pytest.mark.parametrize("pattern", CLASSES)
@pytest.mark.parametrize("clarity", CLARITY)
def test_timeline_covers_the_recording(pattern, clarity):
    for seed in range(4):
        line = simulate_timeline(rng_for(seed), pattern, 600, clarity=clarity)
        assert line[0].start <= 0 and line[-1].stop >= 600
        assert all(a.stop == b.start for a, b in zip(line, line[1:]))
        assert next(p for p in line if p.start <= 300 < p.stop).attributes.pattern == pattern


def test_finite_but_for_missing_samples():
    nan = 0
    for i in range(40):
        r = simulate_recording(5, CLASSES[i % 6], 50, patient=i)
        assert r.signal.shape == (20, 10_000) and r.signal.dtype == np.float32 and not np.isinf(r.signal).any()
        nan += np.isnan(r.signal).any()
    assert nan < 8
    assert not np.isnan(simulate_recording(5, "lpd", 50, artefacts=False).signal).any()


def test_same_seed_same_bytes_and_everything_else_differs():
    a = simulate_recording(3, "gpd", 50, patient=2)
    assert a.signal.tobytes() == simulate_recording(3, "gpd", 50, patient=2).signal.tobytes()
    others = [simulate_recording(3, "gpd", 50, patient=3), simulate_recording(4, "gpd", 50, patient=2), simulate_recording(3, "gpd", 50, patient=2, recording=1)]
    assert len({a.id, *(o.id for o in others)}) == 4


@pytest.mark.parametrize("wrong", [{"pattern": "lpds"}, {"clarity": "vague"}, {"duration": 0}, {"duration": float("nan")}])
def test_wrong_use(wrong):
    with pytest.raises(InputError):
        simulate(0, **wrong)


def nuisances(s):
    "What must not tell the class: mains, missing samples, gain of the reference, muscle, drift, the heart."
    x = s.recording.signal
    a = s.artefact
    f = np.abs(np.fft.rfft(a, axis=1)) ** 2
    hz = np.fft.rfftfreq(a.shape[1], 1 / 200)
    band = lambda lo, hi: np.log(f[:, (hz > lo) & (hz < hi)].sum() + 1)
    common = np.nan_to_num(x[:19]).mean(0).std()
    return [np.isnan(x).any(), (np.nan_to_num(x[:19]).std(1) == 0).any(), np.log(common + 1), np.log(np.nanstd(x[19]) + 1), band(59, 61), band(22, 55), band(.5, 8), band(0, .5), np.log(np.abs(a).max() + 1)]


def test_nuisances_do_not_tell_the_class():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    n = 50
    x = np.array([nuisances(simulate(21, c, 20, patient=i * 6 + k)) for i in range(n) for k, c in enumerate(CLASSES)])
    y = np.tile(np.arange(6), n)
    x = x[:, x.std(0) > 0]
    scores = cross_val_score(make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)), x, y, cv=5)
    assert scores.mean() < 1 / 6 + 3 * np.sqrt(5 / 36 / len(y))


def everything_but_the_brain(i):
    "A data set's recording by what must not tell its class: nuisances, lengths, identifiers."
    plan = draw_plan(rng_for(21, "plan", i), 21, i, 0)
    at = float(plan.clips[0][[0, -1]].mean()) + 300
    s = simulate(21, duration=20, patient=i, timeline=cut_timeline(plan.timeline, at - 10, at + 10))
    ids = [scatter(21, kind, i * k) for kind, k in (("patient_id", 1), ("eeg_id", 256), ("spectrogram_id", 64), ("label_id", 32768))]
    lengths = [plan.duration, len(plan.clips), len(plan.clips[0]), plan.clips[0][-1] - plan.clips[0][0]]
    return [*nuisances(s), *ids, *lengths], plan.lead, np.log(np.sort((bipolar(s.pattern) ** 2).mean(1))[[0, -1]] + 1)


def test_boosting_on_nuisances_stays_at_the_prior():
    "Gain, mains, missing samples, length, EKG, ids: a flexible learner gets no more than the prior from them; given the pattern's size it does."
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import log_loss
    from sklearn.model_selection import cross_val_predict
    found = [everything_but_the_brain(i) for i in range(420)]
    x, y, pattern = np.array([f[0] for f in found]), np.array([f[1] for f in found]), np.array([f[2] for f in found])
    prior = np.bincount(y, minlength=6) / len(y)
    floor = -(prior[prior > 0] * np.log(prior[prior > 0])).sum()

    def loss(features):
        model = HistGradientBoostingClassifier(learning_rate=.03, max_iter=40, max_leaf_nodes=6, min_samples_leaf=20, random_state=0)
        return log_loss(y, cross_val_predict(model, features, y, cv=5, method="predict_proba"))

    assert loss(x) >= floor - .01, (loss(x), floor)
    assert loss(np.c_[x, pattern]) < floor - .1


def test_planting_keeps_the_timeline_whole():
    line = simulate_timeline(rng_for(3), "lpd", 600)
    for a, b in ((100, 130), (0, 600), (590, 640)):
        for what in (line[0].attributes, Attributes("grda")):
            new = plant(line, a, b, what)
            assert all(p.stop == q.start for p, q in zip(new, new[1:])) and all(p.stop > p.start for p in new)
            assert period_at(new, a + 1).attributes == what == period_at(new, b - 1).attributes
            assert new[0].start <= line[0].start and new[-1].stop >= line[-1].stop
    cut = cut_timeline(line, 200, 260)
    assert cut[0].start <= 0 and cut[-1].stop >= 60
    assert period_at(cut, 30).attributes == period_at(line, 230).attributes


# streams
def test_stream_is_endless_seeded_and_seamless():
    def seconds(n, **kw):
        stream = simulate_stream(4, "grda", chapter=15, **kw)
        return np.concatenate([next(stream) for _ in range(n)], axis=1)
    x = seconds(50)
    assert x.shape == (20, 10_000) and x.dtype == np.float32
    np.testing.assert_array_equal(x, seconds(25, block=2.0))
    assert not np.array_equal(x, seconds(50, patient=1))
    quiet = bandpass(bipolar(np.nan_to_num(x[:19])), .5, 20)
    jumps = np.abs(np.diff(quiet, axis=1)).max(0)
    seams = np.concatenate([jumps[k * 3000 - 250:k * 3000 + 250] for k in (1, 2, 3)])
    assert np.quantile(seams, .99) < 4 * np.quantile(jumps, .99)


def test_stream_keeps_time():
    import time
    stream = simulate_stream(0, block=.1, chapter=10, speed=2)
    next(stream)
    begin = time.monotonic()
    for _ in range(10): next(stream)
    assert .4 < time.monotonic() - begin < 1.5


@pytest.mark.parametrize("wrong", [{"block": 0}, {"block": .0003}, {"block": 400}, {"speed": 0}, {"pattern": "lpds"}, {"chapter": 1}, {"block": float("nan")}])
def test_stream_refuses(wrong):
    with pytest.raises(InputError):
        simulate_stream(**wrong)


def test_rate_counts_examples():
    rate = simulation_rate(n=2, workers=1)
    assert rate["examples"] == 2 and rate["per_second"] == 2 / rate["seconds"]


# votes
def test_rules_name_the_clear_cases(gallery):
    called = {c: np.mean([call_probabilities(measure(s, 25)).argmax() == k for s in gallery[c]]) for k, c in enumerate(CLASSES)}
    assert min(called.values()) > .6, called
    for s in gallery["seizure"]:
        p = call_probabilities(measure(s, 25))
        assert abs(p.sum() - 1) < 1e-9 and (p > 0).all()


def test_identifiers_never_collide():
    for kind, prime in PRIMES.items():
        assert len({scatter(0, kind, i) for i in range(3000)}) == 3000
        assert all(prime % d for d in range(2, int(prime**.5) + 1))


def test_prior_is_the_published_one():
    np.testing.assert_allclose(joint_prior().sum(), 1)
    np.testing.assert_allclose(joint_prior()[2] / joint_prior()[2].sum(), np.array([.05, .19, .12, .08, .09, .46]) / .99)


# the data set
@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "The same data set from one and from two workers."
    made = []
    for workers in (1, 2):
        folder = tmp_path_factory.mktemp("sim") / "set"
        simulate_dataset(folder, patients=14, seed=1, workers=workers, recordings=1.5, n_test=1, progress=False)
        made.append(folder)
    return made


def files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def test_workers_do_not_change_a_byte(sets):
    one, two = sets
    assert files(one) == files(two)
    assert all(filecmp.cmp(one / f, two / f, shallow=False) for f in files(one))


def test_layout(sets):
    folder = sets[0]
    df = read_train(folder)
    assert list(df.columns)[:3] == ["eeg_id", "eeg_sub_id", "eeg_label_offset_seconds"] and len(df.columns) == 15
    assert {p.name for p in folder.iterdir()} == {"train.csv", "truth.csv", "test.csv", "sample_submission.csv", "train_eegs", "train_spectrograms",
                                                  "test_eegs", "test_spectrograms", "simulated.json", "README.md", "LICENSE"}
    assert {int(p.stem) for p in (folder / "train_eegs").iterdir()} == set(df.eeg_id)
    assert {int(p.stem) for p in (folder / "train_spectrograms").iterdir()} == set(df.spectrogram_id)
    assert df.label_id.is_unique and (df.groupby("eeg_id").spectrogram_id.nunique() == 1).all()
    assert len(pd.read_csv(folder / "truth.csv")) == len(df)
    assert {k for k in VOTE_COLUMNS if df[k].sum()} == set(VOTE_COLUMNS)
    assert "SIMULATED" in (folder / "LICENSE").read_text() and "SIMULATED" in (folder / "README.md").read_text()
    test = read_test(folder)
    sub = pd.read_csv(folder / "sample_submission.csv")
    np.testing.assert_allclose(sub[list(VOTE_COLUMNS)].sum(axis=1), 1)
    assert list(sub.eeg_id) == list(test.eeg_id)
    assert len(label_runs(df)) >= 10 and np.allclose(soft_votes(df).sum(1), 1)


def test_signals_hold_every_window(sets):
    folder = sets[0]
    df = read_train(folder)
    for eeg, rows in df.groupby("eeg_id"):
        table = pq.read_table(folder / "train_eegs" / f"{eeg}.parquet")
        assert table.column_names == [*CHANNELS, "EKG"] and set(map(str, table.schema.types)) == {"float"}
        assert table.num_rows == 200 * (50 + rows.eeg_label_offset_seconds.max())
    for spec, rows in df.groupby("spectrogram_id"):
        table = pq.read_table(folder / "train_spectrograms" / f"{spec}.parquet")
        t = table.column("time").to_numpy()
        assert table.num_columns == 401 and t[0] == 1 and (np.diff(t) == 2).all()
        assert t[-1] + 1 >= 600 + rows.spectrogram_label_offset_seconds.max()


def test_eeg_and_context_show_the_same_seconds(sets):
    "Second t of the EEG window is second t + 275 of its ten minutes."
    from hms_brain.spectrogram import regional_spectrogram
    folder = sets[0]
    row = read_train(folder).drop_duplicates("eeg_id").iloc[0]
    eeg = read_recording(folder / "train_eegs" / f"{row.eeg_id}.parquet").eeg
    times, power = read_context(folder / "train_spectrograms" / f"{row.spectrogram_id}.parquet")
    t, own = regional_spectrogram(eeg[:, :10_000])
    at = np.searchsorted(times, t + 275 + row.spectrogram_label_offset_seconds - .5)
    inner = slice(4, -4)
    a, b = np.log(own[:, :, inner] + 1e-6), np.log(power[:, :, at][:, :, inner] + 1e-6)
    keep = np.isfinite(a) & np.isfinite(b)
    # clips start on odd seconds of the spectrogram's grid, columns are centred a second apart, hence correlation and not equality
    assert np.corrcoef(a[keep], b[keep])[0, 1] > .8


def test_resumes_and_refuses(sets, tmp_path, monkeypatch):
    import hms_brain.simset as simset
    folder = tmp_path / "set"
    real, calls = simset.simulate_plan, []

    def dies(*args):
        calls.append(args[1])
        if args[1] == 4: raise RuntimeError("the power fails")
        return real(*args)

    monkeypatch.setattr(simset, "simulate_plan", dies)
    with pytest.raises(RuntimeError):
        simulate_dataset(folder, patients=14, seed=1, workers=1, recordings=1.5, n_test=1, progress=False)
    assert not (folder / "train.csv").exists()
    monkeypatch.setattr(simset, "simulate_plan", lambda *a: calls.append(a[1]) or real(*a))
    calls.clear()
    simulate_dataset(folder, patients=14, seed=1, workers=1, recordings=1.5, n_test=1, progress=False)
    assert min(calls) == 4
    assert files(folder) == files(sets[0]) and all(filecmp.cmp(folder / f, sets[0] / f, shallow=False) for f in files(folder))
    with pytest.raises(InputError, match="another"):
        simulate_dataset(folder, patients=15, seed=1, workers=1, progress=False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "train.csv").write_text("real data")
    with pytest.raises(InputError, match="not empty"):
        simulate_dataset(tmp_path / "theirs", patients=2, progress=False)
