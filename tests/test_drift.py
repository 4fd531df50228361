"""Drift, end to end: simulated recordings through `Preprocess` and the packaged model, beside the reference that travels in the packaged bundle."""
from dataclasses import replace
from functools import lru_cache

import pytest

from hms_brain.core import CLASSES, WINDOW_S, get_settings, parallel_map, rng_for
from hms_brain.drift import DriftMonitor, Reference, measure_window
from hms_brain.predict import Predictor
from hms_brain.simset import draw_plan
from hms_brain.simulate import simulate

SEED, SHORT, PANEL = 1, 0.9, 100  # other patients of the population that the packaged model was validated on


@lru_cache
def predictor():
    "The packaged model, once per process."
    return Predictor(threads=1)


def observe(who):  # patient, gain
    "What the service notes about a window: its features as the model saw it, and the answer."
    patient, gain = who
    plan = draw_plan(rng_for(SEED, "plan", patient), SEED, patient, 0, SHORT, PANEL)
    recording = simulate(SEED, CLASSES[plan.lead], plan.duration, patient=patient, timeline=plan.timeline).recording
    x = predictor().inputs(replace(recording, signal=gain * recording.signal), at=float(plan.clips[0][0]) + plan.lead_in + WINDOW_S / 2)
    answer = None if x.abstain else CLASSES[predictor().probabilities([x])[0].argmax()]
    return measure_window(x.eeg), answer


def alarms(rows, every=1):
    "After how many windows a look says that something drifted, and what; and the closest that any look came to its limit."
    monitor, closest = DriftMonitor(Reference.from_dict(predictor().bundle.drift)), 0.0
    for i, (features, answer) in enumerate(rows):
        monitor.add(features, answer, f"{i}")
        found = monitor.look() if i % every == 0 else []
        closest = max([closest, *(r["distance"] / r["limit"] for r in found)])
        if drifted := [r["what"] for r in found if r["drifted"]]: return i + 1, drifted, closest
    return None, [], closest


@pytest.mark.slow
def test_clean_recordings_are_silent_and_twice_the_amplitude_is_not():
    "A thousand patients raise nothing; a hundred whose amplifier doubles do."
    rows = list(parallel_map(observe, [(k, 1) for k in range(1000)] + [(k, 2) for k in range(1000, 1100)], get_settings().system.workers))
    after, drifted, closest = alarms(rows[:1000], every=5)
    assert after is None, (after, drifted)
    again, louder, _ = alarms(rows[1000:])
    mixed, _, _ = alarms(rows[900:])  # the clean ones before make room one by one
    print(f"clean: at most {closest:.2f} of the limit; doubled: {louder} after {again} windows, {mixed - 100 if mixed else None} after a hundred clean ones")
    assert again and again <= 100 and "amplitude" in louder and mixed and mixed - 100 <= 100
