"""Types of values that the configuration, models and data sets share."""

from typing import Annotated

from pydantic import Field

Positive = Annotated[int, Field(ge=1)]
