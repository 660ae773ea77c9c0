"""Every case through every path: the same tokens, log-probabilities and ``applied`` blocks as the definition has."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.answers import CLOSEST, Path, faults
from tests.conformance.cases import CASES, Case, Files
from tests.conformance.definition import Definition
from tests.conformance.local_paths import attached, embedded_engine
from tests.steered_models import SteeredModel, embedded_model

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
        for wave, answers in zip(case.waves, definition.expected(case), strict=True):
            for ask, want in zip(wave, answers, strict=True):
                assert want.margin > CLOSEST
                assert len(want.tokens) == ask.tokens, "an answer that ends by itself is of one length on no host"
                if ask.steering is None:
                    continue
                applied = want.applied(0)
                assert applied is not None
                assert applied["fired"] > 0
                if ask.fails is None:
                    assert want.tokens != want.plain, "the edit moves no token"
                assert (want.error is not None) == (ask.fails is not None)

    @every_case
    def test_fails_where_the_case_says_so(self, definition: Definition, case: Case) -> None:
        answers = definition.run(definition.resolve(case))
        assert faults(case, definition.expected(case), answers, caches=False) == []


class _Table:
    """What every other path must pass."""

    @pytest.fixture(scope="class")
    def path(self, files: Files, model: SteeredModel) -> Iterator[Path]:
        """The path, with one engine for the whole class."""
        raise NotImplementedError

    @every_case
    def test_case(self, path: Path, definition: Definition, case: Case) -> None:
        answers = path.run(definition.resolve(case))
        assert faults(case, definition.expected(case), answers, caches=path.caches) == []


class TestAttach(_Table):
    @pytest.fixture(scope="class")
    def path(self, files: Files, model: SteeredModel) -> Iterator[Any]:
        with attached(files, model.model) as running:
            yield running


class TestEmbedded(_Table):
    @pytest.fixture(scope="class")
    def path(self, files: Files, model: SteeredModel) -> Iterator[Any]:
        with embedded_engine(files, model.model, model.tokenizer) as running:
            yield running
