"""Follows a completion through its constraint and tells which tokens may come next.

llguidance keeps the grammars (github.com/guidance-ai/llguidance). A token may come where the text with it can
still become one that the constraint allows; where only one text is left, it is written in the tokens that the
tokenizer makes of it.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.constraint import Choice, Constraint, Grammar, JsonSchema, Regex
from fastserve.engine.narrow import narrow_schema
from fastserve.errors import ConstraintError
from fastserve.types import UInt32Array

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")

logger = logging.getLogger(__name__)

_MOST_LEXER_STATES = 50_000  # of a grammar, at some 2 kB each; a schema of 4,000 names has 6,000
_NUM_KEPT = 64  # compiled constraints

# What programs print: nothing, a space, or a new line with its indentation. Unbounded, as JSON allows it,
# small models fill their context with it.
_JSON_SPACE = r"( |\n[ \t]{0,32})?"

# Rules may refer to each other as deep as the text is long, and the compiler descends by recursion: on a
# common stack a grammar of 10,000 characters ends the process. Measured with chains of rules, terminals and
# references as long as MAX_CONSTRAINT_CHARACTERS allows. It is address space, and used only as deep as it
# goes.
_DEEP_STACK_BYTES = 512 * 2**20
_DEEP_STACK = threading.Lock()  # the size of new stacks is the process's

_NUM_ERROR_CHARACTERS = 300  # of a reason
_MARK = "\x02"  # no text begins with it, and no tokenizer joins it with what follows
_UNSUPPORTED_KEYWORDS = re.compile(r"Unimplemented keys: (\[.*\])")


class Guide:
    """Of one completion. Made by `ConstraintCompiler`."""

    def __init__(self, matcher: llguidance.LLMatcher, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids

    def fork(self) -> Guide:
        """Another one at the same place, for a completion of its own."""
        return Guide(self._matcher.deep_copy(), self._eos_token_ids)

    def advance(self, token_id: int) -> None:
        """A token has been chosen."""
        self._matcher.consume_token(token_id)

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and no token may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why it cannot go on: the grammar has become too complex at this place."""
        return _brief(self._matcher.get_error()) if self._matcher.is_error() else None

    def num_fitting(self, token_ids: Seq[int]) -> int:
        """How many of these tokens may come next, one after the other; none ends the completion."""
        fitting = self._matcher.validate_tokens(list(token_ids))
        ends = (i for i, token_id in enumerate(token_ids[:fitting]) if token_id in self._eos_token_ids)
        return int(next(ends, fitting))

    def fill_masks(self, masks: UInt32Array, drafts: Seq[int] = ()) -> None:
        """Write which tokens may come next, and which behind each of `drafts`, which fit.

        Args:
            masks: [1 + drafts, words], contiguous.
        """
        self._fill(masks[0])
        for count, draft in enumerate(drafts, 1):
            self._matcher.consume_token(draft)
            self._fill(masks[count])
        if drafts:
            self._matcher.rollback(len(drafts))

    def _fill(self, mask: UInt32Array) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)


