"""What a reader would see of a page, in the order of reading: hand-made pages for every hard case."""

import base64
import time

import pytest

from data_pipelines.web.page import extract
from data_pipelines.web.page_images import parse_srcset

URL = "http://example.org/a/page.html"


def shown(html, max_width=2048):
    """Texts as they are, and images as <URL alt | caption>."""
    nodes = extract(html, URL, max_width)["nodes"]
    return [
        node["text"]
        if node["type"] == "text"
        else "<"
        + " ".join([node["url"].removeprefix("http://example.org"), *([node["alt"]] if "alt" in node else [])])
        + (f" | {node['caption']}" if "caption" in node else "")
        + ">"
        for node in nodes
    ]


@pytest.mark.parametrize(
    ("html", "nodes"),
    [
        ("", []),
        ("   ", []),
        ("just text", ["just text"]),
        ("<p>a <b>bold</b> word, <i>and</i>\n more</p>", ["a bold word, and more"]),
        ("<p>gr<b>ow</b>ing</p>", ["growing"]),
        ("<p>one</p><p>two</p>", ["one\n\ntwo"]),
        ("<p>one<p>two", ["one\n\ntwo"]),
        ("one<br>two<br/>three<br><br>four<br> <br>five", ["one\ntwo\nthree\n\nfour\n\nfive"]),
        ("<div>one</div><div>two <span>three</span></div>", ["one\n\ntwo three"]),
        ("<h1>Title</h1>text<hr>more", ["Title\n\ntext\n\nmore"]),
        ("<h1>Title<a class=headerlink href=#t>¶</a></h1>text", ["Title\n\ntext"]),
        ("<ul><li>one<ul><li>inner</li><li>other</li></ul></li><li>two</li></ul>", ["one\n\ninner\nother\n\ntwo"]),
        ("<dl><dt>word</dt><dd>meaning</dd></dl>", ["word\nmeaning"]),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>", ["a b\n1 2"]),
        ("<table><td>1<td>2<tr><td>3</table>after", ["1 2\n3\n\nafter"]),
        ("<pre>\n  def f():\n      return 1\n</pre>after", ["def f():\n      return 1\n\nafter"]),
        ("before<pre>a\n  <span>b</span>\n  c</pre>", ["before\n\na\n  b\n  c"]),
        ("<p>x<!-- hidden -->y<script>z</script><style>p{}</style></p>", ["xy"]),
        ("<p>a&nbsp;b &amp; &lt;c&gt; &eacute;</p>", ["a b & <c> é"]),
        ("<ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp></ruby>字", ["漢字"]),
        ('<p dir="rtl">שלום <b>עולם</b></p><p>مرحبا</p>', ["שלום עולם\n\nمرحبا"]),
        ("<p>un<b>closed <i>tags</p><p>go on", ["unclosed tags\n\ngo on"]),
        ("<b><p>over</b>lap</p>", ["overlap"]),
        ("</p></div>stray<td>cell", ["straycell"]),
        ("<html><head><title>T</title></head><body>b</body></html>tail", ["btail"]),
        ("<template><p>not shown</p></template>shown", ["shown"]),
        (
            "<form><p>in a form</p><input value=x><select><option>no</select><textarea>no</textarea><button>no</button></form>",
            ["in a form"],
        ),
        ("<svg><text>no</text></svg><math><mi>x</mi><annotation>no</annotation></math>", ["x"]),
        ("a\x00b\x0bc", ["ab c"]),
    ],
)
def test_texts_and_what_the_tags_say_of_them(html, nodes):
    assert shown(html) == nodes


@pytest.mark.parametrize(
    "html",
    [
        "<nav>no</nav>",
        "<footer>no</footer>",
        "<header>no</header>",
        "<div id=nav>no</div>",
        "<div class=navbar>no</div>",
        "<div title=Menu>no</div>",
        "<div class='widget footer dark'>no</div>",
        "<section class=site-info>no</section>",
        "<a class=more-link href=x>Read more</a>",
        "<div class=post-date>no</div>",
        "<div class='entry_date'>no</div>",
        "<div hidden>no</div>",
        "<div id=x\nHIDDEN>no</div>",
        "<p style='display: none'>no</p>",
        "<p STYLE='Display :none'>no</p>",
        "<div role=navigation>no</div>",
        "<div ROLE = 'search'>no</div>",
        "<noscript>Please turn scripts on</noscript>",
        "<iframe src=x>no</iframe><object data=x>no</object><video>no</video>",
    ],
)
def test_what_is_left_out(html):
    assert shown(f"<p>before</p>{html}<p>after</p>") == ["before\n\nafter"]


