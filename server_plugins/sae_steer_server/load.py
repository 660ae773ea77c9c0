"""From settings to a loaded server. Whatever does not fit refuses the start, in words."""

import sys
from dataclasses import replace
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from sae_steer import embedded
from sae_steer.calibration.model import of_source
from sae_steer.capabilities import TRANSFORMERS
from sae_steer.catalog import Catalog, CatalogSae, Vector
from sae_steer.devices import named_device
from sae_steer.errors import StartError
from sae_steer.runtime import Runtime
from sae_steer.sae.cached import open_served
from sae_steer_http.service import SteeringService
from sae_steer_http.steering import check_profiles
from sae_steer_server.engine.engine import Engine
from sae_steer_server.engine.profiler import StepProfiler
from sae_steer_server.logs import get_logger
from sae_steer_server.metrics import Metrics
from sae_steer_server.settings import SaeSource, Settings
from sae_steer_server.state import ServerState

DEMO = "demo"
_NEVER = {"trust_remote_code": False}  # a checkpoint is data; its code is not run
_log: structlog.stdlib.BoundLogger = get_logger("sae_steer_server.load")


def with_demo(settings: Settings, folder: Path = embedded.FOLDER) -> Settings:
    """Settings in which the model ``demo`` is the one that comes with the package, with its SAE and profiles.

    Raises:
        StartError: This installation does not have it.
    """
    if settings.model != DEMO:
        return settings
    missing = [name for name in ("model", "sae") if not (folder / name).is_dir()]
    if missing:
        raise StartError(
            f"The embedded model is not part of this installation: {folder} has no {' and no '.join(missing)}. "
            "`make embedded` in a checkout says how to build it; or serve another model."
        )
    profiles = folder / "profiles"
    return replace(
        settings,
        model=str(folder / "model"),
        saes=(SaeSource(embedded.SAE_NAME, str(folder / "sae")), *settings.saes),
        whole=settings.whole | {embedded.SAE_NAME},  # it is small
        profiles=settings.profiles or (profiles if profiles.is_dir() else None),
        served_names=settings.served_names or (DEMO,),
    )


def load(settings: Settings) -> ServerState:
    """Loads everything; the engine is made and not started.

    Raises:
        StartError: Something cannot be read, does not fit together, or could not be used by any request.
    """
    settings = with_demo(settings)
    catalog = load_catalog(settings)
    model, tokenizer = load_model(settings)
    if settings.profiles is not None:
        catalog = catalog.serving(of_source(settings.model))
    runtime = Runtime.attach(model, catalog, limits=settings.limits, sites=settings.sites)
    metrics = Metrics()
    engine = Engine(
        model,
        tokenizer,
        runtime,
        max_running=settings.max_running,
        max_model_len=_context(settings, model),
        kv_tokens=settings.kv_tokens,
        metrics=metrics,
        profiler=StepProfiler(settings.profile_dir) if settings.profile_dir is not None else None,
    )
    steering = SteeringService(
        catalog=catalog,
        sites=runtime.sites,
        capabilities=TRANSFORMERS,
        limits=settings.limits,
        bos_token_id=_one_id(tokenizer.bos_token_id),
        model_names=settings.model_names,
        admin_key=settings.admin_key,
        max_body_bytes=settings.max_body_bytes,
        host_limits={"max_choices": settings.max_concurrent, "max_model_len": engine.max_model_len},
    )
    check_profiles(steering)
    state = ServerState(
        settings=settings,
        tokenizer=tokenizer,
        steering=steering,
        engine=engine,
        metrics=metrics,
        vocabulary=int(model.config.get_text_config().vocab_size),
    )
    _log.info(
        "loaded",
        models=list(settings.model_names),
        dtype=str(model.dtype),
        device=str(model.device),
        context=engine.max_model_len,
        saes={name: str(entry.site) for name, entry in catalog.saes.items()},
        vectors=sorted(catalog.vectors),
        profiles=catalog.profile_names(),
        steering_bytes=runtime.nbytes,
    )
    return state


def load_catalog(settings: Settings) -> Catalog:
    """Opens the SAEs and vectors; raises :class:`StartError`."""
    names = {source.name for source in settings.saes}
    labels = {source.sae: source.path for source in settings.labels}
    if len(labels) < len(settings.labels):
        raise StartError("--labels: give the labels of an SAE once. A folder of files counts as one.")
    for option, named in (
        ("--whole", settings.whole),
        ("--topk-threshold", settings.thresholds),
        ("--labels", labels.keys()),
    ):
        if unknown := sorted(named - names):
            raise StartError(f"{option} {unknown[0]}: there is no such SAE. Name it with --sae {unknown[0]}=LOCATION.")
    saes: list[CatalogSae] = []
    for source in settings.saes:
        _log.info("opening an SAE", name=source.name, location=source.location)
        sae = open_served(
            source.location,
            revision=source.revision,
            topk="threshold" if source.name in settings.thresholds else "exact",
            cache=settings.convert_cache,
        )
        whole = source.name in settings.whole
        saes.append(CatalogSae.make(source.name, sae, site=source.site, whole=whole, labels=labels.get(source.name)))
    vectors = [Vector.load(source.name, source.path) for source in settings.vectors]
    if settings.profiles is not None and not settings.profiles.is_dir():
        raise StartError(f"--profiles {settings.profiles} is not a folder. Make it first, or mend the path.")
    # What is installed is not a server's to change.
    writable = settings.profiles != embedded.PROFILES
    return Catalog(saes, vectors, settings.profiles, writable=writable)


def load_model(settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode on its device, and its tokenizer; raises :class:`StartError`."""
    device = named_device(settings.device)
    _log.info("loading the model", model=settings.model, dtype=settings.dtype, device=str(device))
    dtype: str | torch.dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if not sys.stderr.isatty():
        # For people; a log has lines of our own.
        disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, **_NEVER)
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, use_safetensors=True, **_NEVER)
    except (OSError, ValueError, SafetensorError) as error:  # the hub's own errors are subclasses of the first two
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StartError(f"The model {settings.model!r} cannot be loaded: {reason}") from error
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of Module.to hides its self
    model.train(False)
    return model, tokenizer


def _one_id(token: object) -> int | None:
    """A special token's id, where the tokenizer has exactly one."""
    return token if isinstance(token, int) else None


def _context(settings: Settings, model: PreTrainedModel) -> int:
    """Longest prompt with its completion: the model's context, or less where the settings say so."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = settings.max_model_len or most
    if wanted is None:
        raise StartError("The model's configuration does not say how long its context is. Say it with --max-model-len.")
    if most is not None and wanted > most:
        raise StartError(f"--max-model-len {wanted} is more than the model's context of {most}.")
    return int(wanted)
