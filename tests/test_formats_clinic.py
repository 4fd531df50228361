"Files as clinics and their scripts write them: names, rates, units and times that say what they mean in many ways."
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy.io import savemat

from hms_brain.core import CHANNELS, InputError
from hms_brain.records import read_recording
from hms_brain.preprocess import Preprocess
from test_formats import HMS, edf, kinds, noise, refused, write

USUAL = "Fp1 Fp2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T3 T4 T5 T6 Fz Cz Pz".split()  # the order of most files, not that of HMS
ASSUMED = "no channel names: HMS order assumed"


def details(recording):
    "Sentences of the issues."
    return [i.detail for i in recording.issues]


@pytest.mark.parametrize("extra", [(), ("A1", "A2"), ("A1", "A2", "EKG", "Photic")])
@pytest.mark.parametrize("variable", ["channels", "labels", "ch_names", "chan_names", "channel_names", "Channel_Names"])
def test_mat_names_are_read(tmp_path, variable, extra):
    "Rows are taken by name, in cells, chars and one string, with any number of rows."
    names = [*USUAL, *extra]
    x = noise(len(names), 3000).astype(float)
    for k, words in enumerate((np.array(names, object), np.array(names), " ".join(names), ", ".join(f"EEG {n}-Ref" for n in names))):
        savemat(tmp_path / f"{k}.mat", {"data": x if k % 2 else x.T, "Fs": 250.0, variable: words})
        r = read_recording(tmp_path / f"{k}.mat", fs=None, sandbox=False)
        assert_allclose(r.eeg, x[[names.index(c) for c in CHANNELS]], rtol=1e-5)
        assert ASSUMED not in details(r) and r.fs == 250


def test_an_order_that_is_assumed_is_said(tmp_path):
    "Arrays without names; the published layouts have an order. Names that fit no table, or are no electrodes, stop the reading."
    x = noise(20, 3000).astype(float)
    for name, content in (("a", {"data": x}), ("b", {"data": x, "labels": np.arange(20.0)}), ("c", {"data": x, "label": "LPD"}), ("d", {"data": x, "labels": np.array(["LPD", "GPD"], object)})):
        savemat(tmp_path / f"{name}.mat", content)
        assert ASSUMED in details(read_recording(tmp_path / f"{name}.mat", sandbox=False))
    for name in ("seg", "seg_10sec"):
        savemat(tmp_path / "p.mat", {name: x})
        assert not read_recording(tmp_path / "p.mat", sandbox=False).issues
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "a.npz", signal=x, label=3)
    np.savez(tmp_path / "b.npz", signal=x, labels=np.array(HMS))
    assert [ASSUMED in details(read_recording(tmp_path / n, sandbox=False)) for n in ("a.npy", "a.npz", "b.npz")] == [True, True, False]
    savemat(tmp_path / "q.mat", {"data": x, "channels": np.array(USUAL, object)})
    assert "its channels are 19 channels, and no table has so many" in refused(tmp_path / "q.mat", sandbox=False)
    savemat(tmp_path / "q.mat", {"data": x, "channels": np.array([f"ch{k}" for k in range(20)], object)})
    assert "none of the 19 electrodes" in refused(tmp_path / "q.mat", sandbox=False)


@pytest.mark.parametrize("name", ["Fs", "fs", "FS", "srate", "SampleRate", "sampling_rate", "samplingRate", "sfreq", "sample_rate"])
def test_rates_have_many_names(tmp_path, name):
    "MAT and NPZ, whatever the case."
    x = noise(20, 3000)
    savemat(tmp_path / "a.mat", {"data": x, name: np.uint16(256)})
    np.savez(tmp_path / "a.npz", signal=x, **{name: 256})
    for file in ("a.mat", "a.npz"):
        r = read_recording(tmp_path / file, fs=None, sandbox=False)
        assert r.fs == 256 and not any("sampling rate" in d for d in details(r))


@pytest.mark.parametrize(("name", "step"), [("Time (s)", 1), ("time[s]", 1), ("Time_s", 1), ("TIME [sec]", 1), ("t", 1), ("seconds", 1), ("time_ms", 1000), ("Time (ms)", 1000), ("time[msec]", 1000),
                                            ("milliseconds", 1000), ("time (µs)", 1e6), ("timestamp (us)", 1e6), ("time", 1000), ("Time (s)", 1000)])
