"""UTM zones as people write them: 33, 33N, 33 S (hemispheres), 33T (a band of latitude)."""

from __future__ import annotations

BANDS = "CDEFGHJKLMNPQRSTUVWX"  # of latitude, 8 degrees each from 80 south
_LETTERS = BANDS + BANDS.lower()
_BAND_S_NORTH_M = (3.4e6, 4.6e6)  # northings of band S, 32 to 40 degrees north, with a margin


def zone_digits(text: str) -> str:
    """A zone's text without its letter and spaces."""
    return text.strip().rstrip(_LETTERS).rstrip()


def zone_letter(text: str, beside: str = "") -> str:
    """The letter of a zone's text, or the one given `beside` it; empty if there is none."""
    text, beside = text.strip().upper(), beside.strip().upper()
    near = (text[-1:] if text[:-1].strip().isdecimal() else "", beside)
    return next((letter for letter in near if len(letter) == 1 and letter in BANDS), "")


def is_south(letter: str, north: float) -> bool:
    """Whether a northing with this letter counts from the south; S means the hemisphere unless band S holds it."""
    if letter == "S":
        return not _BAND_S_NORTH_M[0] <= north <= _BAND_S_NORTH_M[1]
    return bool(letter) and letter < "N"
