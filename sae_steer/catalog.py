"""Named SAEs, plain vectors and profiles: the things a request may refer to.

Names are for people; everything below the compiler goes by fingerprint. SAEs and vectors are fixed at start; profiles
are a folder that is read again whenever it changed, so that several server processes agree on it.
"""

import errno
import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_steer.calibration.record import CALIBRATION_FILE
from sae_steer.calibration.store import CalibrationStore, StoredCalibration
from sae_steer.closed import NAME_PATTERN
from sae_steer.errors import CheckpointError, Forbidden, RequestError, SchemaError, SiteError, StartError, UnknownName
from sae_steer.sae import FeatureLabel, Labels, Sae
from sae_steer.sae.label_files import read_labels
from sae_steer.sae.labels import by_rank
from sae_steer.schema import Profile, parse_profile
from sae_steer.sites import Site
from sae_steer.strict_json import loads
from sae_steer.whole_files import write_whole

PROFILE_FILE = "profile.json"
MAX_PROFILE_BYTES = 4 * 2**20
ANY_MODEL = "any"
"""In place of a model's fingerprint: for tools that look at files where there is no model to compare with."""
_NAME = re.compile(NAME_PATTERN)
_NUMBER = re.compile(r"#?([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class CatalogSae:
    """An SAE under the name that requests use.

    Args:
        name: The name.
        sae: The opened checkpoint.
        site: Where it is attached.
        labels: Labels and reference maxima, where the checkpoint has them.
        whole: Whether its whole dictionary is held in memory (needed to drop the error and for TopK).
    """

    name: str
    sae: Sae
    site: Site
    labels: Labels | None = None
    whole: bool = False

    @classmethod
    def make(
        cls, name: str, sae: Sae, *, site: Site | None = None, whole: bool = False, labels: Path | None = None
    ) -> Self:
        """Names an opened SAE; ``site`` overrides the one its file states, ``labels`` what lies beside it.

        Raises:
            StartError: There is no site, or the labels cannot be read.
        """
        site = site or sae.spec.site
        if site is None:
            raise StartError(
                f"The files of SAE {name!r} do not say where it belongs. "
                f"Give its site, as in {name}=PATH@resid_post.12."
            )
        known = Labels.load(sae.path, sae.spec.n_features)
        if labels is not None:
            known = known.updated(read_labels(labels, sae.spec.n_features))
        return cls(name, sae, site, known, whole)


@dataclass(frozen=True, slots=True)
class Vector:
    """A named direction.

    Args:
        name: The name that requests use.
        values: ``[D]`` float32.
        fingerprint: Content hash of the values.
    """

    name: str
    values: Tensor
    fingerprint: str

    @classmethod
    def make(cls, name: str, values: Tensor) -> Self:
        """Names a direction ``[D]``; raises :class:`CheckpointError` unless it is finite, flat and not zero."""
        flat = values.detach().to("cpu", torch.float32, copy=True).contiguous()
        if flat.ndim != 1 or flat.numel() == 0 or not bool(flat.isfinite().all()) or not bool(flat.any()):
            raise CheckpointError(
                f"Vector {name!r} has shape {list(values.shape)}; needed is one finite row that is not zero."
            )
        return cls(name, flat, "sha256:" + hashlib.sha256(flat.numpy().tobytes()).hexdigest())

    @classmethod
    def load(cls, name: str, path: Path) -> Self:
        """Reads the one tensor of a safetensors file; raises :class:`CheckpointError`."""
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                if len(keys) != 1:
                    raise CheckpointError(
                        f"{path} holds {len(keys)} tensors ({', '.join(keys)}); a vector file holds one."
                    )
                return cls.make(name, file.get_tensor(keys[0]))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"Vector {name!r}: {path} is not a readable safetensors file: {error}") from error


_Named = TypeVar("_Named", CatalogSae, Vector)


