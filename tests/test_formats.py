"Readers of files: round trips, real files, and everything that must be refused in one line."
import importlib
import json
import os
import subprocess
import sys
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from hms_brain.core import CHANNELS, EKG, InputError, get_settings, rng_for
from hms_brain.formats import sandbox as door
from hms_brain.formats.edf import read_header, record_onsets
from hms_brain.formats.tables import spectrogram_names
from hms_brain.records import read_context, read_recording

HMS = [*CHANNELS, EKG]
CANARY = "Zebulon Quagga"


def noise(n_chans=20, n_times=10_000, seed=0):
    "White noise in uV, float32."
    return rng_for(seed, "formats").normal(0, 40, (n_chans, n_times)).astype(np.float32)


def kinds(recording):
    "Kinds of issues of a recording."
    return {i.kind for i in recording.issues}


def refused(path, **kw):
    "The one line with which a file is refused."
    t = time.monotonic()
    with pytest.raises(InputError) as e: read_recording(path, **kw)
    assert time.monotonic() - t < 10
    line = str(e.value)
    assert "\n" not in line and len(line) <= 1024 and "Traceback" not in line
    return line


def edf(x, fs=200, unit="uV", labels=CHANNELS, record=1.0, span=3000, n_records=None, reserved="", onsets=None, bdf=False, date="01.01.85", **fields):
    "An EDF or BDF, byte by byte; `fields` replace the columns of the header."
    n_rec, ns = round(x.shape[1] / fs / record), len(labels) + (onsets is not None)
    top, per = (8388607 if bdf else 32767), round(fs * record)
    columns = {"label": 16, "transducer": 80, "unit": 8, "pmin": 8, "pmax": 8, "dmin": 8, "dmax": 8, "filter": 80, "samples": 8, "reserved": 32}
    values = {"label": list(labels), "unit": unit, "pmin": -span, "pmax": span, "dmin": -top - 1, "dmax": top, "samples": per} | fields
    head = (b"\xffBIOSEMI" if bdf else b"0       ") + f"{CANARY:80}{CANARY:80}{date:8}{'00.00.00':8}{256 * (ns + 1):<8}{reserved:44}{n_rec if n_records is None else n_records:<8}{record:<8g}{ns:<4}".encode()
    for name, width in columns.items():
        cell = values.get(name, CANARY if width >= 32 else "")
        cell = list(cell) if isinstance(cell, list) else [cell] * len(labels)
        if onsets is not None: cell += [{"label": "EDF Annotations", "samples": 30}.get(name, cell[-1] if name != "unit" else "")]
        head += b"".join(f"{c:<{width}}"[:width].encode("latin-1") for c in cell)
    digits = np.clip(np.round((x + span) / (2 * span) * (2 * top + 1) - top - 1), -top - 1, top).astype("<i4")
    def code(a): return a.astype("<i2").tobytes() if not bdf else np.ascontiguousarray(a).view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    body = b""
    for k in range(n_rec):
        body += b"".join(code(row[k * per:(k + 1) * per]) for row in digits)
        if onsets is not None: body += f"+{onsets[k]:g}\x14\x14\0+{onsets[k]:g}\x14{CANARY}\x14".encode().ljust(60, b"\0")
    return head + body


def write(folder, name, content):
    "A file with some bytes."
    path = folder / name
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------- real files
@pytest.mark.real
def test_real_eegs(real):
    "Every EEG of the folder is read through the child: shape, rate, finite in the main."
    files = [*sorted(real.glob("hms/*_eegs/*.parquet")), *sorted(real.glob("iiic/*/*.mat")),
             *(real / "edf" / n for n in ("PN00-5_sample.edf", "chb01_01_sample.edf", "eeg_burst_eg.edf", "eeglab_test.edf"))]
    assert len(files) == 28
    for k, path in enumerate(files):
        r = read_recording(path, sandbox=k % 9 == 0)
        assert r.fs == 200 and r.signal.dtype == np.float32 and r.channels[:19] == CHANNELS and len(r.id) == 16, path.name
        assert np.isfinite(r.eeg).mean() > 0.9 and path.stem not in json.dumps(r.to_dict())
        assert r.duration == pytest.approx(r.file_duration)
    assert read_recording(real / "edf/chb01_01_sample.edf").reference == "bipolar"
    assert set(next(i for i in read_recording(real / "edf/eeglab_test.edf").issues if i.kind == "interpolated").channels) == {"Fz", "Cz", "Pz"}