@pytest.mark.parametrize(
    "html",
    [
        "<article><header><h1>yes</h1></header></article>",
        "<div class=updates>yes</div>",
        "<div class=candidate>yes</div>",
        "<div class=main-menu-item>yes</div>",
        "<div id=navigator>yes</div>",
        "<div class=footer-note>yes</div>",
        "<form><table><tr><td>yes</table></form>",
        "<pre>yes</pre>",
        "<details><summary>yes</summary></details>",
    ],
)
def test_what_only_looks_like_it_is_kept(html):
    assert shown(f"<p>before</p>{html}<p>after</p>") == ["before\n\nyes\n\nafter"]


@pytest.mark.parametrize(
    ("html", "nodes"),
    [
        ("a<img src=b.png alt='  two\n words '>c", ["a", "</a/b.png two words>", "c"]),
        ("<img src=/b.png>", ["</b.png>"]),
        ("<img src=../b.png>", ["</b.png>"]),
        ("<img src=?q=1>", ["</a/page.html?q=1>"]),
        ("<img src='//cdn.org/b.png#part'>", ["<http://cdn.org/b.png>"]),
        ("<img src=' a b.png\n'>", ["</a/a%20b.png>"]),
        ("<img src='é.png'>", ["</a/%C3%A9.png>"]),
        ("<img src='a%20b.png?x=1&amp;y=[2]'>", ["</a/a%20b.png?x=1&y=[2]>"]),
        ("<img src='back\\slash.png'>", ["</a/back/slash.png>"]),
        ("<base href='http://other.org/x/'><img src=b.png>", ["<http://other.org/x/b.png>"]),
        ("<base href='/x/'><base href='/y/'><img src=b.png>", ["</x/b.png>"]),
        (
            "<img><img src=''><img src='#x'><img src='javascript:x'><img src='file:///etc/passwd'><img src='http://'>t",
            ["t"],
        ),
        ("<img src='http://[bad/x.png'>t", ["t"]),
        ("<img src=s.png srcset='m.png 640w, l.png 1600w, xl.png 4000w'>", ["</a/l.png>"]),
        ("<img src=s.png srcset='a.png, b.png 2x'>", ["</a/b.png>"]),
        ("<img src=s.png srcset='xl.png 4000w, xxl.png 8000w'>", ["</a/xl.png>"]),
        (
            "<img srcset='http://example.org/i,w_300/a.jpg 300w, http://example.org/i,w_900/a.jpg 900w'>",
            ["</i,w_900/a.jpg>"],
        ),
        (
            "<picture><source type=image/avif srcset='x.avif 900w'><source srcset='x.webp 900w'><img src=x.jpg alt=A></picture>",
            ["</a/x.webp A>"],
        ),
        ("<picture><source type=image/avif srcset=x.avif><img src=x.jpg></picture>", ["</a/x.jpg>"]),
        ("<img src=blank.gif data-src=real.jpg>", ["</a/real.jpg>"]),
        ("<img src='data:image/gif;base64,R0lGOD' data-lazy-src=real.jpg>", ["</a/real.jpg>"]),
        ("<img src=blank.gif data-srcset='a.jpg 300w, b.jpg 600w' data-src=c.jpg>", ["</a/b.jpg>"]),
        ("<img src=real.jpg data-src='{\"json\": 1}'>", ["</a/real.jpg>"]),
        ("<img src=blank.gif><noscript><img src=real.jpg alt=A></noscript>", ["</a/real.jpg A>"]),
        ("<img data-src=real.jpg><noscript><img src=real.jpg></noscript>", ["</a/real.jpg>"]),
        (
            "<img class=lazy src='data:image/gif;base64,R0lGOD'><noscript><img src=real.jpg></noscript>x",
            ["</a/real.jpg>", "x"],
        ),
        ("<img src=one.jpg>text<noscript><img src=two.jpg></noscript>", ["</a/one.jpg>", "text", "</a/two.jpg>"]),
        (
            "<figure><img src=a.jpg alt=A><figcaption>the <b>caption</b></figcaption></figure>x",
            ["</a/a.jpg A | the caption>", "the caption\n\nx"],
        ),
        ("<p>t<a href=x><img src=a.jpg></a>u</p>", ["t", "</a/a.jpg>", "u"]),
        ("<amp-img src=a.jpg></amp-img>", ["</a/a.jpg>"]),
        ("<table><tr><td><img src=a.jpg><td>b</table>", ["</a/a.jpg>", "b"]),
        ("<div style='display:none'><img src=a.jpg></div>t", ["t"]),
        ("<img src=a.jpg style='display:none' data-src=b.jpg>", ["</a/b.jpg>"]),
    ],
)
def test_images(html, nodes):
    assert shown(html) == nodes


