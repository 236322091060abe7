"""What a recipe says of the images that a PyTorch module of the user's own wants."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from optimize.config import Block

Side = Annotated[int, Field(ge=1, le=16384)]


class Image(Block):
    """Pixels are scaled to `size`, divided by 255, and normalised: (pixel - mean) / std."""

    size: Side | Annotated[tuple[Side, ...], Field(min_length=2, max_length=2)] = 224
    """Pixels a side, or [height, width]."""
    channels: Literal[1, 3] = 3
    """3: red, green, blue. 1: grey."""
    mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=3)] | None = None
    """Of each channel, or of all; the default is 0.5."""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=3)] | None = None
    """Of each channel, or of all; the default is 0.5, so that pixels lie between -1 and 1."""

    @model_validator(mode="after")
    def _one_a_channel(self) -> Image:
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given is not None and len(given) not in (1, self.channels):
                raise ValueError(f"{name} has {len(given)} numbers for {self.channels} channels")
        return self

    def processor(self) -> dict[str, Any]:
        """The same as `preprocessor_config.json` of transformers."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size

        def each(given: tuple[float, ...] | None) -> list[float]:
            given = given or (0.5,)
            return list(given * self.channels if len(given) == 1 else given)

        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": each(self.mean),
            "image_std": each(self.std),
        }
