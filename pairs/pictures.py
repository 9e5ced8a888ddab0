"""Drawn pictures of the simulated world: large figures of one shape and colour (the look) over clutter and noise.

Background, clutter, places, sizes, shades and pixel noise are drawn anew for every picture, so that no two are the
same and only what is large tells the look.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

# Colours by hue (0 to 1). As 8 and 5 have no common divisor, counting through both at once names 40 different looks,
# and any 8 in a row have different colours.
HUES = {
    "red": 0.0,
    "orange": 0.08,
    "yellow": 0.16,
    "green": 0.33,
    "turquoise": 0.48,
    "blue": 0.62,
    "violet": 0.76,
    "pink": 0.9,
}
SHAPES = ("discs", "squares", "triangles", "stripes", "rings")
LOOKS = tuple(f"{list(HUES)[i % len(HUES)]} {SHAPES[i % len(SHAPES)]}" for i in range(len(HUES) * len(SHAPES)))


def draw_picture(look: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Draws an RGB picture of `size` x `size` pixels.

    Args:
        look: one of `LOOKS`.
        size: side in pixels, at least 8.
        rng: what is not the look comes from here.
    """
    colour, shape = look.split(" ")
    light = rng.uniform(0.3, 0.9, (2, 3)) * 0.3 + rng.uniform(0.1, 0.6)  # two greyish corners of a gradient
    slope = np.linspace(0, 1, size)[:, None, None] * rng.uniform() + np.linspace(0, 1, size)[None, :, None] * 0.5
    background = 255 * (light[0] + (light[1] - light[0]) * slope).clip(0, 1)
    picture = Image.fromarray(background.astype(np.uint8), "RGB")
    canvas = ImageDraw.Draw(picture)
    for _ in range(rng.integers(3, 7)):
        _draw_figure(canvas, str(rng.choice(SHAPES)), _shade(rng.uniform(), rng), size * rng.uniform(0.05, 0.12), rng)
    for _ in range(rng.integers(2, 4)):
        hue = HUES[colour] + rng.normal(0, 0.01)
        _draw_figure(canvas, shape, _shade(hue, rng), size * rng.uniform(0.2, 0.32), rng)
    noisy = np.asarray(picture) + rng.normal(0, 10, (size, size, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8), "RGB")


def _shade(hue: float, rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.7, 1), rng.uniform(0.65, 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_figure(
    canvas: ImageDraw.ImageDraw, shape: str, shade: tuple[int, int, int], radius: float, rng: np.random.Generator
) -> None:
    """Draws one figure whose centre lies in the middle half of the canvas or so; `radius` in pixels."""
    x, y = rng.uniform(0.2, 0.8, 2) * canvas.im.size
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "discs":
        canvas.ellipse(box, fill=shade)
    elif shape == "squares":
        canvas.rectangle(box, fill=shade)
    elif shape == "triangles":
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=shade)
    elif shape == "stripes":
        for offset in (-0.8, 0.0, 0.8):
            top = y + offset * radius
            canvas.rectangle((x - 1.5 * radius, top - radius / 5, x + 1.5 * radius, top + radius / 5), fill=shade)
    else:
        canvas.ellipse(box, outline=shade, width=max(1, round(radius / 2.5)))
