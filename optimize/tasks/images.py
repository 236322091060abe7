"""Images as tasks hold them: the bytes of an image file, which pillow reads and checks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import OptimizeError, SourceError
from optimize.tasks.pretrained import first_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Of those that pillow knows: none of these starts another program."""
MAX_PIXELS = 100_000_000
"""More is taken for a decompression bomb."""
PROCESSOR = "preprocessor_config.json"


def check(content: bytes, where: str) -> None:
    """Read an image to its end. Raises `SourceError` that says `where`, for one that is cut off, too large, or none."""
    decode(content, where).close()


def decode(content: bytes, where: str = "the image") -> Image.Image:
    """The image, turned as its camera noted. Raises `SourceError`."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours, below
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise SourceError(
                    f"{where} would unpack to {image.width} x {image.height} pixels",
                    hint=f"images may have {MAX_PIXELS:,} pixels: scale it down, or leave it out",
                )
            image.load()
            return ImageOps.exif_transpose(image)
    except SourceError:
        raise
    except Exception as error:  # every format's reader raises its own
        raise SourceError(
            f"{where} can't be read: {first_line(error)}",
            hint=f"it is cut off, damaged, or none of {', '.join(FORMATS)}",
        ) from error


def pixels(content: bytes, channels: int) -> NDArray[np.uint8]:
    """The image's pixels [channels, height, width]: 3 (red, green, blue) or 1 (grey)."""
    import numpy as np

    array = np.asarray(decode(content).convert("RGB" if channels == 3 else "L"))
    return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))


def netpbm(array: NDArray[Any]) -> bytes:
    """Pixels [height, width], [height, width, 1] or [height, width, 3] of 8 bits as the bytes of an image file, packed
    by no library: the same on every machine (http://netpbm.sourceforge.net/doc/pgm.html).

    Raises `OptimizeError` for an array of another shape or type.
    """
    import numpy as np

    grey = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype != np.uint8 or not grey.size or grey.shape[2:] not in ((), (3,)) or grey.ndim < 2:
        raise OptimizeError(
            f"an array of {array.dtype} and shape {list(array.shape)} is no image",
            hint="give uint8 pixels (0 to 255) of shape [height, width] or [height, width, 3]",
        )
    kind = b"P5" if grey.ndim == 2 else b"P6"
    return b"%s %d %d 255\n" % (kind, grey.shape[1], grey.shape[0]) + np.ascontiguousarray(grey).tobytes()


def image_bytes(value: Any) -> bytes:
    """What a person takes for an image: a path, an image file's bytes, pixels (an array or one of pillow's images), or
    a mapping with one of these as `image`. Raises `OptimizeError`.
    """
    import numpy as np
    from PIL import Image

    if isinstance(value, Mapping) and "image" in value:
        value = value["image"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, (str, PathLike)):
        try:
            return Path(value).expanduser().read_bytes()
        except (OSError, ValueError) as error:
            raise OptimizeError(f"no image at {value}: {getattr(error, 'strerror', None) or error}") from error
    if isinstance(value, Image.Image):
        return netpbm(np.asarray(value.convert("L" if value.mode in ("L", "1") else "RGB")))
    if isinstance(value, np.ndarray):
        return netpbm(value)
    raise OptimizeError(
        f"{type(value).__name__} is no image", hint="give a path, an image of pillow's, or an array of uint8 pixels"
    )


def load_processor(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The image processor in a model's folder, of the back end that computes with pillow and NumPy: so that a machine
    with torchvision prepares the same pixels as one without. Raises `SourceError` where there is none.
    """
    from transformers import AutoImageProcessor

    from optimize.quiet import quiet

    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                path, backend="pil", local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers has no family of errors
        raise SourceError(f"the image processor can't be loaded: {first_line(error)}", location=str(path)) from error
