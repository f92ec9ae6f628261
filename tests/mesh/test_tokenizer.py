"""The tokenizer: encoding, templates, special tokens, and what is said of a broken model directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import EXIT_MODEL, RequestError, StartupError
from mesh.tokenizer import Tokenizer
from tests.proxy.tiny_tokenizer import BOS, EOS, IM_END, TEMPLATE, VOCAB_SIZE, byte_level, model_dir, sentencepiece

HI = [{"role": "user", "content": "hi"}]


def loaded(path: Path, **config: Any) -> Tokenizer:
    return Tokenizer.load(model_dir(path, **config))


def refusal(path: Path) -> str:
    with pytest.raises(StartupError) as caught:
        Tokenizer.load(path)
    assert caught.value.exit_code == EXIT_MODEL
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_importing_it_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, mesh.tokenizer; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_special_tokens_are_added_only_when_asked_for(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode("hi")[0] == BOS
    assert tokenizer.encode("hi")[1:] == tokenizer.encode("hi", add_special_tokens=False)


def test_add_bos_token_false_overrules_the_post_processor(tmp_path: Path) -> None:
    assert BOS not in loaded(tmp_path, add_bos_token=False).encode("hi")


def test_add_eos_token_appends_it(tmp_path: Path) -> None:
    assert loaded(tmp_path, add_bos_token=True, add_eos_token=True).encode("hi")[-1] == EOS


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    model_dir(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert len(Tokenizer.load(tmp_path).encode("a long text")) > 4


def test_eos_ids_come_from_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    assert loaded(tmp_path).eos_token_ids == (IM_END, EOS)


def test_eos_ids_come_from_the_config_without_a_generation_config(tmp_path: Path) -> None:
    model_dir(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer.load(tmp_path).eos_token_ids == (EOS,)


def test_the_vocabulary_is_the_models(tmp_path: Path) -> None:
    assert loaded(tmp_path).vocab_size == VOCAB_SIZE


def test_the_chat_is_rendered_and_its_special_tokens_become_ids() -> None:
    tokenizer = byte_level()
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(HI) == text
    assert tokenizer.apply_chat_template(HI) == tokenizer.encode(text, add_special_tokens=False)


def test_a_template_file_overrules_the_config(tmp_path: Path) -> None:
    model_dir(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).render_chat(HI) == "file"


def test_tools_select_the_tool_template(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    tokenizer = loaded(tmp_path, chat_template=templates)
    assert tokenizer.render_chat(HI) == "plain"
    assert tokenizer.render_chat(HI, [{"name": "<é>"}]) == '[{"name": "<é>"}]'


def test_template_extras() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ bos_token }}{{ strftime_now('%Y') | length }}{{ enable_thinking }}"
    )
    tokenizer = byte_level(source)
    messages = [{"role": "user", "content": c} for c in "ab"]
    assert tokenizer.render_chat(messages, enable_thinking=False) == "a<s>4False"


def test_a_template_cannot_reach_python() -> None:
    tokenizer = byte_level("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError):
        tokenizer.render_chat(HI)


@pytest.mark.parametrize("source", ["{{ raise_exception('no roles') }}", "{{ 1 // 0 }}", "{{ nothing.at.all }}"])
def test_a_failing_template_is_the_requests_fault(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        byte_level(source).render_chat(HI)
    assert caught.value.status == 400
    assert ("no roles" in caught.value.message) == ("raise" in source)


def test_the_final_message_is_continued() -> None:
    messages = [*HI, {"role": "assistant", "content": "so "}]
    text = byte_level().render_chat(messages, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nso ")


def test_a_final_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(RequestError) as caught:
        byte_level("x").render_chat(HI, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_without_a_template_chat_is_refused() -> None:
    with pytest.raises(RequestError, match="chat template") as caught:
        byte_level(None).render_chat(HI)
    assert caught.value.status == 400


def test_token_bytes_spell_the_text() -> None:
    tokenizer = byte_level()
    text = "hello, é😀\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert tokenizer.token_bytes(EOS) == b"</s>"
    assert tokenizer.token_bytes(VOCAB_SIZE - 1) == b""


def test_token_bytes_of_a_sentencepiece_vocabulary() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.encode("hi é", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == " hi é".encode()


def test_encoding_agrees_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = loaded(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = TEMPLATE
    messages = [*HI, {"role": "assistant", "content": "hello é"}, {"role": "user", "content": "  ok\n"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.render_chat(messages) == expected
    assert ours.encode("hello world é") == theirs.encode("hello world é")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "no") in refusal(tmp_path / "no")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    assert "tokenizer.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    model_dir(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert name in refusal(tmp_path)


def test_a_broken_template_is_refused_at_the_start(tmp_path: Path) -> None:
    model_dir(tmp_path, chat_template="{% for %}")
    assert "chat template" in refusal(tmp_path)
