"""The tables of one site: a program's rows, read from its SAEs and vectors, written into a slot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_steer.catalog import Catalog, CatalogSae, Vector
from sae_steer.errors import NonFinite, WidthMismatch
from sae_steer.program import Program, Row, SiteProgram
from sae_steer.sae import Activation, FeatureRows, InputNorm, Sae
from sae_steer.sites import Site
from sae_steer.slots import Bucket
from sae_steer_kernels import Act, EditTable, Norm, RowFloat, RowInt, SlotFloat, SlotInt
from sae_steer_kernels.feature_edit import empty_rows, skips_of

GAIN_BINS = 64

_ACT = {
    Activation.IDENTITY: Act.IDENTITY,
    Activation.RELU: Act.RELU,
    Activation.TANH_RELU: Act.TANH_RELU,
    Activation.JUMPRELU: Act.JUMPRELU,
    Activation.GATED: Act.GATED,
    Activation.TOPK: Act.TOPK,
}
_NORM = {
    InputNorm.NONE: Norm.NONE,
    InputNorm.CENTER: Norm.CENTER,
    InputNorm.LAYER_NORM: Norm.LAYER_NORM,
    InputNorm.NORM_RESCALE: Norm.NORM_RESCALE,
}


def topk_of(sae: Sae) -> int:
    """How many features of an SAE are active on a token, where they are ranked; 0 = they are not."""
    return sae.spec.k or 0 if sae.spec.activation is Activation.TOPK else 0


def pack_features(rows: FeatureRows, sae: Sae, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The scalars of an SAE's rows as the kernels pack them: ``[K, len(RowFloat)]`` and ``[K, len(RowInt)]``."""
    floats, ints = empty_rows((rows.ids.numel(),), device)
    for column, values in (
        (RowFloat.BIAS, rows.bias),
        (RowFloat.THETA, rows.theta),
        (RowFloat.MAG_SCALE, rows.mag_scale),
        (RowFloat.MAG_BIAS, rows.mag_bias),
        (RowFloat.ENC_SUM, rows.enc_sum),
    ):
        floats[:, column] = values.to(device)
    ints[:, RowInt.ACT] = _ACT[sae.spec.activation]
    ints[:, RowInt.NORM] = _NORM[sae.spec.input_norm]
    ints[:, RowInt.TOPK] = topk_of(sae)
    ints[:, RowInt.SAE] = number
    ints[:, RowInt.FEATURE] = rows.ids.to(device, torch.int32)
    return floats, ints


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole dictionary on the device, for what needs all of it: dropping the error, and TopK ranks.

    Args:
        number: The SAE's number at its site.
        enc: ``[F, D]`` float32.
        dec: ``[F, D_out]`` float32.
        dec_bias: ``[D_out]`` float32.
        row_float: ``[F, len(RowFloat)]``.
        row_int: ``[F, len(RowInt)]``.
        topk: k of a TopK dictionary; 0 = another.
    """

    number: int
    enc: Tensor
    dec: Tensor
    dec_bias: Tensor
    row_float: Tensor
    row_int: Tensor
    topk: int

    @classmethod
    def load(cls, sae: Sae, number: int, device: torch.device) -> Self:
        """Reads the whole dictionary of an SAE."""
        rows = sae.rows(range(sae.spec.n_features))
        floats, ints = pack_features(rows, sae, number, device)
        bias = sae.decoder_bias().to(device)
        return cls(number, rows.enc.to(device), rows.dec.to(device), bias, floats, ints, topk_of(sae))

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(t.nbytes for t in (self.enc, self.dec, self.dec_bias, self.row_float, self.row_int))


class SiteTables:
    """The tables of one site, one for each bucket, and the sources that its rows come from.

    Args:
        site: The site.
        saes: The SAEs attached there, by fingerprint.
        vectors: The plain vectors, by fingerprint.
        buckets: Capacities.
        width: ``D``, width of what is read.
        width_out: ``D_out``, width of what is written.
        dtype: The model's dtype, which decoder rows are kept in.
        device: Where the tables live.
    """

    def __init__(
        self,
        site: Site,
        saes: Sequence[CatalogSae],
        vectors: Mapping[str, Vector],
        *,
        buckets: Sequence[Bucket],
        width: int,
        width_out: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.site = site
        self.width, self.width_out = width, width_out
        self._saes = {entry.sae.fingerprint: entry.sae for entry in saes}
        self._numbers = {fingerprint: number for number, fingerprint in enumerate(self._saes)}
        self._vectors = vectors
        self.tables = tuple(
            EditTable.empty(
                slots=bucket.slots,
                rows=bucket.rows,
                width=width,
                width_out=width_out,
                dtype=dtype,
                device=device,
                gain_bins=GAIN_BINS,
            )
            for bucket in buckets
        )
        self.device = device
        self._drops: dict[tuple[int, int], int] = {}  # by bucket and slot, whose error a program drops
        self.wholes = tuple(
            Whole.load(entry.sae, self._numbers[entry.sae.fingerprint], device) for entry in saes if entry.whole
        )

    @classmethod
    def fit(
        cls,
        site: Site,
        catalog: Catalog,
        *,
        buckets: Sequence[Bucket],
        width: int,
        width_out: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Allocates a site's tables, once all of the catalog that belongs there fits the model.

        Raises:
            WidthMismatch: An SAE or a vector does not fit.
            CheckpointError: An SAE that is held whole cannot be read.
        """
        entries = [entry for entry in catalog.saes.values() if entry.site == site]
        for entry in entries:
            spec = entry.sae.spec
            for what, have, need in (("reads", spec.d_in, width), ("writes", spec.d_out, width_out)):
                if have != need:
                    raise WidthMismatch(
                        f"SAE {entry.name!r} {what} vectors of width {have}, and the model's {site} has width {need}. "
                        "It was trained on another model, or on another place of it."
                    )
        if site.read == site.write:
            for vector in catalog.vectors.values():
                if vector.values.numel() != width_out:
                    raise WidthMismatch(
                        f"Vector {vector.name!r} has width {vector.values.numel()}, "
                        f"and the model's {site} has width {width_out}."
                    )
        vectors = {vector.fingerprint: vector for vector in catalog.vectors.values()}
        return cls(
            site,
            entries,
            vectors,
            buckets=buckets,
            width=width,
            width_out=width_out,
            dtype=dtype,
            device=device,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the tables hold."""
        return sum(table.nbytes for table in self.tables) + sum(whole.nbytes for whole in self.wholes)

    def whole_of(self, source: str) -> Whole:
        """The whole dictionary of an SAE; raises ``KeyError`` where it is not held."""
        return next(whole for whole in self.wholes if whole.number == self._numbers[source])

    def drops(self, bucket: int, whole: Whole) -> bool:
        """Whether any slot of a bucket drops the error of a dictionary."""
        return any(own == bucket and number == whole.number for (own, _), number in self._drops.items())

    def clear(self, bucket: int, slot: int) -> None:
        """Empties a slot: its program does nothing at this site."""
        self.tables[bucket].slot_int[slot] = 0
        self._drops.pop((bucket, slot), None)

    def write(self, bucket: int, slot: int, part: SiteProgram, program: Program) -> None:
        """Writes a program's rows into a slot that no running token uses.

        Raises:
            CheckpointError: A row cannot be read.
            NonFinite: A row does not fit the model's dtype.
        """
        table = self.tables[bucket]
        used = len(part.rows)
        enc = torch.zeros(used, self.width)
        dec = torch.zeros(used, self.width_out)
        floats, ints = empty_rows((used,), torch.device("cpu"))
        for fingerprint, places in _by_source(part.rows).items():
            if fingerprint in self._saes:
                sae = self._saes[fingerprint]
                rows = sae.rows([part.rows[i].feature for i in places])
                enc[places], dec[places] = rows.enc, rows.dec
                floats[places], ints[places] = pack_features(rows, sae, self._numbers[fingerprint], torch.device("cpu"))
            else:
                _place_vector(self._vectors[fingerprint], part.rows, places, enc, dec)
                ints[places, RowInt.FEATURE] = -1
        _pack_edits(part.rows, floats, ints)
        gains = _pack_gains(part.rows, floats, table.gain.shape[-1])
        cast = dec.to(table.dec.dtype)
        if not bool(cast.isfinite().all()):
            raise NonFinite(f"A decoder row at {self.site} does not fit the model's dtype {table.dec.dtype}.")
        table.enc[slot, :used] = enc.to(self.device)
        table.dec[slot, :used] = cast.to(self.device)
        table.row_float[slot, :used] = floats.to(self.device)
        table.row_int[slot, :used] = ints.to(self.device)
        if gains is not None:
            table.gain[slot, :used] = gains.to(self.device)
        table.slot_float[slot, SlotFloat.DOSE_LIMIT] = program.dose_limit
        skips = skips_of(table.row_float[slot, :used], table.row_int[slot, :used], table.slot_float[slot])
        table.slot_int[slot, SlotInt.SKIPS] = int(skips)
        table.slot_int[slot, SlotInt.ROWS] = used
        table.slot_int[slot, SlotInt.DROP_SELECT] = _mask(part.drop_selectors) if part.drop else 0
        table.slot_int[slot, SlotInt.DROP_SAE] = self._numbers[part.drop] if part.drop else -1
        self._drops.pop((bucket, slot), None)
        if part.drop:
            self._drops[bucket, slot] = self._numbers[part.drop]


def _by_source(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Numbers of the rows of each source."""
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row.source, []).append(i)
    return places


