"""What the command line says, as one frozen value: where things are, how many there may be, who may call."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from pydantic import TypeAdapter, ValidationError

from sae_steer.closed import Name
from sae_steer.errors import SiteError, StartError
from sae_steer.limits import Limits
from sae_steer.sites import Site

DType = Literal["auto", "float32", "bfloat16", "float16"]
_NAME: TypeAdapter[str] = TypeAdapter(Name)


def _named(text: str, option: str, example: str) -> tuple[str, str]:
    """``NAME=REST`` in two; raises :class:`StartError` for anything else."""
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise StartError(f"{option} {text!r} is not NAME=LOCATION. Write it like {option} {example}.")
    try:
        return _NAME.validate_python(name), rest
    except ValidationError:
        raise StartError(
            f"{option} {text!r}: {name!r} is not a name. Names start with a letter or digit and go on with letters, "
            "digits, '_', '.' and '-'."
        ) from None


@dataclass(frozen=True, slots=True)
class SaeSource:
    """Where an SAE is found, and the name that requests use.

    Args:
        name: The name.
        location: A folder, or a repository of the hub with a folder inside it.
        revision: Revision of the hub repository; None = its main branch.
        site: Overrides the site that the files state.
    """

    name: str
    location: str
    revision: str | None = None
    site: Site | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``NAME=LOCATION[#REVISION][@SITE]``; raises :class:`StartError`."""
        name, location = _named(text, "--sae", "res12=./sae@resid_post.12")
        site = None
        if "@" in location and not Path(location).exists():  # a folder may have an @ in its name
            location, _, place = location.rpartition("@")
            try:
                site = Site.parse(place)
            except SiteError as error:
                raise StartError(f"--sae {text!r}: {error.message}") from None
        revision = None
        if not Path(location).exists():
            location, _, after = location.partition("#")
            revision = after or None
        return cls(name, location, revision, site)


@dataclass(frozen=True, slots=True)
class VectorSource:
    """Where a plain vector is found, and the name that requests use.

    Args:
        name: The name.
        path: A safetensors file with one tensor.
    """

    name: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``NAME=FILE.safetensors``; raises :class:`StartError`."""
        name, path = _named(text, "--vector", "honest=./honest.safetensors")
        return cls(name, Path(path))


@dataclass(frozen=True, slots=True)
class LabelSource:
    """Where labels of an SAE are found, beside those that it comes with.

    Args:
        sae: The name of the SAE.
        path: A file or folder that :func:`~sae_steer.sae.label_files.read_labels` reads.
    """

    sae: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``NAME=FILE``; raises :class:`StartError`."""
        name, path = _named(text, "--labels", "res12=./labels.csv")
        return cls(name, Path(path))


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that is decided at start.

    Args:
        model: A folder or a hub id.
        saes: The SAEs.
        whole: Names of SAEs whose whole dictionary is held in memory.
        thresholds: Names of TopK SAEs that are computed by the threshold that their files store.
        labels: Labels of SAEs, at most one for each.
        convert_cache: Folder of SAEs that had to be converted; None = such SAEs are refused.
        vectors: The plain vectors.
        sites: Places to hook beside those of the SAEs, for vectors.
        profiles: Folder of profiles; None = there are none.
        served_names: Names under which the model is served; none = one made from ``model``.
        dtype: The model's element type; ``auto`` is the one its files state.
        device: Where the model runs, such as ``cpu`` or ``cuda:0``; ``auto`` is a GPU where there is one.
        host: Address to bind.
        port: Port to bind; 0 = any free one.
        api_key: Bearer key of every /v1 route; None = open.
        admin_key: Key of what changes the server's state; None = nothing can.
        allowed_hosts: Values of the Host header that are answered, beside the bound one and localhost; ``*`` = any.
        limits: What the slots hold.
        max_running: Sequences in one forward pass.
        max_model_len: Longest prompt with its completion, in tokens; None = the model's context.
        kv_tokens: Tokens that the key-value cache holds; None = the engine's choice.
        max_concurrent: Choices that run or wait at once; beyond it requests get 429.
        max_body_bytes: Largest request body.
        log_level: Least level that is logged.
        shutdown_grace: Seconds that running requests get to finish after SIGTERM.
        profile_dir: Folder for traces of forward passes; None = none can be taken.
    """

    model: str
    saes: tuple[SaeSource, ...] = ()
    whole: frozenset[str] = frozenset()
    thresholds: frozenset[str] = frozenset()
    labels: tuple[LabelSource, ...] = ()
    convert_cache: Path | None = None
    vectors: tuple[VectorSource, ...] = ()
    sites: tuple[Site, ...] = ()
    profiles: Path | None = None
    served_names: tuple[str, ...] = ()
    dtype: DType = "auto"
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    max_running: int = 32
    max_model_len: int | None = None
    kv_tokens: int | None = None
    max_concurrent: int = 64
    max_body_bytes: int = 2**20
    log_level: str = "info"
    shutdown_grace: float = 10.0
    profile_dir: Path | None = None

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names under which the model is served: those given, or its hub id, or the last part of its folder."""
        if self.served_names:
            return self.served_names
        path = Path(self.model)
        return (path.resolve().name if path.is_dir() else self.model,)
