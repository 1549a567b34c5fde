"""Procedural stand-ins: images drawn here that a network can really learn, for machines without the real sets.

    mnist        handwritten-looking digits: strokes with jitter, slant and pen width
    cifar10      10 shapes; the texture hints at the shape, but not always; colours mean nothing
    cifar100     10 shapes x 10 textures; each texture prefers a hue
    flowers      painted daisies, dandelions, roses, sunflowers and tulips, 240 x 320 JPEG
    anime_faces  cartoon faces, 64 x 64 JPEG, no labels

Position, size, rotation, colour, background and noise vary in all of them. The same seed draws the same images (to the
byte with the same versions of NumPy and Pillow), and train and test come from different random streams.

Shapes of arrays: B images, P = H * W pixels, S stroke segments.
"""

import colorsys
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .prepared import FORMS, new_set, write_arrays, write_folders

SIZES = {  # train, test; all five take about 20 s on two cores. The faces' last 1,000 are held out of their train/
    "mnist": (16_000, 4_000),
    "cifar10": (15_000, 3_000),
    "cifar100": (15_000, 3_000),
    "flowers": (400, 100),
    "anime_faces": (3_000, 0),
}
FLOWERS = ("daisy", "dandelion", "rose", "sunflower", "tulip")
NOTE = "Drawn by a program, not photographed: a stand-in for {name}. Accuracies say nothing about the real set."

Points = list[tuple[float, float]]
Colour = tuple[int, int, int]


def make(name: str, root: Path, *, sizes: tuple[int, int] | None = None, seed: int = 0) -> Path:
    """Draws the stand-in of a set into <root>/synthetic/<name> and returns that folder.

    Args:
        sizes: number of train and test images, SIZES[name] unless given.

    Raises:
        UserError: when the folder cannot be written.
    """
    counts = dict(zip(("train", "test"), sizes or SIZES[name], strict=True))
    rngs = {split: np.random.default_rng([seed, [*FORMS].index(name), i]) for i, split in enumerate(counts)}
    parent = root / "synthetic"
    facts = {"split": "synthetic", "synthetic": True, "note": NOTE.format(name=name), "seed": seed}
    with new_set(name, parent) as folder:
        if name == "flowers":
            for split, rng in rngs.items():
                for kind in FLOWERS:
                    (folder / split / kind).mkdir(parents=True)
                for index in range(counts[split]):
                    kind = FLOWERS[index % len(FLOWERS)]
                    draw_flower(kind, rng).save(folder / split / kind / f"{index // len(FLOWERS):04d}.jpg", quality=85)
            write_folders(folder, name, FLOWERS, **facts)
        elif name == "anime_faces":
            (folder / "train").mkdir()
            for index in range(counts["train"]):
                draw_face(rngs["train"]).save(folder / "train" / f"{index:05d}.jpg", quality=90)
            write_folders(folder, name, [], **facts)
        else:
            arrays = {}
            for split, rng in rngs.items():
                labels = rng.permutation(np.arange(counts[split], dtype=np.int64) % FORMS[name].classes)
                arrays[split] = draw_digits(labels, rng) if name == "mnist" else draw_shapes(labels, name, rng), labels
            write_arrays(folder, name, arrays, **facts)
    return parent / name


# --- digits -----------------------------------------------------------------------------------------------------------


def _arc(x: float, y: float, rx: float, ry: float, start: float, stop: float) -> Points:
    """Points on an ellipse; degrees run clockwise from the right, as y points down."""
    angles = np.radians(np.linspace(start, stop, max(3, round(abs(stop - start) / 30) + 1)))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


