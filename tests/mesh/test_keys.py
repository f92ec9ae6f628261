"""The fleet's keys: made once, private, and refused in every form but their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesh import cli
from mesh.errors import EXIT_USAGE, StartupError
from mesh.keys import PROXY, WORKER, create, load

SECRETS = ("proxy.secret", "worker.secret", "transfer.secret")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create(tmp_path / "keys")
    return tmp_path / "keys"


def refusal(folder: Path, kind: str = WORKER) -> str:
    with pytest.raises(StartupError) as refused:
        load(str(folder), kind)
    assert refused.value.exit_code == EXIT_USAGE
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_command_makes_keys_that_only_the_owner_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", str(tmp_path / "fleet")]) == 0
    assert "--keys" in capsys.readouterr().out
    assert (tmp_path / "fleet").stat().st_mode & 0o777 == 0o700
    for name in SECRETS:
        assert (tmp_path / "fleet" / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--what"]])
def test_the_command_without_one_directory_is_a_usage_error(argv: list[str]) -> None:
    assert cli.main(["keys", *argv]) == EXIT_USAGE


def test_keys_that_exist_are_never_replaced(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StartupError, match="not replaced"):
        create(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_each_kind_gets_its_own_and_a_proxy_no_transfer_key(folder: Path) -> None:
    worker, proxy = load(str(folder), WORKER), load(str(folder), PROXY)
    assert worker is not None
    assert proxy is not None
    assert (worker.public, proxy.public) == (worker.worker, worker.proxy)
    assert (len(worker.transfer), proxy.transfer) == (32, b"")
    (folder / "transfer.secret").unlink()
    (folder / "worker.secret").unlink()
    assert load(str(folder), PROXY) == proxy


def test_without_a_directory_there_are_no_keys() -> None:
    assert load("", WORKER) is None


def test_secrets_are_not_shown(folder: Path) -> None:
    keys = load(str(folder), WORKER)
    assert keys is not None
    assert keys.secret.decode() not in repr(keys)
    assert repr(keys.transfer) not in repr(keys)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660])
@pytest.mark.parametrize("name", ["worker.secret", "transfer.secret"])
def test_a_secret_that_others_may_open_is_refused(folder: Path, name: str, mode: int) -> None:
    (folder / name).chmod(mode)
    assert "chmod go-rwx" in refusal(folder)


def test_a_public_key_that_others_may_write_is_refused(folder: Path) -> None:
    (folder / "proxy.public").chmod(0o666)
    assert "written by other users" in refusal(folder)


@pytest.mark.parametrize("name", ["worker.secret", "worker.public", "proxy.public", "transfer.secret"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"x", b"~" * 40, b"0" * 41, b"\xff" * 40, b"0" * 100_000])
@pytest.mark.parametrize("name", ["worker.secret", "proxy.public", "transfer.secret"])
def test_what_is_no_key_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert name in refusal(folder)


def test_halves_of_two_pairs_are_refused(folder: Path, tmp_path: Path) -> None:
    create(tmp_path / "other")
    (folder / "worker.public").write_bytes((tmp_path / "other" / "worker.public").read_bytes())
    assert "not one pair" in refusal(folder)


def test_a_link_is_judged_by_the_file_that_it_leads_to(folder: Path, tmp_path: Path) -> None:
    secret, elsewhere = folder / "worker.secret", tmp_path / "elsewhere"
    known = load(str(folder), WORKER)
    secret.rename(elsewhere)
    secret.symlink_to(elsewhere)
    assert load(str(folder), WORKER) == known
    elsewhere.chmod(0o644)
    assert "can be read by other users" in refusal(folder)


def test_a_pipe_and_a_directory_are_refused(folder: Path) -> None:
    secret = folder / "worker.secret"
    secret.unlink()
    os.mkfifo(secret, 0o600)
    assert "not a file" in refusal(folder)
    secret.unlink()
    secret.mkdir(mode=0o700)
    refusal(folder)
