"""The requests of the page, as types that are checked before anything is computed.

Numbers are finite and bounded. Limits of a model, such as the number of its levels, are checked by
`session.Session`, which raises `Refused`.
"""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowtrain.errors import shown

LARGEST_SEED = 2**53 - 1  # the largest whole number of JavaScript
LARGEST_INDEX = 2**20
MOVES = 64  # sliders that are off their middle
FARTHEST = 20.0  # of a slider, in standard deviations


class Refused(Exception):
    """A request that cannot be served. The message is one sentence for the user."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status  # of HTTP


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Index = Annotated[int, Field(ge=0, le=LARGEST_INDEX)]
Count = Annotated[int, Field(ge=1, le=LARGEST_INDEX)]
Temperature = Annotated[float, Field(ge=0, le=10)]
Amount = Annotated[float, Field(ge=-FARTHEST, le=FARTHEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=100)]


class Drawn(_Strict):
    """The samples of a seed, as `flowtrain sample` draws them."""

    seed: Seed
    temperatures: Annotated[list[Temperature], Field(min_length=1, max_length=32)]  # finest first
    label: Index | None = None  # None: all classes in turn


class Sample(Drawn):
    kind: Literal["sample"]
    index: Index


class Test(_Strict):
    kind: Literal["test"]
    index: Index


class Upload(_Strict):
    """An image that was dropped in. Its name is a digest of its pixels."""

    kind: Literal["upload"]
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


Source = Annotated[Sample | Test | Upload, Field(discriminator="kind")]


class Principal(_Strict):
    """A move along a principal direction of a level, in standard deviations."""

    level: Index
    component: Index
    amount: Amount


class Attribute(_Strict):
    """A move along an attribute's direction, in multiples of it."""

    name: Name
    amount: Amount


class Class(_Strict):
    """A share of the way from an image's own class to another."""

    label: Index
    amount: Share


class Place(_Strict):
    """An edited latent: its source, and the edits in this order."""

    source: Source
    other: Source | None = None
    way: Share = 0.0  # of the path to `other`
    from_other: Annotated[list[bool], Field(max_length=32)] = []  # levels, finest first
    to_class: Class | None = None
    principal: Annotated[list[Principal], Field(max_length=MOVES)] = []
    attributes: Annotated[list[Attribute], Field(max_length=MOVES)] = []


class Request(_Strict):
    """Of several requests from one tab, only the one with the latest turn is computed."""

    tab: Annotated[str, Field(pattern=r"^[0-9a-z]{8,32}$")]
    turn: Seed


class Tests(Request):
    start: Index
    count: Count


class Samples(Request, Drawn):
    start: Index
    count: Count


class Show(Request):
    """The image at a place, or the model's figures for it."""

    place: Place


class Ends(Show):
    """The image at a place, moved far along each principal direction of a level."""

    level: Index


class Neighbours(Show):
    """The training images that are nearest to the image at a place."""

    by: Literal["pixels", "latents"]


class Animation(Show):
    """The path from a place's source to its `other`, there and back, as a GIF."""

    steps: Annotated[int, Field(ge=2, le=1000)]


Kind = TypeVar("Kind", bound=Request)


def parsed(kind: type[Kind], body: bytes) -> Kind:
    """The request in the JSON of a body. Raises `Refused`, naming the first wrong value."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        value = "" if first["type"] == "json_invalid" else f", not {shown(first['input'])}"
        raise Refused(f"{shown(where)[1:-1]}: {first['msg']}{value}") from None