DIGITS: tuple[tuple[list[Points], ...], ...] = (  # for each digit the ways to write it; x and y within ±1
    ([_arc(0, 0, 0.58, 0.95, 0, 360)],),
    ([[(-0.3, -0.6), (0.1, -0.95), (0.1, 0.95)]], [[(0, -0.95), (0, 0.95)]]),
    ([[*_arc(0, -0.42, 0.55, 0.5, 190, 390), (-0.6, 0.92), (0.65, 0.9)]],),
    ([[*_arc(-0.05, -0.47, 0.5, 0.45, 200, 450), *_arc(-0.05, 0.43, 0.58, 0.5, 270, 510)]],),
    (
        [[(-0.5, -0.9), (-0.55, 0.1), (0.6, 0.1)], [(0.35, -0.9), (0.3, 0.95)]],
        [[(0.3, 0.95), (0.3, -0.95), (-0.6, 0.3), (0.65, 0.3)]],
    ),
    ([[(0.55, -0.9), (-0.4, -0.9), (-0.48, -0.15), *_arc(-0.02, 0.33, 0.58, 0.55, 235, 510)]],),
    ([[(0.35, -0.95), (-0.2, -0.5), (-0.53, 0.2), *_arc(0, 0.42, 0.53, 0.5, 190, 545)]],),
    (
        [[(-0.55, -0.88), (0.55, -0.9), (0.15, -0.1), (-0.1, 0.95)]],
        [[(-0.55, -0.88), (0.55, -0.9), (-0.1, 0.95)], [(-0.25, 0.02), (0.45, 0.02)]],
    ),
    ([_arc(0, -0.48, 0.42, 0.44, 0, 360), _arc(0, 0.45, 0.52, 0.48, 0, 360)],),
    ([_arc(0, -0.42, 0.5, 0.48, 0, 360), [(0.5, -0.42), (0.45, 0.3), (0.2, 0.95)]],),
)


