"""The competition's tables: schema, runs, strata, folds, download. Oracles: brute force, the real train.csv."""
import io
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hms_brain import catalog
from hms_brain.catalog import (TRAIN_COLUMNS, download_competition, label_runs, patient_folds, read_test, read_train, run_ids,
                               soft_votes, strata_table, submission_table, vote_stratum)
from hms_brain.core import CLASS_LABELS, VOTE_COLUMNS, InputError
from stand_ins import kaggle_api

LABELS = list(CLASS_LABELS.values())


def make_table(segments) -> pd.DataFrame:
    "train.csv of (eeg, patient, offset, votes) rows."
    rows = [dict(eeg_id=e, eeg_sub_id=i, eeg_label_offset_seconds=float(o), spectrogram_id=e + 1, spectrogram_sub_id=i,
                 spectrogram_label_offset_seconds=float(o), label_id=i, patient_id=p, expert_consensus=LABELS[int(np.argmax(v))], **dict(zip(VOTE_COLUMNS, v)))
            for i, (e, p, o, v) in enumerate(segments)]
    return pd.DataFrame(rows)[list(TRAIN_COLUMNS)]


@pytest.fixture
def table():
    return make_table([(10, 1, 0, [3, 0, 0, 0, 0, 0]), (10, 1, 2, [3, 0, 0, 0, 0, 0]), (10, 1, 4, [0, 1, 0, 0, 0, 1]),
                       (10, 1, 6, [3, 0, 0, 0, 0, 0]), (20, 2, 0, [0, 0, 5, 0, 0, 6])])


@pytest.fixture(scope="module")
def train(real):
    return read_train(real / "hms")


@pytest.fixture(scope="module")
def runs(train):
    return label_runs(train)


def test_read_back_plain_and_zipped(table, tmp_path):
    table.to_csv(tmp_path / "train.csv", index=False)
    pd.testing.assert_frame_equal(read_train(tmp_path), table, check_dtype=False)
    table.to_csv(tmp_path / "train.csv.zip", index=False)
    (tmp_path / "train.csv").unlink()
    pd.testing.assert_frame_equal(read_train(tmp_path), table, check_dtype=False)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.assign(gpd_vote=[0, 0, 0, -2, 5]), ["gpd_vote", "line 5", "-2 is below 0"]),
    (lambda t: t.assign(gpd_vote=[0, 0, 0, 0, "five"]), ["gpd_vote", "line 6", "five is not a whole number"]),
    (lambda t: t.assign(other_vote=[0, 0, np.nan, 0, 6]), ["other_vote", "line 4", "is empty"]),
    (lambda t: t.assign(eeg_label_offset_seconds=[0, 2, np.nan, 6, 0]), ["eeg_label_offset_seconds", "line 4", "empty"]),
    (lambda t: t.assign(eeg_label_offset_seconds=[0, 2, np.inf, 6, 0]), ["eeg_label_offset_seconds", "line 4", "inf"]),
    (lambda t: t.assign(eeg_label_offset_seconds=[0, "x", 4, 6, 0]), ["eeg_label_offset_seconds", "line 3", "not a number"]),
    (lambda t: t.assign(eeg_label_offset_seconds=[0, 0, 4, 6, 0]), ["eeg_label_offset_seconds", "line 3", "twice"]),
    (lambda t: t.assign(expert_consensus=["Seizure", "Seizure", "LPD", "GPD", "Other"]), ["column expert_consensus, line 5: another class has more votes"]),
    (lambda t: t.assign(expert_consensus=["Seizure", "Seizure", "LPD", "Fit", "Other"]), ["expert_consensus", "line 5", "Fit is not one of the six"]),
    (lambda t: t.assign(expert_consensus=["Seizure", "Seizure", "LPD", None, "Other"]), ["expert_consensus", "line 5", "empty"]),
    (lambda t: t.assign(seizure_vote=[3, 0, 0, 3, 0]), ["column seizure_vote..other_vote, line 3: there is not one vote"]),
    (lambda t: t.assign(patient_id=[1, 1, 9, 1, 2]), ["column patient_id, line 2: one EEG belongs to two patients"]),
    (lambda t: t.drop(columns="lpd_vote"), ["lpd_vote is missing"]),
    (lambda t: t.assign(lpd_votes=1), ["lpd_votes is not known", "did you mean lpd_vote?"]),
    (lambda t: t[[*TRAIN_COLUMNS[:-2], "other_vote", "grda_vote"]], ["other_vote stands where grda_vote belongs"]),
    (lambda t: t.iloc[:0], ["no rows"]),
])
def test_breaches_in_one_line(table, tmp_path, change, words):
    change(table.astype(object)).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(InputError) as e:
        read_train(tmp_path / "train.csv")
    assert all(w in str(e.value) for w in ["train.csv", *words]) and "\n" not in str(e.value) and "; " in str(e.value), str(e.value)


