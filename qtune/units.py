"""The only place that converts or prints units. GiB is 1024^3 bytes; a fraction is 0-1, a percent 0-100."""

import re

KIB, MIB, GIB = 1024, 1024**2, 1024**3
MAX_COUNT = 2**31 - 1  # what the libraries' 32-bit counters hold


def format_bytes(count: float) -> str:
    """`3.2 GiB`, `12 MiB`, `640 KiB`: two significant places, the largest unit that gives at least one."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.1f} {unit}" if abs(value) < 10 else f"{value:,.0f} {unit}"
    return f"{count:.0f} B"


def parse_bytes(text: str) -> int | None:
    """Bytes of `6GiB`, `7.5 GiB`, `800 MB` or `8G` (which is GiB, as card makers mean it); None for anything else."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([KMGT])(i?B?)\s*", text, re.IGNORECASE)
    if found is None:
        return None
    number, prefix, rest = found.groups()
    base = 1000 if rest.lower() == "b" else 1024
    size = round(float(number) * base ** ("KMGT".index(prefix.upper()) + 1))
    return size or None


def parse_seconds(text: str) -> float | None:
    """Seconds of `90s`, `10 min` or `1.5h`; None for anything else."""
    found = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,3})?)\s*(s|min|h)\s*", text)
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]] or None if found else None


def format_count(count: float) -> str:
    """`812`, `4,213`, `412k`, `33.0M`, `8.0B`: rows, tokens and parameters."""
    for suffix, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.1f}{suffix}"
    return f"{count / 1e3:.0f}k" if count >= 1e5 else f"{count:,.0f}"


def counted(number: float, noun: str) -> str:
    """`1 row`, `4,213 rows`, `2 canaries`, `1.5 epochs`."""
    told = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    if number == 1:
        return f"{told} {noun}"
    return f"{told} {noun[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{told} {noun}s"


def format_seconds(seconds: float) -> str:
    """`8 s`, `4 min 10 s`, `2 h 05 min`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {secs:02d} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{secs} s"


def format_rate(value: float) -> str:
    """A learning rate as people write it: `2.0e-4`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_percent(fraction: float) -> str:
    """`0.8 %` from 0.008."""
    return f"{100 * fraction:.1f} %"
