"""The options of the backend, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..settings import AUTOTUNE_MODES

INNER = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options={...})`` may say.

    Attributes:
        inner: who runs the rewritten graph: ``inductor``; ``aot_eager``, op by op after AOTAutograd's min-cut
            partitioner; or ``eager``, op by op, with the tensors kept for backward that eager mode keeps.
        layout: keep activations and weights between convolutions in channels_last_3d.
        fuse: fold padding, frozen arithmetic, bias, activation and residual into the convolution.
        autotune: :func:`triton_conv3d.configure`'s setting, process-wide, set when the graph is compiled; None: as it is.
    """

    inner: str = "inductor"
    layout: bool = True
    fuse: bool = True
    autotune: str | None = None

    @classmethod
    def parse(cls, values: dict | None) -> Options:
        """Raises ValueError for an option that does not exist, or a value that it does not take."""
        values = dict(values or {})
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"options={unknown} are not known: the options of triton_conv3d are {', '.join(known)}")
        for name, allowed in (("inner", INNER), ("autotune", (None, *AUTOTUNE_MODES)), ("layout", (True, False)),
                              ("fuse", (True, False))):  # fmt: skip
            if name in values and values[name] not in allowed:
                raise ValueError(
                    f"options={{{name!r}: {values[name]!r}}} is not known: expected one of {', '.join(map(repr, allowed))}"
                )
        return cls(**values)