@pytest.mark.parametrize("name, content", [("a.csv", b""), ("b.csv", b"\xff\xfe\x00\x01garbage\x00"), ("c.csv.zip", b"PK\x03\x04broken"), ("d.csv", b'a,b\n"1,2\n'), ("gone.csv", None)])
def test_unreadable_tables(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as e:
        read_train(tmp_path / name)
    assert name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("fault", ["a hole", "encrypted"])
def test_damaged_archives_are_told(tmp_path, fault):
    path = tmp_path / "train.csv.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("train.csv", "\n".join(f"{i},{i * 7919 % 1000}" for i in range(5000)))
    raw = bytearray(path.read_bytes())
    if fault == "a hole": raw[200:400] = bytes(b ^ 0x5a for b in raw[200:400])
    else: raw[6], raw[raw.find(b"PK\1\2") + 8] = 1, 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="not a readable CSV"): catalog.read_table(path)
    with pytest.raises(InputError, match="broken zip"): catalog.unpack(path, tmp_path / "dest")


def test_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.csv.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("train.csv", b"0" * 3_000_000)
    with pytest.raises(InputError, match="too large"):
        catalog.read_table(tmp_path / "train.csv.zip", max_bytes=1_000_000)


def test_central_row_represents_a_run(table):
    runs = label_runs(table)
    assert runs["eeg_label_offset_seconds"].tolist() == [0, 4, 6, 0]  # equal votes apart in time are two runs; of two rows the earlier
    assert runs["n_rows"].tolist() == [2, 1, 1, 1] and runs["last_offset"].tolist() == [2, 4, 6, 0]
    assert runs["stratum"].tolist() == ["3-9", "1-2", "3-9", ">=10"]


segments = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=30, unique_by=lambda s: s[:2])


