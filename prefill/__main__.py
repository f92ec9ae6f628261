"""`python -m prefill MODEL_DIR …`: one prefill worker."""

from prefill.role import PrefillRole
from worker.main import run

if __name__ == "__main__":
    run("prefill", PrefillRole)
