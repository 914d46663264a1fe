"""What the depthwise engine takes, offers and promises by design: decided on the host, before anything is launched."""

from __future__ import annotations

import dataclasses

import pytest
from cases import make
from depthwise_cases import ENGINE, FIRST, LAST, depthwise, large

from triton_conv3d.engines.base import CHAIN, WORKSPACE_LIMIT, Memory
from triton_conv3d.engines.depthwise.configs import smallest
from triton_conv3d.engines.depthwise.geometry import plan
from triton_conv3d.problem import PASSES, Problem, met_taps

COMMON = dict(batch=2, in_channels=4, out_channels=8, groups=4, input_size=(4, 4, 4), kernel_size=(2, 2, 2))


@pytest.mark.parametrize("changes, reason", [
    (dict(dtype="float64"), "float64"),
    (dict(arch="cpu"), "TRITON_INTERPRET"),
    (dict(batch=0), "nothing to multiply"),
    (dict(groups=2), "groups=2 is not in_channels=4"),
    (dict(groups=1), "groups=1 is not in_channels=4"),
    (dict(pass_="dgrad", stride=(1, 1, 17), input_size=(4, 4, 40)), "stride 17"),
    (dict(pass_="wgrad", out_channels=128, kernel_size=(64,) * 3, input_size=(64,) * 3), "partial sums"),
])  # fmt: skip
def test_unsupported_problems_are_named(changes: dict, reason: str) -> None:
    problem = Problem(**{"pass_": "forward", "arch": "interpreter", **COMMON, **changes})
    assert reason in ENGINE.supports(problem)
    assert ENGINE.supports(Problem("forward", arch="interpreter", **COMMON)) is None


@pytest.mark.parametrize("pass_", PASSES)
def test_memory_counts_copies_weights_and_partial_sums(pass_: str) -> None:
    def used(layouts: tuple[str, str], **changes) -> Memory:
        problem, _ = make(depthwise(pass_, 4, 2, batch=2, dtype="float16", layouts=layouts))
        return ENGINE.memory(problem, dataclasses.replace(smallest(problem), **changes))

    weights = 4 * 8 * 27
    base = Memory(3 * weights, 0) if pass_ == "wgrad" else Memory(0, weights)
    assert used(LAST, splits=3) == used(FIRST, splits=3) == used(("cropped", "cropped"), splits=3) == base
    copied = {"forward": 2 * 4 * 64, "dgrad": 2 * 8 * 8, "wgrad": 2 * 4 * 64 + 2 * 8 * 8}[pass_]
    assert used(("channel_step", "channel_step"), splits=3) == dataclasses.replace(
        base, copies=base.copies + 2 * copied
    )


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("pass_", PASSES)
def test_bytes_by_design(pass_: str, layout: str) -> None:
    """Planes that two parts of the depth both read come from memory twice: at most 1.25 times the least bytes in all."""
    problem = large(pass_, layout=layout)
    config = ENGINE.configs(problem)[0]
    at = plan(problem, config)
    again = (at.chunks - 1) * 2 / problem.input_size[0] if config.kernel == "slide" else 0.0
    moved = problem.min_bytes + again * problem.min_bytes / 2 + 2 * ENGINE.memory(problem, config).workspace
    assert moved <= 1.25 * problem.min_bytes


@pytest.mark.parametrize("changes, first, kernel, pad", [
    (dict(), (0, 0, 0), (3, 3, 3), (1, 1, 1)),
    (dict(input_size=(1, 8, 8)), (1, 0, 0), (1, 3, 3), (0, 1, 1)),
    (dict(dilation=(9, 1, 1), padding=(9, 9, 1, 1, 1, 1), input_size=(4, 8, 8)), (1, 0, 0), (1, 3, 3), (0, 1, 1)),
    (dict(stride=(8, 1, 1), input_size=(2, 8, 8)), (1, 0, 0), (2, 3, 3), (0, 1, 1)),
    (dict(padding=(1, 0, 0, 1, 1, 1), input_size=(2, 2, 8)), (1, 0, 0), (2, 2, 3), (0, 0, 1)),
])  # fmt: skip
def test_taps_that_only_meet_padding_are_skipped(changes: dict, first: tuple, kernel: tuple, pad: tuple) -> None:
    shape = dict(
        batch=1, in_channels=4, out_channels=4, groups=4, input_size=(8, 8, 8), kernel_size=(3, 3, 3), padding=(1,) * 6
    )
    for pass_ in PASSES:
        met = met_taps(Problem(pass_, **{**shape, **changes}))
        assert (met.first, met.kernel, met.pad) == (first, kernel, pad)


LONG_WGRAD = (
    dict(),
    dict(batch=8, input_size=(160, 160, 160)),
    dict(input_size=(8, 8, 8), batch=1),
    dict(kernel_size=(7, 7, 7), padding=(3,) * 6, input_size=(128, 128, 128)),
    dict(in_channels=64, out_channels=192),
)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("layer", LONG_WGRAD, ids=str)
def test_accumulators_are_short_and_the_workspace_small(layer: dict, layout: str) -> None:
    problem = large("wgrad", layout=layout, **layer)
    assert ENGINE.supports(problem) is None
    for config in ENGINE.configs(problem):
        at = plan(problem, config)
        assert at.share * at.chunk * config.rows * config.columns <= CHAIN, config
        assert ENGINE.memory(problem, config).workspace <= WORKSPACE_LIMIT, config
