"""Mutants of files, thousands per format: bytes and structure are changed, and each must end as a sane recording or as one line. `make fuzz` tries all; `python tests/fuzz.py 0.1 edf csv` a tenth of two."""
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd

from hms_brain.core import CHANNELS, HMS_COLUMNS, InputError, get_settings, rng_for
from hms_brain.formats.sandbox import decode
from hms_brain.records import Recording, Request, read_recording

COUNTS = {"edf": 10_000, "parquet": 2000, "npy": 2000, "csv": 2000, "json": 2000, "npz": 2000, "mat": 2000}
LIMIT_S, PART = 10, 500  # s of the processor for one mutant; mutants per child
FEW = (0, 0, 0, 1, 3)  # how many changes of bytes come after those of structure
SOUND = rng_for(0, "fuzz").normal(0, 40, (20, 1000)).round(1).astype(np.float32)  # 5 s of 20 channels, uV
NUMBERS = ("", " ", "0", "-0", "-1", "1", "2", "3", "1.5", "1,5", ".", "+", "1e", "1e308", "1e-308", "1e999", "-1e9", "99999999", "2147483648", "-32768", "32767", "32768", "nan", "inf", "-inf", "0x10", "1_000", "12 34", "\xb2", "\0\0", "x")
WORDS = (*CHANNELS[:6], "Fp1-F7", "EEG C3-A2", "EKG", "T7", "EDF Annotations", "time", "eeg_id", "seizure_vote", "LL_0.59", "", " ", "\0", "=1+1", "<script src=//a>", "\xe9\xff", "\n", "a" * 300)


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def scramble(rng, data: bytes, near: int | None = None) -> bytes:
    "Change bytes: one, a run, the length. Half of the changes fall within 4 KiB of `near` (default: the beginning)."
    at = int(rng.integers(max(1, len(data)))) if rng.random() < 0.5 else min(max(0, (near or 0) + int(rng.integers(4096 if near is None else -512, 4097 if near is None else 513))), max(0, len(data) - 1))
    n, how = int(2 ** rng.uniform(0, 8)), int(rng.integers(9))
    if how < 3: new = bytes([data[at] ^ 1 << int(rng.integers(8))]) if how and data else rng.bytes(1)
    else: new = (rng.bytes(n), b"\0" * n, b"\xff" * n, b"", data[:n], data[at:at + n] * 2)[how - 3]
    return data[:at] + new + (data[at + (1 if how < 3 else 0 if how == 7 else n):] if rng.random() < 0.95 else b"")


# one function per format: a generator of random numbers -> the bytes of a mutant

@cache
def sound_edf(kind: int) -> bytes:
    "5 s as EDF, EDF+D with a gap, EDF at 100 Hz, BDF."
    from test_formats import edf as make
    return make(SOUND[:19], labels=CHANNELS, bdf=kind == 3, fs=100 if kind == 2 else 200, **({"reserved": "EDF+D", "onsets": [0, 1, 2, 3.5, 4.5]} if kind == 1 else {}))


def edf(rng) -> bytes:
    "EDF, EDF+D and BDF: fields of the header, stamps of records, bytes, lengths."
    kind = int(rng.integers(4))
    data = bytearray(sound_edf(kind))
    n, at, fields = 19 + (kind == 1), 256, [(0, 8), (184, 8), (192, 5), (236, 8), (244, 8), (252, 4)] * 4
    for width in (16, 80, 8, 8, 8, 8, 8, 80, 8, 32):
        fields += [(at + i * width, width) for i in range(n)] if width < 32 else []
        at += n * width
    for _ in range(int(rng.integers(1, 5))):
        place, width = pick(rng, fields)
        text = pick(rng, NUMBERS) if rng.random() < 0.5 else str(int(rng.integers(-10 ** int(rng.integers(1, 9)), 10 ** int(rng.integers(1, 9))))) if rng.random() < 0.6 else pick(rng, WORDS)
        if rng.random() < 0.7: data[place:place + width] = f"{text:<{width}}"[:width].encode("latin-1")
        elif kind == 1 and rng.random() < 0.5: data = bytearray(bytes(data).replace(b"+%d\x14\x14" % rng.integers(5), f"+{text}\x14\x14"[:8].encode("latin-1"), 1))
        else: data = bytearray(scramble(rng, bytes(data)))
    return bytes(data)


