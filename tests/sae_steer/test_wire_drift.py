"""Nothing that a user may say is lost on the way: each field of each op changes what the kernels are given.

Fields, ops and columns are taken from the schema and the layout themselves, so that a new one fails here until it is
carried through (or named as one that is told elsewhere).
"""

import dataclasses
import hashlib
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel

from sae_steer import schema
from sae_steer.catalog import Catalog
from sae_steer.program import GainTable, Gate, Phase, Program, Row, Selector, SiteProgram
from sae_steer.report import Run
from sae_steer.sites import Site
from sae_steer.slots import Bucket, Slot
from sae_steer.step import Span, StepMap
from sae_steer.tables import SiteTables
from sae_steer_kernels import RowFloat, RowInt, SlotFloat, SlotInt
from tests.sae_steer.helpers import SITES, WIDTH, Json, edit, make_catalog, program, vector_edit

CPU = torch.device("cpu")
TABLES = ("enc", "dec", "row_float", "row_int", "slot_float", "slot_int", "gain")
TOKENS = [1, 7, 8, 9, 7, 5, 6, 7]  # the first is the beginning of the sequence
GATE: Json = {"sae": "r1", "feature": 9, "above": 1.0, "below": 5.0}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"))


class Wire:
    """All that the kernels are given for one program: the slot at every site, and the map of eight tokens."""

    def __init__(self, catalog: Catalog, compiled: Program) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        parts = {part.site: part for part in compiled.sites}
        vectors = {vector.fingerprint: vector for vector in catalog.vectors.values()}
        for site in SITES:
            saes = [entry for entry in catalog.saes.values() if entry.site == site]
            kind: Json = {"width": WIDTH, "width_out": WIDTH, "dtype": torch.float32, "device": CPU}
            tables = SiteTables(site, saes, vectors, buckets=[Bucket(1, 8)], **kind)
            if site in parts:
                tables.write(0, 1, parts[site], compiled)
            self.tensors |= {f"{site} {name}": getattr(tables.tables[0], name)[1] for name in TABLES}
        step = StepMap(1, CPU, capacity=len(TOKENS))
        step.fill([Span(Run(compiled, Slot(0, 1), 4), 0, TOKENS)])
        self.tensors |= {"slots": step.slots[0], "bits": step.bits}

    def changed(self, other: "Wire") -> set[str]:
        return {name for name, tensor in self.tensors.items() if not torch.equal(tensor, other.tensors[name])}

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in self.tensors.values())).hexdigest()


def difference(catalog: Catalog, one: Json, other: Json, *more: Json) -> set[str]:
    first, second = (program(document, *more, catalog=catalog) for document in (one, other))
    return Wire(catalog, first).changed(Wire(catalog, second))


# ------------------------------------------------------------------------------------------- from the schema

BY_CALIBRATION: Json = {"sae": "r1", "calibration": "cal", "concept": "rude"}
BASES: dict[str, Json] = {
    "FeatureValueEdit": edit(value=2.0),
    "FeatureScaleEdit": edit(op="scale"),
    "FeatureAblateEdit": edit(op="ablate", value=None),
    "FeatureMaskEdit": edit(op="mask_range", value=None, lo=1.0, hi=3.0),
    "VectorValueEdit": vector_edit(),
    "VectorScaleEdit": vector_edit(op="scale"),
    "VectorAblateEdit": vector_edit(op="ablate", value=None),
    "CalibratedAblateEdit": BY_CALIBRATION | {"op": "ablate"},
    "CalibratedGainEdit": BY_CALIBRATION | {"op": "gain"},
    "CalibratedMaskEdit": BY_CALIBRATION | {"op": "mask_range"},
    "AppEdit": BY_CALIBRATION | {"op": "app"},
}
# Per field, other values; each must change something.
CHANGES: dict[str, list[Any]] = {
    "sae": ["r1b", "r0"],
    "features": [[4], [3, 4], [3, 30]],
    "value": [2.5, -2.0, 0.0],
    "units": ["reference_max", "residual_norm"],
    "lo": [0.5],
    "hi": [3.5],
    "site": ["resid_mid.1"],
    "vector": ["u"],
    "when": [{"token_in": [7]}, GATE, GATE | {"token_in": [7]}],
    "positions": ["prompt", "completion", {"ranges": [[2, 4]]}],
    "skip_bos": [True],
    "calibration": ["cal2"],
    "concept": ["sad"],
    "top": [2],
    "sigmas": [1.0, 0.0],
    "strength": [0.5, 2.0, 0.0],
    "prior": ["target", "empirical"],
}
EDITS = [
    m for m in vars(schema).values() if isinstance(m, type) and issubclass(m, schema._Edit) and "op" in m.model_fields
]


