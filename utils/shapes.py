"""The data set `shapes`, drawn here: ten classes of 32 pixels that need no download."""
import numpy as np

# class -> distance of the point (x, y) from the outline, negative inside; about 1 from centre to rim
SHAPES = {
    "bar": lambda x, y: np.maximum(abs(x) - 1, abs(y) - 0.3),
    "circle": lambda x, y: np.hypot(x, y) - 0.85,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.8 - np.hypot(x - 0.5, y)),
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.25, np.maximum(abs(x), abs(y)) - 0.95),
    "hourglass": lambda x, y: np.maximum(abs(x) - 0.85, 0.7 * (abs(y) - abs(x)) - 0.08),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.2,
    "semicircle": lambda x, y: np.maximum(np.hypot(x - 0.4, y) - 1, -x),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.75,
    "star": lambda x, y: 0.7 * (np.hypot(x, y) - 0.68 - 0.3 * np.cos(5 * np.arctan2(y, x))),
    "triangle": lambda x, y: np.maximum(x, abs(y) * 0.75 ** 0.5 - x / 2) - 0.5,
}


def draw_shape(outline, count: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [count, 32, 32, 3]: one bright shape, turned, moved, scaled, on stripes, among strokes, blobs and
    noise."""
    row, column = np.mgrid[-15.5:16, -15.5:16].astype(np.float32)

    def draw(low, high, *shape):
        return rng.uniform(low, high, (count, 1, 1, *shape)).astype(np.float32)

    def place(spread):  # the pixels' coordinates in a frame turned and moved at random, [count, 32, 32]
        angle, x, y = draw(0, 2 * np.pi), column - draw(-spread, spread), row - draw(-spread, spread)
        return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    def stripes():
        return draw(0, 0.15, 3) * np.sin(draw(0.3, 2) * place(16)[0])[..., None]

    def paint(distance, colour):        # distance in pixels: the rim is one pixel wide
        np.add(canvas, (0.5 - distance).clip(0, 1)[..., None] * (colour - canvas), out=canvas)

    ground = draw(0, 0.5, 3)
    canvas = ground + stripes()
    for _ in range(2):
        along, across = place(16)
        paint(np.maximum(abs(across) - 1, abs(along) - draw(4, 16)), draw(0, 1, 3))
    radius, (x, y) = draw(9, 13), place(3)
    paint(outline(x / radius, y / radius) * radius, ground + draw(0.25, 0.5, 3) + stripes())
    for _ in range(2):
        paint(np.hypot(*place(16)) - draw(1, 3), draw(0, 1, 3))
    canvas += 0.08 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)


def draw_shapes(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The data set `shapes`, always the same: 500 training, 100 test images a class.   -> images, labels"""
    # a hundred at a time: so they stay in the cache
    hundreds = {"train": range(5), "test": range(5, 6)}[split]
    images = [draw_shape(outline, 100, np.random.default_rng((label, hundred)))
              for label, outline in enumerate(SHAPES.values()) for hundred in hundreds]
    return np.concatenate(images), np.repeat(np.arange(len(SHAPES)), 100 * len(hundreds))
