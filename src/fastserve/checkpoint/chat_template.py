"""Renders chat templates as `transformers` does, in jinja's sandbox and within bounds.

A template comes from strangers. It reaches no attribute that jinja calls unsafe and changes nothing that it
is given. Rounds of loops, calls, and what operators, filters and the output copy are counted, and numbers
are kept small, so that no template hangs or fills the memory that way. Not covered: a single filter or method
that makes a long text of a short one (padding, `replace`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from fastserve.errors import TemplateError
from fastserve.types import JsonObject

MAX_STEPS = 1_000_000  # of one rendering: one or two seconds. A round of a loop is one
_CALL_STEPS = 10
_STEP_ELEMENTS = 256  # characters or list elements that are copied in one step
_MAX_INTEGER_BITS = 4096

_STEPS = "fastserve steps"  # no identifier: templates can neither read nor replace it
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # transformers, chat_template_utils.py


def render_chat(
    template: str | None,
    messages: Sequence[JsonObject],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
    tools: Sequence[JsonObject] | None = None,
    variables: JsonObject | None = None,
) -> str:
    """The prompt that a chat template makes of messages: what `apply_chat_template(tokenize=False)` gives.

    `special_tokens` are known to the template by role, `variables` by name (`enable_thinking`, ...). Encode
    the prompt without adding special tokens: the template writes them.

    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    >>> render_chat(template, [{"role": "user", "content": "Hi"}], special_tokens={"eos_token": "</s>"})
    'user: Hi</s>'

    Raises:
        TemplateError: there is no template, or it is faulty, refuses these messages or exceeds the bounds.
    """
    if template is None:
        raise TemplateError(
            "the model has no chat template", hint="use a model tuned for chat, or complete a plain prompt"
        )
    values = {
        **(variables or {}),
        **special_tokens,
        "messages": [_with_reasoning(message) for message in messages],
        "tools": None if tools is None else list(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        steps = _Steps()
        parts = []
        for part in _compile(template).generate({**values, _STEPS: steps}):
            steps.count_copy(len(part))
            parts.append(part)
        return "".join(parts)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template has an error in line {error.lineno}: {error.message}"
        ) from error
    except (jinja2.TemplateError, RecursionError, MemoryError) as error:
        raise TemplateError(f"the chat template refused: {error}") from error
    except TemplateError:
        raise
    except Exception as error:  # a template is a program: what it raises is its own choice
        raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


class _Steps:
    """What is left of MAX_STEPS in one rendering."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def count(self, num_steps: int = 1) -> None:
        self._left -= num_steps
        if self._left < 0:
            raise TemplateError(f"the chat template takes more than {MAX_STEPS} steps")

    def count_copy(self, num_elements: int) -> None:
        self.count(1 + num_elements // _STEP_ELEMENTS)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, configured as in `transformers`, that also counts and measures."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # The odd names are jinja's: a template may pass an argument called `self`.
        __context.parent[_STEPS].count(_CALL_STEPS)
        if isinstance(__obj, LoopContext) and args:  # the next level of a recursive loop
            args = (_counted(__context, args[0]), *args[1:])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(operator, left, right)
        elif operator == "+":
            context.parent[_STEPS].count_copy(_size(left) + _size(right))
        elif operator == "*":
            sequence, times = (right, left) if isinstance(left, int) else (left, right)
            context.parent[_STEPS].count_copy(_size(sequence) * times if isinstance(times, int) else 0)
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what is trained on; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """`dict` of templates: calls and `fromkeys`, nothing of the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` of templates, without names that begin with an underscore: they reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` must work
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters |= {
        "tojson": _to_json,
        "counted": _counted,
        "measured": _measured,
        "joined": _joined,
    }
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(_Counting().visit(environment.parse(source)))


class _Counting(NodeTransformer):
    """Passes what loops run over, what filters work on and what `~` joins through filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja's naming
        self.generic_visit(node)
        node.iter = _filter(node.iter, "counted")
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.node is not None:  # None is the body of a filter block
            node.node = _filter(node.node, "measured")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "joined")


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _counted(context: Context, iterable: Iterable[Any]) -> Iterator[Any]:
    steps = context.parent[_STEPS]
    for item in iterable:
        steps.count()
        yield item


@jinja2.pass_context
def _measured(context: Context, value: Any) -> Any:
    context.parent[_STEPS].count_copy(_size(value))
    return value


@jinja2.pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    context.parent[_STEPS].count_copy(sum(map(len, texts)))
    return "".join(texts)


def _check_bits(operator: str, left: int, right: int) -> None:
    """Whole numbers grow without end by themselves."""
    bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
    if bits > _MAX_INTEGER_BITS:
        raise TemplateError(f"the chat template computes a number of more than {_MAX_INTEGER_BITS} bits")


def _size(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may name the argument
    return datetime.now().strftime(format)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the namespace attribute {name!r} begins with an underscore")


def _with_reasoning(message: JsonObject) -> JsonObject:
    """Templates know the reasoning of an answer by one of two names, whatever the message calls it."""
    found = [message[name] for name in _REASONING_FIELDS if message.get(name) is not None]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else dict(message)
