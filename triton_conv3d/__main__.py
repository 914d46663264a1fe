"""``triton-conv3d info | tune | try | cache | demo``: the command line. ``python -m triton_conv3d`` is the same."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import os
import sys
from pathlib import Path

import torch

from . import __version__, console, convert_conv3d, engines, settings, tryout, tuning
from .problem import PASSES, Problem, interpreted
from .tuning import proof, quarantine, storage, table
from .tuning.cache import PlanCache
from .tuning.environment import environment
from .tuning.faults import is_illegal_access
from .workload import DTYPES, LAYOUTS, Layer, read


class Mistake(Exception):
    """Something the user can mend: printed as one line, without a traceback."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 failed, 2 a mistake in the call or nothing could be done."""
    options = _parser().parse_args(arguments)

    def command() -> int | None:
        with _mistakes(ValueError):  # a bad environment variable is a mistake of the call, whatever the command
            forced = settings.current().engine
        if forced is not None and forced not in engines.available():
            raise Mistake(f"{settings.variable('engine')}={forced!r}: the engines are {', '.join(engines.available())}")
        return options.run(options)

    return console.status(command, "triton-conv3d: error", (Mistake,))


@contextlib.contextmanager
def _mistakes(*exceptions: type[Exception]):
    """These exceptions are mistakes of the user here."""
    try:
        yield
    except exceptions as error:
        raise Mistake(str(error)) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="triton-conv3d", description="Autotuned Triton 3-D convolution for PyTorch.")
    parser.add_argument("--version", action="version", version=f"triton_conv3d {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, GPU, table, cache and every setting with its source")
    info.set_defaults(run=_info)

    tune = commands.add_parser("tune", help="measure ahead of time, so that no first call has to")
    tune.add_argument("workload", help="a JSON file of layers, or a model as module:callable")
    tune.add_argument("--input-shape", type=_shape, metavar="N,C,D,H,W", help="of the model's input")
    tune.add_argument("--passes", type=_passes, default=PASSES, metavar="P,P",
                      help=f"some of {','.join(PASSES)} (default: all; a model's gradients go together)")
    tune.add_argument("--dtype", choices=tuple(DTYPES),
                      help="instead of the layers' own; for a model: run under autocast to it")
    tune.add_argument("--layout", choices=tuple(LAYOUTS), default="channels_last",
                      help="memory format of input and weight (default: channels_last)")
    tune.add_argument("--mode", choices=("quick", "full"), default="full", help="how many candidates (default: full)")
    tune.add_argument("--budget", type=_seconds, metavar="SECONDS", help="for one problem, without compiling")
    tune.set_defaults(run=_tune)

    try_ = commands.add_parser("try", help="run an engine on this GPU, small and ragged layers, and tell whether it is right")
    try_.add_argument("engine", choices=tuple(engines.available()), metavar="ENGINE", help=", ".join(engines.available()))
    try_.add_argument("--device", type=int, default=0, metavar="INDEX", help="of the GPU (default: 0)")
    try_.set_defaults(run=_try)

    cache = commands.add_parser("cache", help="list, export, import or clear the plans measured so far")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", help="one line for every plan").set_defaults(run=_cache_list)
    export = actions.add_parser("export", help="write all plans to one file")
    export.add_argument("file", type=Path)
    export.set_defaults(run=_cache_export)
    import_ = actions.add_parser("import", help="add the plans of an exported file")
    import_.add_argument("file", type=Path)
    import_.set_defaults(run=_cache_import)
    actions.add_parser("clear", help="delete all plans").set_defaults(run=_cache_clear)

    demo = commands.add_parser("demo", help="train a small 3-D U-Net on a brain MRI and show the plans")
    demo.add_argument("--device", choices=("cuda", "interpreter", "cpu"),
                      help="cuda and interpreter run the Triton kernels, cpu torch's own convolution "
                           "(default: cuda if there is one, else interpreter)")
    for name, what in (("steps", "training steps"), ("width", "channels at the finest level"),
                       ("patch", "voxels along each side of a patch, a multiple of 4"), ("seed", "random seed")):
        demo.add_argument(f"--{name}", type=int, help=what)
    demo.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on a GPU)")
    demo.set_defaults(run=_demo)
    return parser


# Values of options


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(map(int, text.replace("x", ",").split(",")))
    except ValueError:
        shape = ()
    if len(shape) != 5 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape: expected five positive sizes, as 2,1,64,64,64")
    return shape


def _passes(text: str) -> tuple[str, ...]:
    passes = tuple(text.split(","))
    if not set(passes) <= set(PASSES):
        raise argparse.ArgumentTypeError(f"{text!r} is not known: expected some of {','.join(PASSES)}")
    return passes


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: expected seconds above 0")
    return seconds


