"""Chat templates in the manner of published ones, each rendered as `transformers` renders it.

Each exercises syntax of its own: white space control, macros, namespaces, loop control, filters,
tests, functions that `transformers` adds, and names that are not always there. Needs the extra
"hf" (`pip install -e '.[test,hf]'`).
"""

import collections
import datetime

import jinja2
import pytest
import tokenizers

from atommem_jax.language import chat

pytestmark = pytest.mark.peer

NEEDED = "needs the extra 'hf': pip install -e '.[test,hf]'"
transformers = pytest.importorskip("transformers", reason=NEEDED)

SYSTEM = {"role": "system", "content": "Read <b>all</b> & note 'it'.\n"}
USER = {"role": "user", "content": ' Où est "Kalo"?\n\n\N{SNOWMAN} {{ no }} '}
CONVERSATION = [SYSTEM, USER]

RENDERED = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
        "'<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "chatml with a system message of its own": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "chatml over lines": """
{%- for message in messages -%}
    <|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
    <|im_start|>assistant
{% endif %}
""",
    "white space is cut before and behind blocks": """
  {% if messages %}
    {% for message in messages %}
  {{ message.content }}
    {% endfor %}
  {% endif %}

    end
""",
    "white space is kept where a plus says so": """
  {%+ if messages %}
    x {%+ endif +%}
  {{- messages[1].content -}}
  y
""",
    "qwen 2.5": """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- "# Tools" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "qwen 3": """
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and
        not(message.content.startswith('<tool_response>') and
        message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.reasoning_content is string %}
        {{- message.reasoning_content }}
    {%- endif %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {{- ns.last_query_index if loop.last else '' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    ),
    "generation is a scope": (
        "{% set x = 'outer' %}{% for m in messages %}{%- generation -%}{% set x = m.role %}"
        "{{ x }} {{ loop.index }}{%- endgeneration %} {{ x }}{% endfor %}"
    ),
    "llama 3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    ),
    "llama 3.1": """
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code') | join(", ") + "\\n\\n"}}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
""",
    "llama 3.2, which writes the date": """
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- bos_token + "Today Date: " + date_string }}{{ messages[0].content }}{{ messages[1].content }}
""",
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
        "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% endfor %}"
    ),
    "mistral, system message with the last user": """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages | rejectattr("role", "equalto", "tool") | list %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
