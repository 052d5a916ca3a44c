"""Numbers as people read them."""

from __future__ import annotations

import math


def bytes_text(size_bytes: int | None) -> str:
    """A number of bytes in decimal units, three digits: "1.09 MB"."""
    return "n/a" if size_bytes is None else _scaled(size_bytes, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: int | None) -> str:
    """A count in decimal units, three digits: "40.6 M"."""
    return "n/a" if count is None else _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def _scaled(number: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(number) >= 999.5 and step < len(units) - 1:
        number /= 1000
        step += 1
    return f"{_three_digits(number) if step else f'{number:.0f}'} {units[step]}"


def _three_digits(number: float) -> str:
    number = float(f"{number:.3g}")
    digits = 2 - math.floor(math.log10(abs(number))) if number else 2
    return f"{number:.{max(0, digits)}f}"


def milliseconds_text(time_ms: float) -> str:
    """A duration, three digits: "0.41 ms", "12.3 ms", "1.20 s"."""
    if time_ms >= 1000:
        return f"{_three_digits(time_ms / 1000)} s"
    if time_ms < 1:
        return f"{_three_digits(time_ms * 1000)} µs"
    return f"{_three_digits(time_ms)} ms"


def percent_text(ratio: float) -> str:
    """A share of 0 to 1 as a percentage with two decimals, never rounded up to 100 %."""
    if ratio < 1 and f"{ratio * 100:.2f}" == "100.00":
        return "99.99 %"
    return f"{ratio * 100:.2f} %"


def smaller_text(before: float, after: float) -> str:
    """What became of a size: "3.52× smaller", "1.10× larger", "+0.2 %", "same"."""
    if before == after:
        return "same"
    if after == 0 or before == 0:
        return ""
    ratio = before / after
    if 0.995 < ratio < 1.005:
        return change_text(before, after)
    return f"{ratio:.2f}× smaller" if ratio >= 1 else f"{1 / ratio:.2f}× larger"


def change_text(before: float, after: float) -> str:
    """What became of a number, as a percentage: "−30 %", "+2.1 %", "same"."""
    if before == after:
        return "same"
    if before == 0:
        return ""
    change = round((after / before - 1) * 100, 3)
    digits = 0 if abs(change) >= 10 else 1 if abs(change) >= 0.1 else 2
    return f"{'−' if change < 0 else '+'}{abs(change):.{digits}f} %"


def decibel_text(sqnr_db: float) -> str:
    """An SQNR: "31.2 dB", or "identical" when nothing differs."""
    if math.isinf(sqnr_db):
        return "identical" if sqnr_db > 0 else "no signal"
    return f"{sqnr_db:.1f} dB".replace("-", "−")


def cosine_text(cosine: float) -> str:
    """A cosine: "0.9871", near 1 as the distance from it: "1 − 3e-6"."""
    if cosine == 1 or cosine < 0.9999:
        return "1" if cosine == 1 else f"{cosine:.4f}".replace("-", "−")
    digit, _, exponent = f"{1 - cosine:.0e}".partition("e")
    return f"1 − {digit}e{int(exponent)}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 change", "12 changes", "2 passes"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith(('s', 'x', 'sh', 'ch')) else 's'}"
