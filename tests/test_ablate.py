"An ablation trains every variant on every draw, goes on where it stood, and compares draw by draw."
import numpy as np
import pandas as pd
import pytest

from hms_brain import ablate as module
from hms_brain.ablate import ablate, gains, try_variant, with_fewer_votes
from hms_brain.batches import SineCache, votes_of
from hms_brain.core import InputError, write_json
from hms_brain.dataset import WindowCache
from hms_brain.trials import CONDITIONS

SMALL = {"stem": 8, "width": 16, "hidden": 8}


@pytest.mark.slow
def test_two_variants_on_one_draw(tmp_path):
    variants = {"base": {"settings": SMALL}, "three votes": {"votes": 3}}
    table = ablate(tmp_path, variants, seeds=1, patients=8, short=1.0, epochs=1, workers=1)
    assert set(zip(table.variant, table.condition)) == {(v, c) for v in variants for c in CONDITIONS}
    assert np.isfinite(table.kl).all() and table.kl.between(0, 3).all()
    cache = WindowCache(tmp_path / "cache-0")
    rows = np.arange(len(cache))
    assert set(votes_of(cache, rows).sum(1)) == {100} and not (tmp_path / "data-0").exists()
    few = with_fewer_votes(cache, 3)
    assert set(votes_of(few, rows).sum(1)) == {3} and (votes_of(few, rows) <= votes_of(cache, rows)).all()
    assert np.array_equal(votes_of(few, rows), votes_of(with_fewer_votes(cache, 3), rows))
    assert with_fewer_votes(cache, 0) is cache
    finished = (tmp_path / "run-0-base/model.safetensors").stat().st_mtime_ns
    pd.testing.assert_frame_equal(ablate(tmp_path, variants, seeds=1, patients=8, short=1.0, epochs=1, workers=1), table)
    assert (tmp_path / "run-0-base/model.safetensors").stat().st_mtime_ns == finished
    assert (gains(table).query("variant == 'base'").change == 0).all()


def test_what_was_asked_before_is_not_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WindowCache", lambda *a, **k: SineCache())
    monkeypatch.setattr(module, "judge", lambda run, cache: pd.DataFrame({"kl": [run.metrics["val_kl"]]}))
    first = try_variant((0, "base", {"settings": SMALL}), tmp_path, 1)
    pd.testing.assert_frame_equal(try_variant((0, "base", {"settings": SMALL}), tmp_path, 1), first)
    for fields, epochs in (({"settings": SMALL}, 2), ({"settings": SMALL, "mirror": 0.0}, 1)):
        with pytest.raises(InputError, match="recipe differs"): try_variant((0, "base", fields), tmp_path, epochs)
    write_json(tmp_path / "draws.json", {"patients": 8, "short": 0.9, "panel": 100})
    with pytest.raises(InputError, match="other draws"): ablate(tmp_path, {"base": {}}, patients=9)