@pytest.mark.real
def test_real_values(real):
    "Samples equal those of pandas and scipy; EDF those of edfio to one step."
    import edfio
    from scipy.io import loadmat
    path = real / "hms/train_eegs/1628180742.parquet"
    assert np.array_equal(read_recording(path).signal, pd.read_parquet(path)[HMS].to_numpy().T, equal_nan=True)
    path = real / "iiic/segments/Other_sample1.mat"
    assert_allclose(read_recording(path).signal, loadmat(path)["seg"], rtol=1e-6)
    path = real / "edf/eeg_burst_eg.edf"
    r, file = read_recording(path, fs=None), edfio.read_edf(path)
    for signal in file.signals:
        to = r.channel_map[signal.label]
        if to: assert_allclose(r.signal[r.channels.index(to)], signal.data, atol=1e-3)
    file, r = edfio.read_edf(real / "edf/chb01_01_sample.edf"), read_recording(real / "edf/chb01_01_sample.edf", fs=None)
    at = CHANNELS.index
    assert_allclose(r.eeg[at("Fz")] - r.eeg[at("Cz")], file.signals[16].data, atol=0.02)
    assert "contradict each other" in next(i.detail for i in r.issues if i.kind == "bipolar")  # this sample's signals are random


@pytest.mark.real
def test_real_bad_files(real):
    "Every malformed file is refused in one line, or read with the repair reported."
    for path in sorted([*real.glob("edf_bad/*"), *real.glob("parquet_bad/*")]):
        try: assert read_recording(path).issues, path.name
        except InputError as e: assert "\n" not in str(e)
    assert "format" in kinds(read_recording(real / "parquet_bad/csv_text_named_3911565283.parquet"))
    assert "annotations only" in refused(real / "edf_bad/SC4001EC-Hypnogram.edf")


@pytest.mark.real
def test_real_other_things(real):
    "Spectrograms, tables, archives and JSON are called by their names."
    assert "an HMS spectrogram (401 columns)" in refused(real / "hms/test_spectrograms/853520.parquet")
    assert "table of votes" in refused(real / "hms/sample_submission.csv")
    assert "table of identifiers" in refused(real / "hms/test.csv")
    assert "zip archive" in refused(real / "hms/train.csv.zip")
    assert "JSON" in refused(real / "attributes/figure_lpd_examples_data.json")
    assert "table of labels" in refused(real / "iiic/expert_votes.parquet")
    assert "is a folder" in refused(real)
    assert "not there" in refused(real / "nothing.edf")


@pytest.mark.real
def test_real_context(real):
    "Kaggle's spectrogram by name; a rated .mat where its four parts agree."
    path = real / "hms/train_spectrograms/353733.parquet"
    times, power = read_context(path)
    frame = pd.read_parquet(path)
    assert list(frame.columns[1:]) == spectrogram_names()
    assert times[:3].tolist() == [1, 3, 5] and power.shape == (4, 100, 320)
    assert_allclose(power[3, 99], frame["RP_19.92"])
    assert np.isnan(read_context(real / "hms/train_spectrograms/1000086677.parquet")[1]).all(axis=(0, 1)).sum() == 26
    assert read_context(real / "iiic/rated/K_Sample11.mat", sandbox=False)[1].shape == (4, 100, 300)
    with pytest.raises(InputError, match="different lengths"): read_context(real / "iiic/rated/A_Sample01.mat", sandbox=False)
    with pytest.raises(InputError, match="lacks 401"): read_context(real / "hms/test_eegs/3911565283.parquet", sandbox=False)


# ---------------------------------------------------------------- EDF and BDF
@pytest.mark.parametrize("fs", [200, 256])
def test_edf_by_edfio(tmp_path, fs):
    "A file written by edfio comes back to one step."
    import edfio
    x = noise(20, 12 * fs)
    signals = [edfio.EdfSignal(row.astype(float), fs, label=f"EEG {c}-REF" if c != EKG else "ECG EKG", physical_dimension="uV", physical_range=(-500, 500)) for c, row in zip(HMS, x)]
    edfio.Edf(signals, annotations=[edfio.EdfAnnotation(1, None, CANARY)]).write(tmp_path / "a.edf")
    r = read_recording(tmp_path / "a.edf", fs=None)
    assert np.abs(r.signal - x).max() <= 1000 / 65535 and not r.issues and r.fs == fs