""",
    "gemma, made to take a system message": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
        "{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}"
        "{%- set loop_messages = messages[1:] -%}{%- else -%}"
        "{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
        "{%- for message in loop_messages -%}{%- if (message['role'] == 'assistant') -%}"
        "{%- set role = 'model' -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
        "{{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}"
        "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
        "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
        "{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
        "{%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}"
        "{{ '<end_of_turn>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
    ),
    "phi 3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
        "{% elif message['role'] == 'user' %}"
        "{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi 4, whose names are made": (
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message "
        "and message['tools'] is not none %}{{ message['tools'] }}{% else %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "deepseek r1": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
        "{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}"
        "{%- for message in messages %}{%- if message['role'] == 'system' %}"
        "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
        "{{'<\uff5cUser\uff5c>' + message['content']}}{%- endif %}"
        "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
        "{% set content = message['content'] %}{{'<\uff5cAssistant\uff5c>' + content}}{%- endif %}"
        "{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}"
        "{{'<\uff5cAssistant\uff5c><think>\\n'}}{% endif %}"
    ),
    "smollm 3, with macros": """
{%- macro head(role, extra='') -%}
<|im_start|>{{ role }}{{ extra }}
{% endmacro -%}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{{ head('system') }}{% set today = strftime_now("%d %B %Y") %}
Today Date: {{ today }}
Reasoning Mode: {{ mode + '\\n' }}
{%- set body = messages[0].content.replace("/no_think", "").rstrip() -%}
{{- body if body != '' else none -}}
<|im_end|>
{% for message in messages[1:] -%}
{{ head(message.role, extra=loop.index) }}{{ message.content | string | trim }}<|im_end|>
{% endfor -%}
""",
    "macros that call": (
        "{% macro wrap(tag) %}<{{ tag }}>{{ caller() }}</{{ tag }}>{% endmacro %}"
        "{% for m in messages %}{% call wrap(m.role) %}{{ m.content }}{% endcall %}{% endfor %}"
    ),
    "a macro that calls itself": (
        "{% macro down(n) %}{{ n }}{% if n > 0 %},{{ down(n - 1) }}{% endif %}{% endmacro %}"
        "{{ down(messages | length) }}{{ messages[-1].content }}"
    ),
    "granite, with documents": """
{%- if documents %}{{- 'Use the documents.' }}{% endif %}
{%- if documents is not none %}{{ 'some' }}{%- else %}{{ 'none' }}{%- endif %}
{%- for document in documents or [] %}{{- document }}{%- endfor %}
{%- for message in messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + eos_token }}
{%- endfor %}
""",
    "hermes, with tools": (
        "{% if tools is none %}no tools{% elif tools is defined %}{{ tools | tojson(indent=2) }}"
        "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    ),
    "tojson": "{{ messages | tojson }}{{ messages[1].content | tojson }}",
    "tojson with all its arguments": (
        "{{ messages | tojson(ensure_ascii=true, indent=2, separators=(',', ' : '), "
        "sort_keys=true) }}{{ messages[1] | tojson(indent=4) }}{{ {'b': 1, 'a': none} | tojson }}"
        "{{ messages[1].content | tojson(false, 2) }}"
    ),
    "html is not escaped": "{{ messages[0].content }}{{ messages[0].content | e }}",
    "loops that break and continue": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}{% for c in m.content %}{% if c == 'K' %}{% break %}{% endif %}{{ c }}"
        "{% endfor %}{% else %}none{% endfor %}"
    ),
    "loops with conditions, and what they know": (
        "{% for m in messages if m.role != 'tool' %}{{ loop.index }}/{{ loop.length }} "
        "{{ loop.revindex0 }} {{ loop.cycle('a', 'b') }} {{ loop.previtem.role if not loop.first }}"
        "{{ loop.nextitem.role if loop.nextitem is defined }} {{ m.content }}{% endfor %}"
    ),
    "filters": (
        "{{ messages | map(attribute='role') | join(' ') | upper | replace('S', '$') }}"
        "{{ messages[0].content | length }}{{ messages | first | dictsort }}"
        "{{ (messages | last).content | indent(2, true) }}{{ none | default('d', true) }}"
        "{{ missing | default('e') }}{{ [3, 1, 2] | sort | list }}{{ 'a' ~ 1 ~ none }}"
        "{{ messages | groupby('role') | length }}{{ ' x ' | trim | capitalize }}"
    ),
    "methods and slices": (
        "{{ messages[0].content.split('<')[0] }}{{ messages[0]['content'][:-1] }}"
        "{{ messages[-1].get('name', 'nobody') }}{{ messages[0].items() | list | length }}"
        "{{ '%s is %d' | format('x', 3) }}{{ messages[1].content.strip().splitlines() }}"
        "{% if 'Kalo' in messages[1].content %}{{ messages[1].content.find('K') }}{% endif %}"
    ),
    "arithmetic and tests": (
        "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 5 }}{{ 1 / 4 }}{{ 3 is odd }}{{ 4 is divisibleby 2 }}"
        "{{ messages is sequence }}{{ messages[0] is mapping }}{{ 'a' is in 'abc' }}"
        "{{ true and not false or none }}{{ messages[1].content is undefined }}"
        "{{ messages[1].content }}"
    ),
    "with, set blocks, comments and raw": (
        "{# a comment #}{% with x = 1, y = messages %}{{ x }}{{ y[0].role }}{% endwith %}"
        "{% set text %}[{{ messages[1].content }}]{% endset %}{{ text }}"
        "{% set up | upper %}abc{% endset %}{{ up }}{% raw %}{{ messages }}{% endraw %}"
        "{%- filter trim %}  padded  {% endfilter %}"
    ),
    "dict and namespace": (
        "{% set d = dict(a=1, b=messages[0].role) %}{{ d.a }}{{ d['b'] }}{{ d.items() | list }}"
        "{% set ns = namespace(found=none, n=0) %}{% for m in messages %}"
        "{% set ns.n = ns.n + 1 %}{% if m.role == 'user' %}{% set ns.found = m.content %}"
        "{% endif %}"
        "{% endfor %}{{ ns.n }}{{ ns.found }}{{ range(3) | list }}{% set a, b = 1, 2 %}{{ b }}"
    ),
    "names that are not there": (
        "{{ bos }}{{ unk_token }}{{ messages[0].name }}{{ tool_choice }}"
        "{% if not nothing %}{{ messages[1].content }}{% endif %}"
        "{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
    ),
    "all names of tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ messages[1].content }}",
    "gpt-oss, with the date and knobs": """
{%- set model_identity = model_identity or "You help." -%}
{%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
{{- "<|start|>system<|message|>" + model_identity + "\\n" }}
{{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{{- "Reasoning: " + reasoning_effort + "\\n\\n# Valid channels: analysis, final.<|end|>" }}
{%- for message in messages -%}
{{- "<|start|>" + ("developer" if message.role == "system" else message.role) }}
{{- "<|message|>" + message.content + "<|end|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
""",
    "vicuna, in one line": (
        "{{ (messages[0].content + ' ') if messages[0].role == 'system' }}"
        "{% for m in messages if m.role == 'user' %}USER: {{ m.content }} ASSISTANT:{% endfor %}"
    ),
    "command r, with a recursive loop": (
        "{% for m in [{'c': [{'c': []}]}] recursive %}<{{ loop.depth }}{{ loop(m.c) }}>"
        "{% endfor %}{{ messages[1].content }}"
    ),
}

REFUSED = {
    "a tag that there is not": "{% thoughts %}{{ messages[1].content }}{% endthoughts %}",
    "a block that is not closed": "{% for m in messages %}{{ m.content }}",
    "generation that is not closed": "{% generation %}{{ messages[1].content }}",
    "a system message that is refused": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ messages[1].content }}"
    ),
    "roles that must alternate": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
    ),
    "a sum with what is not there": "{{ nothing + messages[1].content }}",
    "an entry of what is not there": "{{ nothing.name.first }}",
    "a sum of text and number": "{{ messages[1].content + 1 }}",
    "a division by zero": "{{ 1 // 0 }}",
    "a filter that there is not": "{{ messages | from_json }}",
    "a test that there is not": "{{ messages is json }}",
    "a list that is changed": "{{ messages.append(messages[0]) }}",
    "what the sandbox forbids": "{{ messages.__class__.__mro__ }}",
    "a range without end": "{% for i in range(10000000) %}x{% endfor %}",
    "json of what is not there": "{{ nothing | tojson }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.fixture(scope="module")
def theirs():
    """A tokenizer with names for its beginning, end and padding."""
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    vocabulary = {name: i for i, name in enumerate(names.values())}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [])), **names
    )


def render_both(theirs, template, thinking):
    """The two texts; None for a template that is refused."""

    def attempt(render):
        try:
            return render()
        except Exception as error:  # whatever theirs raises
            return error

    names = {name: getattr(theirs, name) for name in ("bos_token", "eos_token", "pad_token")}
    expected = attempt(
        lambda: theirs.apply_chat_template(
            CONVERSATION,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    )
    found = attempt(lambda: chat.render(template, CONVERSATION, names=names, thinking=thinking))
    return found, expected


@pytest.mark.parametrize("thinking", [False, True])
def test_templates_are_rendered_or_refused_as_transformers_does(theirs, thinking):
    counts, differ = collections.Counter(), {}
    for name, template in {**RENDERED, **REFUSED}.items():
        found, expected = render_both(theirs, template, thinking)
        if isinstance(expected, Exception) and isinstance(found, ValueError):
            counts["refused by both"] += 1
            assert str(found).startswith("chat_template: found one that cannot be rendered (")
        elif found == expected:
            counts["equal"] += 1
        else:
            differ[name] = (found, expected)
    print(f"{dict(counts)}, {len(differ)} differ")
    assert not differ
    assert counts == {"equal": len(RENDERED), "refused by both": len(REFUSED)}


def test_a_wrong_rendering_would_be_seen(theirs):
    """Without tools=None, or with Jinja's own tojson, texts differ: the comparison has teeth."""
    template = "{% if tools is not none %}Tools:{% endif %}{{ messages | tojson }}"
    _, expected = render_both(theirs, template, False)
    plain = jinja2.Template(template).render(messages=CONVERSATION)
    assert plain.startswith("Tools:")
    assert "\\u003cb\\u003e" in plain
    assert "Tools:" not in expected
    assert "<b>" in expected


def test_of_several_templates_the_default_is_taken(theirs):
    templates = {"default": RENDERED["chatml"], "tool_use": "{{ tools }}"}
    theirs.chat_template = templates
    expected = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert expected == render_both(theirs, templates["default"], False)[0]


def test_a_date_may_be_given():
    found = chat.render(
        "{{ strftime_now('%d %b %Y') }}",
        CONVERSATION,
        names={},
        thinking=False,
        now=datetime.datetime(2024, 7, 26),
    )
    assert found == "26 Jul 2024"
