"""correctness.tests: the project's tests on this GPU, every engine x config x dtype x layout among them."""

from __future__ import annotations

import functools
import math

from . import Setting, Step, pytested

NAME = "correctness.tests"
WHAT = "the project's tests on the GPU: every engine, config, dtype and layout"
WORKERS = pytested.WORKERS
# Kernels that the files which need most of them compile, as counted in Triton's interpreter; those of test_hopper*.py by
# their cases, which take it twice as long. A step compiles up to so many, about one a second.
_KERNELS = {
    "test_depthwise.py": 2270, "test_engines.py": 2100, "test_fuzz.py": 890, "test_folded.py": 260, "test_fused.py": 210,
    "test_hopper.py": 270, "test_hopper_im2col.py": 120, "test_hopper_lines.py": 100, "test_hopper_line_wgrad.py": 100,
    "test_hopper_line_dgrad.py": 60,
    "test_perf_slices.py": 150,
    "test_halo.py": 200, "test_space_to_depth.py": 130, "test_padded.py": 120, "test_blocks.py": 100, "test_tma.py": 110,
    "test_toeplitz.py": 420,
}  # fmt: skip
_OF_A_STEP, _OTHER_SECONDS = 80, 40.0
unavailable = pytested.unavailable


def steps(setting: Setting) -> list[Step]:
    found = []
    for path in sorted(pytested.TESTS.glob("test_*.py")):
        kernels = _KERNELS.get(path.name, 0)
        count = max(1, math.ceil(kernels / _OF_A_STEP))
        for index in range(count):
            name = path.name if count == 1 else f"{path.name} {index}/{count}"
            arguments = [f"tests/{path.name}", *pytested.EVERY_CASE, "--shard", f"{index}/{count}"]
            seconds = _OTHER_SECONDS + kernels / count
            found.append(Step(name, seconds, functools.partial(pytested.run, arguments)))
    return found