def test_bdf(tmp_path):
    "24-bit samples, negative ones too."
    x = noise(19)
    r = read_recording(write(tmp_path, "a.bdf", edf(x, bdf=True)), sandbox=False)
    assert np.abs(r.eeg - x).max() < 1e-3 and kinds(r) == {"missing_ekg"}


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1), ("mV", 1e-3), ("V", 1e-6), ("nV", 1e3), ("\xb5V", 1), ("", 1), ("uv", 1), ("UV", 1), ("microV", 1)])
def test_edf_units(tmp_path, unit, factor):
    "The header's unit is obeyed, or understood and reported."
    x = noise(19)
    r = read_recording(write(tmp_path, "a.edf", edf(x * factor, unit=unit, span=3000 * factor)), sandbox=False)
    assert_allclose(r.eeg, x, atol=0.1)
    assert ("unit" in kinds(r)) == (unit in ("", "uv", "UV", "microV"))


def test_edf_gaps(tmp_path):
    "EDF+D: gaps become NaN at the right place, by part as well; EDF+C ignores nothing."
    x = noise(19, 20 * 256)
    onsets = [3 + k for k in range(8)] + [13.5 + k for k in range(12)]
    path = write(tmp_path, "a.edf", edf(x, fs=256, reserved="EDF+D", onsets=onsets))
    assert_allclose(record_onsets(path, read_header(path))[[0, 7, 8]], [0, 7, 10.5])
    r = read_recording(path, fs=None, sandbox=False)
    gap = next(i for i in r.issues if i.kind == "gap")
    assert (gap.start, gap.stop) == (8.0, 10.5) and r.duration == 22.5
    assert np.isnan(r.eeg[:, 8 * 256:round(10.5 * 256)]).all() and np.isnan(r.eeg).sum() == 19 * 640
    assert_allclose(r.eeg[:, round(10.5 * 256):], x[:, 8 * 256:], atol=0.1)
    whole = read_recording(path, sandbox=False)
    part = read_recording(path, start=7, duration=6, sandbox=False)
    assert_allclose(part.signal, whole.signal[:, 1400:2600], atol=0.02)
    inside = read_recording(path, start=8.5, duration=1, sandbox=False)
    assert np.isnan(inside.eeg).all() and inside.n_times == 200
    plain = read_recording(write(tmp_path, "c.edf", edf(x, fs=256, reserved="EDF+C", onsets=list(range(20)))), sandbox=False)
    assert "gap" not in kinds(plain)


@pytest.mark.parametrize(("change", "says"), [
    (dict(n_records=-1), "repaired"), (dict(n_records=9), "repaired"), (dict(n_records=900), "truncated"), (dict(n_records="x"), "repaired"), (dict(date="99.99.99"), "repaired"),
    (dict(pmin="-3000,0"), None), (dict(pmin=3000, pmax=-3000), None)])
def test_edf_repairs(tmp_path, change, says):
    "What can be repaired is read and reported."
    r = read_recording(write(tmp_path, "a.edf", edf(noise(19), **change)), sandbox=False)
    assert r.duration == 50 and (says is None or says in kinds(r))


@pytest.mark.parametrize(("change", "says"), [
    (dict(record=0), "lasts 0 s"), (dict(dmin=5, dmax=5), "digital range"), (dict(pmin=1, pmax=1), "physical range"), (dict(dmin=-99999), "digital range"),
    (dict(pmin="nan"), "physical minimum"), (dict(pmax="1e999"), "physical maximum"), (dict(samples="2e2x"), "samples per record"), (dict(samples=-200), "negative"), (dict(samples=99999999), "records of"),
    (dict(samples=0), "records of 0 bytes"), (dict(label=["EDF Annotations"] * 19), "annotations only"), (dict(label=["X1"] * 19), "none of the 19"),
    (dict(reserved="EDF+D"), "no time stamps"), (dict(record=3.0, fs=66), "sampling rate is 66 Hz")])
def test_edf_refusals(tmp_path, change, says):
    "What cannot be repaired is refused with the field's name."
    fs = change.pop("fs", 200)
    content = edf(noise(19, fs * 12), fs=fs, **change) if change.get("record") != 0 else edf(noise(19)).replace(b"1       19", b"0       19", 1)
    assert says in refused(write(tmp_path, "a.edf", content), sandbox=False)


