"""What the tests of calibrated edits share: interventions by a calibration, and what becomes of them."""

from sae_steer.calibration.store import StoredCalibration
from sae_steer.catalog import Catalog
from sae_steer.errors import RequestError
from sae_steer.program import Row
from tests.sae_steer.helpers import Json, program, refused_doc, steering


def app(concept: str = "rude", **fields: object) -> Json:
    return {"op": "app", "sae": "r1", "calibration": "cal", "concept": concept} | fields


def rival(op: str, **fields: object) -> Json:
    return app(**fields) | {"op": op}


def rows(catalog: Catalog, *interventions: Json, **fields: object) -> list[Row]:
    compiled = program(*interventions, catalog=catalog, **fields)
    return [row for part in compiled.sites for row in part.rows if row.op]


def refused(catalog: Catalog, *interventions: Json, **fields: object) -> RequestError:
    return refused_doc(steering(*interventions, **fields), catalog)


def stored(catalog: Catalog, name: str = "cal") -> StoredCalibration:
    return catalog.calibration(name, param="")
