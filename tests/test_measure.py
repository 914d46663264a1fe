"""Measuring: what is compared with what, how wrong a result must be to be refused, and who is measured at all."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from triton_conv3d.engines import aten, launching
from triton_conv3d.engines.base import Config, Memory
from triton_conv3d.problem import Operands, Problem, describe
from triton_conv3d.tuning import faults, measure, quarantine, verify
from triton_conv3d.tuning.progress import progress


@dataclasses.dataclass(frozen=True)
class Knobs(Config):
    tile: int = 0
    warps: int = 0


def engine(name, configs, launch):
    return types.SimpleNamespace(
        NAME=name,
        configs=lambda problem: tuple(configs),
        memory=lambda problem, config: Memory(),
        launch=launch,
    )


def problem_of(pass_="forward", dtype=torch.float32, channels=3, filters=5, bias=False):
    """A problem and operands of zeros."""
    x = torch.zeros(2, channels, 5, 6, 7, dtype=dtype)
    w = torch.zeros(filters, channels, 3, 3, 3, dtype=dtype)
    y = torch.zeros(2, filters, 5, 6, 7, dtype=dtype)
    operands = {
        "forward": Operands(x, w, None, torch.zeros(filters, dtype=dtype) if bias else None),
        "dgrad": Operands(None, w, y),
        "wgrad": Operands(x, None, y),
    }[pass_]
    geometry = ((1, 1, 1), (1,) * 6, (1, 1, 1), 1)
    return describe(pass_, operands, x.shape, w.shape, *geometry, False, "ieee"), operands


PASSES = ("forward", "dgrad", "wgrad")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TestPrivateOperands:
    @pytest.mark.parametrize(
        "view",
        [
            lambda t: t,
            lambda t: t.contiguous(memory_format=torch.channels_last_3d),
            lambda t: t[:, 1:3, ::2],
            lambda t: t[..., 1:],
            lambda t: t[:, :1].expand(-1, 4, -1, -1, -1),
        ],
        ids=("contiguous", "channels-last", "steps", "unaligned", "expanded"),
    )
    def test_same_strides_and_alignment_and_nothing_shared(self, view):
        given = view(torch.zeros(2, 5, 6, 3, 4, dtype=torch.float16))
        twin = verify.private_operands(Operands(given)).input
        assert (twin.shape, twin.stride(), twin.dtype) == (given.shape, given.stride(), given.dtype)
        assert twin.data_ptr() % 16 == given.data_ptr() % 16
        assert twin.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
        assert 0 < twin.abs().max() <= 1

    def test_same_numbers_each_time_and_no_others_drawn(self):
        state, given = torch.get_rng_state(), Operands(torch.zeros(1, 2, 3, 3, 3))
        first, second = verify.private_operands(given), verify.private_operands(given)
        assert torch.equal(first.input, second.input) and torch.equal(state, torch.get_rng_state())


class TestVerify:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("pass_", PASSES)
    @pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
    def test_torchs_own_is_right(self, pass_, dtype, bias):
        problem, operands = problem_of(pass_, dtype, bias=bias)
        private = verify.private_operands(operands)
        result = aten.launch(problem, private, aten.AtenConfig())
        expected = verify.trusted(problem, private)
        # A CPU adds up in float16, and gradients in bfloat16 too where it has no AVX-512.
        coarse = dtype == torch.float16 or (dtype == torch.bfloat16 and pass_ != "forward")
        assert verify.is_right(problem, result, expected, coarse=coarse)

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @pytest.mark.parametrize("pass_", PASSES)
    @pytest.mark.parametrize("channels", (1, 32))
    def test_a_missing_tap_is_seen(self, pass_, dtype, channels):
        problem, operands = problem_of(pass_, dtype, channels=channels, filters=channels)
        private = verify.private_operands(operands)
        expected = verify.trusted(problem, private)
        if pass_ == "wgrad":
            faulty = private._replace(grad=private.grad.clone())
            faulty.grad[:, :, -1, -1, -1] = 0  # the last pixel
        else:
            faulty = private._replace(weight=private.weight.clone())
            faulty.weight[:, :, 2, 2, 2] = 0
        assert not verify.is_right(problem, aten.launch(problem, faulty, aten.AtenConfig()), expected)

    @pytest.mark.parametrize("value", (math.nan, math.inf))
    def test_one_bad_element_is_seen(self, value):
        problem, operands = problem_of()
        private = verify.private_operands(operands)
        expected = verify.trusted(problem, private)
        result = expected.clone()
        assert verify.is_right(problem, result, expected)
        result[-1, -1, -1, -1, -1] = value
        assert not verify.is_right(problem, result, expected)

    def test_a_volume_is_compared_in_parts(self):
        """Of one sample too, or an enormous one had no room for its differences."""
        made = []

        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
                made.append(function(*args, **kwargs or {}))
                return made[-1]

        expected = torch.ones(1, 2, 64, 3, 3)
        problem = Problem("forward", 1, 2, 2, (64, 3, 3), (1, 1, 1), dtype="float16")
        with Watching():
            assert verify.is_right(problem, expected.half(), expected)
        mine = [t for t in made if isinstance(t, torch.Tensor) and not t._is_view()]
        assert mine and max(t.numel() for t in mine if t.dtype == torch.float32) == expected.numel() // 16

    @pytest.mark.parametrize("length", (27, 27 * 512, 10**7))
    def test_the_bound_follows_the_length_of_the_sum(self, length):
        problem = Problem("wgrad", 1, 1, 1, (1, 1, length), (1, 1, 1), dtype="float32")
        deviation = math.sqrt(length) / 3
        expected = torch.zeros(1, 1, 1, 1, 1)
        assert verify.is_right(problem, expected + 1e-7 * deviation, expected)
        assert not verify.is_right(problem, expected + 0.05 * deviation, expected)

    def test_tf32_may_be_coarser(self):
        problem = Problem("forward", 1, 64, 1, (3, 3, 3), (3, 3, 3), dtype="float32")
        expected = torch.zeros(1, 1, 1, 1, 1)
        result = expected + math.sqrt(64 * 27) / 3 * 2.0**-8
        for precision, right in (("ieee", False), ("tf32x3", False), ("tf32", True)):
            assert verify.is_right(problem.replace(precision=precision), result, expected) == right

    def test_trusted_in_the_operands_type_where_memory_is_short(self, monkeypatch):
        problem, operands = problem_of(dtype=torch.float16)
        launch = aten.launch

        def small(p, o, c):
            if p.dtype != "float16":
                raise torch.OutOfMemoryError("no room")
            return launch(p, o, c)

        monkeypatch.setattr(aten, "launch", small)
        assert verify.trusted(problem, operands).dtype == torch.float16

    @pytest.mark.parametrize(
        "dtype, wide", list(zip(DTYPES, ("float32", "float32", "float64", "float64"), strict=True)), ids=str
    )
    def test_trusted_is_wider_than_tf32_can_spoil(self, dtype, wide, monkeypatch):
        """tf32 holds every product of 16-bit numbers, not of float32; and the user's switches are left alone."""
        launch, seen = aten.launch, []
        monkeypatch.setattr(aten, "launch", lambda p, o, c: seen.append(p.dtype) or launch(p, o, c))
        monkeypatch.setattr(torch._C, "_set_fp32_precision_setter", None)
        expected = verify.trusted(*problem_of(dtype=dtype))
        assert seen == [wide] and str(expected.dtype) == f"torch.{wide}"

    def test_float32_is_not_judged_by_float32(self, monkeypatch):
        def full(*_):
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(aten, "launch", full)
        with pytest.raises(torch.OutOfMemoryError):
            verify.trusted(*problem_of())


