"""What looks like a secret or personal data, and what only seems to."""

import pytest

from qtune.data.private import personal_data_in, secrets_in


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
