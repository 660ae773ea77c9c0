"""``sae-steer serve``: the transformers host."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from sae_steer.errors import StartError
from sae_steer.limits import Limits
from sae_steer.sites import Site
from sae_steer_cli.options import Device, ElementType
from sae_steer_cli.refusal import imports_of, refusals
from sae_steer_server.settings import LabelSource, SaeSource, Settings, VectorSource
from sae_steer_server.sockets import bind

LogLevel = Literal["debug", "info", "warning", "error"]

SERVE_HELP = """
Serve MODEL over an OpenAI-compatible HTTP API, with the field `steering` in every request.

**Examples**

The small model that comes with the package, on any free port:

    sae-steer serve demo --port 0

A model with one SAE, called res12 in requests, at the place that its files state:

    sae-steer serve ./gemma --sae res12=./sae-layer-12

An SAE from the Hugging Face hub, at a revision, attached at another place, held whole in memory:

    sae-steer serve google/gemma-2-2b --sae res12=org/repo/layer_12#main@resid_post.12 --whole res12

Then, from anywhere:

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '
      {"model": "gemma", "prompt": "Once", "steering": {"interventions": [
        {"sae": "res12", "features": [4021], "op": "clamp", "value": 8.0}]}}'
"""


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, or `demo`: the embedded model.")],
    sae: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOCATION[@SITE]",
            help="An SAE and its name in requests. LOCATION is a folder or org/repo[/folder][#revision]; SITE, such as "
            "resid_post.12, overrides the one that its files state. Repeatable.",
        ),
    ] = None,
    whole: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help='Hold this SAE\'s whole dictionary in memory: for TopK SAEs, "error": "drop" and top_k. Repeatable.',
        ),
    ] = None,
    topk_threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Compute this TopK SAE by the threshold that its files store: no whole dictionary, and not exact. "
            "Repeatable.",
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Labels of this SAE's features, for the search: Neuronpedia's export (.json, .jsonl, .jsonl.gz, or a "
            "folder of its batches) or a .csv with the columns feature,label[,reference_max]. Once for each SAE.",
        ),
    ] = None,
    convert_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Convert SAEs from which single rows cannot be read (compressed .npz), once, into here."
        ),
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE.safetensors", help="A plain direction and its name in requests. Repeatable."),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE", help="One more place to hook, for vectors where no SAE is. Repeatable."),
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of stored profiles; each is served as MODEL:PROFILE.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="What requests call the model. Repeatable.")
    ] = None,
    dtype: ElementType = "auto",
    device: Device = "auto",
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to bind; 0 = any free one, which is printed.")
    ] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="SAE_STEER_API_KEY", help="Bearer key that every /v1 route asks for.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(envvar="SAE_STEER_ADMIN_KEY", help="Key for storing and deleting profiles; off without it."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="A Host header to answer, beside the bound one and localhost; * = any."),
    ] = None,
    max_programs: Annotated[int, typer.Option(min=1, max=4096, help="Different programs that run at once.")] = 32,
    features: Annotated[
        int,
        typer.Option(min=1, max=1024, help="Features (edited, gating or read) that a program may use at a place."),
    ] = 16,
    wide_programs: Annotated[
        int, typer.Option(min=0, max=4096, help="Programs beside those that may use more features than that.")
    ] = 4,
    wide_features: Annotated[int, typer.Option(min=2, max=65536, help="Features that these may use.")] = 512,
    max_edits: Annotated[int, typer.Option(min=1, max=65536, help="Edited features in one request.")] = 512,
    dose_limit: Annotated[
        float | None,
        typer.Option(min=0, help="Largest change of a token, in multiples of its length, that any request may make."),
    ] = None,
    max_reading_values: Annotated[
        int, typer.Option(min=1, help="Activations (tokens times values of each) that one answer may send back.")
    ] = 65536,
    max_running: Annotated[int, typer.Option(min=1, max=4096, help="Sequences in one forward pass.")] = 32,
    max_concurrent: Annotated[
        int, typer.Option(min=1, max=65536, help="Choices that run or wait at once; beyond it requests get 429.")
    ] = 64,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Longest prompt with its completion, in tokens; default: the model's context."),
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the key-value cache holds; default: chosen from the above.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest request body.")] = 2**20,
    log_level: Annotated[LogLevel, typer.Option(help="Least level that is logged, as JSON lines on stderr.")] = "info",
    shutdown_grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get to finish after SIGTERM.")
    ] = 10.0,
    profile_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Let POST /start_profile, with the admin key, write a PyTorch profiler trace of one forward pass "
            "into DIR.",
        ),
    ] = None,
) -> None:
    """See ``SERVE_HELP``."""
    with refusals():
        if not all(served_model_name or ["-"]):
            raise StartError("--served-model-name: a name has at least one character.")
        settings = Settings(
            model=model,
            saes=tuple(SaeSource.parse(text) for text in sae or ()),
            whole=frozenset(whole or ()),
            thresholds=frozenset(topk_threshold or ()),
            labels=tuple(LabelSource.parse(text) for text in labels or ()),
            convert_cache=convert_cache,
            vectors=tuple(VectorSource.parse(text) for text in vector or ()),
            sites=tuple(Site.parse(text) for text in site or ()),
            profiles=profiles,
            served_names=tuple(served_model_name or ()),
            dtype=dtype,
            device=device,
            host=host,
            port=port,
            api_key=api_key or None,
            admin_key=admin_key or None,
            allowed_hosts=tuple(allowed_host or ()),
            limits=Limits(
                max_programs=max_programs,
                rows=features,
                wide_programs=wide_programs,
                wide_rows=wide_features,
                max_edits=max_edits,
                dose_limit=math.inf if dose_limit is None else dose_limit,
                max_reading_values=max_reading_values,
            ),
            max_running=max_running,
            max_model_len=max_model_len,
            kv_tokens=kv_tokens,
            max_concurrent=max_concurrent,
            max_body_bytes=max_body_bytes,
            log_level=log_level,
            shutdown_grace=shutdown_grace,
            profile_dir=profile_dir,
        )
        _run(settings)


def _run(settings: Settings) -> None:
    with imports_of("server"):
        from sae_steer_server import logs
    logs.configure(settings.log_level)
    with bind(settings.host, settings.port) as sock:
        # Not before: transformers takes seconds, which --help, a wrong option and a taken port need not wait for.
        with imports_of("server"):
            from sae_steer_server.load import load
            from sae_steer_server.serve import serve
        serve(load(settings), sock)
