"""What is refused of calibrations: by name, by content, of another model, in broken files, and from clients."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_steer
from sae_steer.calibration.model import of_model
from sae_steer.calibration.record import CALIBRATION_FILE
from sae_steer.calibration.store import CalibrationStore
from sae_steer.catalog import PROFILE_FILE, Catalog, CatalogSae
from sae_steer.errors import Forbidden, LimitExceeded, RequestError, SchemaError
from sae_steer.limits import Limits
from sae_steer.sae import open_sae
from sae_steer.schema import parse_profile, parse_profile_body
from sae_steer.sites import Site
from tests.calibrations import made_up, write_calibration
from tests.sae_files import write_saelens
from tests.sae_steer.calibrated_edits import app, refused, stored
from tests.sae_steer.helpers import (
    CONCEPTS,
    HIDDEN,
    MODEL,
    Json,
    compile_doc,
    make_catalog,
    program,
    steering,
    tiny_model,
)

HERE = "steering.interventions[0]"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"))


@pytest.fixture
def own(tmp_path: Path) -> Catalog:
    """A catalog whose files a test may spoil."""
    return make_catalog(tmp_path)


REFUSALS: dict[str, tuple[Json, str, str, str]] = {
    "no such calibration": (app(calibration="none"), "unknown_calibration", "calibration", "cal, cal0, cal2"),
    "no such concept": (app("merry"), "unknown_concept", "concept", "rude, sad, calm"),
    "no such sae": (app(sae="none"), "unknown_sae", "sae", "r1"),
    "another sae": (app(sae="r1b"), "fingerprint_mismatch", "calibration", "Calibrate again"),
    "another sae at another site": (app(calibration="cal0"), "fingerprint_mismatch", "calibration", "Calibrate again"),
    "more than there are": (app(top=30), "out_of_range", "top", "Leave 'top' out"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("op", ["app", "ablate", "gain", "mask_range"])
def test_refusals(catalog: Catalog, case: str, op: str) -> None:
    document, code, field, words = REFUSALS[case]
    error = refused(catalog, document | {"op": op})
    assert (error.code, error.param, error.status) == (code, f"{HERE}.{field}", 400)
    assert words in error.message


def test_all_concepts_against_nobody(catalog: Catalog) -> None:
    error = refused(catalog, *(app(concept, prior="target") for concept in CONCEPTS))
    assert (error.code, error.param) == ("no_prior", f"{HERE}.prior")


def test_another_model_is_refused(catalog: Catalog) -> None:
    error = refused(catalog.serving("sha256:another"), app())
    assert (error.code, error.param) == ("model_mismatch", f"{HERE}.calibration")
    error = refused(catalog.serving(None), app())
    assert (error.code, error.param) == ("model_mismatch", f"{HERE}.calibration")
    assert "cannot tell" in error.message


def test_another_site_is_refused(own: Catalog) -> None:
    entry = replace(own.sae("r1"), site=Site.parse("resid_post.0"))
    moved = Catalog([entry], [], own.profiles.folder, model=MODEL)
    assert refused(moved, app()).code == "site_mismatch"


def test_a_label_without_features_is_told_from_an_unknown_one(own: Catalog) -> None:
    folder = own.profiles.folder
    assert folder is not None
    write_calibration(
        folder, "cal", own.sae("r1"), stored(own).record, labels=CONCEPTS, model=MODEL, concepts=["rude", "sad"]
    )
    error = refused(own, app("calm"))
    assert error.code == "unknown_concept"
    assert "no features were chosen" in error.message


def test_wider_than_the_slots(catalog: Catalog) -> None:
    for limits, option in (
        (Limits(max_programs=1, rows=1, wide_programs=1, wide_rows=2), "--wide-features"),
        (Limits(max_edits=2), "--max-edits"),
    ):
        with pytest.raises(LimitExceeded, match=option) as caught:
            compile_doc(steering(app()), catalog, limits=limits)
        assert "top" in caught.value.message


# ------------------------------------------------------------------------------------------- broken files


def _spoiled(own: Catalog, spoil: Callable[[Path], object]) -> RequestError:
    folder = own.profiles.folder
    assert folder is not None
    spoil(folder / "cal")
    fresh = Catalog(own.saes.values(), [], folder, model=MODEL)
    for document in (steering(app()), {"profiles": ["cal"]}):
        with pytest.raises(RequestError) as caught:
            compile_doc(document, fresh)
        assert caught.value.status == 400
        assert caught.value.param is not None
    assert program(app(calibration="cal2"), catalog=fresh), "one that is broken hides no other"
    return caught.value


def _of_another(path: Path) -> None:
    (path / CALIBRATION_FILE).write_bytes((path.parent / "cal2" / CALIBRATION_FILE).read_bytes())


def _fifo(path: Path) -> None:
    (path / CALIBRATION_FILE).unlink()
    os.mkfifo(path / CALIBRATION_FILE)


def _half(path: Path) -> None:
    content = (path / CALIBRATION_FILE).read_bytes()
    (path / CALIBRATION_FILE).write_bytes(content[: len(content) // 2])


SPOILED: dict[str, Callable[[Path], object]] = {
    "no file": lambda path: (path / CALIBRATION_FILE).unlink(),
    "half a file": _half,
    "an empty file": lambda path: (path / CALIBRATION_FILE).write_bytes(b""),
    "another's file": _of_another,
    "no regular file": _fifo,
    "half a profile": lambda path: (path / PROFILE_FILE).write_bytes((path / PROFILE_FILE).read_bytes()[:-20]),
    "a pickle": lambda path: (path / CALIBRATION_FILE).write_bytes(b"\x80\x04."),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_broken_calibration_is_a_request_error(own: Catalog, case: str) -> None:
    assert _spoiled(own, SPOILED[case]).code == "broken_profile"


@settings(max_examples=30)
@given(place=st.integers(0, 10**6), value=st.integers(1, 255))
def test_no_flipped_byte_is_served(catalog: Catalog, place: int, value: int) -> None:
    folder = catalog.profiles.folder
    assert folder is not None
    content = bytearray((folder / "cal" / CALIBRATION_FILE).read_bytes())
    content[place % len(content)] ^= value
    info = catalog.profile("cal").calibration
    assert info is not None
    target = folder.parent / "flipped"
    target.mkdir(exist_ok=True)
    (target / CALIBRATION_FILE).write_bytes(content)
    with pytest.raises(SchemaError) as caught:
        CalibrationStore().get("flipped", target, info)
    assert caught.value.code == "broken_profile"


# ------------------------------------------------------------------------------------------- what clients may send


def test_no_client_brings_a_calibration(catalog: Catalog) -> None:
    profile = catalog.profile("cal")
    assert profile.calibration is not None
    document = profile.model_dump(mode="json", exclude_defaults=True)
    assert parse_profile(document) == profile
    with pytest.raises(SchemaError, match="no client") as caught:
        parse_profile_body(document)
    assert caught.value.param == "calibration"
    document.pop("calibration")
    assert parse_profile_body(document) == profile.model_copy(update={"calibration": None})


def test_a_calibration_is_not_lost_to_a_profile_of_its_name(own: Catalog) -> None:
    body = own.profile("cal").model_dump(mode="json", exclude_defaults=True)
    body.pop("calibration")
    with pytest.raises(Forbidden, match="would be lost"):
        own.put_profile(parse_profile_body(body))
    assert own.calibration_names() == ["cal", "cal0", "cal2"]
    own.put_profile(parse_profile_body(body | {"name": "mine"}))
    assert program(catalog=own, profiles=["mine"]).digest == program(app(), catalog=own).digest
    own.delete_profile("cal")
    assert refused(own, profiles=["mine"]).code == "unknown_calibration"


# ------------------------------------------------------------------------------------------- in the same process


def test_a_model_in_memory_takes_its_own_calibration_and_no_other(tmp_path: Path) -> None:
    model = tiny_model()
    here = "blocks.1.hook_resid_post"
    write_saelens(tmp_path / "res", architecture="standard", hook_name=here, d_in=HIDDEN, n_features=32, seed=2)
    entry = CatalogSae.make("res", open_sae(tmp_path / "res"))
    for name, made_for in (("own", of_model(model)), ("foreign", "sha256:another")):
        write_calibration(tmp_path / "profiles", name, entry, made_up(range(32), 2), labels=("a", "b"), model=made_for)
    ids = torch.arange(3, 60)[None]
    with sae_steer.attach(model, {"res": entry.sae}, profiles=tmp_path / "profiles") as steer:
        with steer.rows([{"profiles": ["own"]}]) as found, torch.no_grad():
            model(input_ids=ids)
        [report] = found.reports()
        assert report is not None
        assert {entry["op"] for entry in report["features"]} == {"app"}
        assert report["fired"] > 0
        with pytest.raises(RequestError) as caught:
            steer.compile({"profiles": ["foreign"]})
    assert caught.value.code == "model_mismatch"
