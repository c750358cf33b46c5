"""API keys: read from a file, kept as hashes, compared in constant time, never shown.

    # keys.txt: one key a line
    sk-lab-7f3a...
    sk-guest-91c0...    # until March

Not here: which routes ask for a key (gate.py).
"""

import hashlib
import hmac
import logging
import os
import stat
from pathlib import Path

from crystallm_kit.errors import ReadError

log = logging.getLogger(__name__)
_SHORTEST = 16  # characters: 16 of base64 are 96 bits, which nobody guesses over a network


class Keys:
    """The keys that are let in; none at all lets everybody in.

    Args:
        keys: The keys themselves; only their SHA-256 is kept.
    """

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def __repr__(self) -> str:
        return f"Keys({len(self._digests)})"

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def from_file(cls, path: str | Path) -> "Keys":
        """Return the keys of a file: one a line; blank lines and what follows "#" are left out.

        Raises:
            ReadError: If it cannot be read, others than its owner may write to it, it holds no key, or a key
                is short or has a blank in it. The message holds no key.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            mode = os.stat(path).st_mode  # noqa: PTH116
        except (OSError, UnicodeDecodeError) as error:
            raise ReadError(f"key file {path}: cannot be read ({type(error).__name__})") from error
        if mode & stat.S_IWOTH:
            raise ReadError(f"key file {path}: everybody may write to it. Run: chmod 600 {path}")
        if mode & stat.S_IROTH:
            log.warning("key file %s: everybody on this machine may read it. Run: chmod 600 %s", path, path)
        found = []
        for number, line in enumerate(text.splitlines(), start=1):
            key = line.partition("#")[0].strip()
            if not key:
                continue
            if len(key) < _SHORTEST or len(key.split()) > 1 or not key.isascii():
                raise ReadError(
                    f"key file {path}, line {number}: expected one key of {_SHORTEST} or more ASCII "
                    "characters without blanks. Make one: openssl rand -hex 24"
                )
            found.append(key)
        if not found:
            raise ReadError(f"key file {path}: no key in it. Make one: openssl rand -hex 24 > {path}")
        return cls(tuple(found))

    def admit(self, authorization: str | None) -> bool:
        """Tell whether an Authorization header ("Bearer KEY") holds one of the keys, or none is needed."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        # every key is compared, so that the time tells nothing of which one was near
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
