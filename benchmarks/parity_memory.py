"""`gpt-oss-jax parity` on a synthetic 20b of full size, held to 12 GB of anonymous memory.

Needs PyTorch and 14 GB of disk: `python benchmarks/parity_memory.py FOLDER [--reference hf]
[--tokens 160]`. The limit is the kernel's, RLIMIT_DATA. Ends with one JSON line.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from gpt_oss_jax.checkpoint import synthetic
from gpt_oss_jax.config import GPT_OSS_20B

LIMIT = 12 * 10**9


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a process has now; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.split("RssAnon:")[1].split()[0]) if "RssAnon:" in status else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint is or will be written")
    parser.add_argument("--reference", choices=("official", "hf"), default="official")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        sys.exit('there is nothing to compare with: pip install "gpt-oss-jax[test]"')
    checkpoint = args.folder / "hf"
    if not checkpoint.exists():
        print(f"{checkpoint}: 14 GB are written", flush=True)
        synthetic.write(GPT_OSS_20B, checkpoint)
    arguments = ["--reference", args.reference, "--length", str(args.tokens)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt_oss_jax", "parity", str(checkpoint), *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
    )
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.1)
    result = {
        "reference": args.reference,
        "tokens": args.tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_anonymous_gb": round(peak / 1e9, 2),
        "exit_code": process.returncode,
    }
    print(json.dumps(result))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
