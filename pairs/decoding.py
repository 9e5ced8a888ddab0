"""How the model reads images, without the model: `modeling_notellm2.image_notellm2`.

That file needs Pillow and NumPy alone. The package around it takes seconds to import, and torch, in every worker.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image


def _load() -> ModuleType:
    package = importlib.util.find_spec("modeling_notellm2")  # finds, and imports nothing
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "image_notellm2.py"
    spec = importlib.util.spec_from_file_location("pairs._image_notellm2", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_images = _load()

OUTSIDE: str = _images.OUTSIDE
"""See `image_notellm2.OUTSIDE`."""


def decode_image(source: Any) -> Image.Image:
    """See `image_notellm2.decode_image`, whose errors are ValueErrors here."""
    picture: Image.Image = _images.decode_image(source)
    return picture


def is_address(reference: str) -> bool:
    """Whether an image's reference is an address, which nothing fetches, and not a path."""
    return bool(_images.is_address(reference))


def shown(value: Any) -> str:
    """A value in an error message, short however long the value is, and without control characters."""
    return str(_images.shown(value))


__all__ = ["OUTSIDE", "decode_image", "is_address", "shown"]
