"""Run the command line as `python -m gpt_oss_jax`; the same program as `gpt-oss-jax`."""

import sys

from gpt_oss_jax.cli import main

sys.exit(main())
