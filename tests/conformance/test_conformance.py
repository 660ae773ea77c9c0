"""Every case through every path: the same tokens, log-probabilities and ``applied`` blocks as the definition has."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from tests.conformance.answers import CLOSEST, Path, faults
from tests.conformance.asks import Case
from tests.conformance.cases import CASES
from tests.conformance.catalog import Files
from tests.conformance.definition import Definition
from tests.conformance.http_path import served
from tests.conformance.local_paths import attached, embedded_engine
from tests.conformance.vllm_paths import TWO_WORKERS, engine
from tests.conformance.wrong import VARIANTS
from tests.steered_models import SteeredModel, embedded_model

# A compiled engine starts in less than a minute on two idle cores, and in several where others are at work.
pytestmark = pytest.mark.timeout(900)

Started = AbstractContextManager[Path]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The catalog's files."""
    return Files.write(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def model() -> SteeredModel:
    """The model."""
    return embedded_model()


@pytest.fixture(scope="module")
def definition(files: Files, model: SteeredModel) -> Definition:
    """The definition, which remembers what it has answered."""
    return Definition(model, files.catalog())


class TestDefinition:
    """What makes a case show something."""

    @every_case
    def test_case(self, definition: Definition, case: Case) -> None:
        assert case.kills, "name a wrong variant"
        assert VARIANTS.keys() >= set(case.kills)
        answers = definition.run(definition.resolve(case))
        for wave, wants, choices in zip(case.waves, definition.expected(case), answers, strict=True):
            for ask, want, [choice, *_] in zip(wave, wants, choices, strict=True):
                assert choice.error == ask.fails
                assert want.margin > CLOSEST
                assert len(want.tokens) == ask.tokens, "an answer that ends by itself is of one length on no host"
                if ask.steering is None:
                    continue
                applied = want.applied(0)
                assert applied is not None
                if want.read is not None:
                    _shows(want.read)
                if not (ask.steering.get("interventions") or ask.steering.get("profiles")):
                    assert want.tokens == want.plain
                    continue
                assert applied["fired"] > 0
                if ask.fails is None:
                    assert want.tokens != want.plain, "the edit moves no token"


def _shows(read: dict[str, Any]) -> None:
    """Every reading has a feature that fires, and every trigger fires."""
    for one in read["readings"]:
        sums = one["summary"] + one.get("top_summary", [])
        assert any(each["fired"] > 0 for each in sums), sums
    assert all(each["fired"] for each in read["triggers"])


@pytest.fixture(scope="class")
def path(request: pytest.FixtureRequest, files: Files, model: SteeredModel) -> Iterator[Path]:
    """The path of a class below, with one engine for all of its tests."""
    with request.cls.start(files, model) as running:
        yield running


class _Table:
    """What every path but the definition must pass."""

    @every_case
    def test_case(self, path: Path, definition: Definition, case: Case) -> None:
        answers = path.run(definition.resolve(case))
        assert faults(case, definition.expected(case), answers, caches=path.caches) == []


class TestAttach(_Table):
    @staticmethod
    def start(files: Files, model: SteeredModel) -> Started:
        return attached(files, model.model)


class TestEmbedded(_Table):
    @staticmethod
    def start(files: Files, model: SteeredModel) -> Started:
        return embedded_engine(files, model.model, model.tokenizer)


class _Cached(_Table):
    """What every path with a prefix cache must pass besides."""

    def test_warm(self, path: Path, definition: Definition) -> None:
        """Whatever the cache holds of other requests, the answers are those of a cold one."""
        for case in reversed(CASES):
            answers = path.run(definition.resolve(case), cold=False)
            assert faults(case, definition.expected(case), answers, caches=False) == [], case.name


class TestV1(_Cached):
    """V1's model runner, eager, all in one process; where the wrong variants are switched on."""

    @staticmethod
    def start(files: Files, model: SteeredModel) -> Started:
        return engine(files, environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, enforce_eager=True)

    @pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.replace(" ", "-"))
    def test_wrong_variant(self, path: Path, definition: Definition, variant: str) -> None:
        cases = [case for case in CASES if variant in case.kills]
        assert cases, "no case is for this variant"
        for case in cases:
            waves, expected = definition.resolve(case), definition.expected(case)
            assert faults(case, expected, path.run(waves, wrong=variant), caches=True), case.name
            assert faults(case, expected, path.run(waves), caches=True) == [], case.name


class TestCompiled(_Cached):
    """V1's model runner, compiled; as ``vllm.LLM`` runs by itself, with the engine in a process of its own."""

    @staticmethod
    def start(files: Files, model: SteeredModel) -> Started:
        return engine(files)


class TestV2(_Table):
    """V2's model runner, as on a GPU, under Triton's interpreter."""

    @staticmethod
    def start(files: Files, model: SteeredModel) -> Started:
        environment = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        return engine(files, environment=environment, v2=True, enforce_eager=True)


class TestTensorParallel(_Cached):
    """Two workers that share each layer."""

    @staticmethod
    def start(files: Files, model: SteeredModel) -> Started:
        return engine(files, environment=TWO_WORKERS, tensor_parallel_size=2, enforce_eager=True)


class TestPipelineParallel(_Cached):
    """Two workers with three layers each; compiled, since vLLM's own pipeline does not run eager on a CPU."""

    @staticmethod
    def start(files: Files, model: SteeredModel) -> Started:
        return engine(files, environment=TWO_WORKERS, pipeline_parallel_size=2)


class TestHttp(_Cached):
    """``vllm serve`` and the official client."""

    @staticmethod
    def start(files: Files, model: SteeredModel) -> Started:
        return served(files, files.folder)
