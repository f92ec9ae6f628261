"""`python -m decode MODEL_DIR …`: one decode worker; with `--role both` it computes every prompt itself."""

from decode.role import DecodeRole
from worker.main import run

if __name__ == "__main__":
    run("decode", DecodeRole)