def draw_digits(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light digits on black: uint8 [B, 28, 28, 1] for labels [B]."""
    side = 28
    out = np.empty((len(labels), side * side), np.uint8)
    for digit, ways in enumerate(DIGITS):
        of_digit = np.flatnonzero(labels == digit)
        way = rng.integers(len(ways), size=len(of_digit))
        for number, strokes in enumerate(ways):
            rows = of_digit[way == number]
            for start in range(0, len(rows), 128):  # 128 x 784 floats stay in a core's cache
                chunk = rows[start : start + 128]
                out[chunk] = _pen(strokes, len(chunk), side, rng)
    return out.reshape(-1, side, side, 1)


def _pen(strokes: list[Points], count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """`count` renderings of the same strokes, each with its own hand: uint8 [B, P]."""
    heads = np.array([p for stroke in strokes for p in stroke[:-1]])  # [S, 2]
    tails = np.array([p for stroke in strokes for p in stroke[1:]])

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *shape))

    # One smooth displacement field an image, so that strokes bend but stay joined.
    wave, phase, depth = uniform(1, 3, 2, 2), uniform(0, 2 * np.pi, 2), uniform(0, 0.13, 2)
    angle, slant = uniform(-0.2, 0.2), uniform(-0.1, 0.35)
    width, height = uniform(6.0, 9.5), uniform(8.0, 10.0)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.stack([cos * width, -sin * height - slant * width, sin * width, cos * height], 1).reshape(-1, 2, 2)
    centre = (side - 1) / 2 + uniform(-1.8, 1.8, 1, 2)

    def place(points: np.ndarray) -> np.ndarray:  # [S, 2] → pixels [B, S, 2]
        bent = points + depth[:, None] * np.sin(points @ wave + phase[:, None])
        return (bent @ matrix.transpose(0, 2, 1) + centre).astype(np.float32)

    a, b = place(heads), place(tails)
    y, x = np.divmod(np.arange(side * side, dtype=np.float32), np.float32(side))
    nearest = np.full((count, side * side), np.inf, np.float32)
    for s in range(len(heads)):
        dx, dy = (b[:, s] - a[:, s]).T[:, :, None]
        px, py = x - a[:, s, :1], y - a[:, s, 1:]
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
        np.minimum(nearest, (px - along * dx) ** 2 + (py - along * dy) ** 2, out=nearest)
    pen = uniform(0.7, 1.7, 1).astype(np.float32)
    ink = np.clip(0.5 + (pen - np.sqrt(nearest)) / 1.3, 0, 1) * uniform(170, 255, 1).astype(np.float32)
    noise = rng.standard_normal(ink.shape, np.float32) * uniform(2, 14, 1).astype(np.float32)
    return np.clip(ink + noise * (ink > 0), 0, 255).astype(np.uint8)


# --- shapes -----------------------------------------------------------------------------------------------------------

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of x and y, [B, P] each, in units of the shape's size


def _polygon(corners: int, inset: float = 0.0) -> Field:
    """A regular polygon, or with `inset` a star, that reaches to radius 1: positive inside."""

    def field(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        sector = np.pi / corners
        turn = np.abs((np.arctan2(x, y) + sector) % (2 * sector) - sector)  # angle to the nearest corner
        radius = np.hypot(x, y)
        if not inset:
            return math.cos(sector) - radius * np.cos(sector - turn)
        # the edge runs from the corner (1, 0) to the notch at angle `sector`, radius `inset`
        nx, ny = inset * math.sin(sector), 1 - inset * math.cos(sector)
        return (nx - radius * (nx * np.cos(turn) + ny * np.sin(turn))) / math.hypot(nx, ny)

    return field


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.8 - np.hypot(x, 1.15 * y + 0.2 - 0.75 * np.sqrt(np.abs(x)))


SHAPES: tuple[Field, ...] = (
    lambda x, y: 0.9 - np.hypot(x, y),  # disc
    lambda x, y: 0.78 - np.maximum(np.abs(x), np.abs(y)),  # square
    _polygon(3),
    lambda x, y: 0.22 - np.abs(np.hypot(x, y) - 0.75),  # ring
    lambda x, y: np.maximum(  # cross
        np.minimum(0.95 - np.abs(x), 0.28 - np.abs(y)), np.minimum(0.95 - np.abs(y), 0.28 - np.abs(x))
    ),
    _polygon(5, inset=0.42),
    lambda x, y: np.minimum(0.95 - np.hypot(x, y), np.hypot(x - 0.5, y) - 0.65),  # crescent
    _heart,
    lambda x, y: np.minimum(1.1 - np.abs(x), 0.33 - np.abs(y)),  # bar
    lambda x, y: np.minimum(0.95 - np.hypot(x, y), y + 0.15),  # half disc
)
TEXTURES: tuple[Field, ...] = (  # of x and y in units of one period, in [0, 1]
    lambda x, y: np.zeros_like(x),  # plain
    lambda x, y: 0.5 + 0.5 * np.sin(2 * np.pi * x),  # stripes
    lambda x, y: (np.sin(np.pi * x) * np.sin(np.pi * y) > 0).astype(x.dtype),  # checks
    lambda x, y: (np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.3).astype(x.dtype),  # dots
    lambda x, y: 0.5 + 0.5 * np.cos(2 * np.pi * np.hypot(x, y)),  # rings
    lambda x, y: (np.sin(5 * np.arctan2(y, x)) > 0).astype(x.dtype),  # rays
    lambda x, y: (np.minimum(x % 1, y % 1) < 0.25).astype(x.dtype),  # grid
    lambda x, y: (np.sin(2 * np.pi * (x + 0.35 * np.sin(np.pi * y))) > 0).astype(x.dtype),  # waves
    lambda x, y: np.clip(0.5 + 0.3 * y, 0, 1),  # shading
    lambda x, y: (np.sin(127.1 * np.floor(2 * x) + 311.7 * np.floor(2 * y)) > 0).astype(x.dtype),  # speckles
)


def draw_shapes(labels: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    """A textured shape on a cluttered ground each: uint8 [B, 32, 32, 3] for labels [B] of "cifar10" or "cifar100"."""
    out = np.empty((len(labels), 32, 32, 3), np.uint8)
    for start in range(0, len(labels), 256):
        chunk = labels[start : start + 256]
        count = len(chunk)
        if name == "cifar10":
            shape = chunk
            texture = np.where(rng.random(count) < 0.6, chunk, rng.integers(len(TEXTURES), size=count))
            hue = rng.random(count)
        else:
            shape, texture = np.divmod(chunk, len(TEXTURES))
            hue = texture / len(TEXTURES) + rng.normal(0, 0.06, count)
        out[start : start + count] = _paint(shape, texture, hue, rng)
    return out


def _paint(shape: np.ndarray, texture: np.ndarray, hue: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [B, 32, 32, 3] for shape and texture numbers [B] and hues [B], of which 1 is once around."""
    side, count = 32, len(shape)

    def uniform(low: float, high: float, *more: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *(more or (1,)))).astype(np.float32)

    y, x = np.divmod(np.arange(side * side, dtype=np.float32), np.float32(side))
    size, angle, slim = uniform(7.5, 13), uniform(-0.6, 0.6), uniform(0.8, 1.0)
    dx, dy = x - 15.5 - uniform(-4.5, 4.5), y - 15.5 - uniform(-4.5, 4.5)
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / (size * slim)
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / size
    periods, shift = uniform(1.6, 2.4), uniform(-0.3, 0.3, 2)

    inside, pattern = np.empty_like(u), np.empty_like(u)
    for number, field in enumerate(SHAPES):
        rows = shape == number
        inside[rows] = field(u[rows], v[rows])
    for number, field in enumerate(TEXTURES):
        rows = texture == number
        pattern[rows] = field(periods[rows] * u[rows] + shift[rows, :1], periods[rows] * v[rows] + shift[rows, 1:])
    cover = np.clip(0.5 + inside * size, 0, 1)[..., None]  # anti-aliased: one pixel is 1 / size wide

    bright = _rgb(hue, uniform(0.5, 1.0)[:, 0], uniform(0.75, 1.0)[:, 0])[:, None]
    dark = bright * uniform(0.15, 0.5)[..., None]
    figure = bright + pattern[..., None] * (dark - bright)

    ground = _rgb(rng.random(count), uniform(0.0, 0.6)[:, 0], uniform(0.15, 0.85)[:, 0])[:, None]
    coarse = rng.normal(0, 1, (count, 5, 5, 3)).astype(np.float32)
    clutter = np.einsum("yi,bijc,xj->byxc", _BLEND, coarse, _BLEND, optimize=True).reshape(count, -1, 3)
    ground = ground + clutter * uniform(0.03, 0.2)[..., None]
    picture = ground + cover * (figure - ground)

    # A patch of another colour hides a corner of the scene.
    patch = np.maximum(np.abs(x - uniform(0, 31)), np.abs(y - uniform(0, 31))) < uniform(1, 5)
    picture = np.where(patch[..., None], rng.random((count, 1, 3)).astype(np.float32), picture)
    picture = picture * uniform(0.7, 1.1)[..., None]
    picture += rng.standard_normal(picture.shape, np.float32) * uniform(0.01, 0.08)[..., None]
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8).reshape(count, side, side, 3)


