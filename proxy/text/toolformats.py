"""The formats of tool calls, as data: the marks around a call, how an enforced one is written, the signs of its
templates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mesh.errors import EXIT_USAGE, StartupError
from mesh.tokenizer import Tokenizer
from proxy.text import harmony
from proxy.text.jsoncalls import JsonCall, KimiCall, NamedJson, kimi_id, mistral_calls, mistral_id
from proxy.text.pairs import PairsCall
from proxy.text.pythoncalls import PythonCalls, PythonLines
from proxy.text.toolcalls import CallParser, Functions, MarkedParser, Marks

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class JsonWriting:
    """`opening` arguments `closing`, where `NAME` is the function's and `INDEX` any number."""

    opening: str
    closing: str


@dataclass(frozen=True, slots=True)
class PythonWriting:
    """`name(key=value, ...)`."""


Writing = JsonWriting | PairsCall | PythonWriting


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls."""

    name: str
    marks: Marks | None
    """None: harmony, in which every answer is written, with tools or without."""
    writing: Writing
    """Of an enforced call."""
    signs: tuple[str, ...]
    """A chat template of this format has all of these."""
    without: tuple[str, ...] = ()
    """And none of these, which are signs of others that look alike."""
    aliases: tuple[str, ...] = ()
    """Other engines' names."""
    before: str = ""
    """An enforced answer begins with it; likewise the other two."""
    between: str = "\n"
    after: str = ""
    inner: tuple[str, ...] = ()
    """Marks within a call."""

    def is_in(self, template: str) -> bool:
        return all(sign in template for sign in self.signs) and not any(other in template for other in self.without)

    @property
    def always(self) -> bool:
        """Even an answer without calls is written in this format."""
        return self.marks is None

    @property
    def all_marks(self) -> tuple[str, ...]:
        """Those that a vocabulary may have as special tokens, which texts leave out."""
        if self.marks is None:
            return harmony.MARKS
        return (*self.marks.opening, *self.marks.after, *self.inner)

    def parser(self, functions: Functions, *, parallel: bool = True, thoughts: bool = True) -> CallParser:
        """For one choice. Not `parallel`: the first call ends the answer; not `thoughts`: those that this format tells
        apart are left out."""
        if self.marks is None:
            return harmony.HarmonyParser(functions, parallel=parallel, thoughts=thoughts)
        return MarkedParser(self.marks, functions, parallel=parallel)


DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DEEPSEEK_BEGIN, DEEPSEEK_SEP, DEEPSEEK_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
DEEPSEEK_V3 = NamedJson(
    DEEPSEEK_SECTION[0], (DEEPSEEK_BEGIN, "function", DEEPSEEK_SEP), ("```json",), ("```", DEEPSEEK_END)
)
DEEPSEEK_V31 = NamedJson(DEEPSEEK_SECTION[0], (DEEPSEEK_BEGIN,), (DEEPSEEK_SEP,), (DEEPSEEK_END,))
KIMI_SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
KIMI_BEGIN, KIMI_ARGUMENTS, KIMI_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
KIMI = KimiCall(NamedJson(KIMI_SECTION[0], (KIMI_BEGIN,), (KIMI_ARGUMENTS,), (KIMI_END,)))
QWEN_CODER = PairsCall(
    wrapper=("<tool_call>", "</tool_call>"),
    opening="<function=",
    name_end=">",
    key=("<parameter=", ">"),
    value=("", "</parameter>"),
    closing="</function>",
    gap="\n",
    lines=True,
)
GLM47 = PairsCall(
    wrapper=("", ""),
    opening="<tool_call>",
    name_end="",
    key=("<arg_key>", "</arg_key>"),
    value=("<arg_value>", "</arg_value>"),
    closing="</tool_call>",
    gap="",
)
GLM_INNER = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>")
LLAMA_MARKS = ("<|python_tag|>", "<|python_start|>")
LLAMA = Marks(JsonCall(LLAMA_MARKS), LLAMA_MARKS, bare="{", after=("<|python_end|>",), between=(";",), rereads=True)
LLAMA_WRITING = JsonWriting('{"name": "NAME", "parameters": ', "}")
MISTRAL = Marks(mistral_calls, ("[TOOL_CALLS]",), make_id=mistral_id)
MISTRAL_INNER = ("[ARGS]", "[CALL_ID]")