@pytest.mark.parametrize("fs", [128, 199.7, 256, 512])
def test_time_columns(tmp_path, name, step, fs):
    "The unit of a time column is in its name; milliseconds without one are recognised, and said."
    x = noise(19, 3000)
    frame = pd.DataFrame(x.T, columns=list(CHANNELS))
    frame.insert(0, name, np.arange(3000) / fs * step)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for file in ("a.csv", "a.parquet"):
        r = read_recording(tmp_path / file, fs=None, sandbox=False)
        assert r.fs == fs and any("taken as milliseconds" in d for d in details(r)) == (step == 1000 and "m" not in name.lower().removeprefix("time"))
        assert_allclose(r.eeg, x, rtol=1e-4)


def test_a_rate_that_is_no_eeg_is_still_refused(tmp_path):
    "30 Hz is slow in seconds and too fast in milliseconds."
    frame = pd.DataFrame(noise(19, 3000).T, columns=list(CHANNELS))
    frame.insert(0, "time", np.arange(3000) / 30)
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(InputError, match="sampling rate is 30 Hz"): read_recording(tmp_path / "a.csv", sandbox=False)


# ---------------------------------------------------------------- units and empty channels
@pytest.mark.parametrize("factor", [1e-3, 1e-6])
def test_one_unit_for_a_file(tmp_path, factor):
    "A part that is quiet, or all artefact, is read in the unit of the file's middle."
    x = noise(19, 200 * 200).astype(float)
    x[:, :8000] *= 50
    x[:, -8000:] *= 1e-3
    pd.DataFrame(x.T * factor, columns=list(CHANNELS)).to_parquet(tmp_path / "a.parquet")
    write(tmp_path, "a.edf", edf(x * factor, unit="", span=10_000 * factor))
    for name, exact in (("a.parquet", 1e-3), ("a.edf", 0.4)):
        whole = read_recording(tmp_path / name, sandbox=False).eeg
        assert_allclose(whole, x, rtol=1e-4, atol=exact)
        for start in (0, 90, 165): assert_allclose(read_recording(tmp_path / name, start=start, duration=30, sandbox=False).eeg, whole[:, 200 * start:200 * start + 6000], rtol=1e-4, atol=exact)


def test_names_of_a_spreadsheet(tmp_path):
    "Units in brackets, quotes and a dash of typesetters, in UTF-8 and in Latin-1."
    x = noise(19, 4000)
    for name, encoding, label in (("a.csv", "utf-8", "{} (µV)"), ("b.csv", "latin-1", "{} (µV)"), ("c.csv", "utf-8", "'{}–REF'"), ("d.csv", "utf-8", "EEG.{}[uV]")):
        pd.DataFrame(x.T, columns=[label.format(c) for c in CHANNELS]).to_csv(tmp_path / name, index=False, encoding=encoding)
        r = read_recording(tmp_path / name, sandbox=False)
        assert_allclose(r.eeg, x, rtol=1e-4)
        assert ("unit" in kinds(r)) == (name == "c.csv")


def test_edf_channels_without_a_range(tmp_path):
    "Physical minimum equals maximum: the channel is left out and said; three electrodes are estimated, more are refused as before."
    x = noise(20)
    def file(*names, **kw): return write(tmp_path, "a.edf", edf(x, labels=HMS, pmin=[0 if c in names else -3000 for c in HMS], pmax=[0 if c in names else 3000 for c in HMS], **kw))
    r = read_recording(file("EKG"), sandbox=False)
    assert r.ekg is None and next(i.channels for i in r.issues if i.kind == "repaired") == ("EKG",) and r.channel_map["EKG"] == ""
    assert_allclose(r.eeg, x[:19], atol=0.1)
    r = read_recording(file("EKG", "C3", "Pz"), sandbox=False)
    assert next(i.channels for i in r.issues if i.kind == "interpolated") == ("C3", "Pz") and not Preprocess()(r).eeg[CHANNELS.index("C3")].max() == 0
    assert read_recording(file("EKG", "C3"), channel_map={"C3": "", "EKG": ""}, sandbox=False).channel_map["C3"] == ""
    for names in (CHANNELS[:4], HMS): assert "the physical range of channel Fp1 is empty" in refused(file(*names), sandbox=False)