def strange_column(rng, column):
    "A column of a table as another type, or with other values."
    import pyarrow as pa
    import pyarrow.types as types
    x = column.to_numpy(zero_copy_only=False) if types.is_floating(column.type) else np.arange(len(column)) / 200
    kind = int(rng.integers(12))
    if kind < 5: return pa.array(np.clip(np.nan_to_num(x), 0, 100).astype(pick(rng, ("i1", "u2", "i8", "f2", "f8", "u8"))))
    if kind == 5: return pa.array(np.where(np.arange(len(x)) % 7 == 3, np.float32(pick(rng, (np.nan, np.inf, -np.inf, 3e38, 1e9, -2e5))), x))
    if kind == 6: return pa.nulls(len(x), pick(rng, (pa.float32(), pa.null(), pa.string())))
    if kind == 7: return pa.array([pick(rng, NUMBERS)] * len(x))
    if kind == 8: return pa.array([[float(v)] for v in x]) if rng.random() < 0.5 else pa.array([{"a": float(v)} for v in x])
    if kind == 9: return pa.array(x > 0) if rng.random() < 0.5 else pa.array(np.arange(len(x))).cast(pa.timestamp("ns"))
    return column.dictionary_encode() if kind == 10 else pa.array(x * 10.0 ** float(rng.integers(-12, 30)))


def parquet(rng) -> bytes:
    "Columns, types, names, metadata, pages, footer, bytes."
    import pyarrow as pa
    import pyarrow.parquet as pq
    columns, names = [pa.array(x) for x in SOUND], list(HMS_COLUMNS)
    for _ in range(int(rng.integers(3))):
        i, how = int(rng.integers(len(columns))), int(rng.integers(6))
        if how < 3: columns[i] = strange_column(rng, columns[i])
        elif how == 3: names[i] = pick(rng, WORDS)
        elif how == 4: names.append(pick(rng, ("time", "extra", *WORDS))); columns.append(strange_column(rng, pa.array(np.arange(len(columns[0])) / 200)))
        elif len(columns) > 1: del columns[i], names[i]
    if rng.random() < 0.05: short = int(rng.integers(2)); columns = [c.slice(0, short) for c in columns]
    table = pa.Table.from_arrays(columns, names).replace_schema_metadata({"pandas": pick(rng, NUMBERS + WORDS)} if rng.random() < 0.2 else None)
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=pick(rng, (1, 77, 1000, 10_000)) if rng.random() < 0.3 else None, compression=pick(rng, ("none", "snappy", "gzip", "zstd", "lz4")),
                   use_dictionary=bool(rng.random() < 0.5), data_page_version=pick(rng, ("1.0", "2.0")), write_page_checksum=bool(rng.random() < 0.2))
    data = out.getvalue()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for _ in range(pick(rng, FEW)): data = scramble(rng, data, pick(rng, (footer, footer + 500, len(data), None)))
    if rng.random() < 0.1: data = data[:-8] + int(2 ** rng.uniform(0, 32)).to_bytes(4, "little") + data[-4:]
    return data


def npy_header(rng, x) -> bytes:
    "An array with a header that says something else."
    shape = pick(rng, (x.shape, x.shape[::-1], (20, -1000), (2**40, 2**40), (20, 10**9), (), (0,), (20, 0), (20_000,), (20, 10, 100), (True, 20), (-20, -1000), (19, 1000)))
    descr = pick(rng, ("<f4", ">f4", "<f8", "<f2", "<i2", "|O", "<U4", "|b1", "<c8", "|V4", "<m8[s]", "<f16", "", "no", [("a", "<f4")], [("a", "<f4", (10**9,))], ("<f4", (1 << 40,)), None, 4))
    head = pick(rng, (str({"descr": descr, "fortran_order": pick(rng, (False, True, 1, None, "")), "shape": shape}), "{}", "[]", "1", "{" * 500, "(" * 9000, "'" + "9" * 9000 + "'", "9" * 5000, "{'descr': '<f4', 'fortran_order': False, 'shape': (20, 1000), }" + " " * int(rng.integers(70))))
    version = pick(rng, ((1, 0), (2, 0), (3, 0), (9, 9)))
    length = len(head) if rng.random() < 0.8 else int(2 ** rng.uniform(0, 15))
    return b"\x93NUMPY" + bytes(version) + length.to_bytes(2 if version[0] == 1 else 4, "little") + head.encode() + x.tobytes()


