"""Clients of others, unmodified, at pinned versions: `make test-clients` installs each into an environment of its own.

Without that (in the ordinary test run) everything here is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.scripted import MODEL_DIR, scripted
from tests.e2e.processes import ROOT, Deployment, deployment
from tests.proxy.http_server import Server

HERE = Path(__file__).parent
TOLERANCE = 1e-3
LIMIT_S = 600
pytestmark = pytest.mark.timeout(LIMIT_S + 60)


def command(client: str, program: str) -> str:
    """A program of a client's environment."""
    environments = os.environ.get("KVMESH_CLIENTS")
    if not environments:
        pytest.skip("make test-clients runs this")
    return str(ROOT / environments / client / "bin" / program)


def run(*arguments: str, **environment: str) -> str:
    """Standard output and error; fails unless the program succeeds."""
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def complaints(output: str) -> list[str]:
    return [line for line in output.splitlines() if " WARNING " in line or " ERROR " in line or "Traceback" in line]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    command("", "")
    directory = tmp_path_factory.mktemp("clients")
    with deployment(directory, MODEL_DIR, prefill=1, decode=1, flags=("--dtype", "float32")) as running:
        yield running


def test_langchains_standard_suite() -> None:
    python = command("langchain", "python")
    loops = [f"asyncio_default_{kind}_loop_scope=session" for kind in ("fixture", "test")]
    options = [part for option in ("asyncio_mode=auto", *loops) for part in ("-o", option)]
    suite = str(HERE / "langchain_suite.py")
    with Server(scripted()) as server:
        url = f"http://127.0.0.1:{server.port}"
        pytest_command = (
            python,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "--rootdir",
            str(HERE),
        )
        output = run(*pytest_command, *options, suite, KVMESH_URL=url)
    passed = next(line for line in output.splitlines()[::-1] if " passed" in line)
    assert int(passed.split(" passed")[0].split()[-1]) >= 86, output[-3000:]


def test_guidellm(service: Deployment, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    output = run(
        command("guidellm", "guidellm"),
        "run",
        *("--backend", f"kind=openai_http,target={service.url}"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=8"),
        *("--tokenizer", f"kind=hf_auto,model={MODEL_DIR}"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        *("--output", f"kind=json,path={report}", "--disable-progress"),
        HF_HUB_OFFLINE="1",
    )
    assert not complaints(output)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"]), len(requests["incomplete"])) == (8, 0, 0)
    assert {r["output_metrics"]["text_tokens"] for r in requests["successful"]} == {16}


def test_aiperf(service: Deployment, tmp_path: Path) -> None:
    output = run(
        command("aiperf", "aiperf"),
        *("profile", "-m", service.model_name, "--tokenizer", str(MODEL_DIR), "-u", service.url),
        *("--endpoint-type", "chat", "--streaming", "--concurrency", "2", "--request-count", "8"),
        *("--isl", "64", "--osl", "16", "--extra-inputs", "ignore_eos:true", "--use-server-token-count"),
        *("--no-gpu-telemetry", "--ui", "none", "--artifact-dir", str(tmp_path)),
        HF_HUB_OFFLINE="",  # offline, it takes no directory for a tokenizer
    )
    assert not complaints(output + (tmp_path / "logs" / "aiperf.log").read_text().replace(" - ", " "))
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert (report["request_count"]["avg"], report["error_summary"]) == (8, [])
    assert report["output_sequence_length"]["min"] == report["output_sequence_length"]["max"] == 16


def test_lm_evals_loglikelihoods_are_those_of_transformers(service: Deployment, tmp_path: Path) -> None:
    url = f"{service.url}/v1/completions"
    model = f"model={service.model_name},base_url={url},tokenizer_backend=huggingface,tokenizer={MODEL_DIR}"
    output = run(
        *(command("lm_eval", "python"), "-m", "lm_eval", "--model", "local-completions"),
        *("--model_args", f"{model},num_concurrent=2,max_length=4096", "--tasks", "kvmesh_probe"),
        *("--include_path", str(HERE / "lm_eval"), "--log_samples", "--output_path", str(tmp_path)),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
    )
    assert not complaints(output)
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    expected = LogLikelihoods()
    compared = 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for arguments, [[[got, greedy]]] in zip(
            sample["arguments"].values(), [[r] for r in sample["resps"]], strict=True
        ):
            wanted, wanted_greedy = expected.of(arguments["arg_0"], arguments["arg_1"])
            assert abs(float(got) - wanted) < TOLERANCE
            assert (greedy == "True") == wanted_greedy
            compared += 1
    assert compared == 72


class LogLikelihoods:
    """By transformers, in float32."""

    def __init__(self) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
        self._model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)

    @torch.inference_mode()
    def of(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of the continuation, and whether it is the greedy one."""
        whole = self._tokenizer.encode(context + continuation)
        begin = len(self._tokenizer.encode(context))
        logprobs = self._model(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(begin - 1, len(whole) - 1)
        greedy = all(int(logprobs[i].argmax()) == whole[i + 1] for i in places)
        return sum(float(logprobs[i, whole[i + 1]]) for i in places), greedy