def _place_vector(vector: Vector, rows: Sequence[Row], places: Sequence[int], enc: Tensor, dec: Tensor) -> None:
    """``add`` writes the vector as it is and reads nothing; the other ops read and write along the unit direction."""
    for i in places:
        if rows[i].unit:
            enc[i] = dec[i] = vector.values / vector.values.double().norm().float()
        else:
            dec[i] = vector.values


_EDIT_FLOATS = {
    RowFloat.SCALE: "scale",
    RowFloat.SHIFT: "shift",
    RowFloat.LO: "lo",
    RowFloat.HI: "hi",
    RowFloat.MASK_LO: "mask_lo",
    RowFloat.MASK_HI: "mask_hi",
    RowFloat.GAMMA: "gamma",
}


def _pack_edits(rows: Sequence[Row], floats: Tensor, ints: Tensor) -> None:
    """The edits' own scalars; ``floats [K, len(RowFloat)]``, ``ints [K, len(RowInt)]`` hold the features' already."""
    # By column and in numpy: a tensor takes microseconds for each element, and a program may have thousands of rows.
    into, whole = floats.numpy(), ints.numpy()
    for column, name in _EDIT_FLOATS.items():
        into[:, column] = [getattr(row, name) for row in rows]
    whole[:, RowInt.NORM_UNITS] = [row.norm_units for row in rows]
    whole[:, RowInt.SELECT] = [row.select for row in rows]
    for i, row in enumerate(rows):
        if row.gate is not None:
            whole[i, RowInt.WHEN_ROW] = row.gate.row
            into[i, RowFloat.WHEN_ABOVE], into[i, RowFloat.WHEN_BELOW] = row.gate.above, row.gate.below


def _pack_gains(rows: Sequence[Row], floats: Tensor, bins: int) -> Tensor | None:
    """The gain tables ``[K, 2, B]``, None where there are none; their bins' widths go into ``floats``.

    Shorter tables go on with their end value, as their meaning says.
    """
    into = floats.numpy()
    tables: NDArray[np.float32] | None = None
    for i, row in enumerate(rows):
        if row.gain is None:
            continue
        if tables is None:
            tables = np.ones((len(rows), 2, bins), dtype=np.float32)
        sides = (
            (RowFloat.GAIN_WIDTH_POS, row.gain.width_pos, row.gain.values()),
            (RowFloat.GAIN_WIDTH_NEG, row.gain.width_neg, row.gain.values(negative=True)),
        )
        for side, (column, width, values) in enumerate(sides):
            into[i, column] = width if values.size else 0.0
            if values.size:
                tables[i, side, : values.size] = values
                tables[i, side, values.size :] = values[-1]
    return torch.from_numpy(tables) if tables is not None else None


def _mask(selectors: Sequence[int]) -> int:
    return sum(1 << selector for selector in selectors)
