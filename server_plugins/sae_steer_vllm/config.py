"""The plugin's configuration: one closed JSON object in vLLM's ``--additional-config``, under ``sae_steer``.

vLLM hashes that object into the key of its compile cache. A configuration may therefore live in a file of its own only
together with the digest of the file: ``{"sae_steer": {"file": PATH, "digest": "sha256:..."}}``.
"""

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sae_steer.catalog import Catalog, CatalogSae, Vector
from sae_steer.closed import Name
from sae_steer.errors import RequestError, SiteError, StartError
from sae_steer.limits import Limits
from sae_steer.sae.cached import open_served
from sae_steer.sites import Site
from sae_steer.strict_json import loads

KEY = "sae_steer"


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SaeEntry(_Closed):
    """An SAE and its name in requests."""

    name: Name
    location: Annotated[str, Field(min_length=1, description="A folder, or org/repo[/folder] on the hub.")]
    revision: str | None = None
    site: Annotated[str | None, Field(description="Overrides the site that its files state.")] = None
    whole: Annotated[bool, Field(description="Hold the whole dictionary: for TopK, error drop, and top_k.")] = False
    topk: Annotated[
        Literal["exact", "threshold"],
        Field(description="`threshold` = by the threshold that the files store: no whole dictionary, and not exact."),
    ] = "exact"
    labels: Annotated[
        str | None,
        Field(description="Labels of its features: Neuronpedia's export (a file or a folder of batches), or a CSV."),
    ] = None


class VectorEntry(_Closed):
    """A plain direction and its name in requests."""

    name: Name
    location: Annotated[str, Field(min_length=1, description="A safetensors file with one tensor.")]


class LimitsEntry(_Closed):
    """What the slots hold; see :class:`~sae_steer.limits.Limits`."""

    max_programs: Annotated[int, Field(ge=1, le=4096)] = 32
    features: Annotated[int, Field(ge=1, le=1024)] = 16
    wide_programs: Annotated[int, Field(ge=0, le=4096)] = 4
    wide_features: Annotated[int, Field(ge=2, le=65536)] = 512
    max_edits: Annotated[int, Field(ge=1, le=65536)] = 512
    dose_limit: Annotated[float, Field(gt=0, le=1e6)] | None = None
    max_reading_values: Annotated[int, Field(ge=1, le=2**31)] = 65536

    def limits(self) -> Limits:
        """As the core has them."""
        return Limits(
            max_programs=self.max_programs,
            rows=self.features,
            wide_programs=self.wide_programs,
            wide_rows=self.wide_features,
            max_edits=self.max_edits,
            dose_limit=math.inf if self.dose_limit is None else self.dose_limit,
            max_reading_values=self.max_reading_values,
        )


class PluginConfig(_Closed):
    """Everything that is decided at start.

    The admin key of the HTTP routes is not here, since vLLM prints its configuration: it is the environment variable
    ``SAE_STEER_ADMIN_KEY``.
    """

    saes: list[SaeEntry] = []
    vectors: list[VectorEntry] = []
    sites: Annotated[list[str], Field(description="Places to hook beside those of the SAEs, for vectors.")] = []
    profiles: Annotated[str | None, Field(description="Folder of stored profiles.")] = None
    convert_cache: Annotated[
        str | None, Field(description="Folder for SAEs that must be converted first (compressed .npz), each once.")
    ] = None
    limits: LimitsEntry = LimitsEntry()
    allow_untested_vllm: Annotated[
        bool, Field(description="Start with a version of vLLM that the plugin was not tried with.")
    ] = False
    max_body_bytes: Annotated[int, Field(ge=1024)] = 2**20

    def extra_sites(self) -> list[Site]:
        """The places beside those of the SAEs; raises :class:`SiteError`."""
        return [Site.parse(text) for text in self.sites]


def digest_of(data: bytes) -> str:
    """The digest that names a configuration file's content."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def read_file(path: Path) -> tuple[PluginConfig, str]:
    """A configuration file and its digest; raises :class:`StartError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StartError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # a path that no file can have
        raise StartError(f"The configuration {str(path)!a} cannot be read: {error}.") from None
    try:
        value = loads(data)
    except RequestError as error:
        raise StartError(f"The configuration {path} is not JSON: {error.message}") from None
    return _validate(value, str(path)), digest_of(data)


def config_of(additional: object) -> PluginConfig | None:
    """The plugin's part of vLLM's ``additional_config``; None where there is none.

    Raises:
        StartError: It is not of the form above, or the file is not the one that the digest names.
    """
    value = additional.get(KEY) if isinstance(additional, Mapping) else None
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise StartError(f"additional_config.{KEY} is not an object. `sae-steer vllm-args FILE` prints one.")
    if "file" not in value:
        return _validate(dict(value), f"additional_config.{KEY}")
    if set(value) != {"file", "digest"} or not all(isinstance(v, str) for v in value.values()):
        raise StartError(
            f'additional_config.{KEY}: beside "file" there must be its "digest", and nothing else. '
            "`sae-steer vllm-args FILE` prints both."
        )
    config, digest = read_file(Path(value["file"]))
    if digest != value["digest"]:
        raise StartError(
            f"The configuration {value['file']} is not the one that was named: it has {digest}, and "
            f"{value['digest']} was asked for. Print the argument again with `sae-steer vllm-args`."
        )
    return config


def _validate(value: Any, where: str) -> PluginConfig:
    try:
        config = PluginConfig.model_validate(value)
        config.extra_sites()
        config.limits.limits()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise StartError(f"{where}: {path}: {first['msg']}.") from None
    except SiteError as error:
        raise StartError(f"{where}: sites: {error.message}") from None
    return config


@lru_cache(maxsize=4)
def _catalog(text: str) -> Catalog:
    config = PluginConfig.model_validate_json(text)
    saes: list[CatalogSae] = []
    cache = Path(config.convert_cache) if config.convert_cache is not None else None
    for entry in config.saes:
        sae = open_served(entry.location, revision=entry.revision, topk=entry.topk, cache=cache)
        site = Site.parse(entry.site) if entry.site is not None else None
        labels = Path(entry.labels) if entry.labels is not None else None
        saes.append(CatalogSae.make(entry.name, sae, site=site, whole=entry.whole, labels=labels))
    vectors = [Vector.load(entry.name, Path(entry.location)) for entry in config.vectors]
    folder = Path(config.profiles) if config.profiles is not None else None
    if folder is not None and not folder.is_dir():
        raise StartError(f"profiles: {folder} is not a folder. Make it first, or mend the path.")
    return Catalog(saes, vectors, folder)


def catalog_of(config: PluginConfig) -> Catalog:
    """The catalog of a configuration, opened once a process; raises :class:`StartError`."""
    return _catalog(config.model_dump_json())
