"""Everything that is left of a run: ``result.json``, plots, and one HTML file with all of it inside."""

from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from sae_steer_bench.errors import BenchError
from sae_steer_bench.journal import read
from sae_steer_bench.plots import plots
from sae_steer_bench.records import Result
from sae_steer_bench.result import result_of
from sae_steer_bench.samples import METRICS, WORDS
from sae_steer_bench.table import SHOWN, baselines, ratio_text

RESULT, PAGE, PLOTS = "result.json", "report.html", "plots"


def write(result: Result, folder: Path) -> Path:
    """Writes all of it; returns the HTML file."""
    (folder / RESULT).write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    images = plots(result)
    (folder / PLOTS).mkdir(exist_ok=True)
    for name, data in images.items():
        (folder / PLOTS / name).write_bytes(data)
    page = folder / PAGE
    page.write_text(html(result, images), encoding="utf-8")
    return page


def load(path: Path) -> Result:
    """The result in a run's folder, or in a JSON file.

    Raises:
        BenchError: There is none, or it is not of this version.
    """
    if path.is_dir() and not (path / RESULT).exists():
        plan, done, _ = read(path)  # a run that was killed
        return result_of(plan, done, stopped="the process ended before the run did")
    file = path / RESULT if path.is_dir() else path
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
        ratio_text=ratio_text,
        images={name: b64encode(data).decode() for name, data in images.items()},
    )
