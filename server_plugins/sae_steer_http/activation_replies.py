"""What ``/v1/steering/activations`` answers."""

from pydantic import Field

from sae_steer_http.replies import Reply


class OnText(Reply):
    """A feature on one text."""

    max: float
    mean: float
    fired: float = Field(description="Fraction of the tokens with a value above 0.")
    token: int = Field(description="Which of the text's tokens has the maximum, from 0.")


class ActiveFeature(Reply):
    """A feature that fires on a text, or that tells two texts apart."""

    feature: int
    label: str | None
    reference_max: float | None
    difference: float | None = Field(description="The second maximum less the first; null for one text.")
    on: list[OnText] = Field(description="For each text.")


class Text(Reply):
    """A text as the model reads it."""

    tokens: list[str]


class ActivationList(Reply):
    """Features, the largest (or those that differ most) first."""

    sae: str
    floor: float = Field(description="Features that were not compared stay at or below this on every text.")
    texts: list[Text]
    data: list[ActiveFeature]
