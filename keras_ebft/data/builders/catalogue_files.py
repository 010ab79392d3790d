"""Compiled gettext catalogues (`.mo`): finding them and reading them."""

import struct
import sys
from pathlib import Path

FOLDERS = (
    "/usr/share/locale",
    "/usr/local/share/locale",
    "/usr/lib/libreoffice/program/resource",
)
MAGIC = 0x950412DE
CONTEXT_MARK, PLURAL_MARK = b"\x04", b"\x00"


def default_folders():
    """Where programs of this system keep their catalogues."""
    return [*FOLDERS, str(Path(sys.prefix) / "share" / "locale")]


def installed_languages(folders):
    """Sorted names of languages with at least one catalogue, such as `"pt_BR"`."""
    return sorted(
        {
            path.parts[-3]
            for folder in folders
            for path in Path(folder).glob("*/LC_MESSAGES/*.mo")
        }
    )


def catalogues(folders, language):
    """Yields `(domain, path)` of a language's catalogues, sorted by domain."""
    found = {}
    for folder in folders:
        for path in (Path(folder) / language / "LC_MESSAGES").glob("*.mo"):
            found.setdefault(path.stem, path)
    return sorted(found.items())


def read_catalogue(path):
    """Reads a catalogue.

    Args:
        path: path of a `.mo` file.

    Returns:
        dict from message to translation, singular forms only. A message that is there
        in several contexts is left out where they translate it differently.

    Raises:
        ValueError: if the file is no catalogue, or is cut off.
    """
    data = Path(path).read_bytes()
    try:
        return _read(data)
    except (struct.error, UnicodeDecodeError, LookupError) as error:
        raise ValueError(
            f"Expected a compiled gettext catalogue. Received: {str(path)!r}, {error}."
        ) from error


def _read(data):
    order = "<" if struct.unpack_from("<I", data)[0] == MAGIC else ">"
    magic, _, count, messages, translations = struct.unpack_from(f"{order}5I", data)
    if magic != MAGIC:
        raise struct.error("which does not begin as one")
    entries = [
        (
            _text(data, order, messages + 8 * index),
            _text(data, order, translations + 8 * index),
        )
        for index in range(count)
    ]
    charset = _charset(dict(entries).get(b"", b""))
    found = {}
    for message, translation in entries:
        if message and translation:
            text = message.rpartition(CONTEXT_MARK)[2].split(PLURAL_MARK)[0]
            singular = translation.split(PLURAL_MARK)[0].decode(charset)
            found.setdefault(text.decode(charset), set()).add(singular)
    return {text: min(ways) for text, ways in found.items() if len(ways) == 1 and text}


def _text(data, order, place):
    length, start = struct.unpack_from(f"{order}2I", data, place)
    text = data[start : start + length]
    if len(text) != length:
        raise struct.error("which is cut off")
    return text


def _charset(header):
    _, _, rest = header.lower().partition(b"charset=")
    name = rest.split()[0].decode("ascii") if rest.split() else "utf-8"
    return "utf-8" if name == "charset" else name
