"""Where the numbers part: ours against a reference, op by op. docs/parity.md says how to use it."""

from gpt_oss_jax.parity.compare import assert_parity as assert_parity, compare as compare
from gpt_oss_jax.parity.golden import Golden as Golden, Recorder as Recorder
from gpt_oss_jax.parity.ours import Streamed as Streamed, values as values
from gpt_oss_jax.parity.report import Report as Report
