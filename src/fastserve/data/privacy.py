"""Personal data in text, found by patterns and check digits: addresses of mail and machines, numbers of
telephones, cards, accounts and persons. What has no fixed form, such as names, is not found."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import ip_address

from fastserve.data.edit import Edit
from fastserve.option import check_choice

_CHINESE_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999


def _is_card(text: str) -> bool:
    """Luhn's check digit, ISO/IEC 7812-1."""
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 13616: letters as numbers, the first four characters last, rest 1 of 97."""
    compact = text.replace(" ", "")
    number = "".join(str(int(character, 36)) for character in compact[4:] + compact[:4])
    return 15 <= len(compact) <= 34 and int(number) % 97 == 1


def _is_person(text: str) -> bool:
    """A Chinese citizen's number, ISO 7064 MOD 11-2, or a social security number of the United States."""
    if len(text) != 18:
        return text[:3] not in ("000", "666") and text[0] != "9"
    rest = sum(int(digit) * weight for digit, weight in zip(text, _CHINESE_ID_WEIGHTS, strict=False)) % 11
    return "10X98765432"[rest] == text[-1].upper()


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_phone(text: str) -> bool:
    return 8 <= sum(character.isdigit() for character in text) <= 15  # E.164 has 15 at most


def _always(text: str) -> bool:
    return True


_IPV4 = r"\d{1,3}(?:\.\d{1,3}){3}"
_IPV6 = r"[\da-fA-F]{0,4}(?::[\da-fA-F]{0,4}){2,7}"
_PHONES = (
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}",
    r"\(\d{2,4}\) ?\d{3,4}[ .-]?\d{3,4}",
    r"\d{3}[ .-]\d{3}[ .-]\d{4}",
    r"1[3-9]\d{9}",  # a mobile telephone in China
    r"0\d{2,3}-\d{7,8}",
)

_PATTERNS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}"), _always),
    "iban": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _is_iban),
    "person": (re.compile(r"(?<![\w.-])(?:\d{17}[\dXx]|\d{3}-\d{2}-\d{4})(?![\w-])"), _is_person),
    "card": (re.compile(r"(?<![\w.+-])\d(?:[ -]?\d){12,18}(?![\w-])"), _is_card),
    "ip": (re.compile(rf"(?<![\w.:])(?:{_IPV4}|{_IPV6})(?![\w:])"), _is_ip),
    "phone": (re.compile(rf"(?<![\w.+-])(?:{'|'.join(_PHONES)})(?![\w-])"), _is_phone),
}
"""By kind: a pattern, and what more must hold. Those that check digits confirm come first."""

PII_KINDS = tuple(_PATTERNS)


def find_pii(text: str, kinds: Sequence[str] = PII_KINDS) -> list[Edit]:
    """Edits that put [EMAIL], [PHONE] and so on in the place of personal data.

    >>> apply_edits = __import__("fastserve.data.edit", fromlist=["apply_edits"]).apply_edits
    >>> text = "Mail ann@example.org or call +49 30 1234567."
    >>> apply_edits(text, find_pii(text))
    'Mail [EMAIL] or call [PHONE].'

    Raises:
        OptionError: a kind is unknown.
    """
    for kind in kinds:
        check_choice("mask_pii", kind, PII_KINDS)
    found: list[Edit] = []
    for kind, (pattern, is_valid) in _PATTERNS.items():
        if kind not in kinds:
            continue
        for match in pattern.finditer(text):
            start, end = match.span()
            is_free = all(end <= edit.start or start >= edit.end for edit in found)
            if is_free and is_valid(match[0]):
                found.append(Edit(start, end, f"[{kind.upper()}]"))
    return sorted(found)
