"""The form of ``result.json`` and of the lines of ``run.jsonl``: what ``docs/benchmarks.md`` describes."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sae_steer_bench.samples import Metric

Baseline = Literal["plain", "idle"]


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(Record):
    """A median of ratios with its 95 % interval."""

    median: float
    low: float
    high: float


class Ratio(Interval):
    """A median of the ratios of a run's rounds, with its 95 % interval, and where another run's would lie."""

    again_low: float | None = Field(
        description="With again_high: the median of another such run lies between them with 99 %; null = one round."
    )
    again_high: float | None


class Machine(Record):
    """Where the client ran, which is where the server ran only if ``server.local``."""

    cpu: str
    cores: int = Field(description="Logical cores that this process may use.")
    memory_gb: float | None
    gpus: list[str]
    system: str


class SaeFacts(Record):
    """An SAE of the server."""

    id: str
    site: str
    features: int
    fingerprint: str
    whole: bool = Field(False, description="Whether its whole dictionary is held, which top_k takes.")


class ServerFacts(Record):
    """The server under test, as it describes itself."""

    host: str = Field(description="vllm or transformers.")
    version: str | None = Field(description="Of the host, where it says so.")
    model: str
    saes: list[SaeFacts]
    limits: dict[str, float]
    features: list[str] = Field(description="What /v1/steering/capabilities says is supported.")
    vocabulary: int = Field(description="Prompts are made of token ids below this.")
    local: bool = Field(description="Whether it is on the client's machine.")


class LoadPlan(Record):
    """One way of sending requests."""

    name: str
    concurrency: int = Field(description="Most requests at once.")
    rate: float | None = Field(
        default=None, description="Requests a second, arriving as a Poisson process; null = closed loop."
    )


class CasePlan(Record):
    """A case, and whether it can be measured here."""

    key: str
    label: str
    programs: int = Field(description="Different programs in its requests.")
    edits: int = Field(description="Features that a program edits, over all layers.")
    layers: int = Field(description="Layers where it does.")
    status: Literal["measured", "refused", "skipped"]
    reason: str | None = Field(
        default=None, description="The server's own words where it refused; else why it was skipped."
    )


class Launch(Record):
    """A command that the run starts by itself."""

    command: str
    plain: bool = Field(description="Whether a second server without the plugin is started beside it.")


class Plan(Record):
    """All that a run has decided before its first round; a resumed run goes on by it."""

    kind: Literal["plan"] = "plan"
    version: Literal[1] = 1
    command: str
    started: str = Field(description="UTC, ISO 8601.")
    launch: Launch | None
    url: str | None = Field(description="Of a server that was there already.")
    plain_url: str | None
    server: ServerFacts
    generator: Literal["openai", "vllm"]
    tokenizer: str | None
    loads: list[LoadPlan]
    cases: list[CasePlan]
    value: float = Field(description="What features are clamped to by the first program.")
    prompt_tokens: int
    output_tokens: int
    requests: int = Field(description="Of one measurement.")
    rounds: int = Field(description="Most rounds.")
    minutes: float = Field(description="After which no round beyond the fifth is begun.")
    seed: int
    machine: Machine
    versions: dict[str, str]


class Measurement(Record):
    """One case under one load in one round."""

    kind: Literal["measurement"] = "measurement"
    round: int
    load: str
    case: str
    at: str = Field(description="UTC, ISO 8601.")
    seconds: float
    requests: int
    output_tokens: int
    metrics: dict[Metric, float]


class RoundEnd(Record):
    """All cases of a round were measured; a round without it is measured anew when a run is resumed."""

    kind: Literal["round"] = "round"
    round: int


Line = Annotated[Plan | Measurement | RoundEnd, Field(discriminator="kind")]
LINE: TypeAdapter[Plan | Measurement | RoundEnd] = TypeAdapter(Line)


class MetricResult(Record):
    """A metric of a case under a load."""

    value: float = Field(description="Median over rounds, in the unit that the metric's name ends with.")
    ratios: dict[Baseline, Ratio] = Field(description="To a baseline in the same rounds; above 1 is more.")


class CaseResult(CasePlan):
    """A case with what was measured."""

    loads: dict[str, dict[Metric, MetricResult]]


class Result(Record):
    """A whole run: ``result.json``."""

    version: Literal[1] = 1
    plan: Plan
    rounds: int = Field(description="Complete ones; the result is of these alone.")
    stopped: str | None = Field(default=None, description="What ended the run early.")
    cases: list[CaseResult]
    measurements: list[Measurement]