# Commands


def _info(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = environment(device)
    found = next(filter(os.path.isfile, _tables(names["gpu"])), None)
    rows = [
        ("triton_conv3d", __version__),
        ("python", sys.version.split()[0]),
        ("torch", torch.__version__),
        ("triton", names["triton"]),
        ("CUDA, driver", names["driver"]),
        ("cuDNN", names["cudnn"]),
        ("GPU", f"{names['gpu']}, {names['arch']}" if device.type == "cuda" else "none that torch sees"),
        ("CPU tensors", "Triton's interpreter" if interpreted() else "torch's own convolution"),
        ("table", found or "none for this device: a new shape is ranked by the cost model"),
        ("cache", _cache_state()),
    ]
    for name, value in rows:
        print(f"{name:<14} {value}")
    print("\nsettings")
    for name, value in dataclasses.asdict(settings.current()).items():
        variable = settings.variable(name)
        print(f"  {name:<10} {value!s:<32} {f'default ({variable})' if settings.given(name) is None else variable}")


def _tables(gpu: str) -> list[Path]:
    """Where a table for this GPU would stand: the user's own, then the shipped one."""
    own = settings.current().tables
    return [table.path_for(directory, gpu) for directory in (own, table.SHIPPED) if directory is not None]


def _cache_state() -> str:
    cache = _cache()
    if cache.directory is None:
        return "memory only: TRITON_CONV3D_CACHE_DIR is empty, or there is no home"
    try:
        storage.check_directory(cache.directory)
    except FileNotFoundError:
        return f"{cache.directory}, not made yet"
    except OSError as error:
        return f"{cache.directory}, not used: {error.strerror}"
    state = "writable" if os.access(cache.directory, os.W_OK) else "read-only: new plans stay in memory"
    return f"{cache.directory}, {_count(sum(1 for _ in cache.entries()), 'plan')}, {state}"


def _cache() -> PlanCache:
    return PlanCache(settings.current().cache_dir)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cache_list(options: argparse.Namespace) -> None:
    cache = _cache()
    total = 0
    for _, entry in cache.entries():
        total += 1
        aten = f", torch {entry.aten_us:.1f} us" if entry.aten_us is not None else ""
        config = " ".join(f"{name}={value}" for name, value in entry.config.items())
        print(f"{entry.environment['gpu']}: {Problem.from_dict(entry.problem)}")
        print(f"    {entry.engine} {config}  {entry.time_us:.1f} us{aten}, best of {entry.candidates}")
    for _, trial in quarantine.ended(cache.directory):
        print(f"{trial.environment.get('gpu')}: left out: {trial}, which ended a process that measured {trial.problem}")
    for proven in proof.kept(cache.directory):
        found = "works" if proven.failure is None else f"left out: {proven.failure}"
        print(f"{proven.environment.get('gpu')}: engine {proven.engine}, on trial: {found}")
    print(f"{_count(total, 'plan')} in {cache.directory or 'memory only: there is no cache directory'}")


def _cache_export(options: argparse.Namespace) -> None:
    count = _cache().export(options.file)
    print(f"{_count(count, 'plan')} written to {options.file}")


def _cache_import(options: argparse.Namespace) -> int:
    if not os.path.isfile(options.file):
        raise Mistake(f"FILE {options.file} is no file: expected one that cache export wrote")
    report = _cache().import_(options.file)
    for reason, count in report.skipped.items():
        print(f"skipped {count}: {reason}", file=sys.stderr)
    print(f"{_count(report.added, 'plan')} added to {_cache().directory or 'nowhere: there is no cache directory'}")
    return 0 if report.added or set(report.skipped) <= {"already in the cache"} else 2


def _cache_clear(options: argparse.Namespace) -> None:
    cache = _cache()
    print(f"{_count(cache.clear(), 'plan')} deleted from {cache.directory or 'nowhere: there is no cache directory'}")


def _tune(options: argparse.Namespace) -> int:
    work = _tune_layers if os.path.exists(options.workload) or ":" not in options.workload else _tune_model
    measured = settings.configure(autotune=options.mode, log="plan")
    with measured, tuning.budget(options.budget):
        status = work(options) or 0
    print(f"plans are kept in {_cache_state()}")
    return status


def _need_gpu(what: str, index: int | None = None) -> torch.device:
    if not torch.cuda.is_available():
        raise Mistake(f"torch sees no GPU, so nothing can be measured; with one, this would {what}")
    if index is not None and not 0 <= index < torch.cuda.device_count():
        raise Mistake(f"--device {index}: torch sees {_count(torch.cuda.device_count(), 'GPU')}, counted from 0")
    return torch.device("cuda", index)


def _tune_layers(options: argparse.Namespace) -> int:
    """1 if a layer could not be computed; the others are tuned all the same."""
    if options.input_shape:
        raise Mistake("--input-shape belongs to a model (module:callable); a workload file has its own shapes")
    if not os.path.isfile(options.workload):
        raise Mistake(f"workload {options.workload} is no file: expected a JSON list of layers, or module:callable")
    with _mistakes(ValueError):
        layers, left_out = read(options.workload)
    if left_out:
        print(f"left out of {options.workload}: {left_out}, which are not conv3d")
    if options.dtype:
        layers = [dataclasses.replace(layer, dtype=options.dtype) for layer in layers]
    device = _need_gpu(f"tune {_count(len(layers), 'layer')}, {', '.join(options.passes)}, mode {options.mode}")
    failed = 0
    for number, layer in enumerate(layers, 1):
        print(f"[{number}/{len(layers)}] {layer.id}", flush=True)
        failed += sum(not _tuned(layer, pass_, options, device) for pass_ in options.passes)
    return 1 if failed else 0


def _tuned(layer: Layer, pass_: str, options: argparse.Namespace, device: torch.device) -> bool:
    """One pass at a time: the least memory. False if it could not be computed for another reason than that."""
    try:
        layer.run((pass_,), device, LAYOUTS[options.layout])
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"    {pass_} left out: it does not fit into this GPU's memory")
    except RuntimeError as error:
        if is_illegal_access(error):
            raise Mistake(f"{error}\nthe device is lost to this process; what was tuned before is kept") from error
        print(f"    {pass_} failed: {error}", file=sys.stderr)
        return False
    return True


