"Names as amplifiers, spreadsheets and typesetters write them; electrodes where some of the file is missing."
import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.testing import assert_allclose

from hms_brain.core import CHANNELS, EKG, InputError, rng_for
from hms_brain.electrodes import bare, common_ending, electrode, electrode_pair, from_differences, interpolate_electrodes, plan_channels
from hms_brain.records import from_arrays
from test_records import BANANA, kinds, noise

AT = CHANNELS.index


@pytest.mark.parametrize("suffix", ["-AV", "-AVE", "-Average", "-CAR", "-AA", "-Vref", "-Org", "-CLE", "-LER", "-LE", "-RE", "-COM", "-REFERENCE", "-(A1+A2)/2", "-((A1+A2)/2)", "-LM", "-A1/A2", "-A1+A2", "/A1", "_A2",
                                    " Ref", "REF", "LE", "AVG", " (uV)", "[uV]", "(µV)", " (Âµv)", "-REF (mV)", " [microvolt]"])
@pytest.mark.parametrize("prefix", ["", "EEG ", "EEG.", "EEG", "SEEG", "EEG_", "POL "])
def test_decorations(prefix, suffix):
    "Every way of saying Fp1, T7 and O2."
    for name, to in (("Fp1", "Fp1"), ("T7", "T3"), ("O2", "O2"), ("CZ", "Cz")):
        for label in (prefix + name + suffix, f"'{prefix}{name}{suffix}'", f'"{prefix}{name}{suffix}" ', f"“{prefix}{name}{suffix}”"):
            assert electrode(label) == to, label


@pytest.mark.parametrize("label", ["Fp1-F7 (uV)", "FP1/F7", "FP1_F7", "Fp1–F7", "Fp1−F7", "EEG Fp1 - F7", "EEGFp1-F7[µV]", "EEG_FP1_F7", "'Fp1-F7'", "FP1-F7-0"])
def test_pairs(label):
    "Every way of saying Fp1 minus F7."
    assert electrode_pair(label) == ("Fp1", "F7") and electrode(label) == ""


@pytest.mark.parametrize("label", ["EEG", "P30", "O10", "Fp12", "C3'", "T3T5", "Fp1 mean", "EEGX1", "REF", "Fp", "A1/A2", "(A1+A2)/2", "F3F", "(uV)", "Pulse Rate", "POLE", "ECHO"])
def test_what_is_no_electrode(label):
    "Near misses."
    assert electrode(label) == "" and electrode_pair(label) is None


def test_hearts():
    "An EKG stays one whatever surrounds it."
    assert {electrode(x) for x in ("EKG (mV)", "ECG-REF", "EEG EKG1", "'EKG'", "EEGEKG", "ECG_II", "POL EKG")} == {EKG}


def test_units_behind_labels():
    "The bracketed unit counts where the header is silent; the header's word is stronger."
    x = noise()
    for text, factor, said in (("mV", 1e-3, False), ("uV", 1, False), ("V", 1e-6, False), ("microvolts", 1, True)):
        r = from_arrays(x * factor, 200, [f"{c} ({text})" for c in CHANNELS], unit=None)
        assert_allclose(r.eeg, x, rtol=1e-4, atol=1e-3)
        assert ("unit" in kinds(r)) == said
    assert_allclose(from_arrays(x, 200, [f"{c} (mV)" for c in CHANNELS], unit="uV").eeg, x, rtol=1e-5)
    assert bare("Fp1 (2)") == ("Fp1 (2)", None) and bare("C3 [ mV ]") == ("C3", "mV")


def test_a_reference_that_nobody_knows():
    "What ten and more labels end in, and what is no electrode, is taken off and reported; other endings are not."
    x = noise()
    r = from_arrays(x, 200, [f"EEG {c}-Xyz12a" for c in CHANNELS])
    assert_allclose(r.eeg, x, rtol=1e-6)
    assert next(i.detail for i in r.issues if i.kind == "renamed") == "the ending -XYZ12A is taken for the reference"
    assert plan_channels([*(f"{c}-Q" for c in CHANNELS[:10]), *CHANNELS[10:], "SpO2-Q"]).missing == ()
    for labels in ([f"{c}-Q" for c in CHANNELS[:9]], [f"{c}-{e}" for c in CHANNELS for e in ("alpha", "beta")], [f"{c}-FCz" for c in CHANNELS]): assert common_ending(labels) == ""
    with pytest.raises(InputError, match="none of the 19"): plan_channels([f"{c}-{e}" for c in CHANNELS for e in ("alpha", "beta")])
    assert plan_channels([f"{c}-FCz" for c in CHANNELS]).reference == "bipolar"


