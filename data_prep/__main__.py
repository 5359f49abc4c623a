"""``python -m data_prep demo FOLDER`` and ``python -m data_prep encode SOURCE FOLDER``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from data_prep.build import Vision, demo, encode
from megatron_dit.cli import Parser, add_command
from megatron_dit.errors import UserError


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m data_prep", description="Pictures and captions to shards of latents and text.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, text: str, example: str) -> Parser:
        return add_command(commands, name, text, f"python -m data_prep {example}")

    embedded = add("demo", "Draw the embedded dataset of captioned scenes.", "demo data/scenes")
    embedded.add_argument("folder", type=Path, help="folder to make")
    embedded.add_argument("--pictures", type=int, default=20000, help="number of pictures")
    embedded.add_argument("--seed", type=int, default=0, help="seed of the scenes and the tiny T5")

    real = add("encode", "Encode webdataset shards of pictures and captions.", "encode 'photos/*.tar' data/photos")
    real.add_argument("source", help="glob of tars with KEY.jpg|png and KEY.txt")
    real.add_argument("folder", type=Path, help="folder to make")
    real.add_argument("--size", type=int, default=256, help="side of the square pictures, in pixels")
    real.add_argument("--text-encoder", default="tiny", help="T5 folder or hub name; tiny: a random one is built")
    real.add_argument("--tokens", type=int, default=120, help="text tokens kept of a caption")
    real.add_argument("--classes", type=int, default=0, help="classes of KEY.cls; captions may then be missing")
    real.add_argument("--vae", default="pixels", help="AutoencoderKL folder or hub name; pixels: none")
    for command in (embedded, real):
        command.add_argument("--vision-encoder", help="DINOv2 folder or hub name: features for REPA are kept too")
        command.add_argument("--patch", type=int, default=2, help="the model's patch_size, which the features fit")
    try:
        parsed = parser.parse_args(arguments)
        if parsed.patch < 1:
            raise UserError(f"--patch {parsed.patch}: expected at least 1")
        vision = Vision(parsed.vision_encoder, parsed.patch) if parsed.vision_encoder else None
        if parsed.command == "demo":
            if parsed.pictures < 1:
                raise UserError(f"--pictures {parsed.pictures}: expected at least 1")
            index = demo(parsed.folder, parsed.pictures, parsed.seed, vision=vision)
        else:
            source, size, tokens = parsed.source, parsed.size, parsed.tokens
            named = {"vision": vision, "classes": parsed.classes}
            index = encode(source, parsed.folder, size, parsed.text_encoder, parsed.vae, tokens, **named)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {index.samples} samples in {len(index.shards)} shards to {parsed.folder}")
    if parsed.json:
        figures = {"samples": index.samples, "shards": [asdict(shard) for shard in index.shards]}
        Path(parsed.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
