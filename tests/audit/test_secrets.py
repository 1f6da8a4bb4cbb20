"""What looks like a secret or personal data, and what only seems to."""

import base64
import random

import pytest

from qtune.audit.secrets import CARD, CARD_START, SECRETS, personal_data_in, secrets_in


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("key AKIAIOSFODNN7EXAMPLE.", ["an AWS key"]),
        ("token ghp_" + "a1B2" * 9, ["a GitHub token"]),
        ("-----BEGIN RSA PRIVATE KEY-----", ["a private key"]),
        ("https://joe:hunter2@host.org/x", ["a password in a web address"]),
        ("the password is hard to guess", []),
        ("sk-learn and AKIA are words", []),
    ],
)
def test_secrets_by_their_shape(text: str, kinds: list[str]) -> None:
    assert list(secrets_in(text)) == kinds


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to joe.bloggs@acme.co", ["a mail address"]),
        ("write to joe@example.com or a@b.test", []),
        ("ring +1 650-253-0000 now", ["a phone number"]),
        ("1 + 1 = +2, and +3 more", []),
        ("card 4111 1111 1111 1111", ["a payment card number"]),
        ("card 4111-1111-1111-1112", []),
        ("pi is 3.14159265358979323846", []),
    ],
)
def test_personal_data(text: str, kinds: list[str]) -> None:
    assert list(personal_data_in(text)) == kinds


def jwt() -> str:
    return ".".join(
        base64.urlsafe_b64encode(part).decode().strip("=") for part in (b'{"alg":"none"}', b'{"sub":1}', b"x")
    )


# One for every pattern of every detector, and what else its letters may be.
FOUND = (
    *(f"{start}IOSFODNN7EXAMPLE" for start in ("A3TX", "ABIA", "ACCA", "AKIA", "ASIA")),
    *(f"{aws}_secret_key = '{'a1B2/' * 8}'" for aws in ("aws", "AWS", "Aw\u017f")),
    f"AccountKey={'a1B2' * 22}",
    "https://joe:hunter2@host.org/x",
    *(f"{start}_{'a1B2' * 9}" for start in ("ghp", "gho", "ghu", "ghs", "ghr")),
    *(f"{start}-{'a1B2c' * 4}" for start in ("glpat", "gldt", "glft", "glsoat", "glrt", "glcbt", "glcbt-0a_")),
    f"GR1348941{'a1B2c' * 4}",
    f"glimt-{'a1B2c' * 5}",
    f"glptt-{'a1B2c' * 8}",
    f"glagent-{'a1B2c' * 10}",
    f"gloas-{'a1B2' * 16}",
    jwt(),
    "//registry.npmjs.org/:_authToken= npm_abc",
    f"sk-{'a1B2c' * 4}T3BlbkFJ{'a1B2c' * 4}",
    *(f"BEGIN {kind}PRIVATE KEY" for kind in ("", "DSA ", "EC ", "OPENSSH ", "RSA ", "SSH2 ENCRYPTED ")),
    "BEGIN PGP PRIVATE KEY BLOCK",
    "PuTTY-User-Key-File-2",
    f"pypi-AgEIcHlwaS5vcmc{'a1' * 35}",
    f"pypi-AgENdGVzdC5weXBpLm9yZw{'a1' * 35}",
    f"SG.{'a' * 22}.{'b' * 43}",
    *(f"{start}-1-a" for start in ("xoxa", "XOXB", "xOxp", "xoxo", "xoxs", "xoxr")),
    "HTTPS://hoo\u212as.\u017flack.com/services/Tx/Bx/x",
    f"sk_live_{'a1B2' * 6}",
    f"rk_live_{'a1B2' * 6}",
)


@pytest.mark.parametrize("text", FOUND)
def test_whatever_a_detector_finds_is_found_by_its_signs(text: str) -> None:
    """To look for signs first is ten times as fast as thirteen detectors, and must not lose one of their patterns."""
    plain = [kind for detector, kind, _ in SECRETS if next(iter(detector.analyze_string(text)), None) is not None]
    assert plain
    assert list(secrets_in(f"Look: {text} there.")) == list(secrets_in(text)) == plain


def test_every_pattern_of_every_detector_is_among_those() -> None:
    """A release of detect-secrets may bring a pattern without the signs, which would be passed over."""
    for detector, _, _ in SECRETS:
        for pattern in detector.denylist:
            assert any(pattern.search(text) for text in FOUND), pattern.pattern


def test_whatever_is_a_card_number_begins_like_one() -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("0123456789 -.x", weights=[6] * 10 + [3, 3, 1, 1], k=40)) for _ in range(20_000)]
    found = [text for text in texts if CARD.search(text)]
    assert len(found) > 500
    assert all(CARD_START.search(text) for text in found)