class ProfileStore:
    """Profiles in a folder: ``NAME/profile.json`` each. Reads are cached by the file's identity, size and time.

    Args:
        folder: Where profiles live; None = there are none, and none can be stored.
        writable: Whether profiles may be stored and removed.
    """

    def __init__(self, folder: Path | None, *, writable: bool = True) -> None:
        self.folder = folder
        self.writable = writable
        self._cache: dict[str, tuple[tuple[int, int, int], Profile]] = {}

    def names(self) -> list[str]:
        """Sorted names of the stored profiles."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(
            entry.name
            for entry in self.folder.iterdir()
            if _NAME.fullmatch(entry.name) and not entry.is_symlink() and (entry / PROFILE_FILE).is_file()
        )

    def get(self, name: str) -> Profile:
        """The profile as it is now on disk; raises :class:`UnknownName`, or :class:`SchemaError` for a broken file."""
        # Names are compared with the listing before they become a path: nothing of a client's reaches the file system.
        if name not in self.names() or self.folder is None:
            raise self._unknown(name)
        path = self.folder / name / PROFILE_FILE
        try:
            stat = path.stat()
            identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            cached = self._cache.get(name)
            if cached is not None and cached[0] == identity:
                return cached[1]
            text = path.read_bytes() if stat.st_size <= MAX_PROFILE_BYTES else b""
        except FileNotFoundError:  # somebody else removed it since it was listed
            raise self._unknown(name) from None
        if stat.st_size > MAX_PROFILE_BYTES:
            raise SchemaError(f"Profile {name!r} is larger than {MAX_PROFILE_BYTES} bytes.", code="broken_profile")
        try:
            profile = parse_profile(loads(text), root="")
        except SchemaError as error:
            message = f"The stored profile {name!r} is broken: {error.message}"
            raise SchemaError(message, code="broken_profile") from None
        if profile.name != name:
            raise SchemaError(
                f"The profile in folder {name!r} calls itself {profile.name!r}; the two must agree.",
                code="broken_profile",
            )
        self._cache[name] = identity, profile
        return profile

    def put(self, profile: Profile) -> None:
        """Stores a profile atomically.

        Raises:
            Forbidden: There is no folder, it cannot be written, or a calibration of that name is in the way.
        """
        folder = self._writable()
        if (folder / profile.name / CALIBRATION_FILE).exists():
            raise Forbidden(
                f"The profile {profile.name!r} holds a calibration, which would be lost. Choose another name, or "
                "remove that profile first."
            )
        try:
            self._put(folder / profile.name, profile.model_dump_json(indent=2, exclude_defaults=True))
        except OSError as error:
            raise self._unwritable(profile.name, error) from error

    def _put(self, target: Path, text: str) -> None:
        if target.is_symlink():
            raise FileExistsError(errno.EEXIST, "a link of that name is in the way")
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / PROFILE_FILE, text.encode())

    def delete(self, name: str) -> None:
        """Removes a profile; raises :class:`UnknownName` or :class:`Forbidden`."""
        folder = self._writable()
        if name not in self.names():
            raise self._unknown(name)
        try:
            shutil.rmtree(folder / name)
        except FileNotFoundError:  # somebody else was faster
            raise self._unknown(name) from None
        except OSError as error:
            raise self._unwritable(name, error) from error

    @staticmethod
    def _unwritable(name: str, error: OSError) -> Forbidden:
        return Forbidden(f"The folder of profile {name!r} cannot be changed: {error.strerror or type(error).__name__}.")

    def _unknown(self, name: str) -> UnknownName:
        known = ", ".join(self.names()) or "none"
        return UnknownName(f"There is no profile {name!r}. Profiles: {known}.", code="unknown_profile")

    def _writable(self) -> Path:
        if self.folder is None or not self.writable:
            raise Forbidden("This server has no folder of its own for profiles. Start it with --profiles DIR.")
        return self.folder


class Catalog:
    """Everything that requests may name.

    Args:
        saes: The SAEs; two of one name raise :class:`StartError`.
        vectors: The plain vectors; likewise.
        profiles: Folder of profiles, which may hold calibrations.
        writable: Whether profiles may be stored and removed.
        model: Fingerprint of the model that they are for; None = nobody can tell, and no calibration is honoured.
    """

    def __init__(
        self,
        saes: Iterable[CatalogSae],
        vectors: Iterable[Vector] = (),
        profiles: Path | None = None,
        *,
        writable: bool = True,
        model: str | None = None,
    ) -> None:
        self.saes: Mapping[str, CatalogSae] = _by_name(saes, "SAE")
        self.vectors: Mapping[str, Vector] = _by_name(vectors, "vector")
        self.profiles = ProfileStore(profiles, writable=writable)
        self.model = model
        self._calibrations = CalibrationStore()

    def serving(self, model: str | None) -> "Catalog":
        """The same, for a model of that fingerprint."""
        store = self.profiles
        return Catalog(self.saes.values(), self.vectors.values(), store.folder, writable=store.writable, model=model)

    def sae(self, name: str, *, param: str | None = None) -> CatalogSae:
        """The SAE of that name; raises :class:`UnknownName` with those there are."""
        if name not in self.saes:
            raise UnknownName(f"There is no SAE {name!r}. SAEs: {_known(self.saes)}.", param=param, code="unknown_sae")
        return self.saes[name]

    def vector(self, name: str, *, param: str | None = None) -> Vector:
        """The vector of that name; raises :class:`UnknownName` with those there are."""
        if name not in self.vectors:
            raise UnknownName(
                f"There is no vector {name!r}. Vectors: {_known(self.vectors)}.", param=param, code="unknown_vector"
            )
        return self.vectors[name]

    def sites(self, more: Iterable[Site] = ()) -> tuple[Site, ...]:
        """The places of the SAEs, and ``more`` beside them, in the model's order.

        Raises:
            SiteError: One of them writes before it reads.
        """
        wanted = dict.fromkeys([*(entry.site for entry in self.saes.values()), *more])
        for site in wanted:
            if site.write.order < site.read.order:
                raise SiteError(f"The site {site} writes before it reads. Swap its places.")
        return tuple(sorted(wanted, key=lambda site: (site.write.order, site.read.order)))

    def name_of(self, site: Site, fingerprint: str) -> str:
        """What requests call an SAE at a site, or a vector: the first of its names."""
        saes = (name for name, e in self.saes.items() if e.site == site and e.sae.fingerprint == fingerprint)
        vectors = (name for name, vector in self.vectors.items() if vector.fingerprint == fingerprint)
        return next(chain(saes, vectors))

    def profile_names(self) -> list[str]:
        """Sorted names of the profiles, as the folder is now."""
        return self.profiles.names()

    def profile(self, name: str) -> Profile:
        """A profile by name; raises :class:`UnknownName`."""
        return self.profiles.get(name)

    def calibration(self, name: str, *, param: str) -> StoredCalibration:
        """The calibration of a profile, read once for each content.

        Raises:
            UnknownName: There is none of that name; the message lists those there are.
            SchemaError: Its files are broken, or do not belong together.
        """
        try:
            if name in self.profile_names():
                profile = self.profiles.get(name)
                if profile.calibration is not None and self.profiles.folder is not None:
                    return self._calibrations.get(name, self.profiles.folder / name, profile.calibration)
        except RequestError as error:
            error.param = param
            raise
        raise UnknownName(
            f"{param}: there is no calibration {name!r}. "
            f"Calibrations: {', '.join(self.calibration_names()) or 'none'}. `sae-steer calibrate` makes one.",
            param=param,
            code="unknown_calibration",
        )

    def calibration_names(self) -> list[str]:
        """Sorted names of the profiles that hold a calibration."""
        return [name for name in self.profile_names() if self._holds_calibration(name)]

    def _holds_calibration(self, name: str) -> bool:
        try:
            return self.profiles.get(name).calibration is not None
        except RequestError:  # broken, or gone since it was listed
            return False

    def put_profile(self, profile: Profile) -> None:
        """Stores a profile; raises :class:`Forbidden` where there is no folder."""
        self.profiles.put(profile)

    def delete_profile(self, name: str) -> None:
        """Removes a profile; raises :class:`UnknownName` or :class:`Forbidden`."""
        self.profiles.delete(name)

    def search_features(self, sae: str | None, query: str, limit: int) -> list[tuple[str, FeatureLabel]]:
        """Features whose label contains the words of ``query``, the best first, each with the name of its SAE.

        Args:
            sae: Where to search; None = in every SAE.
            query: Words; or the number of a feature, which comes first, with a label or without.
            limit: The most that are found.

        Raises:
            UnknownName: There is no such SAE.
        """
        found: list[tuple[int, str, FeatureLabel]] = []
        for entry in self.saes.values() if sae is None else [self.sae(sae, param="sae")]:
            labels = entry.labels if entry.labels is not None else Labels({})
            number = _NUMBER.fullmatch(query.strip())
            feature = int(number[1]) if number is not None else -1
            if 0 <= feature < entry.sae.spec.n_features:
                found.append((-1, entry.name, labels.get(feature) or FeatureLabel(feature, None, None)))
            found += [(rank, entry.name, label) for rank, label in labels.ranked(query) if label.feature != feature]
        found.sort(key=lambda entry: by_rank((entry[0], entry[2])) if query.strip() else (entry[0], 0, 0))
        return [(name, label) for _, name, label in found[: max(limit, 0)]]


def _by_name(items: Iterable[_Named], what: str) -> Mapping[str, _Named]:
    found: dict[str, _Named] = {}
    for item in items:
        if item.name in found:
            raise StartError(f"Two {what}s are called {item.name!r}.")
        found[item.name] = item
    return MappingProxyType(found)


def _known(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "none"
