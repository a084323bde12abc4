"""Whether the bytes of a PNG are those that were written: Pillow decodes changed pixel data without a word."""

from __future__ import annotations

import struct
import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD = struct.Struct(">I4s")


def png_damage(data: bytes) -> str | None:
    """What is wrong with the chunks of a PNG: one that ends too early, or differs from its CRC; None if nothing is.

    Anything else than a PNG is left alone. What follows the end chunk is not looked at, as decoders do not.
    """
    if not data.startswith(_SIGNATURE):
        return None
    view, place = memoryview(data), len(_SIGNATURE)
    while place + 12 <= len(data):
        length, kind = _HEAD.unpack_from(data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return f"chunk {kind.decode('latin-1')} at byte {place} differs from its checksum"
        if kind == b"IEND":
            return None
        place = end + 4
    return f"it ends at byte {len(data)} without its end chunk"
