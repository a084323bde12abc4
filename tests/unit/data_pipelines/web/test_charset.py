"""Which encoding a page is read by: those of the WHATWG standard, in the order of browsers."""

import pytest

from data_pipelines.web.charset import decode_page, label_in_page, label_of

RUSSIAN = "<p>Привет, мир, это обычная страница на русском языке</p>"


@pytest.mark.parametrize(
    ("content", "declared", "text", "encoding"),
    [
        ("<p>é</p>".encode(), None, "<p>é</p>", "utf-8"),
        ("<p>é</p>".encode("latin-1"), "iso-8859-1", "<p>é</p>", "cp1252"),
        ("<p>“quoted”</p>".encode("cp1252"), "latin1", "<p>“quoted”</p>", "cp1252"),
        (b'<meta charset="koi8-r">' + RUSSIAN.encode("koi8-r"), None, RUSSIAN, "koi8_r"),
        (b'<meta charset="koi8-r">' + RUSSIAN.encode(), "utf-8", RUSSIAN, "utf-8"),  # the header wins
        (b"\xef\xbb\xbf" + RUSSIAN.encode(), "windows-1251", RUSSIAN, "utf-8"),  # the mark wins over the header
        (b"\xff\xfe" + RUSSIAN.encode("utf-16-le"), None, RUSSIAN, "utf-16-le"),
        (b'<meta charset="utf-16">' + RUSSIAN.encode(), None, RUSSIAN, "utf-8"),  # it could not have been read
        (b'<meta charset="no-such-thing">' + RUSSIAN.encode(), None, RUSSIAN, "utf-8"),
        (
            "<p>日本語の文章です。これはテストのためのページです。</p>".encode("shift_jis"),
            "shift_jis",
            "日本語",
            "shift_jis",
        ),
        ("<p>日本語の文章です。これはテストのためのページです。</p>".encode("euc-jp"), None, "日本語", "euc_jp"),
        (RUSSIAN.encode("windows-1251"), None, "Привет", "cp1251"),
        (b"<p>lies \xff\xfe about it</p>", "utf-8", "<p>lies \ufffd\ufffd about it</p>", "utf-8"),
        (RUSSIAN.encode()[:-6] + "я".encode()[:1], None, "русском", "utf-8"),  # cut off within a character
        (b"+ADw-script+AD4-", "utf-7", "+ADw-script+AD4-", "utf-8"),  # not an encoding of the web
        (b"\x1b$)Aabc", "iso-2022-kr", "\ufffd", "replacement"),
    ],
)
def test_encodings(content, declared, text, encoding):
    import codecs

    found, by = decode_page(content, declared)
    assert text in found
    same = by if by == "replacement" else codecs.lookup(by).name
    assert same == (encoding if encoding == "replacement" else codecs.lookup(encoding).name)


@pytest.mark.parametrize(
    ("page", "label"),
    [
        (b"<meta http-equiv=Content-Type content='text/html; charset=koi8-r'>", "koi8-r"),
        (b"<META CHARSET=koi8-r>", "koi8-r"),
        (b"<meta name=description content='charset=koi8-r'>", None),
        (b"<!-- <meta charset=koi8-r> -->", None),
        (b" " * 1024 + b"<meta charset=koi8-r>", None),
        (b"<meta content='text/html;charset=\"koi8-r\"' http-equiv=content-type />", "koi8-r"),
        (b"<metadata charset=koi8-r>", None),
    ],
)
def test_the_meta_element(page, label):
    assert label_in_page(page) == label_of(label)


@pytest.mark.parametrize(
    ("label", "means"),
    [
        ("latin1", "windows-1252"),
        ("ascii", "windows-1252"),
        ("gb2312", "gbk"),
        (" UTF8 ", "utf-8"),
        ("x-sjis", "shift_jis"),
        ("sjis2", None),
    ],
)
def test_labels(label, means):
    import codecs

    found = label_of(label)
    assert (found and codecs.lookup(found).name) == (means and codecs.lookup(means).name)
