"""What all data from outside have in common: closed, strict models, and names."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_FEATURES = 16384
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, description="A name in the server's catalog.")]


class Closed(BaseModel):
    """Base of all wire models: unknown keys, coercions and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
