"""A pytest plugin: tests of engines on the GPU that is made up. Every kernel is compiled for sm_90 and launched into nothing,
and no result is compared by what these tests compare with: what raises here would on a GPU too.

    PYTHONPATH=.:tests python -m pytest -p made_up_tests --cases 0 tests/test_halo.py
"""

import made_up_gpu

made_up_gpu.install()

import cases  # noqa: E402  as on a GPU
import tolerances  # noqa: E402
import torch  # noqa: E402


def _right(*args, **more) -> bool:
    return True


for owner, names in (
    (tolerances, ("check_exact", "check_bound", "check_peer", "check_drift")),
    (cases, ("check_footprint",)),
    (torch.testing, ("assert_close",)),
    (torch, ("equal",)),
):
    for name in names:
        setattr(owner, name, _right)