def test_a_lazy_gallery_is_read_image_by_image():
    items = "".join(
        f"<li><img src='data:image/gif;base64,R0lGOD' data-original='g/{n}.jpg' alt='{n}'><noscript><img src='g/{n}.jpg'></noscript> {n}</li>"
        for n in range(30)
    )
    expected = [part for n in range(30) for part in (f"</a/g/{n}.jpg {n}>", str(n))]
    assert shown(f"<ul class=gallery>{items}</ul>") == expected


def test_the_sizes_a_page_gives_an_image():
    found = extract("<img src=a.jpg width=300 height='200px'><img src=b.jpg width='100%' height=0>", URL, 2048)["nodes"]
    assert (found[0]["rendered_width"], found[0]["rendered_height"]) == (300, 200)
    assert not {"rendered_width", "rendered_height"} & set(found[1])


def test_images_within_the_page():
    large = bytes(range(256)) * 8
    html = f"<img src='data:image/png;base64,{base64.b64encode(large).decode()}'><img src='data:image/png;base64,iVBORw0KGgo='>"
    [node] = extract(html, URL, 2048)["nodes"]
    assert node["content"] == large


def test_the_head():
    html = (
        '<html lang="en-GB"><head><title> A\n title </title><meta name=ROBOTS content="NoAI, noimageai">'
        '<meta name=robots content=nofollow><meta name="tdm-reservation" content="1"></head><body>b'
    )
    found = extract(html, URL, 2048)
    assert (found["title"], found["language"]) == ("A title", "en-GB")
    assert found["meta"] == {"robots": "noai, noimageai, nofollow", "tdm-reservation": "1"}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("", []),
        ("a.jpg", [("a.jpg", 1)]),
        (" a.jpg 1x , b.jpg 2x", [("a.jpg", 1), ("b.jpg", 2)]),
        ("a.jpg 300w 200h, b.jpg 600w", [("a.jpg", 300), ("b.jpg", 600)]),
        ("a.jpg,b.jpg 2x", [("a.jpg,b.jpg", 2)]),
        ("a.jpg, b.jpg", [("a.jpg", 1), ("b.jpg", 1)]),
        (",, a.jpg wide,", [("a.jpg", 1)]),
        ("data:image/png;base64,AAAA 1x, b.jpg 2x", [("b.jpg", 2)]),
    ],
)
def test_srcset(value, found):
    assert parse_srcset(value) == found


def test_3000_nested_elements_keep_their_text():
    for tag in ("div", "b", "span", "ul><li"):
        opening = f"<{tag}>" * 3000
        assert shown(f"{opening}deep<img src=a.jpg>text") == ["deep", "</a/a.jpg>", "text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    [
        "<p>Some words of a <b>paragraph</b> with a <a href=x>link</a>.</p>",
        "<div class=post-date>x</div><div><img src=a.jpg><noscript><img src=b.jpg></noscript></div>",
        "<figure><img src=a.jpg><figcaption>c</figcaption></figure>",
    ],
)
def test_time_is_in_proportion_to_size(piece):
    def seconds(size):
        html = piece * (size // len(piece))
        times = []
        for _ in range(2):
            begun = time.process_time()
            extract(html, URL, 2048)
            times.append(time.process_time() - begun)
        return min(times)

    # Ten times the size: a cost by the square of the size would be a hundred times as much.
    assert seconds(1_500_000) < 10 * 5 * max(seconds(150_000), 0.005)
