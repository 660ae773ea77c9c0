"""The result of an evaluation: a JSON document of a published form, and its table."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Interval = tuple[float, float] | None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measure(_Part):
    """A number and its 95 % bootstrap interval over texts and readouts."""

    value: float
    interval: Interval


class Measures(_Part):
    """What was measured of one request."""

    target_accuracy: Measure = Field(description="Share of the concept's texts that the readout takes for it.")
    target_confidence: Measure = Field(description="Mean probability of the concept on its texts.")
    complement_accuracy: Measure = Field(description="Share of the other texts whose own label is the likeliest.")
    complement_confidence: Measure = Field(description="Mean probability of their own label.")
    perplexity: Measure = Field(description="On plain text, every position edited.")
    divergence: Measure = Field(description="KL(unsteered || steered) on the other texts, nats a token.")
    drop: Measure = Field(description="How much the concept's confidence fell.")
    perplexity_rise: Measure = Field(description="Perplexity over that without any edit, less 1.")


class Row(_Part):
    """A method at one setting."""

    method: str
    knob: str
    setting: float | None
    measures: Measures


class Matched(_Part):
    """A method where it takes away as much as the others."""

    method: str
    knob: str
    level: float = Field(description="Share of what full masking takes away.")
    reached: float = Field(description="Share of the samples of texts in which it gets there.")
    setting: float | None = Field(description="None where it does not get there over all texts.")
    measures: Measures | None


class Difference(_Part):
    """APP's rise of perplexity less a rival's, at one level, over the same samples of texts."""

    rival: str
    level: float
    value: float
    interval: Interval


class Claim(_Part):
    """Whether APP has the smallest rise of perplexity at matched removal."""

    claim: Literal["holds", "does not"]
    because: str
    differences: list[Difference]


class Material(_Part):
    """What it was measured on."""

    model: str
    model_fingerprint: str
    sae: str
    sae_fingerprint: str
    site: str
    calibration: str
    calibration_file: str
    concept: str
    labels: list[str]
    features: int
    readout: str
    readouts: int
    training_texts: int
    target_texts: int
    complement_texts: int
    plain_texts: int
    plain_tokens: int


class SuppressionResult(_Part):
    """What `sae-steer evaluate suppression` writes."""

    version: Literal[1] = 1
    command: str
    versions: dict[str, str]
    material: Material
    samples: int
    unsteered: Measures
    defaults: list[Row]
    matched: list[Matched]
    claim: Claim


def table(result: SuppressionResult) -> str:
    """The result as a Markdown table: at default settings, and at matched removal."""
    head = "| method | setting | concept found (confidence) | others found (confidence) | perplexity | KL on others |"
    lines = ["At default settings:", "", head, "| --- | --- | --- | --- | --- | --- |"]
    lines.append(_line("none", "", result.unsteered))
    lines += [_line(row.method, _setting(row.knob, row.setting), row.measures) for row in result.defaults]
    for level in sorted({row.level for row in result.matched}):
        rows = [row for row in result.matched if row.level == level]
        lines += ["", f"Where each takes away {level:.0%} of what full masking takes away:", "", head]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for row in rows:
            if row.measures is None:
                lines.append(f"| {row.method} | does not get there | | | | |")
            else:
                lines.append(_line(row.method, _setting(row.knob, row.setting), row.measures))
    return "\n".join(lines)


def _setting(knob: str, setting: float | None) -> str:
    return "" if setting is None else f"{knob} {setting:.3g}"


def _line(method: str, setting: str, m: Measures) -> str:
    rise = m.perplexity_rise
    spread = f" ({rise.interval[0]:+.1%} to {rise.interval[1]:+.1%})" if rise.interval is not None else ""
    cost = f"{m.perplexity.value:.2f}" + (f", {rise.value:+.1%}{spread}" if method != "none" else "")
    found = f"{m.target_accuracy.value:.3f} ({m.target_confidence.value:.3f})"
    others = f"{m.complement_accuracy.value:.3f} ({m.complement_confidence.value:.3f})"
    return f"| {method} | {setting} | {found} | {others} | {cost} | {m.divergence.value:.4f} |"
