"""python -m convert SRC DST: any checkpoint into an Orbax one, or with --to into another format.

Thin: the work is in gpt_oss_jax.checkpoint. SRC is what `gpt_oss_jax.load` takes, DST a new folder.
"""

import argparse
import sys

from gpt_oss_jax.checkpoint import export
from gpt_oss_jax.checkpoint.saving import FORMATS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convert", description=__doc__.split(":")[1])
    parser.add_argument("src", help="a folder, repository, URL or alias")
    parser.add_argument("dst", help="a folder that does not exist")
    parser.add_argument("--to", choices=FORMATS, default="orbax", help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        export(args.src, args.dst, args.to)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