def test_every_kind_of_edit_is_tried() -> None:
    assert {model.__name__ for model in EDITS} == set(BASES)


def _fields(model: type[BaseModel]) -> set[str]:
    return set(model.model_fields) - {"op"}


FIELDS = [(name, field) for name in BASES for field in sorted(_fields(getattr(schema, name)))]


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_every_field_reaches_the_kernels(kind: str, field: str, catalog: Catalog) -> None:
    for value in CHANGES[field]:
        if field == "sae" and "calibration" in BASES[kind]:
            continue  # its calibration is of one SAE: tried in test_calibrated
        if field == "units" and value == "reference_max" and kind.startswith("Vector"):
            continue
        assert difference(catalog, BASES[kind], BASES[kind] | {field: value}), value


@pytest.mark.parametrize("kind", BASES)
def test_every_op_of_a_kind_is_its_own(kind: str, catalog: Catalog) -> None:
    """'scale' and 'gain' mean the same."""
    ops = get_args(getattr(schema, kind).model_fields["op"].annotation)
    digests = {op: Wire(catalog, program(BASES[kind] | {"op": op}, catalog=catalog)).digest for op in ops}
    assert len(set(digests.values())) == len({"scale" if op == "gain" else op for op in ops})


@pytest.mark.parametrize("field", sorted(set(schema.When.model_fields)))
def test_every_field_of_a_gate_reaches_the_kernels(field: str, catalog: Catalog) -> None:
    base = GATE | {"token_in": [7]}
    other: Json = {"sae": "r1b", "feature": 8, "above": 2.0, "below": 4.0, "token_in": [8]}
    assert set(other) == set(schema.When.model_fields)
    assert difference(catalog, edit(when=base), edit(when=base | {field: other[field]}))
    if field not in ("sae", "feature"):
        without = {key: value for key, value in base.items() if key != field}
        assert difference(catalog, edit(when=base), edit(when=without))


def test_positions_reach_the_map(catalog: Catalog) -> None:
    digests = set()
    kinds: list[Any] = ["all", "prompt", "completion", {"ranges": [[2, 4]]}, {"ranges": [[2, 5]]}, {"ranges": [[1, 4]]}]
    for value in kinds:
        digests.add(Wire(catalog, program(edit(positions=value), catalog=catalog)).digest)
    assert len(digests) == len(kinds)


# Fields of ``steering`` beside the interventions, and where each is carried.
BESIDE = {
    "profiles": "test_compiler: a profile means what its interventions mean",
    "interventions": "above",
    "override": "test_compiler: override replaces only what is named",
    "error": "below",
    "dose": "below",
    "readings": "test_readings: every field changes what is told",
    "on": "test_readings: a trigger fires where its feature is above its threshold",
}


def test_every_field_of_a_request_is_carried_somewhere() -> None:
    assert set(schema.Steering.model_fields) == set(BESIDE)
    assert set(schema.Dose.model_fields) == {"limit", "on_dose"}
    assert set(schema.Ranges.model_fields) == {"ranges"}


def test_the_dose_limit_reaches_the_slot_and_its_action_the_run(catalog: Catalog) -> None:
    plain = program(edit(), catalog=catalog)
    low, high = (program(edit(), catalog=catalog, dose={"limit": limit}) for limit in (0.5, 0.7))
    wires = [Wire(catalog, compiled) for compiled in (plain, low, high)]
    assert wires[1].changed(wires[2]) == {"resid_post.1 slot_float"}
    # Beside the limit itself, the slot says whether there is one.
    assert wires[0].changed(wires[1]) == {"resid_post.1 slot_float", "resid_post.1 slot_int"}
    actions = {program(edit(), catalog=catalog, dose={"limit": 1, "on_dose": a}).on_dose for a in ("fail", "scale")}
    assert actions == {"fail", "scale"}


def test_dropping_the_error_reaches_the_slot(catalog: Catalog) -> None:
    keep, drop = (program(edit(sae="w1"), catalog=catalog, error=error) for error in ("keep", "drop"))
    assert Wire(catalog, keep).changed(Wire(catalog, drop)) == {"resid_post.1 slot_int"}


# ------------------------------------------------------------------------------------------- from the program

