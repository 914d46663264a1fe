"""What a first call inside the capture of a CUDA graph asks of the driver and of cuDNN; tests/test_training.py captures."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from cases import Case, make

from triton_conv3d import engines
from triton_conv3d.engines import launching
from triton_conv3d.problem import Problem


@pytest.mark.parametrize("capturing", (True, False), ids=("capturing", "not-capturing"))
def test_a_kernel_may_be_loaded_while_a_graph_is_captured(capturing: bool, monkeypatch) -> None:
    """The driver refuses to load one there in every other mode; the mode that the user asked for comes back."""
    asked, mode, launched = 1, [1], []

    def exchange(pointer) -> None:
        pointer._obj.value, mode[0] = mode[0], pointer._obj.value

    def run(*args, **options):
        launched.append(mode[0])
        raise RuntimeError("of the launch")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(launching, "_exchange_capture_mode", lambda: exchange)
    tensor = types.SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="of the launch"):
        launching._run(types.SimpleNamespace(run=run), (1, 1), (tensor,), {})
    assert launched == [2 if capturing else asked] and mode == [asked]


def test_cudnn_searches_before_a_capture_only(monkeypatch) -> None:
    """Its search measures; what it found is kept for the problem, the layout and the thread, unless the call failed."""
    aten, used = engines.get("aten"), []
    problem, operands = make(Case(pass_="forward"))
    known, new, failed = (problem.replace(arch="sm_90", batch=batch) for batch in (1, 2, 3))

    def searches(of: Problem, capturing: bool, channels_last: bool = False, fails: bool = False) -> bool:
        def finished(*args) -> None:
            used.append(torch.backends.cudnn.benchmark)
            if fails:
                raise torch.OutOfMemoryError

        monkeypatch.setattr(aten, "_finished", finished)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        with contextlib.suppress(torch.OutOfMemoryError):
            aten.launch(of, operands, aten.AtenConfig(channels_last, benchmark=True))
        return used.pop()

    assert searches(known, False) and searches(known, True) and not searches(known, True, channels_last=True)
    assert not searches(new, True) and not searches(new, True) and searches(new, False) and searches(new, True)
    assert searches(failed, False, fails=True) and not searches(failed, True)
