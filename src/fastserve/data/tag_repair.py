"""Brings the tags of a file to one scheme, and reports those that are not of the file's."""

from __future__ import annotations

from fastserve.data.problem import DROP, ERROR, ProblemLog
from fastserve.data.row import Row
from fastserve.data.tag_scheme import (
    SchemeEvidence,
    find_neighbours,
    find_violation,
    fitting_schemes,
    read_spans,
    write_tags,
)


class TagReader:
    """Reads the tags of one file's rows: first `see` each row, then `convert` each.

    `source` is the scheme they are in; None tells it from the rows. `target` is the scheme that they get.
    """

    def __init__(self, log: ProblemLog, *, target: str, source: str | None = None) -> None:
        self._log = log
        self._target = target
        self._source = source
        self._evidence = SchemeEvidence.empty()

    def see(self, row: Row) -> None:
        if self._source is None:
            self._evidence.add(fitting_schemes(row["tags"]))

    @property
    def has_seen(self) -> bool:
        return self._evidence.num_sentences > 0

    @property
    def source(self) -> str:
        """The scheme that the rows are in, or most of them."""
        return self._source or self._evidence.best

    def convert(self, row: Row) -> Row | None:
        """The row with tags of the target scheme; None where it is left out.

        Raises:
            DataError: a problem is fatal, and the log raises at once.
        """
        tags = row["tags"]
        if violation := find_violation(tags, self.source):
            others = sorted(fitting_schemes(tags)) if self._source is None else []
            kind = "mixed-tag-scheme" if others else "bad-tag"
            told = f"tags of {others[0]} in a file of {self.source}: " if others else ""
            can_repair = bool(others) or all(tag == "O" or (tag[1:2] == "-" and tag[2:]) for tag in tags)
            action = self._log.report(kind, row.file, row.line, told + violation, can_repair=can_repair)
            if action in (ERROR, DROP):
                return None
        spans = read_spans(tags)
        if self._target == "io" and (joined := find_neighbours(spans)):
            message = f"io joins two entities {joined.label!r} at token {joined.start}"
            if self._log.report("joined-entities", row.file, row.line, message) in (ERROR, DROP):
                return None
        row["tags"] = write_tags(spans, len(tags), self._target)
        return row
