"""``python -m perf plot``: pictures of result files, as PNG."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from . import results, summary
from .summary import Outcome, Results, geometric_mean, measured

PICTURES = "pictures"  # folder beside a report
NETWORKS = "whole networks"  # their group of pictures
_SIZES = {"sweep.size": "pixels of each side", "sweep.depthwise": "channels = groups"}  # others by their own name
_TILE = re.compile(r"block_m=(\d+) block_n=(\d+)")
_FEWEST_TILES = 4  # of a case, that a map of tiles is drawn from: tuning measures at least the best few candidates
TILE_CAPTION = (
    "Speed of the best config with this tile over the best of all: geometric mean over the layers that can take it.\n"
    "In brackets: of how many layers it is the best."
)

Tile = tuple[int, int]  # block_m, block_n


@dataclass(frozen=True)
class Picture:
    """
    path: of the PNG. caption: one line.
    group: of the outcomes that it shows, as in :attr:`.summary.Outcome.group`, or :data:`NETWORKS`; empty: of all.
    """

    path: Path
    caption: str
    group: str = ""


def figures() -> ModuleType:
    """:mod:`perf.figures`, which needs matplotlib. Raises ValueError where there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install matplotlib")
    return importlib.import_module(".figures", __package__)


def draw(found: Results, folder: Path) -> list[Picture]:
    """Every picture that these results allow, written to ``folder``.

    Raises:
        ValueError: there is no matplotlib.
        OSError: a picture cannot be written.
    """
    drawn, gpu, pictures = figures(), found.gpus, []

    def add(figure, name: str, caption: str, group: str = "") -> None:
        pictures.append(Picture(drawn.save(figure, folder / f"{name}.png"), caption, group))

    compared = [outcome for outcome in found.layers if outcome.speedup]
    if compared:
        caption = f"{gpu}: speed-up over the fastest torch provider of each layer"
        add(drawn.speedup_overview(found.layers, caption), "speedup", caption)
    for group, outcomes in summary.by_group(found.layers).items():
        if any(outcome.speedup for outcome in outcomes):
            caption = f"{gpu}, {group}: speed-up over the fastest torch provider"
            add(drawn.speedup_bars(outcomes, caption), f"speedup-{group}", caption, group)
    if any(o.any.matmul_tflops and o.any.copy_gbps and measured(o.any) for o in found.layers):
        caption = f"{gpu}: roofline, its ceilings measured in the same runs"
        add(drawn.roofline(found.layers, caption), "roofline", caption)
    for group, outcomes in summary.by_group(found.sweeps).items():
        for kind, chosen in _by_kind(outcomes).items():
            caption, size = f"{gpu}, {group}, {kind}", _SIZES.get(group, group.removeprefix("sweep."))
            sizes = {outcome.workload: int(outcome.layer) for outcome in chosen}
            name = "-".join((group, *kind.split()))
            add(drawn.sweep_lines(chosen, sizes, size, caption), name, caption, group)
    tiles = tile_shares(_tuned(found.layers))
    if tiles:
        caption = f"{gpu}: tiles of configs that were measured"
        add(drawn.heat_map(tiles, caption, TILE_CAPTION), "tiles", caption)
    if any(measured(row) for rows in found.networks.values() for row in rows.values()):
        caption = f"{gpu}: {NETWORKS}, time of a step"
        add(drawn.step_times(found.networks, caption), "end-to-end", caption, NETWORKS)
    return pictures


def _by_kind(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Apart by type, precision and layout."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(f"{outcome.any.dtype} {outcome.any.precision} {outcome.any.layout}", []).append(outcome)
    return kinds


def tile_shares(timed: Iterable[tuple[str, str, Tile, float]]) -> dict[str, dict[Tile, tuple[float, int]]]:
    """What :func:`perf.figures.heat_map` draws, from (pass, case, tile, time) of many configs."""
    best: dict[tuple[str, str], dict[Tile, float]] = {}
    for pass_, case, tile, time in timed:
        of = best.setdefault((pass_, case), {})
        of[tile] = min(time, of.get(tile, time))
    shares: dict[str, dict[Tile, list[float]]] = {}
    for (pass_, _), of in best.items():
        for tile, time in of.items():
            shares.setdefault(pass_, {}).setdefault(tile, []).append(min(of.values()) / time)
    return {
        pass_: {tile: (geometric_mean(values), values.count(1.0)) for tile, values in by_tile.items()}
        for pass_, by_tile in shares.items()
    }


def _tuned(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, str, Tile, float]]:
    """The measured configs of cases of which several tiles were measured."""
    for outcome in outcomes:
        tiles = [(_TILE.search(row.plan), row) for row in outcome.rows.values() if measured(row)]
        found = [((int(match[1]), int(match[2])), row) for match, row in tiles if match]
        if len({tile for tile, _ in found}) >= _FEWEST_TILES:
            yield from ((row.pass_, row.case, tile, row.time_us) for tile, row in found)


def sources(options: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(result file or folder, folder to write to) of the options of ``plot`` and ``report``.

    Raises:
        ValueError: there are no results yet, or ``--out`` without saying of what.
    """
    if options.results is not None:
        given = options.results
        return [(given, options.out or (given if given.is_dir() else given.with_suffix("")))]
    if options.out is not None:
        raise ValueError(f"--out {options.out}: of which results? Name a file or a folder of {results.RESULTS}")
    folders = sorted({path.parent for path in results.RESULTS.glob("*/*.csv")})
    if not folders:
        raise ValueError(f"{results.RESULTS} holds no results yet: python -m perf run makes some where there is a GPU")
    return [(folder, folder) for folder in folders]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="?", help="a result file or a GPU's folder (default: all folders)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the folder, or one named as the file")


def main(options: argparse.Namespace) -> int:
    for source, folder in sources(options):
        pictures = draw(summary.load(source), folder / PICTURES)
        for picture in pictures:
            print(picture.path)
        if not pictures:
            print(f"{source}: nothing that was measured can be drawn")
    return 0
