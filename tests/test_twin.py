"A twin has the labels, the ids and the lengths of the data set whose table it was given."
import pandas as pd
import pyarrow.parquet as pq
import pytest

from hms_brain.catalog import read_train
from hms_brain.core import InputError
from hms_brain.twin import simulate_like


@pytest.mark.real
def test_the_twin_of_a_published_example(real, tmp_path):
    train = read_train(real / "hms/train.csv.zip")
    rows = train[train.spectrogram_id == 353733]
    rows.to_csv(tmp_path / "train.csv", index=False)
    simulate_like(tmp_path / "train.csv", tmp_path / "twin", workers=1, n_test=0, progress=False)
    pd.testing.assert_frame_equal(read_train(tmp_path / "twin").sort_values("label_id", ignore_index=True), rows.sort_values("label_id", ignore_index=True))
    for kind in ("eegs/1628180742", "spectrograms/353733"):
        ours, theirs = (pq.read_table(folder / f"train_{kind}.parquet") for folder in (tmp_path / "twin", real / "hms"))
        assert ours.column_names == theirs.column_names and len(ours) == len(theirs)
        assert [t.to_pandas_dtype() for t in ours.schema.types] == [t.to_pandas_dtype() for t in theirs.schema.types]
    truth = pd.read_csv(tmp_path / "twin/truth.csv")
    assert set(truth.intended) == {"seizure"}


def test_some_patients_and_bad_input(tmp_path):
    with pytest.raises(InputError, match="not a share"):
        simulate_like(tmp_path / "train.csv", tmp_path / "x", share=0)
    with pytest.raises(InputError, match="is not there"):
        simulate_like(tmp_path / "none.csv", tmp_path / "x")
    assert not (tmp_path / "x").exists()
