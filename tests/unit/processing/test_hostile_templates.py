"""A chat template that loops for ever, fills the memory, fails or reaches out is one sentence, soon."""

import time

import pytest

from m4train.errors import BadSample, ConfigError
from m4train.processing import template_sandbox
from m4train.processing.chat import IDEFICS2_TEMPLATE, IDEFICS3_TEMPLATE, IDEFICS_TEMPLATE, ChatTemplate

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% set b = range(99999) | list %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ range(99999) | map('center', 99999) | join }}",
    "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
]
HUGE = [
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * 'x' }}",
    "{{ [1] * 10**9 }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ 'x\t'.expandtabs(10**9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '%*d' | format(999999999, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ 'x' | indent(10**9, true) }}",
    "{{ 9**(9**9) }}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aaaaaaaaaaaaaaaa') %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x | replace('a', 'aaaaaaaaaaaaaaaa') %}{% endfor %}",
    "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 1 }}",
]
FAILING = [
    "{{ 1 / 0 }}",
    "{{ messages[99].x }}",
    "{{ messages[0]['content'][0]['text'].nothing() }}",
    "{{ raise_exception('no') }}",
    "{% include 'x' %}",
    "{{ 'a' + 1 }}",
    "{{ [] | first | upper | int('x', base=99) }}{{ {}['x']['y'] }}",
    "{{ messages | sum }}",
    "{{ strftime_now(7) }}",
]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ messages.append(1) }}",
    "{{ ('' | attr('__class__')).__mro__ }}",
]
UNPARSED = ["{% if %}", "{{", "{% for a in %}", "{{ " + "(" * 3000 + ")" * 3000 + " }}", "{% generation %}"]


@pytest.fixture(autouse=True)
def _sooner(monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 1.0)
    monkeypatch.setattr(template_sandbox, "STEPS", 200_000)


@pytest.mark.parametrize("source", [*ENDLESS, *HUGE])
def test_what_has_no_end_is_stopped(source):
    before = time.monotonic()
    with pytest.raises((ConfigError, BadSample)) as refusal:
        ChatTemplate(source).render(MESSAGES)
    assert time.monotonic() - before < 30  # without a limit it would be hours
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("source", [*FAILING, *ESCAPES])
def test_what_fails_or_reaches_out_is_one_sentence(source):
    try:
        text = ChatTemplate(source).render(MESSAGES)
    except (ConfigError, BadSample) as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017
    else:  # a variable that is not there is empty, as jinja2 has it
        assert not any(word in text for word in ("class", "object", "uid=", "function"))


@pytest.mark.parametrize("source", UNPARSED)
def test_what_does_not_parse_is_one_sentence(source):
    with pytest.raises(ConfigError, match="cannot be parsed"):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize("source", [IDEFICS_TEMPLATE, IDEFICS2_TEMPLATE, IDEFICS3_TEMPLATE])
def test_a_long_conversation_is_no_attack(source):
    many = [{"role": "user", "content": [{"type": "text", "text": "x" * 5000}]}] * 1000
    assert len(ChatTemplate(source, {"bos_token": "<s>"}).render(many)) > 5_000_000


def test_loops_and_joins_are_as_without_bounds():
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m.role ~ '-' ~ loop.first }}"
        "{% if loop.first %}{% continue %}{% endif %}{% endfor %}{{ [3, 1] | sort | map('string') | join(',') }}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ messages | selectattr('role') | list | length }}"
    )
    assert ChatTemplate(source).render(MESSAGES * 2) == "1/2Falseuser-True2/2Trueuser-False1,3a12"
