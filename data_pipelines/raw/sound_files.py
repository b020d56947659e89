"""Whether a sound's file is whole: what its head promises, and where its parts end.

libsndfile takes what is there of a WAV, an MP3 or an Ogg file and says nothing of what is missing.
"""

from __future__ import annotations

import struct
import zlib

UNKNOWN_LENGTH = 0x7FFF_0000
"""Programs that write into a pipe cannot go back to say how long a WAV is, and write a size from here on."""
PCM = 1
BITS_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
MP3_KBITS = {
    (True, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""kbit/s by (whether it is MPEG 1, the layer's bits: 3 is layer I) and the header's number from 1 on."""
FREE = -1


def damage(data: bytes) -> str:
    """Why a sound's file is not whole; "" where nothing says so."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _wav_damage(data)
    if data[:4] == b"OggS":
        return _ogg_damage(data)
    if data[:3] == b"ID3":
        start = _after_id3(data)
        # A tag may stand before another form too, which libsndfile knows.
        return _mp3_damage(data) if start > len(data) or _mp3_frame(data, start) else ""
    return _mp3_damage(data) if _mp3_frame(data, 0) else ""


def _wav_damage(data: bytes) -> str:
    """Walk the parts of a RIFF file: all there, and together as long as the header says."""
    promised = 8 + int.from_bytes(data[4:8], "little")
    end = promised if promised < UNKNOWN_LENGTH else len(data)
    if end > len(data) + 1:
        return f"its header promises {end:,} bytes, the file has {len(data):,}"
    place, block, sounds = 12, 0, 0
    while place + 8 <= end:
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        body, place = place + 8, place + 8 + size
        if not all(32 <= byte < 127 for byte in name):
            return f"no part of a WAV file at byte {body - 8:,}"
        if name == b"data" and size >= UNKNOWN_LENGTH and promised >= UNKNOWN_LENGTH:
            return _inside_a_sample(len(data) - body, block)
        if place > len(data):
            return f"its part {name.decode()!r} promises {size:,} bytes, the file holds {len(data) - body:,}"
        if name == b"fmt " and size >= 16:
            kind, _, rate, byte_rate, block, _ = struct.unpack_from("<HHIIHH", data, body)
            if kind == PCM and byte_rate != rate * block:
                return f"its header has {rate:,} samples of {block} bytes and {byte_rate:,} bytes a second"
        sounds += name == b"data"
        if sounds > 1:
            return "it has two parts of sound, of which only the first would be read"
        if name == b"data" and _inside_a_sample(size, block):
            return _inside_a_sample(size, block)
        place += size % 2
    if abs(place - end) > 1:
        return f"its header promises {end:,} bytes, its parts have {place:,}"
    behind = data[max(place, end) :]
    if behind.strip(b"\0") and not behind.startswith(b"TAG"):
        return f"{len(behind):,} bytes stand behind its end, of which its header knows nothing"
    return ""


def _inside_a_sample(size: int, block: int) -> str:
    return f"its {size:,} bytes of sound end inside a sample of {block}" if block and size % block else ""


def _ogg_damage(data: bytes) -> str:
    """Walk the pages: each whole, with its checksum, in order, and the last one marked so (RFC 3533)."""
    place = 0
    numbers: dict[bytes, int] = {}
    ended: dict[bytes, bool] = {}
    while place < len(data):
        head = data[place : place + 27]
        if len(head) < 27 or head[:4] != b"OggS":
            return f"no Ogg page at byte {place:,}"
        flags, stream, number = head[5], head[14:18], int.from_bytes(head[18:22], "little")
        table = data[place + 27 : place + 27 + head[26]]
        end = place + 27 + len(table) + sum(table)
        if len(table) < head[26] or end > len(data):
            return f"its Ogg page at byte {place:,} is cut off"
        if int.from_bytes(head[22:26], "little") != _ogg_crc(data[place:end]):
            return f"its Ogg page at byte {place:,} has a wrong checksum"
        if stream in numbers and number != numbers[stream] + 1:
            return f"an Ogg page is missing before byte {place:,}"
        numbers[stream], ended[stream], place = number, bool(flags & 4), end
    return "" if all(ended.values()) else "its last Ogg page is missing"


def _ogg_crc(page: bytes) -> int:
    """zlib's polynomial with the bits the other way round, from 0, over the page without its own checksum."""
    blank = page[:22] + bytes(4) + page[26:]
    reversed_ = zlib.crc32(blank.translate(BITS_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int(f"{reversed_:032b}"[::-1], 2)


def _mp3_frame(data: bytes, place: int) -> int:
    """Bytes of the MPEG audio frame at `place`; 0 where there is none, FREE for a free bit rate."""
    if place + 4 > len(data) or data[place] != 0xFF or data[place + 1] & 0xE0 != 0xE0:
        return 0
    version, layer = data[place + 1] >> 3 & 3, data[place + 1] >> 1 & 3
    bits, rate = data[place + 2] >> 4, data[place + 2] >> 2 & 3
    if version == 1 or layer == 0 or bits == 15 or rate == 3:
        return 0
    if bits == 0:
        return FREE
    padding = data[place + 2] >> 1 & 1
    kbits, hertz = MP3_KBITS[version == 3, layer][bits - 1], MP3_RATES[version][rate]
    if layer == 3:
        return (12_000 * kbits // hertz + padding) * 4
    samples = 576 if layer == 1 and version != 3 else 1152
    return samples // 8 * 1000 * kbits // hertz + padding


def _mp3_damage(data: bytes) -> str:
    """Walk the frames up to the tags at the end, and count them against what the first one says."""
    place, end, frames, promised = _after_id3(data), _before_tags(data), 0, -1
    if place > end:
        return "its ID3 tag is cut off"
    while place < end:
        found = _mp3_frame(data, place)
        if not found:
            rest = data[place:end]
            return "" if not rest.strip(b"\0") else f"no MPEG frame at byte {place:,}"
        if found == FREE:  # its frames have no length of their own
            return ""
        if place + found > end:
            return f"its last MPEG frame has {end - place:,} of {found:,} bytes"
        if frames == 0 and promised < 0:
            promised = _promised_frames(data[place : place + found])
            frames -= promised >= 0  # the frame that says so holds no sound
        frames, place = frames + 1, place + found
    if promised > 0 and frames < promised:
        return f"its header promises {promised:,} MPEG frames, the file has {frames:,}"
    return ""


def _after_id3(data: bytes) -> int:
    place = 0
    while data[place : place + 3] == b"ID3" and place + 10 <= len(data):
        size = 0
        for byte in data[place + 6 : place + 10]:
            size = size << 7 | byte & 0x7F
        place += 10 + size + (10 if data[place + 5] & 0x10 else 0)
    while place < len(data) and data[place] == 0:  # padding behind the tag
        place += 1
    return place


def _before_tags(data: bytes) -> int:
    end = len(data)
    if data[end - 128 : end - 125] == b"TAG":
        end -= 128
    while data[end - 32 : end - 24] == b"APETAGEX":
        end -= 32 + int.from_bytes(data[end - 20 : end - 16], "little")
        if data[max(0, end) : end + 8] != b"APETAGEX" and data[end - 32 : end - 24] != b"APETAGEX":
            break
    return max(0, end)


def _promised_frames(frame: bytes) -> int:
    """What the Xing, Info or VBRI header of an encoder says; -1 where there is none, 0 where it does not say."""
    for name in (b"Xing", b"Info"):
        place = frame.find(name, 4, 48)
        if place >= 0:
            flags = int.from_bytes(frame[place + 4 : place + 8], "big")
            return int.from_bytes(frame[place + 8 : place + 12], "big") if flags & 1 else 0
    if frame[36:40] == b"VBRI":
        return int.from_bytes(frame[50:54], "big")
    return -1


def plain_wav(data: bytes) -> tuple[int, int, bytes] | None:
    """(rate, channels, bytes of its samples) of a WAV file of 16 bits; None for anything else."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    place, form = 12, None
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        body, place = place + 8, place + 8 + size + size % 2
        if name == b"fmt " and 16 <= size <= len(data) - body:
            form = struct.unpack_from("<HHIIHH", data, body)
        if name == b"data":
            if (
                form is None
                or form[0] != 1
                or form[5] != 16
                or form[4] != 2 * form[1]
                or not form[1] * form[2]
            ):
                return None
            return form[2], form[1], data[body : min(body + size, len(data))]
    return None
