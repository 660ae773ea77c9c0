"""Everything that is left of a run: ``result.json``, plots, and one HTML file with all of it inside."""

from base64 import b64encode
from contextlib import suppress
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from sae_steer_bench.errors import BenchError, words_of
from sae_steer_bench.journal import NAME as JOURNAL
from sae_steer_bench.journal import read
from sae_steer_bench.plots import plots
from sae_steer_bench.records import Result
from sae_steer_bench.result import result_of
from sae_steer_bench.samples import METRICS, WORDS
from sae_steer_bench.table import SHOWN, again_text, baselines, ratio, ratio_text

RESULT, PAGE, PLOTS = "result.json", "report.html", "plots"


def write(result: Result, folder: Path) -> Path:
    """Writes all of it, each file whole or not at all, and returns the HTML file; raises :class:`BenchError`."""
    images = plots(result)
    page = folder / PAGE
    files = {folder / PLOTS / name: data for name, data in images.items()}
    files[page] = html(result, images).encode()
    files[folder / RESULT] = (result.model_dump_json(indent=1) + "\n").encode()
    try:
        (folder / PLOTS).mkdir(exist_ok=True)
        for path, data in files.items():
            _replace(path, data)
    except OSError as error:
        raise BenchError(f"The report cannot be written: {words_of(error)}.") from None
    return page


def _replace(path: Path, data: bytes) -> None:
    """Writes a file beside it first: a process that ends in between leaves what was there."""
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_bytes(data)
    fresh.replace(path)


def load(path: Path) -> Result:
    """The result in a run's folder, or in a JSON file.

    What a folder's ``run.jsonl`` says counts: a process that was killed while it went on with a run has left a
    ``result.json`` that knows nothing of its rounds.

    Raises:
        BenchError: There is none, or it is not of this version.
    """
    if not path.is_dir():
        return _load(path)
    if not (path / JOURNAL).exists() and (path / RESULT).exists():
        return _load(path / RESULT)
    plan, done, _ = read(path)
    with suppress(BenchError):  # none was written, or one of another version
        written = _load(path / RESULT)
        if written.plan == plan and written.measurements == done:
            return written
    return result_of(plan, done, stopped="the process ended before the run did")


def _load(file: Path) -> Result:
    try:
        return Result.model_validate_json(file.read_bytes())
    except OSError as error:
        raise BenchError(f"{file} cannot be read: {error.strerror or error}.") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise BenchError(f"{file} is not a result of this version: {where}: {fault['msg']}.") from None


def html(result: Result, images: dict[str, bytes]) -> str:
    """The page: well-formed, with nothing in it that is fetched from anywhere."""
    environment = Environment(
        loader=PackageLoader("sae_steer_bench", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        result=result,
        plan=result.plan,
        shown=SHOWN,
        metrics=METRICS,
        words=WORDS,
        baselines=baselines(result),
        ratio=ratio,
        ratio_text=ratio_text,
        again_text=again_text,
        images={name: b64encode(data).decode() for name, data in images.items()},
    )