@settings(max_examples=60, deadline=None)
@given(segments, st.randoms())
def test_runs_against_brute_force(segs, random):
    df = make_table([(e, e // 2, o, np.eye(6, dtype=int)[c] * (n + 1)) for e, o, n, c in segs])
    expected = []
    for e in sorted(set(df["eeg_id"])):
        previous = None
        for _, r in df[df["eeg_id"] == e].sort_values("eeg_label_offset_seconds").iterrows():
            v = tuple(r[list(VOTE_COLUMNS)])
            if v == previous:
                expected[-1][2].append(r["eeg_label_offset_seconds"])
            else:
                expected.append((e, v, [r["eeg_label_offset_seconds"]]))
            previous = v
    order = list(range(len(df)))
    random.shuffle(order)
    runs = label_runs(df.iloc[order])
    got = list(zip(runs["eeg_id"], map(tuple, runs[list(VOTE_COLUMNS)].to_numpy()), runs["n_rows"]))
    assert got == [(e, v, len(o)) for e, v, o in expected]
    for at, (_, _, o) in zip(runs["eeg_label_offset_seconds"], expected):
        assert at == min(o, key=lambda x: (abs(x - (o[0] + o[-1]) / 2), x))
    assert run_ids(df).nunique() == len(expected)


def test_soft_votes_and_strata():
    np.testing.assert_allclose(soft_votes([[1, 0, 0, 0, 0, 3]]), [[.25, 0, 0, 0, 0, .75]])
    for bad in ([[0] * 6], [[-1, 2, 0, 0, 0, 0]], [[np.nan, 1, 0, 0, 0, 0]]):
        with pytest.raises(InputError):
            soft_votes(bad)
    assert [vote_stratum(n) for n in (1, 2, 3, 9, 10, 28)] == ["1-2", "1-2", "3-9", "3-9", ">=10", ">=10"]


def test_real_counts(train, runs):
    assert train.shape == (106_800, 15)
    assert (train["eeg_id"].nunique(), train["spectrogram_id"].nunique(), train["patient_id"].nunique()) == (17_089, 11_138, 1_950)
    assert len(train[["eeg_id", *VOTE_COLUMNS]].drop_duplicates()) == 20_183
    assert len(runs) == 21_490 and runs["n_rows"].sum() == len(train)


def test_real_strata(runs):
    t = strata_table(runs)
    assert t["segments"].tolist() == [5948, 9176, 6366]
    facts = [[.05, .19, .15, .04, .07, .51, .90], [.41, .13, .06, .07, .12, .21, .63], [.05, .19, .12, .08, .09, .46, .14]]
    np.testing.assert_allclose(t.drop(columns="segments").to_numpy(float), facts, atol=.0051)


def test_real_folds(runs):
    folds = patient_folds(runs, 5, 0)
    assert (runs.groupby(folds.to_numpy())["patient_id"].nunique().sum(), folds.nunique()) == (1950, 5)
    counts = folds.value_counts()
    assert counts.max() / counts.min() < 1.02
    share = pd.crosstab(folds, [runs["stratum"], runs[list(VOTE_COLUMNS)].to_numpy().argmax(1)])
    big = share.loc[:, share.sum() > 500]
    assert (big.max() / big.min()).max() < 1.6  # every fold has its share of the common kinds
    assert folds.equals(patient_folds(runs, 5, 0)) and not folds.equals(patient_folds(runs, 5, 1))
    back = patient_folds(runs.iloc[::-1], 5, 0)
    assert folds.equals(back.sort_index())


def test_real_priors(runs):
    from hms_brain.metrics import kl_divergence
    y = soft_votes(runs[runs["stratum"] == ">=10"])
    assert abs(kl_divergence(y, np.full(y.shape, 1 / 6)) - 1.138) < .0006
    assert abs(kl_divergence(y, np.tile(y.mean(axis=0), (len(y), 1))) - .850) < .0006


def test_real_test_side(real):
    test = read_test(real / "hms")
    sample = pd.read_csv(real / "hms/sample_submission.csv")
    pd.testing.assert_frame_equal(submission_table(test["eeg_id"]), sample)


# the Kaggle client against a loopback stand-in of its API


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    pytest.importorskip("kagglesdk.kaggle_env", reason="the Kaggle client is an extra")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("train.csv", make_table([(10, 1, 0, [3, 0, 0, 0, 0, 0])]).to_csv(index=False))
        z.writestr("train_eegs/10.parquet", b"x" * 3_000_000)  # the client reads pieces of 1 MiB
    with kaggle_api(monkeypatch, tmp_path / "home") as handler:
        handler.body = archive.getvalue()
        yield handler


@pytest.fixture
def no_naps(monkeypatch):
    "The pauses that the client would have made, s."
    from kaggle.api import kaggle_api_extended

    naps = []
    monkeypatch.setattr(kaggle_api_extended.time, "sleep", naps.append)
    return naps


def test_download(kaggle, tmp_path, capfd):
    dest = download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    assert sorted(p.name for p in dest.rglob("*") if p.is_file()) == ["10.parquet", "download.json", "train.csv"]
    assert len(read_train(dest)) == 1
    kaggle.calls.clear()
    download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    assert kaggle.calls == []  # complete: the network is not asked
    shown = "".join(capfd.readouterr())
    assert "CANARY" not in shown
    with pytest.raises(InputError, match="holds the data of toy"): download_competition(tmp_path / "raw", "another", archive_gb=1e-6)


@pytest.mark.parametrize("status, words", [(401, "refused the token"), (403, "rules"), (404, "no such competition"), (429, "asks for patience"), (500, "answered 500")])
def test_refusals_in_words(kaggle, tmp_path, capfd, status, words):
    kaggle.status = status
    with pytest.raises(InputError, match=words) as e:
        download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    assert "\n" not in str(e.value) and "CANARY" not in str(e.value) + "".join(capfd.readouterr())
    assert not list((tmp_path / "raw").rglob("*"))


def test_a_short_pause_is_waited_for(kaggle, no_naps, tmp_path):
    kaggle.status, kaggle.retry_after, kaggle.refusals = 429, "7", 2
    download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    assert no_naps == [7.0, 7.0] and [m for m, _ in kaggle.calls].count("DownloadDataFiles") == 3


def test_a_long_pause_is_told(kaggle, no_naps, tmp_path):
    kaggle.status, kaggle.retry_after = 429, "3600"
    with pytest.raises(InputError, match=r"429\), 3600 s of it"):
        download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    assert no_naps == []


def test_a_cut_transfer_goes_on_where_it_stopped(kaggle, no_naps, tmp_path, capfd):
    kaggle.cuts = 1
    download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    assert [asked for m, asked in kaggle.calls if m == "GET"] == ["", f"bytes={2**20}-"]
    shown = "".join(capfd.readouterr())
    assert f"Resuming from {2**20} bytes" in shown and "CANARY" not in shown


def test_a_download_that_was_given_up_goes_on_the_next_time(kaggle, no_naps, tmp_path, capfd):
    kaggle.cuts = 100
    with pytest.raises(InputError, match="the connection was cut"):
        download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    (part,) = (tmp_path / "raw").glob("toy.zip")
    there, kaggle.cuts = part.stat().st_size, 0
    kaggle.calls.clear()
    assert 0 < there < len(kaggle.body)
    assert len(read_train(download_competition(tmp_path / "raw", "toy", archive_gb=1e-6))) == 1
    assert [asked for m, asked in kaggle.calls if m == "GET"] == ["", f"bytes={there}-"]
    assert "CANARY" not in "".join(capfd.readouterr())


def test_a_wrong_size_is_told(kaggle, no_naps, tmp_path):
    kaggle.cuts, kaggle.short = 1, 5
    with pytest.raises(InputError, match="does not match expected size"):
        download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    assert not (tmp_path / "raw/download.json").exists()


def test_what_is_not_a_zip_file_is_told(kaggle, tmp_path):
    kaggle.body = b"<html>sorry</html>"
    with pytest.raises(InputError, match="not a zip file"):
        download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)


def test_nobody_there(kaggle, monkeypatch, tmp_path, capfd):
    import kagglesdk.kaggle_env as env

    monkeypatch.setitem(env._env_to_endpoint, env.KaggleEnv.PROD, "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached") as e:
        download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    assert "127.0.0.1" not in str(e.value) and "CANARY" not in "".join(capfd.readouterr())


def test_no_token(kaggle, monkeypatch, tmp_path):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    assert catalog.kaggle_token_source() is None
    with pytest.raises(InputError, match="no valid token"):
        download_competition(tmp_path / "raw", "toy", archive_gb=1e-6)
    assert kaggle.calls == []


def test_no_space(tmp_path):
    with pytest.raises(InputError, match="GB are needed"):
        download_competition(tmp_path / "raw", "toy", archive_gb=1e9)
    assert not (tmp_path / "raw").exists()


def test_hostile_and_broken_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as z:
        z.writestr("../outside.txt", "x")
    with pytest.raises(InputError, match="points outside"):
        catalog.unpack(tmp_path / "evil.zip", tmp_path / "dest")
    assert not (tmp_path / "outside.txt").exists()
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as z:
        z.writestr("a.txt", "hello world")
    raw = (tmp_path / "bad.zip").read_bytes().replace(b"hello", b"hellO")
    (tmp_path / "bad.zip").write_bytes(raw)
    with pytest.raises(InputError, match="broken zip"):
        catalog.unpack(tmp_path / "bad.zip", tmp_path / "dest")
    assert not list((tmp_path / "dest").glob("*"))