def _blend(side: int, knots: int) -> np.ndarray:
    """Linear interpolation from `knots` values to `side` pixels, float32 [side, knots]."""
    position = np.linspace(0, knots - 1, side)[:, None]
    return np.clip(1 - np.abs(position - np.arange(knots)), 0, 1).astype(np.float32)


_BLEND = _blend(32, 5)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV to RGB, all in [0, 1] (hue wraps): float32 [B, 3] from three [B]."""
    ramp = np.abs((hue[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return (value[:, None] * (1 + saturation[:, None] * (np.clip(ramp, 0, 1) - 1))).astype(np.float32)


# --- flowers ----------------------------------------------------------------------------------------------------------


def _colour(rng: np.random.Generator, hue: float, saturation: float, value: float, spread: float = 0.06) -> Colour:
    """A colour near the given one; hue in turns."""
    s, v = (float(np.clip(part + rng.uniform(-spread, spread), 0, 1)) for part in (saturation, value))
    r, g, b = colorsys.hsv_to_rgb((hue + rng.uniform(-spread, spread) / 4) % 1, s, v)
    return round(255 * r), round(255 * g), round(255 * b)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with `share` of it replaced by `b`."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def _petal(x: float, y: float, angle: float, start: float, stop: float, half_width: float, tip: float) -> Points:
    """A leaf shape that points from (x, y) towards `angle`, between two radii; `tip` above 1 moves its belly out."""
    t = np.linspace(0, 1, 9)
    along, across = start + (stop - start) * t, half_width * np.sin(np.pi * t**tip)
    along, across = np.concatenate([along, along[::-1]]), np.concatenate([across, -across[::-1]])
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x + a * cos - c * sin, y + a * sin + c * cos) for a, c in zip(along, across, strict=True)]


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Colour) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _meadow(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An out-of-focus ground: mostly greens, at times sky or earth."""
    base = ((0.28, 0.5, 0.4), (0.25, 0.4, 0.6), (0.56, 0.35, 0.75), (0.09, 0.35, 0.4))[
        rng.choice(4, p=(0.4, 0.3, 0.2, 0.1))
    ]
    coarse = np.array([_colour(rng, *base, spread=0.25) for _ in range(48)], np.uint8).reshape(6, 8, 3)
    soft = Image.fromarray(coarse).resize((width // 8, height // 8)).filter(ImageFilter.BoxBlur(4))
    return soft.resize((width, height), Image.Resampling.BICUBIC)


def draw_flower(kind: str, rng: np.random.Generator) -> Image.Image:
    """One to three flowers of a kind before a blurred meadow: RGB, 320 wide, 240 high."""
    width, height = 640, 480  # drawn at twice the size, then halved: smooth edges
    image = _meadow(rng, width, height)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 12))):  # grass
        x, y = rng.uniform(0, width), rng.uniform(height * 0.5, height * 1.2)
        blade = _petal(x, y, rng.uniform(-2.2, -0.9), 0, rng.uniform(80, 300), rng.uniform(3, 9), 0.7)
        draw.polygon(blade, fill=_colour(rng, 0.3, 0.6, 0.45, 0.15))
    image = image.filter(ImageFilter.BoxBlur(3))
    draw = ImageDraw.Draw(image)
    number = int(rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15)))
    for index in range(number):
        radius = rng.uniform(90, 185) / math.sqrt(number)
        x = width * (index + 0.5) / number + rng.uniform(-1, 1) * (90 / number)
        y = height * 0.42 + rng.uniform(-60, 60)
        foot = x + rng.uniform(-80, 80)
        green = _colour(rng, 0.29, 0.65, 0.45, 0.1)
        draw.line((x, y, foot, height), fill=green, width=round(radius * rng.uniform(0.08, 0.14)))
        for side in (-1, 1):
            if rng.random() < 0.6:
                leaf = _petal(
                    (x + foot) / 2, (y + height) / 2, -1.57 + side * rng.uniform(0.4, 1.1), 0, radius, radius * 0.2, 1
                )
                draw.polygon(leaf, fill=green)
        _FLOWER_HEADS[kind](draw, x, y, radius, rng)
    image = image.reduce(2)
    pixels = np.asarray(image, np.float32) * rng.uniform(0.75, 1.15)
    pixels += rng.standard_normal(pixels.shape, np.float32) * rng.uniform(2, 9)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _rays(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    radii: tuple[float, float],
    count: int,
    fullness: float,
    tip: float,
    rng: np.random.Generator,
    colour: tuple[float, float, float],
) -> None:
    """A wreath of petals, `fullness` times as wide as would just touch."""
    turn = rng.uniform(0, 2 * math.pi)
    half_width = fullness * math.pi * sum(radii) / 2 / count
    for index in range(count):
        angle = turn + 2 * math.pi * index / count + rng.uniform(-0.08, 0.08)
        stop = radii[1] * rng.uniform(0.88, 1.0)
        draw.polygon(_petal(x, y, angle, radii[0], stop, half_width, tip), fill=_colour(rng, *colour))