@pytest.mark.parametrize("duration", [b"-1      ", b"nan     ", b"inf     ", b"        ", b"1e-999  ", b"0x10    "])
def test_edf_record_durations(tmp_path, duration):
    "A record duration that is no positive number is refused."
    content = bytearray(edf(noise(19)))
    content[244:252] = duration
    assert "record" in refused(write(tmp_path, "a.edf", content), sandbox=False)


def test_edf_truncated(tmp_path):
    "A file cut anywhere is read as far as whole records go, or refused."
    content = edf(noise(19))
    for n in (1, 100, 255, 256, 400, 5119, 5120, 5200): refused(write(tmp_path, "a.edf", content[:n]), sandbox=False)
    r = read_recording(write(tmp_path, "a.edf", content[:5120 + 7600 * 12 + 99]), sandbox=False)
    assert r.duration == 12 and "truncated" in kinds(r)


def test_edf_72_hours(tmp_path):
    "Three days in a sparse file: refused whole, read by part at once."
    path = write(tmp_path, "a.edf", edf(noise(19, 2000), n_records=259_200))
    os.truncate(path, 5120 + 259_200 * 7600)
    assert "give a duration" in refused(path, sandbox=False)
    t = time.monotonic()
    r = read_recording(path, start=259_100, duration=50)
    assert r.n_times == 10_000 and r.file_duration == 259_200 and time.monotonic() - t < 5
    assert read_recording(path, duration=50, sandbox=False).start == 129_575


def test_edf_no_patient_data(tmp_path):
    "What stands in the header and in annotations is nowhere in the recording."
    r = read_recording(write(tmp_path, f"{CANARY}.edf", edf(noise(19, 2000), reserved="EDF+D", onsets=list(range(10)))))
    shown = repr(r) + json.dumps(r.to_dict()) + r.summary().to_string()
    assert not any(word in shown for word in CANARY.split())
    other = write(tmp_path, "other.edf", (tmp_path / f"{CANARY}.edf").read_bytes())
    assert read_recording(other, sandbox=False).id == r.id


# ---------------------------------------------------------------- tables
def test_parquet_parts(tmp_path):
    "Parts, a shuffled column order, an index, integers, several row groups."
    x = noise()
    frame = pd.DataFrame(x.T, columns=HMS)[sorted(HMS)].set_index(np.arange(5, 10_005))
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=777)
    assert np.array_equal(read_recording(tmp_path / "a.parquet", sandbox=False).signal, x)
    r = read_recording(tmp_path / "a.parquet", duration=10, sandbox=False)
    assert r.start == 20 and np.array_equal(r.signal, x[:, 4000:6000])
    frame.assign(timestamp=1.7e9 + np.arange(10_000) / 256).to_parquet(tmp_path / "c.parquet")  # seconds since 1970
    assert any("from 256 Hz" in i.detail for i in read_recording(tmp_path / "c.parquet", sandbox=False).issues)
    frame.round().astype("int16").to_parquet(tmp_path / "b.parquet")
    assert np.array_equal(read_recording(tmp_path / "b.parquet", sandbox=False).signal, x.round())


def test_parquet_bombs(tmp_path):
    "Too many rows by the footer, and a footer that lies, are refused quickly."
    import pyarrow as pa
    import pyarrow.parquet as pq
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([(c, pa.float32()) for c in HMS])) as w:
        for _ in range(20): w.write_table(pa.table([pa.nulls(1_000_000, pa.float32())] * 20, names=HMS))
    assert path.stat().st_size < 5e6
    t = time.monotonic()
    assert "1.49 GiB when decoded" in refused(path)
    assert time.monotonic() - t < 2
    pd.DataFrame(noise().T, columns=HMS).to_parquet(path)
    content = path.read_bytes()
    def varint(n): return bytes([n * 2 & 127 | 128, n * 2 >> 7 & 127 | 128, n * 2 >> 14])
    body, footer = content[:-100_000 if len(content) > 200_000 else 0], content[-100_000:]
    for claimed in (9_000, 12_000, 100_000):
        path.write_bytes(body + footer.replace(varint(10_000), varint(claimed)))
        try: assert read_recording(path).n_times == claimed
        except InputError as e: assert "\n" not in str(e)
    for cut in (4, 9, 11, 12, 100, len(content) - 1): refused(write(tmp_path, "c.parquet", content[:cut]), sandbox=False)