def _tune_model(options: argparse.Namespace) -> None:
    if not options.input_shape:
        raise Mistake(f"--input-shape is missing: the model {options.workload} needs it, as 2,1,64,64,64")
    model = _model(options.workload)
    layout = LAYOUTS[options.layout]
    device = _need_gpu(f"tune the model {options.workload} on an input of {options.input_shape}, mode {options.mode}")
    print(convert_conv3d(model))
    model.to(device, memory_format=layout)
    input = torch.randn(options.input_shape, device=device).contiguous(memory_format=layout)
    gradients = options.passes != ("forward",)
    low = DTYPES[options.dtype] if options.dtype not in (None, "fp32") else None
    with torch.set_grad_enabled(gradients), torch.autocast("cuda", dtype=low, enabled=low is not None):
        output = model(input)
    if gradients:
        outputs = [t for t in _tensors(output) if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _try(options: argparse.Namespace) -> int:
    """1 if the engine is wrong."""
    device = _need_gpu(f"run {options.engine}", options.device)
    try:
        with _mistakes(tryout.Untried, torch.OutOfMemoryError), torch.no_grad(), torch.cuda.device(device):
            failure = tryout.run(engines.get(options.engine), device, functools.partial(print, flush=True))
    except RuntimeError as error:
        if not is_illegal_access(error):
            raise
        failure = str(error).replace("\n", " ")
    print(proof.FAILED + failure if failure else f"{options.engine} is right on {torch.cuda.get_device_name(device)}")
    return 1 if failure else 0


def _model(name: str) -> torch.nn.Module:
    """The model that ``module:callable`` makes; the working directory is searched first, as by ``python -m``."""
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        make = getattr(module, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise Mistake(f"model {name} cannot be found: {error}; expected module:callable") from error
    model = make() if callable(make) and not isinstance(make, torch.nn.Module) else make
    if not isinstance(model, torch.nn.Module):
        raise Mistake(f"model {name} gives a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _tensors(value: object) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _demo(options: argparse.Namespace) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "interpreter")
    if device == "cuda" and not torch.cuda.is_available():
        raise Mistake("--device cuda: torch sees no GPU; use --device interpreter or --device cpu")
    if device == "interpreter":
        _enter_interpreter()
    from . import demo

    chosen = {name: getattr(options, name) for name in ("steps", "width", "patch", "seed", "amp")}
    changes = {name: value for name, value in chosen.items() if value is not None}
    with _mistakes(ValueError, ModuleNotFoundError):
        run = dataclasses.replace(demo.DEFAULTS[device], **changes)
        slabs = demo.load(run.patch, run.spacing)
    demo.main(run, *slabs)


def _enter_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when it is imported: set it, and start afresh if Triton is already here."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules:
        os.execv(sys.executable, [sys.executable, "-m", __package__, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