def ranked(*candidates):
    return [(float(i), *candidate) for i, candidate in enumerate(candidates)]


class Clock:
    """A timer whose seconds are the candidate's tile, while time itself passes."""

    def __init__(self, monkeypatch, seconds_each=0.0):
        self.now, self.each, self.last, self.count = 0.0, seconds_each, 0.0, {}
        monkeypatch.setattr(measure.time, "monotonic", lambda: self.now)

    def time(self, function):
        function()
        self.now += self.each
        self.count[self.last] = self.count.get(self.last, 0) + 1
        return float(self.last)


class TestBest:
    @pytest.fixture(autouse=True)
    def _quarantine(self, monkeypatch):
        monkeypatch.setattr(quarantine, "_left_out", {})

    def contest(self, clock, tiles, wrong=(), errors=None, dtype=torch.float32, seconds=60.0):
        def launch(problem, operands, config):
            clock.last = config.tile
            if config.tile in (errors or {}):
                raise errors[config.tile]
            result = F.conv3d(operands.input, operands.weight, operands.bias, padding=1)
            return result * (1.5 if config.tile in wrong else 1)

        ours, torchs = (engine(name, map(Knobs, of), launch) for name, of in (("ours", tiles), ("aten", [50])))
        problem, operands = problem_of(dtype=dtype)
        candidates = [(ours, Knobs(t)) for t in tiles] + [(torchs, Knobs(50))]
        return measure.best(problem, operands, ranked(*candidates), "full", clock, seconds)

    def test_the_callers_zeros_do_not_hide_a_fault(self, monkeypatch):
        with pytest.warns(RuntimeWarning, match=r"ours \[tile=5 warps=0\] gave a wrong result"):
            result = self.contest(Clock(monkeypatch), [5, 9], wrong=[5])
        assert (result.config.tile, result.candidates) == (9, 2)

    def test_without_time_the_best_and_torchs_own_are_measured(self, monkeypatch):
        clock = Clock(monkeypatch, seconds_each=1.0)
        result = self.contest(clock, [30, 10, 20], seconds=0.5)
        assert set(clock.count) == {30, 50} and result.config.tile == 30 and result.aten_us == 50e6

    def test_the_reference_and_cudnns_search_do_not_count(self, monkeypatch):
        """The first convolution of a process loads cuDNN, and the first of a shape searches."""
        clock, trusted, is_right = Clock(monkeypatch), verify.trusted, measure.Bench.is_right

        def loading(problem, operands):
            clock.now += 10.0
            return trusted(problem, operands)

        def searching(bench, engine, config):
            clock.now += 10.0 * (engine.NAME == "aten")
            return is_right(bench, engine, config)

        monkeypatch.setattr(verify, "trusted", loading)
        monkeypatch.setattr(measure.Bench, "is_right", searching)
        self.contest(clock, [30, 10, 20], seconds=1.0)
        assert set(clock.count) == {10, 20, 30, 50}

    def test_budget_of_a_block(self, monkeypatch):
        clock = Clock(monkeypatch, seconds_each=1.0)
        with measure.budget(3.5):
            result = self.contest(clock, range(20, 30), seconds=None)
        assert result.policy["budget_s"] == 3.5 and sum(clock.count.values()) == 4
        assert self.contest(clock, [20], seconds=None).policy["budget_s"] == measure.FULL_SECONDS

    def test_all_wrong_is_the_references_fault(self, monkeypatch):
        with pytest.warns(RuntimeWarning, match="not tuned"):
            assert self.contest(Clock(monkeypatch), [5, 9], wrong=[5, 9, 50]) is None
        assert not quarantine._left_out

    def test_torchs_own_is_never_quarantined(self, monkeypatch):
        with pytest.warns(RuntimeWarning, match="aten"):
            assert self.contest(Clock(monkeypatch), [5], wrong=[50]).config.tile == 5
        assert not quarantine._left_out

    def test_unknown_errors_leave_the_candidate_out(self, monkeypatch):
        with pytest.warns(RuntimeWarning, match="left out: KeyError"):
            assert self.contest(Clock(monkeypatch), [5, 9], errors={5: KeyError("bug")}).config.tile == 9

    def test_what_fails_only_while_timed_is_out(self, monkeypatch):
        clock, calls = Clock(monkeypatch), []

        class Flaky(Clock):
            def time(self, function):
                seconds = super().time(function)
                if seconds == 5 and self.count[5] == 3:
                    raise torch.OutOfMemoryError("no room")
                calls.append(seconds)
                return seconds

        clock = Flaky(monkeypatch)
        assert self.contest(clock, [5, 9]).config.tile == 9 and 5 in calls

    def test_no_memory_for_operands(self, monkeypatch):
        def full(operands):
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(verify, "private_operands", full)
        assert self.contest(Clock(monkeypatch), [5]) is None

    def test_complex_numbers_are_not_tuned(self, monkeypatch):
        assert self.contest(Clock(monkeypatch), [5], dtype=torch.complex64) is None