def _daisy(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: np.random.Generator) -> None:
    tint = (rng.uniform(0, 1), rng.choice((0.03, 0.2)), 0.93)
    _rays(draw, x, y, (r * 0.15, r), int(rng.integers(14, 23)), 0.75, 1.3, rng, tint)
    _disc(draw, x, y, r * rng.uniform(0.22, 0.3), _colour(rng, 0.13, 0.85, 0.9))


def _dandelion(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: np.random.Generator) -> None:
    r *= 0.8
    if rng.random() < 0.3:  # gone to seed
        for _ in range(120):
            angle, reach = rng.uniform(0, 2 * math.pi), r * math.sqrt(rng.uniform(0.1, 1))
            tip = (x + reach * math.cos(angle), y + reach * math.sin(angle))
            grey = _colour(rng, 0.1, 0.06, 0.85)
            draw.line((x, y, *tip), fill=grey, width=1)
            _disc(draw, *tip, r * 0.05, grey)
        _disc(draw, x, y, r * 0.14, _colour(rng, 0.1, 0.4, 0.4))
        return
    for reach, value in ((1.0, 0.85), (0.78, 0.92), (0.55, 0.97), (0.32, 0.9)):
        _rays(draw, x, y, (0, r * reach), 34, 0.9, 1.6, rng, (0.145, 0.9, value))