def test_csv_dialects(tmp_path):
    "Comma, semicolon with decimal comma, tab; time column; empty cells; a BOM."
    x = noise(19, 2560).round(2)
    frame = pd.DataFrame(x.T, columns=list(CHANNELS))
    frame.iloc[5, 3] = np.nan
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "b.csv", index=False, sep=";", decimal=",", encoding="utf-8-sig")
    frame.assign(time=np.arange(2560) / 256).to_csv(tmp_path / "c.tsv", index=False, sep="\t")
    for name in ("a.csv", "b.csv"):
        r = read_recording(tmp_path / name, sandbox=False)
        assert_allclose(r.eeg, frame.to_numpy().T, rtol=1e-5)
        assert r.fs == 200 and {"nan"} <= kinds(r)
    r = read_recording(tmp_path / "c.tsv", fs=None)
    assert r.fs == 256 and {"unit"} <= kinds(r) and np.isnan(r.eeg).sum() == 1


def test_csv_refusals(tmp_path):
    "The line is named."
    rows = [",".join(CHANNELS), *(["1," * 18 + "2"] * 300)]
    def attempt(lines): return refused(write(tmp_path, "a.csv", "\n".join(lines).encode()), sandbox=False)
    assert "line 101 has 18 columns" in attempt([*rows[:100], "1," * 17 + "2", *rows[101:]])
    assert "line 51, column 19 is not a number" in attempt([*rows[:50], "1," * 18 + "two", *rows[51:]])
    assert "no line of electrode names" in attempt(rows[1:])
    assert "no rows" in attempt(rows[:1])
    timed = ["time," + rows[0], *(f"{k / 200 + (k > 100)},{r}" for k, r in enumerate(rows[1:]))]
    assert "time column jumps after row 101" in attempt(timed)
    assert "time column does not run" in attempt(["time," + rows[0], *(f"0,{r}" for r in rows[1:])])
    assert "text without columns" in refused(write(tmp_path, "a.txt", b"dear reader\n"))
    assert "none of the 19" in attempt(["a,b,c", "1,2,3"])
    assert "is empty" in refused(write(tmp_path, "a.csv", b"\xef\xbb\xbf"))


def test_npy_npz(tmp_path):
    "Both orientations, Fortran order, types, extras."
    x = noise()
    for name, a in {"a": x, "b": x.T, "c": np.asfortranarray(x), "d": x.astype(float), "e": x.astype(">f4")}.items():
        np.save(tmp_path / f"{name}.npy", a)
        r = read_recording(tmp_path / f"{name}.npy", sandbox=False)
        assert_allclose(r.signal, x, rtol=1e-6)
        assert kinds(r) == {"header", "unit"}
    np.savez(tmp_path / "a.npz", eeg=x[:, :2560] / 1000, sfreq=256, ch_names=np.array(HMS), unit="mV")
    r = read_recording(tmp_path / "a.npz", fs=None, start=2, duration=4, sandbox=False)
    assert_allclose(r.signal, x[:, 512:1536], rtol=1e-4, atol=1e-3)
    assert not r.issues


def test_array_bombs(tmp_path):
    "Object arrays, headers that promise more than there is, and inflating archives are refused without trying."
    np.save(tmp_path / "a.npy", np.array([[object()]]), allow_pickle=True)
    assert "Python objects" in refused(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", signal=np.array([[object()]]))
    assert "Python objects" in refused(tmp_path / "a.npz")
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (20, 144000000), }".ljust(117) + b"\n"
    assert "promises" in refused(write(tmp_path, "b.npy", b"\x93NUMPY\x01\x00\x76\x00" + head))
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        with z.open("signal.npy", "w", force_zip64=True) as f:
            for _ in range(40): f.write(bytes(1 << 25))
    assert "1.25 GiB when decoded" in refused(tmp_path / "b.npz")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as z:
        for k in range(40): z.writestr(f"{k}.npy", b"")
    assert "40 arrays" in refused(tmp_path / "c.npz")
    np.savez_compressed(tmp_path / "d.npz", signal=noise())
    content = (tmp_path / "d.npz").read_bytes()
    for broken in (content[:5000] + b"\0\0" + content[5002:], content[:-30]): assert "damaged zip archive" in refused(write(tmp_path, "d.npz", broken), sandbox=False)
    np.save(tmp_path / "d.npy", np.zeros((7, 300)))
    assert "has the shape 7 x 300" in refused(tmp_path / "d.npy", sandbox=False)
    np.save(tmp_path / "e.npy", np.full((19, 3000), np.inf))
    assert "infinite" in refused(tmp_path / "e.npy", sandbox=False)


