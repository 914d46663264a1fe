"""Pictures of an analysis, as PNG. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from . import analysis
from .analysis import Measured

_DPI = 150


def draw(found: Sequence[Measured], folder: Path, most: int) -> list[Path]:
    """Regret, the value of the best k variants, and a heat map of tiles for every pass.

    Raises:
        ValueError: there is no matplotlib. OSError: a picture cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_regret(found, folder / "regret.png"), _best_k(found, folder / "best_k.png", most)]
    tiles = analysis.tile_map(found)
    return drawn + [_tiles(tiles[pass_], folder / f"tiles_{pass_}.png", pass_) for pass_ in tiles]


def _figure(title: str, x: str, y: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def _saved(figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path


def _regret(found: Sequence[Measured], path: Path) -> Path:
    figure, axes = _figure("Regret against the best measured", "part of the problems", "regret")
    for name, regret in analysis.regrets(found).items():
        values = sorted(regret.values)
        axes.plot([(i + 1) / len(values) for i in range(len(values))], values, label=name)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=0)
    axes.legend()
    return _saved(figure, path)


def _best_k(found: Sequence[Measured], path: Path, most: int) -> Path:
    figure, axes = _figure("Value of the best k variants", "k, beside torch's own", "mean time over the best")
    values = [value for _, value in analysis.best_variants(found, most)]
    axes.plot(range(1, len(values) + 1), values, marker="o")
    return _saved(figure, path)


def _tiles(tiles: dict[tuple[int, int], float], path: Path, pass_: str) -> Path:
    rows, columns = (sorted({tile[i] for tile in tiles}) for i in (0, 1))
    figure, axes = _figure(f"{pass_}: best time over the tile's (geometric mean)", "block_n", "block_m")
    grid = [[tiles.get((m, n), float("nan")) for n in columns] for m in rows]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for (m, n), value in tiles.items():
        color = "white" if value < 0.6 else "black"
        axes.text(columns.index(n), rows.index(m), f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image)
    return _saved(figure, path)