def _rose(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: np.random.Generator) -> None:
    hue, saturation = ((0.98, 0.8), (0.94, 0.45), (0.12, 0.35), (0.0, 0.08))[rng.choice(4, p=(0.5, 0.25, 0.15, 0.1))]
    turn, rings = rng.uniform(0, 2 * math.pi), 7
    for ring in range(rings):  # overlapping round petals, spiralling inwards and getting darker
        reach = r * 0.62 * (1 - ring / rings)
        for index in range(5):
            angle = turn + ring * 2.4 + 2 * math.pi * index / 5
            value = 0.92 - 0.07 * ring - 0.07 * (index % 2)
            fill = _colour(rng, hue, saturation, value, 0.03)
            _disc(draw, x + reach * math.cos(angle), y + reach * math.sin(angle), 0.08 * r + 0.6 * reach, fill)


def _sunflower(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: np.random.Generator) -> None:
    r *= 1.1
    for reach in (1.0, 0.9):
        _rays(draw, x, y, (r * 0.35, r * reach), int(rng.integers(18, 26)), 0.85, 0.85, rng, (0.125, 0.92, 0.95))
    heart = r * rng.uniform(0.42, 0.52)
    _disc(draw, x, y, heart, _colour(rng, 0.07, 0.7, 0.28))
    for index in range(90):  # seeds on Vogel's spiral
        reach, angle = heart * 0.95 * math.sqrt((index + 0.5) / 90), index * 2.39996
        seed = _colour(rng, 0.08, 0.7, 0.42)
        _disc(draw, x + reach * math.cos(angle), y + reach * math.sin(angle), heart * 0.05, seed)


def _tulip(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: np.random.Generator) -> None:
    hue = float(rng.choice((0.97, 0.9, 0.78, 0.13, 0.05)))
    saturation, foot, tilt = rng.uniform(0.5, 0.9), y + r * 0.7, rng.uniform(-0.25, 0.25)
    for lean, value in ((-0.16, 0.6), (0.16, 0.66), (-0.4, 0.78), (0.4, 0.84), (0.0, 0.94)):  # back to front
        angle = -math.pi / 2 + lean + tilt
        petal = _petal(x - tilt * r * 0.5, foot, angle, 0, r * rng.uniform(1.4, 1.6), r * 0.4, 0.9)
        draw.polygon(petal, fill=_colour(rng, hue, saturation, value))


_FLOWER_HEADS = {"daisy": _daisy, "dandelion": _dandelion, "rose": _rose, "sunflower": _sunflower, "tulip": _tulip}


# --- faces ------------------------------------------------------------------------------------------------------------


