"""numpy's products on one thread, so that their sums do not depend on how many there are."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager

# How the libraries that numpy is built with call it: OpenBLAS (numpy's own wheels, distributions'), MKL.
_NAMES = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Have every thread's products computed on that thread alone, in the whole process, until the block ends.

    Where numpy's library cannot be told, it works as it likes.
    """
    # Of a library it also finds what that is linked with.
    library = ctypes.CDLL(importlib.import_module("numpy.linalg._umath_linalg").__file__)
    for get_name, set_name in _NAMES:
        try:
            get_threads, set_threads = getattr(library, get_name), getattr(library, set_name)
        except AttributeError:
            continue
        before = get_threads()
        set_threads(1)
        try:
            yield
        finally:
            set_threads(before)
        return
    yield
