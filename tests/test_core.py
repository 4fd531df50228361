"The small tools that every other room uses."

import numpy as np
from threadpoolctl import threadpool_info

from hms_brain.core import parallel_map


def blas_threads(_) -> set[int]:
    np.linalg.svd(np.ones((3, 3)))
    return {pool["num_threads"] for pool in threadpool_info()}


def test_workers_keep_to_one_core_each():
    assert set().union(*parallel_map(blas_threads, range(2), workers=2)) == {1}
