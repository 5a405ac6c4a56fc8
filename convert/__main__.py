"""python -m convert SRC DST, from a checkout: `gpt-oss-jax convert`, or with --to `export`."""

import sys

from gpt_oss_jax import cli


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    back = any(argument.split("=")[0] == "--to" for argument in argv)
    return cli.main(["export" if back else "convert", *argv])


if __name__ == "__main__":
    sys.exit(main())
