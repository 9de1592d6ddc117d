"""Types that the configuration, models and data sets share."""

from typing import Annotated

from pydantic import Field

Positive = Annotated[int, Field(ge=1)]
Shape = tuple[int, int, int]  # (C, H, W)