def test_mat(tmp_path):
    "Other variables are named; v7.3 is told how to be saved."
    from scipy.io import savemat
    savemat(tmp_path / "a.mat", {"spam": np.eye(2)})
    assert "a MATLAB file with spam" in refused(tmp_path / "a.mat", sandbox=False)
    assert "save it with -v7" in refused(write(tmp_path, "b.mat", b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n"))


# ---------------------------------------------------------------- MNE
def mne_raw(x, fs=250):
    "An MNE Raw with 19 electrodes."
    import mne
    raw = mne.io.RawArray(x * 1e-6, mne.create_info(list(CHANNELS), fs, "eeg"), verbose="ERROR")
    raw.info["subject_info"] = {"last_name": CANARY}
    return raw


def test_fif(tmp_path):
    "FIF through the child; gaps of acquisition are NaN; nothing of the patient."
    import mne
    x = noise(19, 5000).astype(float)
    raw = mne_raw(x)
    raw.set_annotations(mne.Annotations(4, 2, "BAD_ACQ_SKIP"))
    raw.save(tmp_path / "a_raw.fif", verbose="ERROR")
    r = read_recording(tmp_path / "a_raw.fif", fs=None)
    assert_allclose(np.nan_to_num(r.eeg[:, :1000]), x[:, :1000], atol=1e-3)
    assert np.isnan(r.eeg).sum() == 19 * 500 and "gap" in kinds(r) and r.fs == 250
    assert CANARY not in json.dumps(r.to_dict())
    assert_allclose(read_recording(tmp_path / "a_raw.fif", start=10, duration=5, sandbox=False).n_times, 1000)


def test_eeglab(tmp_path):
    "A .set with its samples inside, and one that points elsewhere."
    from scipy.io import savemat
    x = noise(19, 2500).astype(float)
    places = np.array([(c,) for c in CHANNELS], dtype=[("labels", "O")])
    eeg = dict(setname="x", nbchan=19.0, pnts=2500.0, trials=1.0, srate=250.0, xmin=0.0, xmax=9.996, data=x, chanlocs=places, event=[], epoch=[], ref="common", icawinv=[], icasphere=[], icaweights=[])
    savemat(tmp_path / "a.set", {"EEG": eeg}, appendmat=False)
    assert_allclose(read_recording(tmp_path / "a.set", fs=None).eeg, x, atol=1e-3)
    savemat(tmp_path / "b.set", {"EEG": eeg | {"data": "../a.fdt"}}, appendmat=False)
    assert "outside its folder" in refused(tmp_path / "b.set", sandbox=False)
    savemat(tmp_path / "c.set", {"EEG": eeg | {"data": "c.fdt"}}, appendmat=False)
    assert "needs its companion c.fdt" in refused(tmp_path / "c.set", sandbox=False)
    write(tmp_path, "c.fdt", x.astype("<f4").T.tobytes())
    assert_allclose(read_recording(tmp_path / "c.set", fs=None, sandbox=False).eeg, x, atol=1e-3)


def test_persyst(tmp_path):
    "A .lay with its .dat."
    x = noise(19, 2000)
    names = "\n".join(f"{c}-REF={i}" for i, c in enumerate(CHANNELS, 1))
    lay = f"[FileInfo]\nFile=a.dat\nFileType=Interleaved\nSamplingRate=200\nHeaderLength=0\nCalibration=0.1\nWaveformCount=19\nDataType=0\n[ChannelMap]\n{names}\n[SampleTimes]\n0=0\n[Patient]\nFirst={CANARY}\n"
    path = write(tmp_path, "a.lay", lay.encode())
    assert "needs its companion a.dat" in refused(path)
    write(tmp_path, "a.dat", np.round(x / 0.1).astype("<i2").T.tobytes())
    r = read_recording(path)
    assert_allclose(r.eeg, x, atol=0.06)
    assert CANARY not in json.dumps(r.to_dict())


@pytest.mark.parametrize("head", [b"GDF 2.20", b"Version 3.0", b"EEG-1100C V01.00", b"Brain Vision Data Exchange Header File Version 1.0\n", b"\0\0\0\x64\0\0\0\x1f\0\0\0\x14\0\0\0\0", b"MATLAB 5.0 MAT-file", b"[FileInfo]\n"])
def test_mne_rubbish(tmp_path, head):
    "Files with the right first bytes and nothing behind them are refused in one line, whatever MNE throws."
    endings = {b"GDF ": ".gdf", b"Vers": ".cnt", b"EEG-": ".eeg", b"Brai": ".vhdr", b"[Fil": ".lay", b"MATL": ".set"}
    path = write(tmp_path, "a" + endings.get(head[:4], ".fif"), head + rng_for(0, "rubbish").bytes(3000))
    refused(path)
    assert (tmp_path / "x").mkdir() is None and write(tmp_path / "x", "info.xml", b"<a/>")
    refused(tmp_path / "x", sandbox=False)


# ---------------------------------------------------------------- the child
def test_child_limits(tmp_path, monkeypatch):
    "Time and memory run out in the child, and the parent says so; a pipe is not opened."
    os.mkfifo(tmp_path / "pipe.edf")
    assert "not a regular file" in refused(tmp_path / "pipe.edf")
    path = write(tmp_path, "b.edf", edf(noise(19, 2000)))
    os.truncate(path, 5120 + 60_000 * 7600)
    def limited(**limits):
        get_settings.cache_clear()
        for k, v in limits.items(): monkeypatch.setenv(f"HMS_SYSTEM_{k.upper()}", v)
        return refused(path, start=0, duration=55_000)
    try:
        assert "takes more than 1 GiB" in limited(decode_memory_gib="1")
        began = time.monotonic()
        assert "takes more than 1 s" in limited(decode_memory_gib="4", decode_seconds="1")
        assert time.monotonic() - began < 5  # before the child's own clock
    finally:
        monkeypatch.undo()
        get_settings.cache_clear()


def test_child_leaves_nothing(tmp_path, monkeypatch):
    "Temporary files are gone after success and after refusal."
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    read_recording(write(tmp_path, "a.edf", edf(noise(19))))
    refused(write(tmp_path, "b.edf", b"0       " + b"?" * 999))
    assert list((tmp_path / "t").iterdir()) == []


def test_one_child_reads_parts(tmp_path):
    "Parts of a file come from one process and equal the whole; after a failure or a kill another one goes on; nothing is left."
    whole = read_recording(path := write(tmp_path, "a.edf", edf(noise(19))), sandbox=False)
    with door.Decoder(path) as child:
        def same(start): assert_allclose(read_recording(path, start=start, duration=10, sandbox=child).eeg, whole.eeg[:, 200 * start:200 * start + 2000], atol=.05)
        first = child.child.pid
        for start in (0, 20, 40): same(start)
        assert child.child.pid == first
        os.kill(first, 9)
        assert "made the decoder stop (code -9)" in refused(path, sandbox=child)
        same(20)
        second = child.child.pid
        assert "lies behind the end" in refused(path, start=1000, sandbox=child) and child.child is None
        same(0)
        third, folder = child.child.pid, child.folder.name
    assert len({first, second, third}) == 3 and not os.path.exists(folder) and not os.path.exists(f"/proc/{third}")


def test_child_does_not_import_neighbours(tmp_path, monkeypatch):
    "A numpy.py beside the recording is not run."
    write(tmp_path, "numpy.py", b"raise SystemExit(7)")
    path = write(tmp_path, "a.edf", edf(noise(19)))
    monkeypatch.chdir(tmp_path)
    assert read_recording(path.name).n_times == 10_000


LAB = """from hms_brain.formats.sandbox import register_format
from hms_brain.records import Raw
import numpy as np
{extra}

@register_format("lab", b"LAB1\\n", ".lab")
def read_lab(path, request, kind):
    x = np.frombuffer(path.read_bytes()[5:], "<f4").reshape(19, -1)
    return Raw({labels}, list(x), [200.0] * 19, ["uV"] * 19, file_duration=x.shape[1] / 200)
"""


@pytest.fixture
def registered():
    "What a test registers is forgotten after it."
    before = dict(door.READERS), dict(door.SUFFIXES), list(door.MAGIC)
    yield
    for now, was in zip((door.READERS, door.SUFFIXES, door.MAGIC), before):
        now.clear()
        now.extend(was) if isinstance(now, list) else now.update(was)


@pytest.mark.parametrize("extra, says", [("", None), ("import no_such_package", "needs the package no_such_package")])
def test_a_format_from_outside(tmp_path, monkeypatch, registered, extra, says):
    "A module anywhere on the parent's path reads in the child too; what the child lacks is one line."
    module = f"lab_{'poor' if extra else 'rich'}"
    write(tmp_path, f"{module}.py", LAB.format(extra="", labels=list(CHANNELS)).encode())
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(module)
    write(tmp_path, f"{module}.py", LAB.format(extra=extra, labels=list(CHANNELS)).encode())
    x = noise(19)
    path = write(tmp_path, "a.lab", b"LAB1\n" + x.tobytes())
    if says: assert says in refused(path)
    else:
        recording = read_recording(path)
        assert_allclose(recording.eeg, x)
        assert kinds(recording) == {"missing_ekg"} and "format" in kinds(read_recording(write(tmp_path, "a.edf", path.read_bytes())))


def test_formats_of_the_house_come_first(registered):
    def reader(path, request, kind): raise AssertionError
    for name, magic in (("mine", b"PAR1more"), ("mine", b"0"), ("mine", b""), ("edf", b"MINE")):
        with pytest.raises(ValueError): door.register_format(name, magic)(reader)
    door.register_format("mine", b"MINE")(reader)
    door.register_format("mine", b"MINE2")(reader)
    assert [m for m, f in door.MAGIC if f == "mine"] == [b"MINE2"]


def test_a_broken_plugin_is_a_warning(tmp_path, monkeypatch, registered):
    about = tmp_path / "lab-1.dist-info"
    about.mkdir()
    write(about, "METADATA", b"Metadata-Version: 2.1\nName: lab\nVersion: 1\n")
    write(about, "entry_points.txt", b"[hms_brain.formats]\nlab = lab_broken\n")
    write(tmp_path, "lab_broken.py", b"raise RuntimeError('half-installed')")
    monkeypatch.syspath_prepend(tmp_path)
    door.load_plugins.cache_clear()
    with pytest.warns(UserWarning, match="lab_broken.*half-installed"): assert door.sniff(write(tmp_path, "a.csv", b"Fp1,F3\n1,2\n")) == "csv"


def test_light_imports():
    "The fast path imports neither scipy nor mne nor pandas."
    code = "import sys, hms_brain.records, hms_brain.formats.sandbox, hms_brain.formats.tables, hms_brain.formats.edf, hms_brain.formats.mne; print([m for m in ('scipy', 'mne', 'pandas', 'torch', 'pydantic', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("packed", [False, True])
def test_mat_tags_are_looked_at_first(tmp_path, packed):
    "What scipy would follow out of its place: an imaginary part that is not there, a type that does not exist."
    from scipy.io import savemat
    numbers = np.random.default_rng(0).normal(0, 30, (20, 2000)).astype(np.float32)
    for name, value, said in (("complex", numbers + 1j, "seg is complex"), ("real", numbers, "")):
        savemat(tmp_path / f"{name}.mat", {"seg": value, "other": np.eye(3) * 1j}, do_compression=packed)
        if said: assert said in refused(tmp_path / f"{name}.mat", sandbox=False)
        else: assert read_recording(tmp_path / f"{name}.mat", sandbox=False).duration == 10
    savemat(tmp_path / "b.mat", {"seg": numbers})
    data = bytearray((tmp_path / "b.mat").read_bytes())
    at = data.index(numbers.nbytes.to_bytes(4, "little")) - 4
    assert data[at] == 7  # single precision
    data[at] = 77
    (tmp_path / "b.mat").write_bytes(data)
    with pytest.raises(InputError, match="damaged MATLAB file"): read_recording(tmp_path / "b.mat", sandbox=False)


def test_mat_with_other_names(tmp_path):
    "A file whose only table has 20 rows or columns is read; its rate and unit are taken, or inferred and reported."
    from scipy.io import savemat

    x = rng_for(0, "mat").normal(0, 30, (20, 2800))
    savemat(tmp_path / "a.mat", {"data_50sec": x.T, "Fs": 250.0, "label": [1, 2]})
    recording = read_recording(tmp_path / "a.mat", fs=None, sandbox=False)
    assert recording.fs == 250 and "unit" in [i.kind for i in recording.issues]
    assert_allclose(recording.eeg, x[:19], rtol=1e-5)
    savemat(tmp_path / "b.mat", {"EEG": x})
    assert_allclose(read_recording(tmp_path / "b.mat", sandbox=False).eeg, x[:19], rtol=1e-5)
    savemat(tmp_path / "b.mat", {"seg": x + 1j})
    assert "its seg is complex of shape (20, 2800)" in refused(tmp_path / "b.mat", sandbox=False)
    savemat(tmp_path / "b.mat", {"one": x, "two": x})
    with pytest.raises(InputError, match="a MATLAB file with one, two"): read_recording(tmp_path / "b.mat", sandbox=False)
