"""The MNI152 T1 template with its grey- and white-matter maps, read from the files inside the nilearn wheel."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

CLASSES = ("background", "grey", "white")
INSTALL = 'the demo needs nilearn (for its data) and nibabel (to read them): pip install "triton_conv3d[demo]"'
_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


@dataclass(frozen=True)
class Slab:
    """Part of the brain: image (D, H, W) float32 with zero mean and unit variance, labels (D, H, W) int64."""

    image: torch.Tensor
    labels: torch.Tensor

    def patches(self, count: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` cubes of ``size`` voxels a side, each centred on grey or white matter where the slab allows it.

        Returns images (count, 1, size, size, size) and labels (count, size, size, size).
        """
        tissue = self.labels.nonzero()
        centres = tissue[torch.randint(len(tissue), (count,), generator=generator)]
        limit = torch.tensor(self.labels.shape) - size
        corners = (centres - size // 2).clamp(min=torch.zeros_like(limit), max=limit).tolist()
        cubes = [tuple(slice(start, start + size) for start in corner) for corner in corners]
        return (
            torch.stack([self.image[cube] for cube in cubes]).unsqueeze(1),
            torch.stack([self.labels[cube] for cube in cubes]),
        )


def _folder() -> Path:
    """Where the installed nilearn keeps its data; nilearn itself is not imported.

    Raises ModuleNotFoundError naming the extra, if nilearn or nibabel is absent.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("nibabel") is None:
        raise ModuleNotFoundError(INSTALL)
    return Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"


def _read(folder: Path, kind: str) -> torch.Tensor:
    """One volume as float32 (D, H, W): left-right, back-front, bottom-top, one voxel a millimetre."""
    import nibabel
    import numpy

    path = folder / _FILE.format(kind)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this nilearn carries no MNI152 template; install nilearn>=0.12")
    return torch.from_numpy(numpy.asanyarray(nibabel.load(path).dataobj).astype(numpy.float32))


def load(patch: int, spacing: int = 1) -> tuple[Slab, Slab]:
    """(training slab, held-out slab): the back of the brain, and its front third, or more if ``patch`` needs it.

    They part front from back, because the template's left half mirrors its right one.

    Args:
        patch: voxels along each side of the patches to come.
        spacing: millimetres along each side of a voxel.

    Raises:
        ModuleNotFoundError: nilearn or nibabel is not installed; the message tells how to.
        ValueError: a patch that does not fit into both slabs.
    """
    folder = _folder()
    image, grey, white = (_read(folder, kind) for kind in ("t1", "gm", "wm"))
    inside = image > 0
    box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in inside.nonzero().T)
    image = torch.where(inside, (image - image[inside].mean()) / image[inside].std(), -3.0)[box]
    grey, white = grey[box] / 255, white[box] / 255
    image, *tissues = F.avg_pool3d(torch.stack([image, 1 - grey - white, grey, white]), spacing)
    labels = torch.stack(tissues).argmax(0)
    width, length, height = labels.shape
    longest = min(width, length // 2, height) // 4 * 4
    if patch > longest:
        raise ValueError(f"patch={patch} does not fit the brain twice: expected at most {longest}")
    border = length - max(patch, length // 3)
    return Slab(image[:, :border], labels[:, :border]), Slab(image[:, border:], labels[:, border:])
