"""The program `qwen-jax` with few shapes to compile, for tests of jobs: python -m job_cli …"""

import sys

import tiny_llm

from qwen_jax import cli

if __name__ == "__main__":
    with tiny_llm.few_shapes():
        sys.exit(cli.main(sys.argv[1:]))