class ConstraintCompiler:
    """Makes the guides of one model's completions. Any thread may call it.

    >>> compiler = ConstraintCompiler(tokenizer, vocab_size=49152, eos_token_ids=[2])  # doctest: +SKIP
    >>> compiler.compile(Choice(["yes", "no"])).is_over  # doctest: +SKIP
    False

    Args:
        vocab_size: the model's logits in a row, which may be more than the tokenizer has tokens.
        eos_token_ids: tokens that end a completion, allowed where its text is whole.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Seq[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[tuple[type, str], Guide] = OrderedDict()  # the latest last
        self._lock = threading.Lock()

    def compile(self, constraint: Constraint) -> Guide:
        """A guide at the beginning of a completion.

        Raises:
            ConstraintError: the constraint has an error, something that is not supported, or is too complex;
                or the extra [structured] is not installed.
        """
        check_installed()
        key = (type(constraint), constraint.text)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept.fork()
        guide = self._compile(self._vocabulary, constraint)
        with self._lock:
            self._kept[key] = guide
            while len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
        return guide.fork()

    def _make_vocabulary(self) -> llguidance.LLTokenizer:
        """The bytes of every token, as they come out in the text; some tenths of a second."""
        import llguidance

        special = self._tokenizer.special_ids | set(self._eos_token_ids)
        tokens = [self._tokenizer.token_bytes(token_id) or b"" for token_id in range(self._vocab_size)]
        vocabulary = _Vocabulary(
            self._tokenizer,
            tokens=[
                b"\xff" + token if token_id in special else token for token_id, token in enumerate(tokens)
            ],
            eos_token_id=self._eos_token_ids[0],
            special_token_ids=sorted(special),
        )
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary), eos_token=list(self._eos_token_ids)
        )

    def _compile(self, vocabulary: llguidance.LLTokenizer, constraint: Constraint) -> Guide:
        import llguidance

        if isinstance(constraint, JsonSchema):
            grammar = _schema_to_grammar(supported_schema(constraint))
        else:
            grammar = _to_grammar(constraint)
        limits = llguidance.LLParserLimits(max_lexer_states=_MOST_LEXER_STATES)
        matcher = _on_deep_stack(
            lambda: llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        )
        probe = matcher.deep_copy()
        for text in ("", "{"):  # what is too complex at once is refused at once
            probe.try_consume_tokens(vocabulary.tokenize_str(text))
            probe.compute_bitmask()
        if matcher.is_error() or probe.is_error():
            raise _to_error(constraint, matcher.get_error() or probe.get_error())
        return Guide(matcher, frozenset(self._eos_token_ids))


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of tokens, and how a text that goes on from another is
    written, which is what may come where only one text may. Some tokenizers put a space before it, as at the
    beginning of a text; nothing of that kind must come from here.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, tokens: Seq[bytes], eos_token_id: int, special_token_ids: Seq[int]
    ) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self.special_token_ids = special_token_ids
        self.bos_token_id = None
        self._tokenizer = tokenizer
        special = frozenset(special_token_ids)
        self._ids = {token: id_ for id_, token in reversed([*enumerate(tokens)]) if id_ not in special}
        self._longest = max(map(len, tokens))
        self._mark_ids = tokenizer.encode(_MARK, add_special_tokens=False)

    def __call__(self, text: str) -> list[int]:
        data = text.encode()
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        if self._join(token_ids) == data:
            return token_ids
        behind_mark = self._tokenizer.encode(_MARK + text, add_special_tokens=False)
        num_mark = len(self._mark_ids)
        if behind_mark[:num_mark] == self._mark_ids and self._join(behind_mark[num_mark:]) == data:
            return behind_mark[num_mark:]
        return self._split(data)

    def _join(self, token_ids: Seq[int]) -> bytes:
        return b"".join(self.tokens[token_id] for token_id in token_ids)

    def _split(self, data: bytes) -> list[int]:
        """The longest token, and so on, as far as there are any."""
        token_ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._ids), None)
            if end is None:
                break
            token_ids.append(self._ids[data[start:end]])
            start = end
        return token_ids


def supported_schema(constraint: JsonSchema) -> JsonSchema:
    """The schema itself, or, where it has keywords that llguidance lacks, a narrower one without them. Its
    `x-guidance` tells llguidance how JSON is written, in grammars too.

    Raises:
        ConstraintError: it has an error, or something that is not supported.
    """
    check_installed()
    reason = _find_error(constraint.schema)
    if reason is None:
        return _with_space(constraint.schema)
    try:
        narrowed = narrow_schema(constraint.schema)
    except (TypeError, AttributeError, ValueError, KeyError, RecursionError) as error:
        if isinstance(error, ConstraintError):
            raise
        raise _to_error(constraint, reason) from error  # it is no schema at some place
    if _find_error(narrowed) is not None:
        raise _to_error(constraint, reason)
    logger.info("a schema is narrowed, to be followed: %s", _brief(reason))
    return _with_space(narrowed)


def check_installed() -> None:
    """
    Raises:
        ConstraintError: llguidance is not installed, which an installation without extras has no room for.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise ConstraintError(
            f"constraints need llguidance: {error}", hint="pip install 'fastserve-llm[structured]'"
        ) from error


def _with_space(schema: Mapping[str, Any] | bool) -> JsonSchema:
    options = {"x-guidance": {"whitespace_pattern": _JSON_SPACE}}
    return JsonSchema(options if isinstance(schema, bool) else {**schema, **options})


def _find_error(schema: Mapping[str, Any] | bool) -> str | None:
    from llguidance import LLMatcher

    text = JsonSchema(schema).text
    error = _on_deep_stack(lambda: LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text)))
    return str(error) or None


def _schema_to_grammar(constraint: JsonSchema) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(constraint.text))


def _to_grammar(constraint: Regex | Choice | Grammar) -> str:
    from llguidance import LLMatcher

    match constraint:
        case Regex(pattern):
            return str(LLMatcher.grammar_from_regex(pattern))
        case Choice(options):
            texts = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
            return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}"))
        case Grammar(grammar):
            return str(LLMatcher.grammar_from_lark(grammar))


def _on_deep_stack(act: Callable[[], T]) -> T:
    """What `act` gives, or raises, in a thread with room for deep recursion."""
    with _DEEP_STACK, ThreadPoolExecutor(max_workers=1) as executor:
        before = threading.stack_size(_DEEP_STACK_BYTES)
        try:
            future = executor.submit(act)  # which starts the thread
        finally:
            threading.stack_size(before)
        return future.result()


def _to_error(constraint: Constraint, reason: str) -> ConstraintError:
    kind = {JsonSchema: "schema", Regex: "pattern", Choice: "choice", Grammar: "grammar"}[type(constraint)]
    unsupported = _UNSUPPORTED_KEYWORDS.match(reason)
    if reason.startswith("oneOf"):
        return ConstraintError(
            "the schema has oneOf whose options cannot be told apart",
            hint="use anyOf, or tell the options apart by a property that is const in each",
        )
    if unsupported:
        keywords = ", ".join(json.loads(unsupported[1]))
        return ConstraintError(
            f"the schema has keywords that are not supported: {keywords}", hint="say it without them"
        )
    return ConstraintError(f"the {kind} cannot be compiled: {_brief(reason)}")


def _brief(reason: str) -> str:
    """The first line of a reason; the others quote the grammar and the state of the parser, but for the one
    that says what is wrong with an expression."""
    line, *others = reason.strip().splitlines() or ["unknown"]
    line = " ".join([line, *(other.strip() for other in others if line.endswith(":") and "error: " in other)])
    return line if len(line) <= _NUM_ERROR_CHARACTERS else f"{line[:_NUM_ERROR_CHARACTERS]}..."
