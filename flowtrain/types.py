"""Types that the configuration, models and data sets share."""

from typing import Annotated, Literal

from pydantic import Field

# The upper limits are beyond any real use.
Positive = Annotated[int, Field(ge=1, le=2**20)]  # a number of layers, channels, images of a batch
NonNegative = Annotated[int, Field(ge=0, le=2**20)]  # the same for what may be left out
Count = Annotated[int, Field(ge=1, le=10**7)]  # a number of examples
Side = Annotated[int, Field(ge=1, le=2**16)]  # of an image
Period = Annotated[int, Field(ge=1, le=10**12)]  # a number of steps
Steps = Annotated[int, Field(ge=0, le=10**12)]  # also the images that they use
Shape = tuple[int, int, int]  # (C, H, W)
Policy = Literal["crop", "stretch", "exact"]  # how images are brought to a shape