def draw_face(rng: np.random.Generator) -> Image.Image:
    """A cartoon face from the front, large-eyed and with coloured hair: RGB, 64 x 64."""
    side = 128  # drawn at twice the size, then halved: smooth edges
    backdrop = _colour(rng, rng.random(), rng.uniform(0, 0.5), rng.uniform(0.4, 1))
    image = Image.new("RGB", (side, side), backdrop)
    draw = ImageDraw.Draw(image)

    def ellipse(x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    skin = _colour(rng, rng.uniform(0.05, 0.09), rng.uniform(0.12, 0.4), rng.uniform(0.8, 1), 0.03)
    shade = _mix(skin, (0, 0, 0), 0.15)
    hue, saturation, value = rng.random(), rng.uniform(0.1, 0.85), rng.uniform(0.2, 0.95)
    hair = _colour(rng, hue, saturation, value, 0.02)
    gloss = _colour(rng, hue, saturation * 0.8, min(1, value + 0.15), 0.02)
    iris = _colour(rng, rng.random(), rng.uniform(0.5, 0.95), rng.uniform(0.5, 0.95))
    line = _mix(hair, (0, 0, 0), 0.75)

    x, y = side / 2 + rng.uniform(-7, 7), side / 2 + rng.uniform(-3, 8)
    turn = rng.uniform(-8, 8)  # where the face looks: its features move, the head does not
    rx, ry, length = rng.uniform(36, 43), rng.uniform(42, 50), rng.uniform(10, 75)
    ellipse(x, y - 12, rx + 10, ry + 4, hair)
    draw.rounded_rectangle((x - rx - 9, y - 12, x + rx + 9, y + length), radius=18, fill=hair)
    draw.rectangle((x - 11, y + 20, x + 11, side), fill=shade)
    clothes = _colour(rng, rng.random(), rng.uniform(0.1, 0.8), rng.uniform(0.2, 0.95))
    ellipse(x, y + ry + 28, rx + 12, 22, clothes)
    chin = [(x - rx, y - 8), (x - rx * 0.88, y + ry * 0.45), (x + turn * 0.4, y + ry), (x + rx * 0.88, y + ry * 0.45)]
    ellipse(x, y - 8, rx, ry * 0.86, skin)
    draw.polygon([*chin, (x + rx, y - 8)], fill=skin)

    eye_w, eye_h, gap = rng.uniform(9, 12), rng.uniform(9, 15), rng.uniform(17, 20)
    eye_y, brow = y + rng.uniform(4, 9), rng.uniform(-4, 4)
    closed, blush = rng.random() < 0.06, _mix(skin, (255, 90, 90), rng.uniform(0, 0.35))
    for sign in (-1, 1):
        ex = x + turn + sign * gap
        if closed:
            draw.arc((ex - eye_w, eye_y - 6, ex + eye_w, eye_y + 8), 20, 160, fill=line, width=3)
        else:
            ellipse(ex, eye_y, eye_w, eye_h, (250, 250, 250))
            ellipse(ex + turn * 0.2, eye_y + 1, eye_w * 0.72, eye_h * 0.88, iris)
            ellipse(ex + turn * 0.2, eye_y + 2, eye_w * 0.36, eye_h * 0.5, (20, 15, 25))
            ellipse(ex + turn * 0.2 - 3, eye_y - eye_h * 0.4, 3, 3.5, (255, 255, 255))
            draw.arc((ex - eye_w - 1, eye_y - eye_h - 2, ex + eye_w + 1, eye_y + eye_h), 190, 350, fill=line, width=4)
        top = eye_y - eye_h - 7
        draw.line((ex - eye_w * 0.8, top + sign * brow, ex + eye_w * 0.8, top - sign * brow), fill=line, width=2)
        ellipse(x + turn + sign * (gap + 5), eye_y + eye_h + 5, 7, 4, blush)
    middle, mouth = x + turn * 1.1, y + ry * 0.66
    draw.line((middle, mouth - 11, middle + 1, mouth - 9), fill=shade, width=2)
    wide, tall = rng.uniform(4, 9), rng.uniform(1, 7)
    if tall > 4:
        draw.chord((middle - wide, mouth - tall, middle + wide, mouth + tall), 0, 180, fill=(190, 70, 80))
    else:
        draw.arc((middle - wide, mouth - tall - 2, middle + wide, mouth + tall), 10, 170, fill=line, width=2)

    # The fringe: locks from the crown down over the forehead, with a glossy one now and then.
    locks, fringe = int(rng.integers(4, 9)), y - rng.uniform(6, 16)
    draw.pieslice((x - rx - 5, y - ry - 14, x + rx + 5, y + ry * 0.6), 190, 350, fill=hair)
    for index in range(locks):
        left = x - rx - 4 + (2 * rx + 8) * index / locks
        right = left + (2 * rx + 8) / locks + 3
        tip = (left + right) / 2 + rng.uniform(-7, 7), fringe + rng.uniform(-6, 14)
        fill = gloss if rng.random() < 0.25 else hair
        draw.polygon([(left, y - ry * 0.5), (right, y - ry * 0.5), tip], fill=fill)
    for sign in (-1, 1):
        lock = [(x + sign * (rx + 9), y - 20), (x + sign * (rx - 4), y - 16), (x + sign * (rx + 2), y + length * 0.6)]
        draw.polygon(lock, fill=hair)
    return image.rotate(rng.uniform(-9, 9), Image.Resampling.BILINEAR, fillcolor=backdrop).reduce(2)
