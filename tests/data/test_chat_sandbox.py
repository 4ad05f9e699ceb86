"""Templates that make much of little end in one message, soon; sound ones render as in Jinja."""

from __future__ import annotations

import json
import time
from datetime import date

import pytest
from jinja2 import Environment
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ernie_train.core.errors import DataError
from ernie_train.data import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi\nthere"}, {"role": "assistant", "content": "Yes"}]
NS = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
BOMBS = {
    "doubling by ~": NS + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": NS + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by %": NS + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling by format": NS + "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubling by the filter format": NS + "{% set ns.x = '%s%s'|format(ns.x, ns.x) %}{% endfor %}",
    "doubling by join": NS + "{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "doubling by the method join": NS + "{% set ns.x = ''.join([ns.x, ns.x]) %}{% endfor %}",
    "doubling by replace": NS + "{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "doubling by the method": NS + "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "doubling by blocks": NS + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "a tower of lists": NS + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "a tower of dicts": NS + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "a tower of calls": NS + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "two towers": "{% set a = namespace(x=1, y=1) %}{% for i in range(60) %}"
    "{% set a.x = [a.x, a.x] %}{% set a.y = [a.y, a.y] %}{% endfor %}{{ a.x == a.y }}",
    "a namespace in itself": NS + "{% set ns.x = ns %}{% endfor %}{{ ns }}",
    "growing lists": NS + "{% set ns.x = ns.x|list + ns.x|list %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "callers": "{% macro f(n) %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f(1) %}" * 30
    + "x" + "{% endcall %}" * 30,
    "recursive loops": "{% for x in [[1, 1]] * 2 recursive %}{{ loop([x, x]) }}{% endfor %}",
    "static text": "{% set x %}{% for i in range(999999) %}" + "a" * 999 + "{% endfor %}"
    "{% endset %}",
    "a width": "{{ '%999999999d' % 1 }}",
    "a computed width": "{{ '%*d' % (999999999, 1) }}",
    "a precision": "{{ '%.999999999f' % 1 }}",
    "a width of format": "{{ '{:>999999999}'.format('') }}",
    "a computed width of format": "{{ '{:>{}}'.format('', 999999999) }}",
    "a width of the filter": "{{ '%999999999d'|format(1) }}",
    "center": "{{ 'a'|center(999999999) }}",
    "the method center": "{{ 'a'.center(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "zfill": "{{ '1'.zfill(999999999) }}",
    "indent": "{{ 'a\nb'|indent(999999999) }}",
    "indent of tojson": "{{ messages|tojson(indent=999999999) }}",
    "batches": "{{ [1]|batch(999999999, 'x')|list }}",
    "rounding": "{{ 1.5|round(999999999) }}",
    "bytes": "{{ (5).to_bytes(999999999, 'big') }}",
    "tabs": "{{ '\t'.expandtabs(999999999) }}",
    "powers": "{{ 99999999 ** 9999999 }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "repeated lists": "{{ [1] * 999999999 }}",
    "wrapping": "{{ ('a ' * 40000)|wordwrap(1, wrapstring='x' * 40000) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_message_with_its_file(name):
    started = time.process_time()
    with pytest.raises(DataError, match=r"bomb\.jinja") as failed:
        ChatTemplate(BOMBS[name], {}, "bomb.jinja").render(MESSAGES)
    assert time.process_time() - started < 15
    assert len(str(failed.value)) < 300


def test_the_message_names_the_line():
    with pytest.raises(DataError, match=r"pads text beyond all bounds \(a\.jinja, line 3\)"):
        ChatTemplate("\n\n{{ '%999999999d' % 1 }}", {}, "a.jinja").render(MESSAGES)


SOUND = [
    "{{ messages }}{{ [messages[0].role, 1, none] }}{{ {'a': messages[0], 1: (2, 3)} }}",
    "{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v ~ 1 ~ none }}{{ loop.last }}{% endfor %}",
    "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.content|trim|upper|replace('E', 'ee') }}"
    "{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}",
    "{{ '%s and %05.2f' % ('a', 1.5) }}{{ '{0:>6}|{x}'.format('a', x=2) }}{{ '%s'|format(7) }}",
    "{{ messages|map(attribute='content')|join('; ') }}{{ '-'.join(['a', 'b']) }}",
    "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{{ caller is defined }}"
    "{% endmacro %}{{ f(5) }}{% call f(1) %}x{% endcall %}",
    "{% set x %}{{ messages[0].content|indent(2, true) }}{% endset %}{{ x|center(30) }}"
    "{{ x|length }}",
    "{{ (1, 2) + (3,) }}{{ [1] * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 'a' * 3 }}{{ 1.5|round(1) }}",
    "{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }}{% endfor %}{{ dict(a=1, b=[2])|dictsort }}",
    "{{ nothing }}{{ nothing|default(99999999) }}{{ '5'|int }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ [3, 1]|sort }}"
    "{{ 'abc'|list }}{{ range(3)|list }}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}{{ 'x' in ['x', messages[0].role] }}"
    "{{ 'a' if messages else 'b' }}{{ 'hello'[1:3] }}{{ messages[0]['content'].split('\\n')[-1] }}",
    "{%- for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("source", SOUND)
def test_sound_templates_render_as_jinja_renders_them(source):
    plain = Environment(trim_blocks=True, lstrip_blocks=True)
    expected = plain.from_string(source).render(messages=MESSAGES)
    assert ChatTemplate(source).render(MESSAGES) == expected


ROW = {"role": "user", "items": 1, "update": 2, "none": None, "__class__": 3, "names": ["a"]}


@pytest.mark.parametrize("name", [*ROW, "keys", "absent", "__init__", "format", "encode"])
@pytest.mark.parametrize("of", ["row", "row.role", "row.names", "namespace(**row)", "1"])
def test_an_attribute_is_what_jinjas_sandbox_says_also_when_asked_again(of, name):
    source = "{% for row in messages %}{{ (" + of + ")." + name + " is defined }}"
    source += "{{ (" + of + ")." + name + "|string|truncate(9, true, '', 0) }}{% endfor %}"
    expected = ImmutableSandboxedEnvironment().from_string(source).render(messages=[ROW, ROW])
    if name == "encode" and of == "row.role":
        expected = "False" * 2  # withheld
    for _ in range(2):
        assert ChatTemplate(source).render([ROW, ROW]) == expected


def test_endless_work_in_small_steps_ends_by_the_clock(monkeypatch):
    monkeypatch.setattr("ernie_train.data.chat_template.sandbox._MOST_SECONDS", 0.0)
    source = "{% for i in range(999) %}{% endfor %}"
    with pytest.raises(DataError, match="computes beyond all bounds"):
        ChatTemplate(source).render(MESSAGES)


def test_json_is_written_as_transformers_writes_it():
    source = "{{ messages|tojson }}{{ messages|tojson(indent=0) }}{{ 'ü'|tojson(true) }}"
    expected = json.dumps(MESSAGES, ensure_ascii=False)
    expected += json.dumps(MESSAGES, ensure_ascii=False, indent=0) + json.dumps("ü")
    assert ChatTemplate(source).render(MESSAGES) == expected


def test_a_long_conversation_stays_within_the_bounds():
    turns = [{"role": "user", "content": "word " * 2000}] * 400
    source = (
        "{% set ns = namespace(last=0, all='') %}{% for m in messages[::-1] %}{% set ns.last = loop"
        ".index %}{% endfor %}{% for m in messages %}{% set ns.all = ns.all + m.content[:200] %}"
        "{{ '<|' ~ m.role ~ '|>' + m.content.split('x')[-1].strip() }}{% endfor %}{{ ns.all }}"
    )
    assert len(ChatTemplate(source).render(turns)) > 4_000_000


def test_a_fixed_date_is_what_the_template_writes():
    source = "{{ strftime_now('%d %b %Y %H') }}"
    template = ChatTemplate(source, date=date(2026, 1, 5))
    assert template.render(MESSAGES) == "05 Jan 2026 00"
    assert template.fingerprint != ChatTemplate(source, date=date(2026, 1, 6)).fingerprint
    assert (
        ChatTemplate("{{ 1 }}", date=date(2026, 1, 5)).fingerprint
        == ChatTemplate("{{ 1 }}").fingerprint
    )
    assert ChatTemplate(source).render(MESSAGES)[:2].isdigit()