@given(st.lists(st.text(max_size=20) | st.sampled_from([f"{c}{s}" for c in CHANNELS for s in ("", "-X", " (uV)", "/F7", "REF")]), min_size=1, max_size=40))
def test_any_labels(labels):
    "A plan or one line."
    try: plan = plan_channels(labels)
    except InputError as e: assert "\n" not in str(e)
    else: assert len(plan.missing) <= 3 and set(plan.used) <= set(range(len(labels)))


# ---------------------------------------------------------------- missing samples
def differences(x):
    "The double banana of potentials."
    return np.array([x[AT(a)] - x[AT(b)] for a, b in BANANA])


@pytest.mark.parametrize("pair", range(16))
def test_a_missing_pair_is_no_missing_hemisphere(pair):
    "The chains form rings: what one pair lacks, the others say."
    x, lost = noise(), slice(300, 900)
    d = differences(x)
    d[pair, lost] = np.nan
    y = from_differences(d, BANANA)
    assert np.isfinite(y).all()
    for a, b in BANANA: assert_allclose(y[AT(a)] - y[AT(b)], x[AT(a)] - x[AT(b)], atol=2e-3)
    whole = from_differences(differences(x), BANANA)
    np.testing.assert_array_equal(np.delete(y, np.r_[lost], 1), np.delete(whole, np.r_[lost], 1))
    assert_allclose(y, whole, atol=2e-3)


def test_what_two_missing_pairs_cut_off():
    "The larger part of a ring stays; pairs that are missing at different times do not add up; nothing is left where all are missing."
    x = noise()
    d = differences(x)
    d[1, 100:200] = d[2, 100:200] = np.nan  # T3 alone
    d[5, 300:400] = np.nan
    d[6, 400:500] = np.nan
    d[:, 600:700] = np.nan
    y = from_differences(d, BANANA)
    gone = np.isnan(y)
    assert gone[AT("T3"), 100:200].all() and gone[:, 600:700].all() and gone.sum() == 100 + 1900
    for a, b in BANANA:
        there = ~gone[[AT(a), AT(b)]].any(0)
        assert_allclose((y[AT(a)] - y[AT(b)])[there], (x[AT(a)] - x[AT(b)])[there], atol=2e-3)


def test_scattered_holes_end():
    "Every sample lacks others: slow patterns are given up, none is wrong."
    x = noise(19, 20_000)
    d = differences(x)
    d[rng_for(0, "holes").random(d.shape) < 0.2] = np.nan
    y = from_differences(d, BANANA)
    assert 0.02 < np.isfinite(y).mean() < 1


def test_neighbours_without_a_sample_do_not_vote():
    "A hole in a neighbour is no hole in what is estimated; a flat electrode says nothing."
    x = np.cumsum(noise(1, 1000)[0]) * np.linspace(0.8, 1.2, 19)[:, None]
    keep = [i for i, c in enumerate(CHANNELS) if c != "C3"]
    holes = x.copy()
    holes[AT("F3"), 200:400] = np.nan
    holes[[AT("P3"), AT("Cz")], 300:500] = np.nan
    r = from_arrays(holes[keep], 200, [CHANNELS[i] for i in keep])
    whole = from_arrays(x[keep], 200, [CHANNELS[i] for i in keep]).eeg[AT("C3")]
    assert np.isfinite(r.eeg[AT("C3")]).all()
    assert_allclose(r.eeg[AT("C3")], whole, atol=0.1 * np.abs(whole).max())
    np.testing.assert_array_equal(r.eeg[AT("C3"), :200], whole[:200])
    dead = x.copy()
    dead[[AT("F3"), AT("P3")]] = 5000.0
    assert_allclose(interpolate_electrodes(dead, ["C3"])[AT("C3")], x[AT("C3")], atol=0.1 * np.abs(x).max())
    assert (interpolate_electrodes(np.zeros((19, 50)), ["C3"]) == 0).all()
