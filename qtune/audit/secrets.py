"""Texts that look like secrets or personal data. What was found is named by its kind and never repeated."""

import re
from collections.abc import Iterator

from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.basic_auth import BasicAuthDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.npm import NpmDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.private_key import PrivateKeyDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.stripe import StripeDetector
from phonenumbers import PhoneNumberMatcher

# Those that know a secret by its shape, each with texts of which one, its case folded, stands in all that it finds: to
# look for those first takes a tenth of the time. The library's others go by entropy or by words such as "password"
# beside a value, and cry wolf on prose; its checks with the services that issued a key are never called.
SECRETS = (
    (AWSKeyDetector(), "an AWS key", ("a3t", "abia", "acca", "akia", "asia", "aws")),
    (AzureStorageKeyDetector(), "an Azure storage key", ("accountkey=",)),
    (BasicAuthDetector(), "a password in a web address", ("://",)),
    (GitHubTokenDetector(), "a GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")),
    (
        GitLabTokenDetector(),
        "a GitLab token",
        (
            "glpat-",
            "gldt-",
            "glft-",
            "glsoat-",
            "glrt-",
            "glcbt-",
            "glimt-",
            "glptt-",
            "glagent-",
            "gloas-",
            "gr1348941",
        ),
    ),
    (JwtTokenDetector(), "a JSON web token", ("eyj",)),
    (NpmDetector(), "an npm token", ("_authtoken=",)),
    (OpenAIDetector(), "an OpenAI key", ("t3blbkfj",)),
    (PrivateKeyDetector(), "a private key", ("private key", "putty-user-key")),
    (PypiTokenDetector(), "a PyPI token", ("pypi-",)),
    (SendGridDetector(), "a SendGrid key", ("sg.",)),
    (SlackDetector(), "a Slack token", ("xox", "://")),
    (StripeDetector(), "a Stripe key", ("k_live_",)),
)
MAIL = re.compile(r"\b[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}\b")
NO_ONES_MAIL = re.compile(r"[@.](?:example\.(?:com|org|net)|[\w-]+\.(?:example|test|invalid))$", re.IGNORECASE)
CARD = re.compile(r"(?<![\d.-])[3-6]\d{3}(?:[ -]?\d{3,6}){2,4}(?![\d.-])")
CARD_START = re.compile(r"[3-6]\d{3}[ -]?\d{3}")  # in all that CARD finds, and looked for three times as fast
CARD_DIGITS = range(13, 20)
ABROAD = re.compile(r"\+\d")


def secrets_in(text: str) -> Iterator[str]:
    """The kinds of secret that `text` seems to hold."""
    folded = text.casefold()  # as `re` ignores case: a long s is an s
    for detector, kind, signs in SECRETS:
        if any(sign in folded for sign in signs) and next(iter(detector.analyze_string(text)), None) is not None:
            yield kind


def personal_data_in(text: str) -> Iterator[str]:
    """The kinds of personal data: mail addresses, phone numbers with a country code, payment cards by check digit."""
    if "@" in text and any(NO_ONES_MAIL.search(mail) is None for mail in MAIL.findall(text)):
        yield "a mail address"
    if "+" in text and ABROAD.search(text) and PhoneNumberMatcher(text, None).has_next():
        yield "a phone number"
    if CARD_START.search(text) and any(map(_is_card, CARD.findall(text))):
        yield "a payment card number"


def _is_card(text: str) -> bool:
    """Luhn's check digit (ISO/IEC 7812-1)."""
    digits = [int(char) for char in reversed(text) if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return len(digits) in CARD_DIGITS and (sum(digits[::2]) + sum(doubled)) % 10 == 0
