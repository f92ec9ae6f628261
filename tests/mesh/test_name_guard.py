"""Our package `kernels` beside the Hugging Face package of the same name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mesh import environment
from mesh.errors import EXIT_ENVIRONMENT, StartupError

ROOT = Path(__file__).resolve().parents[2]
BUILD_A_MODEL = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
import kernels
assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)
print(sum(p.numel() for p in LlamaForCausalLM(config).parameters()))
"""


def install(name: str, version: str, place: Path) -> None:
    """A distribution as importlib.metadata sees it."""
    folder = place / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_environment_of_the_tests_is_fine() -> None:
    environment.check()


def test_the_other_kernels_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("kernels", "0.9.0", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StartupError, match=r"'kernels' 0\.9\.0 is installed") as caught:
        environment.check()
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "pip uninstall kernels" in str(caught.value)


def test_kvmesh_up_refuses_it_too(tmp_path: Path) -> None:
    install("kernels", "0.9.0", tmp_path)
    found = subprocess.run(
        [sys.executable, "-P", "-m", "mesh.cli", "up"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == EXIT_ENVIRONMENT
    assert len(found.stderr.splitlines()) == 1


def test_our_package_stays_empty_of_what_transformers_probes() -> None:
    source = (ROOT / "kernels" / "__init__.py").read_text()
    assert "import" not in source
    assert "__version__" not in source


def test_transformers_builds_a_model_with_our_root_first() -> None:
    found = subprocess.run(
        [sys.executable, "-c", BUILD_A_MODEL, str(ROOT)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 0