def npy(rng) -> bytes:
    "Headers, orders, types, values, bytes, lengths."
    x = SOUND.copy()
    if rng.random() < 0.3: x.ravel()[rng.integers(x.size, size=9)] = pick(rng, (np.nan, np.inf, 3e38, 1e9, -1e5))
    if rng.random() < 0.3: data = npy_header(rng, x)
    else:
        out = io.BytesIO()
        np.save(out, pick(rng, (x, x.T, np.asfortranarray(x), x.astype(">f4"), x.astype("f8"), np.nan_to_num(x).clip(-3e4, 3e4).astype("i2"), x[:19], x[:7], x[0], x.astype("c8"), x > 0, x[:, :1], x * np.float32(1e-6))))
        data = out.getvalue()
    for _ in range(pick(rng, FEW)): data = scramble(rng, data, 64)
    return data


def csv(rng) -> bytes:
    "Names, cells, rows, delimiters, decimals, quotes, line ends, bytes."
    cells = [list(HMS_COLUMNS), *([f"{v:.1f}" for v in row] for row in SOUND.T[:300])]
    if rng.random() < 0.3: cells = [[t, *row] for t, row in zip(["time", *(f"{k / 200:.3f}" for k in range(300))], cells)]
    for _ in range(pick(rng, FEW)):
        i, j, how = pick(rng, (0, 1, 2, int(rng.integers(len(cells))))), int(rng.integers(19)), int(rng.integers(6))
        if how < 3 and j < len(cells[i]): cells[i][j] = pick(rng, NUMBERS if how else WORDS)
        elif how == 3: cells[i] = cells[i][:j]
        elif how == 4: cells.insert(i, pick(rng, ([], ["#"], cells[-1], ["1"] * 5000)))
        elif len(cells) > 1: del cells[i]
    text = pick(rng, ("\n",) * 5 + ("\r\n", "\r")).join(pick(rng, (",", ",", ";", "\t", " ")).join(row) if rng.random() < 0.002 else ",".join(row) for row in cells)
    if rng.random() < 0.2: text = text.replace(",", pick(rng, (";", "\t", "|", "\",\"")))
    data = (pick(rng, ("", "", "\ufeff")) + text).encode(pick(rng, ("utf-8",) * 9 + ("utf-16",)), "replace")
    for _ in range(pick(rng, FEW)): data = scramble(rng, data)
    return data


def strange_value(rng, depth: int = 0):
    "A JSON value that nobody asked for."
    plain = (None, True, False, 0, -1, 1e39, -1e308, 10**400, 0.5, "", "x", "1", "\u0000", "\ud83d", [], {}, [[]], [None], [[1, 2], [3]], float("nan"), float("inf"))
    if depth > 3 or rng.random() < 0.7: return pick(rng, plain)
    return [strange_value(rng, depth + 1) for _ in range(int(rng.integers(25)))] if rng.random() < 0.7 else {pick(rng, WORDS): strange_value(rng, depth + 1) for _ in range(3)}


