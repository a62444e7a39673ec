"""Hostile chat templates end in a ValueError: soon, and without memory."""

import time
import tracemalloc

import pytest

from qwen_jax.prompt.chat import ChatTemplate
from qwen_jax.prompt.sandbox import MAX_TEMPLATE_CHARS

USER = [{"role": "user", "content": "hi"}]
STOPPED = "does more work than any real one"


def looped(setup: str, step: str, use: str = "") -> str:
    return f"{{% set ns = namespace({setup}) %}}{{% for i in range(99) %}}{step}{{% endfor %}}{use}"


LISTS = looped("x=['a']", "{% set ns.x = [ns.x, ns.x] %}", "{{ USE }}")
TUPLES = looped("x=('a',)", "{% set ns.x = (ns.x, ns.x) %}", "{{ USE }}")
TWO = looped(
    "x=['a'], y=['a']", "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}", "{{ USE }}"
)
BIG = "{% set big = 'ab' * 2000000 %}"

COSTLY = {
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "loops that filter all out": (
        "{% set r = range(99999) %}"
        "{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}"
    ),
    "loops in a generation block": (
        "{% generation %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endgeneration %}"
    ),
    "filters over ranges": (
        "{% for i in range(99999) %}{% set x = range(99999)|select('none')|list %}{% endfor %}"
    ),
    "doubling by ~": looped("s='ab'", "{% set ns.s = ns.s ~ ns.s %}"),
    "doubling by +": looped("s='ab'", "{% set ns.s = ns.s + ns.s %}"),
    "doubling by a set block": looped(
        "s='ab'", "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"
    ),
    "doubling by a macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}"
    + looped("s='ab'", "{% set ns.s = m(ns.s) %}"),
    "doubling by a filter block": looped(
        "s='ab'",
        "{% set x %}{% filter upper %}{{ ns.s }}{{ ns.s }}{% endfilter %}{% endset %}"
        "{% set ns.s = x %}",
    ),
    "doubling a list": looped("s=[1]", "{% set ns.s = ns.s + ns.s %}"),
    "string times number": "{{ 'a' * 10**10 }}",
    "number times list": "{{ 10**10 * [0] }}",
    "replace filter": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "replace method": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "join filter": "{{ range(99999)|join('a' * 99999) }}",
    "join method": "{{ ('a' * 99999).join(range(99999)|map('string')) }}",
    "indent": "{{ 'a\n'|indent(10**9) }}",
    "split": BIG + "{% for i in range(999) %}{% set x = big.split('a') %}{% endfor %}",
    "searching": BIG + "{% for i in range(99999) %}{{ 'zz' in big }}{% endfor %}",
    "slicing": BIG + "{% for i in range(99999) %}{% set x = big[1:] %}{% endfor %}",
    "methods": BIG + "{% for i in range(99999) %}{% set x = big.upper() %}{% endfor %}",
    "filters": BIG + "{% for i in range(99999) %}{% set x = big|upper %}{% endfor %}",
    "shared lists printed": LISTS.replace("USE", "ns.x"),
    "shared lists joined": LISTS.replace("USE", "'' ~ ns.x"),
    "shared lists as JSON": LISTS.replace("USE", "ns.x|tojson"),
    "shared lists as text": LISTS.replace("USE", "ns.x|string"),
    "shared lists compared": TWO.replace("USE", "ns.x == ns.y"),
    "shared lists tested": TWO.replace("USE", "ns.x is eq ns.y"),
    "shared lists searched": TWO.replace("USE", "ns.x in [ns.y]"),
    "shared lists passed": TWO.replace("USE", "[ns.x].index(ns.y)"),
    "shared tuples hashed": TUPLES.replace("USE", "{ns.x: 1}"),
    "shared tuples looked up": TUPLES.replace("USE", "{}[ns.x]"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_work_without_end_is_stopped(name):
    template = ChatTemplate(COSTLY[name])
    start = time.process_time()
    with pytest.raises(ValueError, match=STOPPED):
        template.render(USER)
    assert time.process_time() - start < 20  # 0.001 to 2 s; unbounded it would take years


@pytest.mark.parametrize(
    "name",
    ["doubling by ~", "doubling by a set block", "string times number"],
)
def test_memory_stays_bounded(name):
    template = ChatTemplate(COSTLY[name])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=STOPPED):
            template.render(USER)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6


def test_a_printed_namespace_does_not_print_what_it_holds():
    assert ChatTemplate(LISTS.replace("USE", "ns")).render(USER) == "<namespace>"


def test_the_limit_grows_with_the_messages():
    # 40 searches of a 4-million-character message are work that the message itself pays for.
    template = ChatTemplate("{% for i in range(40) %}{{ 'z' in messages[0].content }}{% endfor %}")
    assert template.render([{"role": "user", "content": "ab" * 2_000_000}]) == "False" * 40


REFUSED = {
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.__class__.__base__ }}": "unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ raise_exception.__globals__['x'] }}": "unsafe",
    "{{ (messages|map(attribute='__class__')|list)[0].x }}": "undefined|unsafe",
    "{{ (1).to_bytes(10**9) }}": "unsafe",
    "{{ 'a'.ljust(10**9) }}": "unsafe",
    "{{ 'a'.zfill(10**9) }}": "unsafe",
    "{{ 'a\t'.expandtabs(10**9) }}": "unsafe",
    "{{ '{:999999999d}'.format(1) }}": "unsafe",
    "{{ '{x}'.format_map({'x': 1}) }}": "unsafe",
    "{{ '%999999999d' % 1 }}": "formatting with % is not offered",
    "{% set x = messages.append(1) %}": "unsafe",
    "{% set x = messages[0].update({'content': 1}) %}": "unsafe",
    "{{ 9**99 }}": "too large",
    looped("n=9", "{% set ns.n = ns.n * ns.n %}"): "product of integers is too large",
    "{{ range(10**9) }}": "Range too big",
    "{{ [1]|tojson(indent=10**9) }}": "at most 16 characters",
    "{{ lipsum(10**6) }}": "undefined",
    "{% include '/etc/passwd' %}": "no loader",
    "{% extends 'x' %}": "no loader",
    "{{ nothing.at.all }}": "undefined",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a' + 1 }}": "TypeError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion depth",
    "{% block a %}{{ self.a() }}{% endblock %}": "recursion depth",
    "{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x == [] }}": "nested deeper than 200",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_offered_is_refused_when_it_runs(text):
    template = ChatTemplate(text)
    with pytest.raises(ValueError, match="the chat template failed: .*(" + REFUSED[text] + ")"):
        template.render(USER)


