"""A concept of real text, calibrated on a real model by one command, and suppressed by one request on both hosts.

The comments are some that people called toxic; the model was trained on such text, and the dictionary is trained on it
here. Both hosts must answer as the definition does in float64, with the same tokens, log-probabilities and ``applied``
blocks, and the answers must differ from those of the model that nobody steers.
"""

import csv
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sae_steer.calibration.model import of_source
from sae_steer.catalog import Catalog, CatalogSae
from sae_steer.limits import Limits
from sae_steer.sae import open_sae
from sae_steer_cli.cli import app
from sae_steer_server.settings import SaeSource, Settings
from tests.conformance.answers import CLOSEST, Asked, faults
from tests.conformance.answers import Path as HostPath
from tests.conformance.asks import Ask, Case
from tests.conformance.definition import Definition
from tests.conformance.server_path import embedded_server, token_ids
from tests.conformance.vllm_paths import engine
from tests.steered_models import SteeredModel, comment_model

Request = dict[str, Any] | None

pytestmark = [pytest.mark.slow, pytest.mark.assets, pytest.mark.timeout(1800)]

FEATURES = 64
"""Chosen for each concept, if nothing else is said."""
LIMITS = Limits(max_programs=8, rows=FEATURES, wide_programs=0)
PROMPT, COMPLETION, WANTED = 8, 6, 3
"""Tokens of a prompt and of an answer, and how many prompts. The model itself ends comments after some words."""


def app_of(strength: float, **more: Any) -> dict[str, Any]:
    edit = {"op": "app", "sae": "res", "calibration": "toxic", "concept": "toxic", "strength": strength}
    return {"interventions": [edit | more]}


STRENGTH = 6.0
"""The profile's own."""
SUPPRESSED: tuple[Request, ...] = ({"profiles": ["toxic"]}, app_of(12.0, prior="empirical"))
WRONG: dict[str, Request] = {
    "another strength": app_of(1.0),
    "fewer features": app_of(STRENGTH, top=16),
    "another concept": {"profiles": ["banking"]},
}
"""What must not pass for the first of them."""


