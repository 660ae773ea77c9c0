"""What is written into the packed tables: every op exactly, every site, and nothing left of the program before."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_steer.catalog import Catalog, CatalogSae, Vector
from sae_steer.errors import NonFinite
from sae_steer.program import GainTable, Phase, Program, Row, Selector, SiteProgram
from sae_steer.sae import open_sae
from sae_steer.sites import Site
from sae_steer.slots import Bucket
from sae_steer.tables import GAIN_BINS, SiteTables
from sae_steer_kernels import Act, Norm, RowFloat, RowInt, SlotFloat, SlotInt
from sae_steer_kernels.feature_edit import empty_rows
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import FEATURES, WIDTH, Json, edit, make_catalog, program, vector_edit

HERE = Site.parse("resid_post.1")
INF = math.inf


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"))


def make_tables(
    catalog: Catalog,
    site: Site = HERE,
    *,
    width: int = WIDTH,
    width_out: int = WIDTH,
    dtype: torch.dtype = torch.float32,
) -> SiteTables:
    return SiteTables(
        site,
        [entry for entry in catalog.saes.values() if entry.site == site],
        {vector.fingerprint: vector for vector in catalog.vectors.values()},
        buckets=[Bucket(3, 4), Bucket(1, 9)],
        width=width,
        width_out=width_out,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def written(catalog: Catalog, *interventions: Json, **fields: Any) -> tuple[SiteTables, Program]:
    """The tables after slot 2 of the narrow bucket was written."""
    compiled = program(*interventions, catalog=catalog, **fields)
    tables = make_tables(catalog)
    tables.write(0, 2, compiled.sites[0], compiled)
    return tables, compiled


def floats(tables: SiteTables, row: int = 0) -> dict[RowFloat, float]:
    return {column: float(tables.tables[0].row_float[2, row, column]) for column in RowFloat}


def ints(tables: SiteTables, row: int = 0) -> dict[RowInt, int]:
    return {column: int(tables.tables[0].row_int[2, row, column]) for column in RowInt}


# The columns of the edit itself, and what they hold where nothing is asked.
EDIT = {
    RowFloat.SCALE: 1.0,
    RowFloat.SHIFT: 0.0,
    RowFloat.LO: -INF,
    RowFloat.HI: INF,
    RowFloat.MASK_LO: INF,
    RowFloat.MASK_HI: -INF,
    RowFloat.GAMMA: 1.0,
    RowFloat.WHEN_ABOVE: -INF,
    RowFloat.WHEN_BELOW: INF,
    RowFloat.GAIN_WIDTH_POS: 0.0,
    RowFloat.GAIN_WIDTH_NEG: 0.0,
}
OPS: list[tuple[Json, dict[RowFloat, float]]] = [
    ({"op": "clamp", "value": 2.5}, {RowFloat.SCALE: 0.0, RowFloat.SHIFT: 2.5}),
    ({"op": "add", "value": 2.5}, {RowFloat.SHIFT: 2.5}),
    ({"op": "floor", "value": 2.5}, {RowFloat.LO: 2.5}),
    ({"op": "cap", "value": 2.5}, {RowFloat.HI: 2.5}),
    ({"op": "scale", "value": 2.5}, {RowFloat.SCALE: 2.5}),
    ({"op": "ablate", "value": None}, {RowFloat.SCALE: 0.0}),
]
FEATURE_OPS: list[tuple[Json, dict[RowFloat, float]]] = [
    *OPS,
    ({"op": "gain", "value": 2.5}, {RowFloat.SCALE: 2.5}),
    ({"op": "mask_range", "value": None, "lo": -1.5, "hi": 3.5}, {RowFloat.MASK_LO: -1.5, RowFloat.MASK_HI: 3.5}),
]


@pytest.mark.parametrize(("fields", "expected"), FEATURE_OPS, ids=lambda value: value.get("op"))
def test_each_op_on_a_feature(fields: Json, expected: dict[RowFloat, float], catalog: Catalog) -> None:
    tables, _ = written(catalog, edit(features=[7], **fields))
    rows = catalog.sae("r1").sae.rows([7])
    assert floats(tables) == EDIT | expected | {
        RowFloat.BIAS: float(rows.bias),
        RowFloat.THETA: float(rows.theta),
        RowFloat.MAG_SCALE: 1.0,
        RowFloat.MAG_BIAS: 0.0,
        RowFloat.ENC_SUM: float(rows.enc_sum),
    }
    table = tables.tables[0]
    assert torch.equal(table.enc[2, 0], rows.enc[0])
    assert torch.equal(table.dec[2, 0], rows.dec[0])
    assert ints(tables)[RowInt.ACT] == Act.JUMPRELU
    assert ints(tables)[RowInt.FEATURE] == 7
    assert ints(tables)[RowInt.WHEN_ROW] == -1
    assert ints(tables)[RowInt.NORM_UNITS] == 0
    assert ints(tables)[RowInt.SELECT] == 1


@pytest.mark.parametrize(("fields", "expected"), OPS, ids=lambda value: value.get("op"))
def test_each_op_on_a_vector(fields: Json, expected: dict[RowFloat, float], catalog: Catalog) -> None:
    tables, _ = written(catalog, vector_edit(**fields))
    blank, _ = empty_rows((1,), torch.device("cpu"))
    feature_columns = {column: float(blank[0, column]) for column in RowFloat}
    assert floats(tables) == feature_columns | EDIT | expected
    assert ints(tables)[RowInt.ACT] == Act.IDENTITY
    assert ints(tables)[RowInt.FEATURE] == -1
    values = catalog.vector("v").values
    enc, dec = tables.tables[0].enc[2, 0], tables.tables[0].dec[2, 0]
    if fields["op"] == "add":
        assert not enc.any()
        assert torch.equal(dec, values)
    else:
        assert torch.equal(enc, dec)
        torch.testing.assert_close(dec, values / values.norm())


def test_units(catalog: Catalog) -> None:
    tables, _ = written(catalog, edit(features=[3], value=2.0, units="reference_max"))
    assert floats(tables)[RowFloat.SHIFT] == 10.0
    assert ints(tables)[RowInt.NORM_UNITS] == 0
    tables, _ = written(catalog, edit(features=[3], value=2.0, units="residual_norm"))
    assert floats(tables)[RowFloat.SHIFT] == 2.0
    assert ints(tables)[RowInt.NORM_UNITS] == 1


@pytest.mark.parametrize("op", ["clamp", "add", "floor", "cap"])
def test_every_op_with_a_value_may_count_in_residual_norms(op: str, catalog: Catalog) -> None:
    for one in (edit(op=op), vector_edit(op=op)):
        raw, norm = (written(catalog, one | {"units": units})[0] for units in ("raw", "residual_norm"))
        assert floats(raw) == floats(norm)
        assert (ints(raw)[RowInt.NORM_UNITS], ints(norm)[RowInt.NORM_UNITS]) == (0, 1)


def test_gates_and_selectors(catalog: Catalog) -> None:
    gate = {"sae": "r1b", "feature": 9, "above": 1.5, "below": 4.5}
    tables, _ = written(
        catalog, edit(features=[1]), edit(features=[2], positions="prompt"), edit(features=[3], when=gate)
    )
    assert [ints(tables, i)[RowInt.SELECT] for i in range(4)] == [1, 2, 1, 0]
    assert [ints(tables, i)[RowInt.WHEN_ROW] for i in range(4)] == [-1, -1, 3, -1]
    assert [ints(tables, i)[RowInt.FEATURE] for i in range(4)] == [1, 2, 3, 9]
    assert (floats(tables, 2)[RowFloat.WHEN_ABOVE], floats(tables, 2)[RowFloat.WHEN_BELOW]) == (1.5, 4.5)
    rows = catalog.sae("r1b").sae.rows([9])
    gating = floats(tables, 3)
    assert ints(tables, 3)[RowInt.ACT] == Act.GATED
    assert gating[RowFloat.MAG_SCALE] == float(rows.mag_scale)
    assert gating[RowFloat.MAG_BIAS] == float(rows.mag_bias)
    assert int(tables.tables[0].slot_int[2, SlotInt.ROWS]) == 4


def test_the_31st_selector_fits(catalog: Catalog) -> None:
    rows = (Row(catalog.sae("r1").sae.fingerprint, 1, "ablate", scale=0.0, selector=30),)
    selectors = tuple(Selector(Phase.RANGES, ((i, i + 1),)) for i in range(31))
    compiled = Program((SiteProgram(HERE, rows),), selectors)
    tables = make_tables(catalog)
    tables.write(0, 2, compiled.sites[0], compiled)
    assert ints(tables)[RowInt.SELECT] == 2**30


def test_topk_and_numbers_of_saes(catalog: Catalog) -> None:
    tables, _ = written(catalog, edit(sae="tkw", features=[1]), edit(features=[1]), edit(sae="w1", features=[1]))
    # Rows are in the order of their fingerprints, so that programs that mean the same are the same.
    order = sorted(range(3), key=lambda i: catalog.sae(("tkw", "r1", "w1")[i]).sae.fingerprint)
    place = [order.index(i) for i in range(3)]
    assert [ints(tables, place[i])[RowInt.TOPK] for i in range(3)] == [4, 0, 0]
    numbers = [ints(tables, place[i])[RowInt.SAE] for i in range(3)]
    assert len(set(numbers)) == 3
    wholes = {whole.number: whole for whole in tables.wholes}
    assert set(wholes) == {numbers[0], numbers[2]}
    assert torch.equal(wholes[numbers[0]].enc, catalog.sae("tkw").sae.rows(range(FEATURES)).enc)
    assert wholes[numbers[0]].row_int[:, RowInt.FEATURE].tolist() == list(range(FEATURES))
    assert set(wholes[numbers[0]].row_int[:, RowInt.TOPK].tolist()) == {4}


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("none", Norm.NONE), ("layer_norm", Norm.LAYER_NORM), ("constant_norm_rescale", Norm.NORM_RESCALE)],
)
def test_input_norms(norm: str, expected: Norm, tmp_path: Path) -> None:
    write_saelens(tmp_path, hook_name="blocks.1.hook_resid_post", normalize_activations=norm)
    tables, _ = written(Catalog([CatalogSae.make("r1", open_sae(tmp_path))]), edit())
    assert ints(tables)[RowInt.NORM] == expected


def test_dose_and_dropping(catalog: Catalog) -> None:
    tables, _ = written(catalog, edit())
    assert float(tables.tables[0].slot_float[2, SlotFloat.DOSE_LIMIT]) == INF
    assert tables.tables[0].slot_int[2, : SlotInt.SKIPS].tolist() == [1, 0, -1]
    tables, _ = written(catalog, edit(), dose={"limit": 0.5})
    assert float(tables.tables[0].slot_float[2, SlotFloat.DOSE_LIMIT]) == 0.5
    tables, _ = written(catalog, edit(sae="w1"), edit(sae="w1", features=[4], positions="prompt"), error="drop")
    slot = tables.tables[0].slot_int[2]
    assert int(slot[SlotInt.DROP_SELECT]) == 3
    assert int(slot[SlotInt.DROP_SAE]) == ints(tables)[RowInt.SAE]


def test_gain_tables(catalog: Catalog) -> None:
    gain = GainTable.of(0.5, (0.9, 0.5), 0.25, (0.7,))
    row = Row(catalog.sae("r1").sae.fingerprint, 1, "app", gamma=2.0, selector=0, gain=gain)
    compiled = Program((SiteProgram(HERE, (row,)),), (Selector(Phase.ALL),))
    tables = make_tables(catalog)
    tables.write(0, 2, compiled.sites[0], compiled)
    kept = floats(tables)
    assert (kept[RowFloat.GAIN_WIDTH_POS], kept[RowFloat.GAIN_WIDTH_NEG]) == (0.5, 0.25)
    assert kept[RowFloat.GAMMA] == 2.0
    expected = torch.tensor([[0.9] + [0.5] * (GAIN_BINS - 1), [0.7] * GAIN_BINS])
    assert torch.equal(tables.tables[0].gain[2, 0], expected)


# ------------------------------------------------------------------------------------------- slots


def test_only_the_slot_that_is_written_changes(catalog: Catalog) -> None:
    tables, _ = written(catalog, edit(features=[1, 2, 3]))
    blank = make_tables(catalog)
    for number, table in enumerate(tables.tables):
        for name in ("enc", "dec", "row_float", "row_int", "slot_float", "slot_int", "gain"):
            now, before = getattr(table, name).clone(), getattr(blank.tables[number], name)
            if number == 0:
                now[2] = before[2]
            assert torch.equal(now, before), name


def test_a_slot_written_again_holds_the_new_program_alone(catalog: Catalog) -> None:
    gate = {"sae": "r1", "feature": 9, "above": 1.5}
    wide = program(edit(features=[1, 2], when=gate, units="residual_norm"), catalog=catalog, dose={"limit": 0.5})
    narrow = program(edit(sae="r1b", features=[5], op="ablate", value=None), catalog=catalog)
    gained = Row(catalog.sae("r1").sae.fingerprint, 1, "app", selector=0, gain=GainTable.of(1.0, (0.1, 0.2)))
    part = SiteProgram(HERE, (gained,))
    tables, fresh = make_tables(catalog), make_tables(catalog)
    tables.write(0, 2, part, Program((part,), (Selector(Phase.ALL),)))
    tables.write(0, 2, wide.sites[0], wide)
    tables.write(0, 2, narrow.sites[0], narrow)
    fresh.write(0, 2, narrow.sites[0], narrow)
    for name in ("enc", "dec", "row_float", "row_int"):
        now, expected = getattr(tables.tables[0], name)[2, :1], getattr(fresh.tables[0], name)[2, :1]
        assert torch.equal(now, expected), name
    assert torch.equal(tables.tables[0].slot_int[2], fresh.tables[0].slot_int[2])
    assert torch.equal(tables.tables[0].slot_float[2], fresh.tables[0].slot_float[2])


def test_a_cleared_slot_has_no_rows_and_drops_nothing(catalog: Catalog) -> None:
    tables, _ = written(catalog, edit(sae="w1"), error="drop")
    tables.clear(0, 2)
    assert int(tables.tables[0].slot_int[2, SlotInt.ROWS]) == 0
    assert int(tables.tables[0].slot_int[2, SlotInt.DROP_SELECT]) == 0


def test_a_program_of_as_many_rows_as_the_slot_has(catalog: Catalog) -> None:
    compiled = program(edit(features=list(range(9))), catalog=catalog)
    tables = make_tables(catalog)
    tables.write(1, 1, compiled.sites[0], compiled)
    assert int(tables.tables[1].slot_int[1, SlotInt.ROWS]) == 9
    assert tables.tables[1].row_int[1, :, RowInt.FEATURE].tolist() == list(range(9))


def test_a_transcoder_reads_one_width_and_writes_another(tmp_path: Path) -> None:
    write_saelens(tmp_path, architecture="transcoder", d_in=12, d_out=20)
    catalog = Catalog([CatalogSae.make("tc", open_sae(tmp_path))])
    site = catalog.sae("tc").site
    compiled = program(edit(sae="tc", features=[3]), catalog=catalog)
    tables = make_tables(catalog, site, width=12, width_out=20)
    tables.write(0, 1, compiled.sites[0], compiled)
    rows = catalog.sae("tc").sae.rows([3])
    assert torch.equal(tables.tables[0].enc[1, 0], rows.enc[0])
    assert torch.equal(tables.tables[0].dec[1, 0], rows.dec[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoder_rows_stay_in_float32(dtype: torch.dtype, catalog: Catalog) -> None:
    compiled = program(edit(features=[3]), catalog=catalog)
    tables = make_tables(catalog, dtype=dtype)
    tables.write(0, 2, compiled.sites[0], compiled)
    rows = catalog.sae("r1").sae.rows([3])
    assert torch.equal(tables.tables[0].enc[2, 0], rows.enc[0])
    assert torch.equal(tables.tables[0].dec[2, 0], rows.dec[0].to(dtype))


def test_a_decoder_row_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    vectors = [Vector.make("huge", torch.full((WIDTH,), 1e6)), Vector.make("v", torch.ones(WIDTH))]
    catalog = Catalog([], vectors)
    tables = make_tables(catalog, dtype=torch.float16)
    compiled = program(vector_edit(vector="huge"), catalog=catalog)
    with pytest.raises(NonFinite):
        tables.write(0, 1, compiled.sites[0], compiled)
    unit = program(vector_edit(vector="huge", op="ablate", value=None), catalog=catalog)
    tables.write(0, 1, unit.sites[0], unit)


def test_bytes_are_all_counted(catalog: Catalog) -> None:
    tables = make_tables(catalog)
    names = ("enc", "dec", "row_float", "row_int", "slot_float", "slot_int", "gain")
    held = sum(getattr(table, name).nbytes for table in tables.tables for name in names)
    wholes = sum(
        getattr(whole, name).nbytes
        for whole in tables.wholes
        for name in ("enc", "dec", "dec_bias", "row_float", "row_int")
    )
    assert wholes > 0
    assert tables.nbytes == held + wholes


def test_whose_error_a_slot_drops_is_known_until_it_is_emptied(catalog: Catalog) -> None:
    """By it a step goes through no whole dictionary for programs that drop nothing."""
    tables, dropping = written(catalog, edit(sae="w1"), error="drop")
    keeping = program(edit(sae="w1"), catalog=catalog)
    whole = tables.whole_of(catalog.saes["w1"].sae.fingerprint)
    assert [tables.drops(bucket, whole) for bucket in (0, 1)] == [True, False]
    assert not any(tables.drops(0, other) for other in tables.wholes if other is not whole)
    tables.write(0, 1, dropping.sites[0], dropping)
    tables.write(0, 2, keeping.sites[0], keeping)
    assert tables.drops(0, whole)  # the first slot still does
    tables.clear(0, 1)
    assert not tables.drops(0, whole)