def json_body(rng) -> bytes:
    "What is sent to /predict: fields, values, shapes, nesting, bytes."
    rows = np.tile(SOUND[:19, :400], (1, 1)).round(1).astype(float).tolist()
    body = {"eeg_data": rows} | {k: v for k, v in (("fs", 200), ("at", 1.0), ("spectrogram_data", [[[0.5]]])) if rng.random() < 0.2}
    for _ in range(int(rng.integers(4))):
        how, i = int(rng.integers(7)), int(rng.integers(19))
        if how < 2: body[pick(rng, ("eeg_data", "fs", "at", "spectrogram_data", pick(rng, WORDS)))] = strange_value(rng)
        elif how == 2: body.pop(pick(rng, tuple(body)) if body else "", None)
        elif body.get("eeg_data") is rows and rows:
            row = rows[i % len(rows)]
            if not isinstance(row, list): continue  # a mutant of a mutant
            if how == 3 and row: row[int(rng.integers(len(row)))] = strange_value(rng)
            if how == 4: rows[i % len(rows)] = pick(rng, (strange_value(rng), row[:-1], row * 2, [None] * len(row), [1e5 + 1] * len(row)))
            if how == 5: rows.append(row)
            if how == 6: rows.pop()
    data = json.dumps(pick(rng, (body,) * 20 + (rows, [body], strange_value(rng)))).encode()
    if rng.random() < 0.05: data = data.replace(b"[", b"[" * int(rng.integers(2, 100_000)), 1)
    for _ in range(pick(rng, FEW)): data = scramble(rng, data, pick(rng, (None, len(data) - 1)))
    return data


def npz(rng) -> bytes:
    "Members, names, what stands beside the signal, bytes."
    out, parts = io.BytesIO(), {pick(rng, ("signal", "signal", "eeg", "data", "x", "../a", "fs")): pick(rng, (SOUND, SOUND, SOUND.T, SOUND[:7], SOUND[0], SOUND > 0, np.array(["x"])))}
    beside = {"fs": (200, 100, 250.0, 0, -1, np.nan, np.inf, [200, 200], "x", 1e30, 1e-30, True), "channels": (list(HMS_COLUMNS), list(CHANNELS), [], ["\0"] * 20, 3, [b"Fp1"] * 20, [WORDS[k] for k in range(20)]), "unit": ("uV", "V", "MV", "", 3, [], b"\xff")}
    parts |= {k: np.array(pick(rng, v)) for k, v in beside.items() if rng.random() < 0.3}
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(out, **parts)
    data = out.getvalue()
    for _ in range(pick(rng, FEW)): data = scramble(rng, data, pick(rng, (None, len(data) - 100)))
    return data


def mat(rng) -> bytes:
    "Variables, classes, shapes, bytes."
    from scipy.io import savemat
    out = io.BytesIO()
    parts = {pick(rng, ("seg", "seg", "seg_10sec", "x", "EEG", "Sdata")): pick(rng, (SOUND, SOUND, SOUND.T, SOUND[:7], SOUND[0], SOUND.astype("i2"), SOUND + 1j, "text", np.array([[SOUND, 1]], dtype=object), {"a": SOUND, "b": {"c": 1}}))}
    parts |= {"Fs": pick(rng, (200.0, 0, -1, np.nan, np.inf, "x", [200, 200], 1e30))} if rng.random() < 0.4 else {}
    savemat(out, parts, do_compression=bool(rng.random() < 0.5))
    data = out.getvalue()
    for _ in range(pick(rng, FEW)): data = scramble(rng, data)
    return data


MAKERS = {"edf": edf, "parquet": parquet, "npy": npy, "csv": csv, "json": json_body, "npz": npz, "mat": mat}


# what a mutant ends as

def check(r: Recording):
    "Raise AssertionError unless a recording is one."
    assert r.fs == 200 and r.channels[:19] == CHANNELS and r.signal.dtype == np.float32 and r.signal.shape[0] == len(r.channels) and r.n_times > 0, repr(r)
    assert not np.isinf(r.signal).any() and 0 < r.duration <= r.file_duration + 1 / 80 and 0 <= r.start and r.signal.nbytes <= 1 << 30, repr(r)
    json.dumps(r.to_dict(), allow_nan=False)


def one_line(e: InputError) -> str:
    assert "\n" not in str(e) and len(str(e)) <= 1024, f"a long line: {str(e)[:200]!r}"
    return str(e)


def attempt(kind: str, data: bytes, path: Path) -> str:  # the line; empty: accepted
    "Read a mutant. Raises whatever is no `InputError` (of a service: no status 400)."
    if kind == "json":
        from fastapi import HTTPException

        from hms_brain.service.core import input_problem, read_json, read_sample
        try: check(read_sample(read_json(data)).recording)
        except HTTPException as e: return e.detail if e.status_code == 400 else f"{1 / 0}"
        except InputError as e:
            assert len(input_problem(e).body) <= 1024
            return one_line(e)
        return ""
    path.write_bytes(data)
    try: check(decode(path, Request()))
    except InputError as e: return one_line(e)
    except MemoryError: return "takes more memory than it may"
    return ""