@dataclass(frozen=True)
class Material:
    """A calibrated model.

    Args:
        folder: Of all that was made.
        steered: The model and its dictionary.
        held_out: Toxic comments that nothing was calibrated on.
        printed: What the command said.
    """

    folder: Path
    steered: SteeredModel
    held_out: list[str]
    printed: str

    @property
    def profiles(self) -> Path:
        """The profiles."""
        return self.folder / "profiles"

    def plugin(self) -> dict[str, Any]:
        """The configuration of the vLLM plugin."""
        return {
            "saes": [{"name": "res", "location": str(self.steered.sae_folder)}],
            "profiles": str(self.profiles),
            "limits": {"max_programs": LIMITS.max_programs, "features": LIMITS.rows, "wide_programs": 0},
        }


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def calibrate(steered: SteeredModel, data: Path, out: Path, *more: str) -> str:
    """One command; what it prints."""
    command = ["calibrate", "--model", str(steered.folder), "--sae", f"res={steered.sae_folder}", "--data", str(data)]
    command += ["--tokens", "all", "--dtype", "float32", "--quiet", "--out", str(out), *more]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def material(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("concept")
    comments = rows_of(assets / "data" / "toxicity_surge.csv")
    held_out = comments[::5]
    known = [row for row in comments if row not in held_out]
    steered = comment_model(assets, folder, [row["text"] for row in known])
    toxic = ["--label-column", "toxic", "--label-name", "0=other", "--label-name", "1=toxic", "--concept", "toxic"]
    data = write(folder / "comments.csv", known)
    printed = calibrate(steered, data, folder / "profiles" / "toxic", *toxic, "--strength", str(STRENGTH))
    topics = [row for row in rows_of(assets / "data" / "topic_clinc150.csv") if row["split"] == "test"][::10]
    banking = ["--label-column", "domain", "--concept", "banking", "--strength", str(STRENGTH)]
    calibrate(steered, write(folder / "topics.csv", topics), folder / "profiles" / "banking", *banking)
    return Material(folder, steered, [row["text"] for row in held_out if row["toxic"] == "1"], printed)


@dataclass(frozen=True)
class Questions:
    """Beginnings of comments, and whether a host goes on with them as the definition does.

    Args:
        definition: The definition.
        prompts: The beginnings.
    """

    definition: Definition
    prompts: list[list[int]]

    def faults(
        self,
        host: HostPath,
        requests: Sequence[Request],
        *,
        sent: Request = None,
        wrong: str | None = None,
    ) -> list[str]:
        """Where a host differs.

        Args:
            host: The host.
            requests: What is asked with each prompt, all of it at once.
            sent: What is sent in place of that.
            wrong: The wrong variant that is switched on meanwhile.
        """
        asked = [Asked(prompt, request, COMPLETION, 1, False) for prompt in self.prompts for request in requests]
        case = Case("concept", (), (tuple(Ask("", each.steering, COMPLETION) for each in asked),))
        answers = host.run([[replace(each, steering=sent or each.steering) for each in asked]], wrong=wrong)
        return faults(case, [[self.definition.expect(each) for each in asked]], answers, caches=False)

    def differ_all(self, faults: list[str]) -> bool:
        """Whether one request a prompt was made, and each had faults."""
        return {fault.partition(":")[0] for fault in faults} == {
            f"wave 0, request {i}" for i in range(len(self.prompts))
        }


@pytest.fixture(scope="module")
def questions(material: Material) -> Questions:
    """Of beginnings that every request goes on with in other words, and float32 cannot mistake."""
    steered = material.steered
    entry = CatalogSae.make("res", open_sae(steered.sae_folder), whole=True)
    catalog = Catalog([entry], [], material.profiles, model=of_source(str(steered.folder)))
    definition = Definition(steered, catalog)
    known = set(token_ids(steered.tokenizer).values())
    found: list[list[int]] = []
    for text in material.held_out:
        prompt = steered.tokenizer(text)["input_ids"][:PROMPT]
        plain, *suppressed = (
            definition.expect(Asked(prompt, request, COMPLETION, 1, False)) for request in (None, *SUPPRESSED)
        )
        sound = all(
            len(each.tokens) == COMPLETION and known.issuperset(each.tokens) and each.margin > CLOSEST
            for each in (plain, *suppressed)
        )
        if sound and all(each.tokens != plain.tokens for each in suppressed):
            found.append(prompt)
        if len(found) == WANTED:
            return Questions(definition, found)
    raise AssertionError(f"only {len(found)} of {len(material.held_out)} comments are changed")


def test_one_command_finds_features_that_know_the_concept(material: Material) -> None:
    assert f"toxic: {FEATURES} features" in material.printed
    assert "suppresses toxic" in material.printed
    for name in ("profile.json", "profile.safetensors"):
        assert (material.profiles / "toxic" / name).stat().st_size > 0


@pytest.fixture(scope="class")
def host(request: pytest.FixtureRequest, material: Material) -> Iterator[HostPath]:
    """The host of a class below."""
    with request.cls.start(material) as running:
        yield running


class _Host:
    """What both hosts must pass."""

    def test_answers_are_the_definitions(self, host: HostPath, questions: Questions) -> None:
        assert questions.faults(host, (None, *SUPPRESSED)) == []

    @pytest.mark.parametrize("wrong", WRONG)
    def test_other_requests_are_answered_otherwise(self, host: HostPath, questions: Questions, wrong: str) -> None:
        assert questions.differ_all(questions.faults(host, SUPPRESSED[:1], sent=WRONG[wrong]))


class TestEmbedded(_Host):
    """The embedded server, over HTTP."""

    @staticmethod
    def start(material: Material) -> AbstractContextManager[HostPath]:
        steered = material.steered
        settings = Settings(
            model=str(steered.folder),
            saes=(SaeSource("res", str(steered.sae_folder)),),
            profiles=material.profiles,
            served_names=("m",),
            dtype="float32",
            device="cpu",
            port=0,
            limits=LIMITS,
            max_running=16,
        )
        return embedded_server(settings, steered.tokenizer)


class TestVllm(_Host):
    """vLLM, eager, all in one process, where wrong variants can be switched on."""

    @staticmethod
    def start(material: Material) -> AbstractContextManager[HostPath]:
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        return engine(material, model=material.steered.folder, environment=environment, enforce_eager=True)

    @pytest.mark.parametrize("variant", ["no gain table", "strength of one"])
    def test_a_wrong_plugin_is_seen(self, host: HostPath, questions: Questions, variant: str) -> None:
        assert questions.differ_all(questions.faults(host, SUPPRESSED[:1], wrong=variant))
        assert questions.faults(host, SUPPRESSED[:1]) == []
