"""Places in a model where an SAE reads and writes: one grammar, one parser, one printer.

A place is ``kind.layer``; a site reads one place and writes one (mostly the same). The kinds:

=============  ==================================================================  ==============================
kind           the tensor                                                          TransformerLens name
=============  ==================================================================  ==============================
resid_pre      residual stream as it enters layer L                                blocks.L.hook_resid_pre
resid_mid      residual stream between attention and MLP                           blocks.L.hook_resid_mid
resid_post     residual stream as it leaves layer L                                blocks.L.hook_resid_post
attn_out       what attention adds to the residual stream                          blocks.L.hook_attn_out
mlp_in         what the MLP receives, after its norm                               blocks.L.mlp.hook_in
mlp_out        what the MLP adds to the residual stream                            blocks.L.hook_mlp_out
z              input of the attention output projection, heads flattened           blocks.L.attn.hook_z
=============  ==================================================================  ==============================

``resid_post.12`` reads and writes the residual stream; ``mlp_in.5->mlp_out.5`` is a transcoder's site.
"""

import enum
import re
from dataclasses import dataclass
from typing import Self

from sae_steer.errors import SiteError


class Kind(enum.StrEnum):
    """The kinds of place, in the order in which a layer computes them."""

    RESID_PRE = "resid_pre"
    Z = "z"
    ATTN_OUT = "attn_out"
    RESID_MID = "resid_mid"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"
    RESID_POST = "resid_post"


_ORDER = {kind: i for i, kind in enumerate(Kind)}
_PLACE = re.compile(r"(?P<kind>[a-z_]+)\.(?P<layer>0|[1-9][0-9]{0,4})")
_LENS_BLOCK = re.compile(r"blocks\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<hook>[a-z0-9_.]+)")
_LENS_KINDS = {
    "hook_resid_pre": Kind.RESID_PRE,
    "hook_resid_mid": Kind.RESID_MID,
    "hook_resid_post": Kind.RESID_POST,
    "hook_attn_out": Kind.ATTN_OUT,
    "hook_mlp_out": Kind.MLP_OUT,
    "hook_mlp_in": Kind.MLP_IN,
    "mlp.hook_in": Kind.MLP_IN,
    "attn.hook_z": Kind.Z,
}


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of one layer.

    Args:
        kind: Which tensor.
        layer: Layer number, from 0.
    """

    kind: Kind
    layer: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``resid_post.12``; raises :class:`SiteError` for anything else."""
        match = _PLACE.fullmatch(text)
        if match is None or match["kind"] not in set(Kind):
            kinds = ", ".join(Kind)
            raise SiteError(
                f"{text!r} is not a place. Write KIND.LAYER, such as resid_post.12, with KIND one of {kinds}."
            )
        return cls(Kind(match["kind"]), int(match["layer"]))

    @classmethod
    def from_transformer_lens(cls, hook: str) -> Self:
        """Reads a TransformerLens hook name such as ``blocks.12.hook_resid_post``; raises :class:`SiteError`."""
        match = _LENS_BLOCK.fullmatch(hook)
        kind = _LENS_KINDS.get(match["hook"]) if match else None
        if match is None or kind is None:
            known = ", ".join(_LENS_KINDS)
            raise SiteError(f"The hook name {hook!r} is not one this program knows. Known below 'blocks.L.': {known}.")
        return cls(kind, int(match["layer"]))

    @property
    def order(self) -> tuple[int, int]:
        """Sorts places in the order in which the model computes them."""
        return (self.layer, _ORDER[self.kind])

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


@dataclass(frozen=True, slots=True)
class Site:
    """Where an SAE reads and where its edits are written.

    Args:
        read: The place whose tensor is encoded.
        write: The place whose tensor is edited.
    """

    read: Place
    write: Place

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``resid_post.12`` or ``mlp_in.5->mlp_out.5``; raises :class:`SiteError`."""
        read, arrow, write = text.partition("->")
        place = Place.parse(read)
        return cls(place, Place.parse(write) if arrow else place)

    @classmethod
    def from_transformer_lens(cls, hook: str, out: str | None = None) -> Self:
        """Reads TransformerLens hook names; ``out`` is the written one where it differs. Raises :class:`SiteError`."""
        read = Place.from_transformer_lens(hook)
        return cls(read, Place.from_transformer_lens(out) if out is not None else read)

    @property
    def is_residual(self) -> bool:
        """Whether the site reads and writes the residual stream."""
        return self.read == self.write and self.read.kind.startswith("resid_")

    def __str__(self) -> str:
        return str(self.read) if self.read == self.write else f"{self.read}->{self.write}"