FORMATS = (
    ToolFormat(
        "harmony",
        None,
        JsonWriting("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", "<|call|>"),
        signs=("<|channel|>", "<|message|>"),
        aliases=("openai", "gpt-oss"),
    ),
    ToolFormat(
        "deepseek_v3",
        Marks(DEEPSEEK_V3, (DEEPSEEK_SECTION[0], DEEPSEEK_BEGIN), after=DEEPSEEK_SECTION[1:]),
        JsonWriting(f"{DEEPSEEK_BEGIN}function{DEEPSEEK_SEP}NAME\n```json\n", f"\n```{DEEPSEEK_END}"),
        signs=(DEEPSEEK_BEGIN, "```json"),
        aliases=("deepseekv3",),
        before=DEEPSEEK_SECTION[0],
        after=DEEPSEEK_SECTION[1],
        inner=(DEEPSEEK_SEP, DEEPSEEK_END),
    ),
    ToolFormat(
        "deepseek_v31",
        Marks(DEEPSEEK_V31, (DEEPSEEK_SECTION[0], DEEPSEEK_BEGIN), after=DEEPSEEK_SECTION[1:]),
        JsonWriting(f"{DEEPSEEK_BEGIN}NAME{DEEPSEEK_SEP}", DEEPSEEK_END),
        signs=(DEEPSEEK_BEGIN,),
        without=("```json",),
        aliases=("deepseekv31",),
        before=DEEPSEEK_SECTION[0],
        between="",
        after=DEEPSEEK_SECTION[1],
        inner=(DEEPSEEK_SEP, DEEPSEEK_END),
    ),
    ToolFormat(
        "kimi_k2",
        Marks(KIMI, (KIMI_SECTION[0], KIMI_BEGIN), after=KIMI_SECTION[1:], make_id=kimi_id),
        JsonWriting(f"{KIMI_BEGIN}functions.NAME:INDEX{KIMI_ARGUMENTS}", KIMI_END),
        signs=(KIMI_BEGIN,),
        before=KIMI_SECTION[0],
        between="",
        after=KIMI_SECTION[1],
        inner=(KIMI_ARGUMENTS, KIMI_END),
    ),
    ToolFormat(
        "qwen3_coder",
        Marks(QWEN_CODER, ("<tool_call>", "<function="), after=("</tool_call>",)),
        QWEN_CODER,
        signs=("<tool_call>", "<function=", "<parameter="),
        aliases=("qwen3_xml", "step3p5", "mimo"),
        inner=("<parameter=", "</parameter>", "</function>"),
    ),
    ToolFormat(
        "glm45",
        Marks(GLM47, ("<tool_call>",)),
        replace(GLM47, gap="\n"),
        signs=("<tool_call>", "</arg_key>\n"),
        without=("<tool_sep>",),
        aliases=("glm",),
        inner=GLM_INNER,
    ),
    ToolFormat(
        "glm47",
        Marks(GLM47, ("<tool_call>",)),
        GLM47,
        signs=("<tool_call>", "</arg_key>"),
        without=("<tool_sep>", "</arg_key>\n"),
        between="",
        inner=GLM_INNER,
    ),
    ToolFormat(
        "hermes",
        Marks(JsonCall(("<tool_call>",), ("</tool_call>",)), ("<tool_call>",), rereads=True),
        JsonWriting('<tool_call>{"name": "NAME", "arguments": ', "}</tool_call>"),
        signs=("<tool_call>",),
        without=("<function=", "<arg_key>", "<tool_sep>"),
        aliases=("qwen", "qwen25", "qwen3_json", "granite4"),
        inner=("</tool_call>",),
    ),
    ToolFormat(
        "mistral",
        MISTRAL,
        JsonWriting('{"name": "NAME", "arguments": ', "}"),
        signs=("[TOOL_CALLS]",),
        without=("[ARGS]",),
        before="[TOOL_CALLS] [",
        between=", ",
        after="]",
        inner=MISTRAL_INNER,
    ),
    ToolFormat(
        "mistral_args",
        MISTRAL,
        JsonWriting("[TOOL_CALLS]NAME[ARGS]", ""),
        signs=("[TOOL_CALLS]", "[ARGS]"),
        aliases=("mistral",),
        between="",
        inner=MISTRAL_INNER,
    ),
    ToolFormat(
        "llama4_pythonic",
        Marks(PythonCalls(("<|python_start|>",)), ("<|python_start|>",), bare="[", after=("<|python_end|>",)),
        PythonWriting(),
        signs=("<|header_start|>", "func_name1("),
        before="<|python_start|>[",
        between=", ",
        after="]<|python_end|>",
    ),
    ToolFormat(
        "olmo3",
        Marks(PythonLines("<function_calls>", "</function_calls>"), ("<function_calls>",)),
        PythonWriting(),
        signs=("<function_calls>",),
        without=("<invoke",),
        before="<function_calls>\n",
        after="\n</function_calls>",
        inner=("</function_calls>",),
    ),
    ToolFormat(
        "pythonic",
        Marks(PythonCalls(), (), bare="["),
        PythonWriting(),
        signs=("func_name1(",),
        without=("<|header_start|>",),
        before="[",
        between=", ",
        after="]",
    ),
    ToolFormat(
        "llama3_json",
        LLAMA,
        LLAMA_WRITING,
        signs=("<|start_header_id|>", '"parameters": '),
        without=("<tool_call>", "func_name1("),
        aliases=("llama3",),
        between="; ",
    ),
    ToolFormat(
        "llama4_json",
        LLAMA,
        LLAMA_WRITING,
        signs=("<|header_start|>", '"parameters": '),
        without=("<tool_call>", "func_name1("),
        between="; ",
    ),
)
"""No chat template has the signs of two of them."""


def detected(template: str) -> ToolFormat | None:
    """The format that a chat template shows its model; None for one that is not known here."""
    return next((f for f in FORMATS if f.is_in(template)), None)


def tool_format(name: str, tokenizer: Tokenizer) -> ToolFormat | None:
    """The format of that name; of several the one in the chat template; `auto`: any that is in the chat template.

    Raises `StartupError` for a name that is not known.
    """
    template = "" if tokenizer.chat is None else tokenizer.chat.text
    if name == AUTO:
        return detected(template)
    known = [f for f in FORMATS if name in (f.name, *f.aliases)]
    if not known:
        names = dict.fromkeys(known for f in FORMATS for known in (f.name, *f.aliases))
        raise StartupError(
            f"--tool-call-parser {name} is not known; give {AUTO} or one of {', '.join(names)}", EXIT_USAGE
        )
    return next((f for f in known if f.is_in(template)), known[0])
