"""All corruptions of one image, severity by severity, as a PNG.

    python tools/contact_sheet.py --out docs/corruptions.png
    python tools/contact_sheet.py --image photo.jpg --preset imagenet --out sheet.png

The image is cropped to a centred square, resized to the size of the preset (224 or 32 px),
corrupted, and shown in tiles of `--tile` px. Without `--image` one of the embedded images is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from driftline.core.files import replacing
from driftline.streams import corruptions as C
from driftline.streams.embedded import SHIFT_CLASSES, EmbeddedImages

SIDE = {"imagenet": 224, "cifar": 32}
GAP, HEAD, LABEL = 3, 22, 118  # px


def clean_image(path: Path | None, side: int) -> Image.Image:
    """The square image to corrupt, RGB."""
    if path is None:
        return EmbeddedImages(SHIFT_CLASSES, split="probe", per_class=1, size=side).image(6)
    with Image.open(path) as image:
        return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)


def sheet(image: Image.Image, preset: C.Preset, tile: int, frost: Path | None) -> Image.Image:
    """One row per corruption: its name, the clean image and severities 1 to 5."""
    names = [*C.STANDARD, *C.EXTRA]
    width = LABEL + 6 * (tile + GAP)
    canvas = Image.new("RGB", (width, HEAD + len(names) * (tile + GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=12)

    def column(i: int) -> int:
        return LABEL + i * (tile + GAP)

    def shown(pixels: Image.Image) -> Image.Image:
        small = pixels.width <= tile
        return pixels.resize(
            (tile, tile), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        )

    for i, title in enumerate(("clean", "1", "2", "3", "4", "5")):
        pen.text((column(i) + tile // 2, HEAD // 2), title, "black", font, anchor="mm")
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for row, name in enumerate(names):
        top = HEAD + row * (tile + GAP)
        label = name.replace("_", " ")
        if name == "frost" and frost is None:
            label += "\n(synthetic texture)"
        pen.multiline_text((LABEL - 8, top + tile // 2), label, "black", font, "rm", align="right")
        canvas.paste(shown(image), (column(0), top))
        for severity in range(1, 6):
            result = C.corrupt_batch(x, name, severity, [0], preset=preset, frost_dir=frost)
            pixels = Image.fromarray(result[0].permute(1, 2, 0).contiguous().numpy())
            canvas.paste(shown(pixels), (column(severity), top))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--image", type=Path, help="default: an embedded image")
    add("--preset", choices=C.PRESETS, default="imagenet")
    add("--tile", type=int, default=88, help="side of a tile, px")
    add("--frost", type=Path, help="folder of the frost photographs")
    add("--out", type=Path, default=Path("corruptions.png"))
    args = parser.parse_args()
    image = clean_image(args.image, SIDE[args.preset])
    canvas = sheet(image, args.preset, args.tile, args.frost)
    with replacing(args.out) as part:
        canvas.save(part, "PNG", optimize=True)
    print(
        f"{args.out}: {canvas.width} x {canvas.height} px, {args.out.stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