class Lazy:
    """A compiled kernel as Triton returns it: loaded, and its launcher built, when ``run`` is first asked for."""

    def __init__(self, loaded):
        self._loaded = loaded

    @property
    def run(self):
        self._loaded.append(self)


class TestCompile:
    """A kernel that only records, launched as engines launch theirs, on a GPU that is made up."""

    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch):
        self.runs, self.loaded = [], []
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(measure, "interpreted", lambda: False)

    def compile(self, count, launch):
        fake = types.SimpleNamespace(NAME="ours", launch=launch)
        measure._compile(*problem_of(), types.SimpleNamespace(type="cuda"), [(fake, Knobs(i)) for i in range(count)])

    def run(self, *args, warmup, num_warps, **_):
        self.runs.append((warmup, num_warps, threading.get_ident()))
        return Lazy(self.loaded)

    def launch(self, problem, operands, config):
        launching.launch_kernel(self, (1, 1), (operands.input,), {"num_warps": config.tile // 2})

    def test_each_kernel_once_and_none_launched(self):
        self.compile(6, self.launch)
        assert sorted((warmup, warps) for warmup, warps, _ in self.runs) == [(True, 0), (True, 1), (True, 2)]
        assert len(self.loaded) == 3  # or building launchers would count as measuring
        launching.launch_kernel(self, (1, 1), (torch.empty(0),), {"num_warps": 9})
        assert self.runs[-1][:2] == (False, 9)

    def test_one_alone_is_compiled_too(self):
        """Or its compiling would count as measuring."""
        self.compile(1, self.launch)
        assert [(warmup, warps) for warmup, warps, _ in self.runs] == [(True, 0)]

    def test_what_triton_specialises_on_is_compiled_apart(self):
        """Or it would be compiled while it is measured. Tensors are not looked into, which takes a launch."""
        numbers = (1, 2, 3, 16, 2**40)

        class Closed(torch.Tensor):
            def __eq__(self, other):
                raise AssertionError("compared")

        def launch(problem, operands, config):
            args = operands.input.as_subclass(Closed), (4, (numbers[config.tile],))
            launching.launch_kernel(self, (1, 1), args, {"num_warps": 4})

        self.compile(len(numbers), launch)
        assert len(self.runs) == 4  # 2 and 3 are alike

    def test_other_threads_launch_meanwhile(self):
        def launch(problem, operands, config):
            call = (self, (1, 1), (torch.empty(0),), {"num_warps": 9})
            other = threading.Thread(target=launching.launch_kernel, args=call)
            other.start()
            other.join()
            self.launch(problem, operands, config)

        self.compile(2, launch)
        assert {(warmup, warps) for warmup, warps, _ in self.runs} == {(False, 9), (True, 0)}

    def test_failures_wait_for_the_launch_but_illegal_accesses_do_not(self):
        def failing(message):
            def launch(problem, operands, config):
                raise RuntimeError(message)

            return launch

        self.compile(3, failing("PassManager::run failed"))
        with pytest.raises(RuntimeError, match="being tuned"):
            self.compile(3, failing("an illegal memory access was encountered"))


@pytest.mark.parametrize(
    "message, fatal, unfit",
    [
        ("CUDA error: an illegal memory access was encountered", True, False),
        ("CUDA error: misaligned address", True, False),
        ("CUDA error: device-side assert triggered", True, False),
        ("Triton Error [HIP]: unspecified launch failure", True, False),
        ("CUDA error: operation not supported on global/shared address space", True, False),
        ("Triton Error [CUDA]: the launch timed out and was terminated", True, False),
        ("out of resource: shared memory, Required: 300000", False, True),
        ("CUDA error: too many resources requested for launch", False, True),
        ("PassManager::run failed", False, True),
        ("shape mismatch", False, False),
    ],
)
def test_errors_are_told_apart(message, fatal, unfit):
    error = RuntimeError(message)
    assert (faults.is_illegal_access(error), faults.is_out_of_resources(error)) == (fatal, unfit)


@pytest.mark.parametrize("name, module", [("OutOfResources", "triton.runtime.errors"),
                                          ("CompilationError", "triton.compiler.errors"),
                                          ("PTXASError", "triton.runtime.errors")])  # fmt: skip
def test_tritons_errors_still_have_their_names(name, module):
    pytest.importorskip("triton")
    kind = getattr(importlib.import_module(module), name)
    silent = type("Silent", (kind,), {"__init__": lambda self: None, "__str__": lambda self: ""})
    assert faults.is_out_of_resources(silent())


def test_the_host_is_ahead_of_the_device_when_a_launch_is_timed(monkeypatch):
    """Or what launching takes the host would count: longer than overwriting the L2 cache, for some engines."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("wait" if cycles >= 4e5 else "too short"))
    monkeypatch.setattr(measure, "FLUSH_BYTES", 1)
    assert measure.EventTimer(torch.device("cpu")).time(lambda: log.append("launch")) == 2e-3
    assert log == ["wait", "record", "launch", "record", "synchronize"]


class TestProgress:
    def test_silent_unless_a_terminal(self, capsys):
        with progress("tuning", 2) as step:
            step()
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("delay, shown", ((0.0, True), (1e9, False)))
    def test_counter(self, delay, shown, monkeypatch, capsys):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.setitem(sys.modules, "tqdm", None)
        monkeypatch.setattr("triton_conv3d.tuning.progress._DELAY", delay)
        with progress("tuning", 2) as step:
            step()
        assert ("tuning: 1/2" in capsys.readouterr().err) == shown