SITE = Site.parse("resid_post.1")
ROW_CHANGES: dict[str, Any] = {
    "source": "r1b",
    "feature": 4,
    "scale": 0.5,
    "shift": 2.0,
    "lo": -1.0,
    "hi": 4.0,
    "mask_lo": 1.0,
    "mask_hi": 2.0,
    "gamma": 0.5,
    "norm_units": True,
    "selector": 1,
    "gate": Gate(1, 0.0, 3.0),
    "gain": GainTable.of(0.5, (0.5, 0.25), 0.25, (0.75,)),
}
TOLD_ELSEWHERE = {"op"}  # the name of the operation is for the report
OF_VECTORS = {"unit"}


def _wire_of(catalog: Catalog, row: Row) -> Wire:
    rows = (row, Row(catalog.sae("r1").sae.fingerprint, 9, "ablate", scale=0.0, selector=0))
    return Wire(catalog, Program((SiteProgram(SITE, rows),), (Selector(Phase.ALL), Selector(Phase.PROMPT))))


def test_every_field_of_a_row_is_tried() -> None:
    assert {f.name for f in dataclasses.fields(Row)} == set(ROW_CHANGES) | TOLD_ELSEWHERE | OF_VECTORS


@pytest.mark.parametrize("field", ROW_CHANGES)
def test_every_field_of_a_row_reaches_the_slot(field: str, catalog: Catalog) -> None:
    row = Row(catalog.sae("r1").sae.fingerprint, 3, "clamp", selector=0)
    value = ROW_CHANGES[field]
    other = dataclasses.replace(row, **{field: catalog.sae(value).sae.fingerprint if field == "source" else value})
    assert _wire_of(catalog, row).changed(_wire_of(catalog, other))


def test_whether_a_direction_is_unit_reaches_the_slot(catalog: Catalog) -> None:
    row = Row(catalog.vector("v").fingerprint, -1, "add", selector=0)
    other = dataclasses.replace(row, unit=True)
    assert _wire_of(catalog, row).changed(_wire_of(catalog, other)) == {"resid_post.1 enc", "resid_post.1 dec"}


def test_every_field_of_a_gate_and_of_a_gain_table_reaches_the_slot(catalog: Catalog) -> None:
    row = Row(
        catalog.sae("r1").sae.fingerprint, 3, "app", selector=0, gate=ROW_CHANGES["gate"], gain=ROW_CHANGES["gain"]
    )
    gates: Json = {"row": 0, "above": 0.5, "below": 2.5}
    other = GainTable.of(0.75, (0.5, 0.5), 0.5, (0.25,))
    gains: Json = {f.name: getattr(other, f.name) for f in dataclasses.fields(GainTable)}
    assert set(gates) == {f.name for f in dataclasses.fields(Gate)}
    others = [dataclasses.replace(row, gate=dataclasses.replace(row.gate, **{k: v})) for k, v in gates.items()]
    others += [dataclasses.replace(row, gain=dataclasses.replace(row.gain, **{k: v})) for k, v in gains.items()]
    base = _wire_of(catalog, row)
    for other in others:
        assert base.changed(_wire_of(catalog, other)), other


def test_every_column_of_the_layout_is_written_by_something(catalog: Catalog) -> None:
    """Over rows of different SAEs and edits, no column stays the same: none is forgotten, none is unused."""
    fingerprint = {name: catalog.sae(name).sae.fingerprint for name in ("r1", "r1b", "tkw")}
    rows = [Row(fingerprint["r1"], 3, "clamp", selector=0), Row(fingerprint["r1b"], 4, "clamp", selector=0)]
    rows.append(Row(fingerprint["tkw"], 5, "clamp", selector=0))
    rows += [
        dataclasses.replace(rows[0], **{field: value})
        for field, value in ROW_CHANGES.items()
        if field not in ("source", "feature")
    ]
    wires = [_wire_of(catalog, row) for row in rows]
    drop = program(edit(sae="w1", features=[3, 4]), catalog=catalog, error="drop", dose={"limit": 0.5})
    wires += [Wire(catalog, drop), Wire(catalog, program(edit(), catalog=catalog))]
    kinds: list[tuple[str, Any]] = [
        ("row_float", RowFloat), ("row_int", RowInt), ("slot_float", SlotFloat), ("slot_int", SlotInt),
    ]  # fmt: skip
    same = set()
    for name, columns in kinds:
        stacked = torch.stack([wire.tensors[f"resid_post.1 {name}"] for wire in wires])
        for column in columns:
            first = stacked[:, 0, column] if name.startswith("row") else stacked[:, column]
            if len(set(first.tolist())) == 1:
                same.add(column.name)
    assert same == {"NORM"}  # the business of the SAE's file: tried in test_tables