INVALID = {
    "{{ 'a'|center(10**9) }}": "No filter named 'center'",
    "{{ 'a'|batch(10**9, 'x') }}": "No filter named 'batch'",
    "{{ 1.5|round(10**9) }}": "No filter named 'round'",
    "{{ '%s'|format('x') }}": "No filter named 'format'",
    "{{ 'a'|attr('__class__') }}": "No filter named 'attr'",
    "{{ 'a'| measured }}": "No filter named 'measured'",
    "{{ " + "9" * 5000 + " }}": "ValueError",
    "{% for x in [1] %}" * 40 + "{% endfor %}" * 40: "nested",
    "x" * (MAX_TEMPLATE_CHARS + 1): f"{MAX_TEMPLATE_CHARS + 1} characters, the limit is",
}


@pytest.mark.parametrize("text", INVALID, ids=lambda text: text[:30])
def test_what_is_not_offered_is_refused_when_it_loads(text):
    with pytest.raises(ValueError, match=INVALID[text]):
        ChatTemplate(text)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Jinja's lexer
@pytest.mark.parametrize(
    "text", ["{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "-" * 9999]
)
def test_nesting_without_end_is_refused_when_it_loads(text):
    with pytest.raises(ValueError, match="chat template 'default' is not valid"):
        ChatTemplate(text)


def test_constant_expressions_are_not_evaluated_when_the_template_loads():
    ChatTemplate("{% if false %}{{ 'a' * 10**12 }}{{ ('a' ~ 'b')|upper }}{{ 9**9**9 }}{% endif %}")


def test_a_template_can_still_do_what_templates_do():
    text = (
        "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}"
        "{% set ns.n = ns.n + 1 %}{{ loop.index }}{{ loop.last }}{% endfor %}"
        "{{ 'a' ~ 1 ~ ['b'] }}{{ ['x', 'y']|join('-') }}{{ 'x-y'|replace('-', '_') }}"
        "{{ messages|map(attribute='role')|list }}"
        "{{ messages|selectattr('role', '==', 'tool')|list }}{{ {'b': 1, 'a': 2}|dictsort|first }}"
        "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'a\nb'|indent(2) }}"
    )
    assert ChatTemplate(text).render(USER) == ("1Truea1['b']x-yx_y['user'][]('a', 2)338a\n  b")