def memory() -> int:  # bytes
    "The most that this process held in memory so far."
    import resource
    if os.path.exists("/proc/self/status"): return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(kind: str, seed: int, first: int, last: int):
    "Some mutants within the limits of the decoder; one line of JSON for each."
    import resource
    import warnings
    warnings.simplefilter("ignore")
    path = Path(f"mutant.{kind}")
    for name in ("scipy.signal", "scipy.io", "pyarrow.parquet", "pyarrow.csv", *["hms_brain.service.core"] * (kind == "json")): import_module(name)  # are not timed
    resource.setrlimit(resource.RLIMIT_AS, (int(get_settings().system.decode_memory_gib * 2**30),) * 2)
    for k in range(first, last):
        data, end, said = MAKERS[kind](rng_for(seed, kind, k)), "accepted", ""
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        began = time.process_time()
        try:
            said = attempt(kind, data, path)
            if said: end = "refused"
        except Exception as e: end, said = "crashed", f"{type(e).__name__}: {e}"[:300]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"k": k, "end": end, "said": said, "seconds": time.process_time() - began, "memory": memory()}), flush=True)


def through_the_door(kind: str, seed: int, k: int, folder: Path) -> str:
    "How the whole way ends in this process: the child of `read_recording`, and what it hands back."
    path = folder / f"mutant.{kind}"
    path.write_bytes(MAKERS[kind](rng_for(seed, kind, k)))
    try: check(read_recording(path))
    except InputError as e: return "refused" if one_line(e) else ""
    return "accepted"


def fuzz(kind: str, count: int, seed: int = 0, door: int = 500) -> list[dict]:  # one row per mutant: k, end, said, seconds, memory
    "Try mutants in children; each `door`-th also by `read_recording` from here, which must end alike."
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="hms_fuzz_") as folder:
        while len(rows) < count:
            words = [sys.executable, str(Path(__file__).resolve()), "--child", kind, *map(str, (seed, len(rows), min(count, len(rows) + PART)))]
            env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
            before, done = len(rows), subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
            rows += [json.loads(line) for line in done.stdout.splitlines()]
            if done.returncode: rows.append({"k": len(rows), "end": "crashed", "said": f"the child ended with code {done.returncode}: {done.stderr.strip()[-200:]}", "seconds": LIMIT_S if done.returncode == -signal.SIGPROF else 0, "memory": 0})
            assert len(rows) > before, "the child does nothing"
        for row in rows[::door] if kind != "json" else []:
            end = through_the_door(kind, seed, row["k"], Path(folder))
            if end != row["end"]: row |= {"end": "crashed", "said": f"{row['end']} by the decoder, {end} by read_recording"}
    return rows


def main(share: float = 1.0, kinds: tuple[str, ...] = tuple(COUNTS)) -> int:
    "Print a line per format. Returns the number of crashes."
    print(f"{'format':8} {'mutants':>8} {'refused':>8} {'accepted':>8} {'crashed':>8} {'slowest s':>10} {'child MiB':>10}")
    bad = []
    for kind in kinds:
        rows = pd.DataFrame(fuzz(kind, round(share * COUNTS[kind])))
        n = rows["end"].value_counts()
        print(f"{kind:8} {len(rows):8} {n.get('refused', 0):8} {n.get('accepted', 0):8} {n.get('crashed', 0):8} {rows.seconds.max():10.2f} {rows.memory.max() / 2**20:10.0f}", flush=True)
        bad += [f"{kind} {r.k}: {r.said}" for r in rows[rows["end"] == "crashed"].itertuples()]
    print("\n".join(bad), end="\n" if bad else "")
    return len(bad)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]: child(sys.argv[2], *map(int, sys.argv[3:6]))
    else: sys.exit(min(1, main(float((sys.argv[1:] or ["1"])[0]), tuple(sys.argv[2:]) or tuple(COUNTS))))
