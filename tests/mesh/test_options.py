"""Command lines from settings, and back."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mesh.options import Group, UsageError, environment_without_flags, parse, parse_groups, parser, to_argv
from mesh.settings import ChatSettings, CompleteSettings, ProxySettings, UpSettings, WorkerSettings

EVERY = (WorkerSettings, ProxySettings, UpSettings, ChatSettings, CompleteSettings)


def refusal(settings: type, *argv: str, **environ: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(settings, argv, environ=environ)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("settings", EVERY)
def test_an_empty_command_line_is_the_defaults(settings: type) -> None:
    assert parse(settings, [], environ={}) == settings()


def test_values_are_converted_to_their_types() -> None:
    proxy = parse(ProxySettings, ["models/x", "--port", "9", "--request-timeout=2.5"], environ={})
    assert (proxy.model, proxy.port, proxy.request_timeout) == ("models/x", 9, 2.5)


def test_a_negative_number_is_a_value() -> None:
    assert parse(ProxySettings, ["--disaggregate-above", "-1"], environ={}).disaggregate_above == -1


def test_a_repeated_flag_replaces_the_default() -> None:
    worker = parse(WorkerSettings, ["--proxy", "tcp://a:1", "--proxy", "tcp://b:2"], environ={})
    assert worker.proxy == ("tcp://a:1", "tcp://b:2")


def test_the_environment_stands_below_the_command_line() -> None:
    environ = {"KVMESH_PORT": "7", "KVMESH_HOST": "::1", "KVMESH_PROXY": "tcp://a:1,tcp://b:2"}
    proxy = parse(ProxySettings, ["--port", "8"], environ=environ)
    assert (proxy.port, proxy.host) == (8, "::1")
    assert parse(WorkerSettings, [], environ=environ).proxy == ("tcp://a:1", "tcp://b:2")


def test_given_defaults_stand_below_everything() -> None:
    assert parse(WorkerSettings, [], environ={}, role="decode").role == "decode"
    assert parse(WorkerSettings, ["--role", "both"], environ={}, role="decode").role == "both"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--prot", "1"], "unknown flag --prot; did you mean --port?"),
        (["--port"], "--port: expected one argument"),
        (["--port", "many"], "--port must be a whole number, not 'many'"),
        (["--port", "65536"], "--port must be at most 65535"),
        (["--request-timeout", "nan"], "--request-timeout must be above 0.0"),
        (["--log-level", "loud"], "--log-level must be one of debug, info, warning, error"),
        (["a", "b"], "'b' is one argument too many"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(argv: list[str], expected: str) -> None:
    assert expected in refusal(ProxySettings, *argv)


def test_an_abbreviated_flag_is_unknown() -> None:
    assert "unknown flag --max-body" in refusal(ProxySettings, "--max-body", "1")


def test_a_wrong_variable_is_named() -> None:
    assert refusal(ProxySettings, KVMESH_PORT="tcp://10.0.0.1:8000").startswith("KVMESH_PORT must be a whole number")


@pytest.mark.parametrize(
    "settings",
    [
        WorkerSettings(model="-odd name", role="both", proxy=(), threads=3, gpu_memory_utilization=0.25),
        WorkerSettings(proxy=("ipc:///a b/c", "tcp://x:1"), drain_timeout=1e-3, device="cuda:1"),
        ProxySettings(model="m", port=0, disaggregate_above=-1, served_model_name=("a=b", "c")),
        ChatSettings(message=("--help", "x"), quiet=True),
        UpSettings(prefill=0, both=2),
    ],
)
def test_arguments_round_trip(settings: object) -> None:
    assert parse(type(settings), to_argv(settings), environ={}) == settings


def test_a_field_can_be_written_even_when_it_is_the_default() -> None:
    assert to_argv(WorkerSettings(), always=("role",)) == ["--role=both"]


def test_groups_share_a_flag_and_hide_another() -> None:
    groups = (Group(ProxySettings), Group(WorkerSettings, hidden=("role",)))
    proxy, worker = parse_groups(groups, ["m", "--log-level", "debug"], prog="x", environ={})
    assert proxy["log_level"] == worker["log_level"] == "debug"
    assert proxy["model"] == worker["model"] == "m"
    assert "role" not in worker
    with pytest.raises(UsageError):
        parse_groups(groups, ["--role", "both"], prog="x", environ={})


def test_a_child_does_not_inherit_flags_from_the_environment() -> None:
    environ = {"KVMESH_PORT": "1", "KVMESH_PROGRESS_FD": "3", "HOME": "/"}
    assert environment_without_flags(environ, (ProxySettings,)) == {"KVMESH_PROGRESS_FD": "3", "HOME": "/"}


@pytest.mark.parametrize("settings", EVERY)
def test_help_lists_every_flag_with_its_default(settings: type) -> None:
    text = parser(settings, "prog", "about").format_help()
    for field in fields(settings):
        name = field.name.upper() if field.metadata.get("positional") else "--" + field.name.replace("_", "-")
        assert name in text
    if settings is WorkerSettings:
        assert "(default: 16)" in text
