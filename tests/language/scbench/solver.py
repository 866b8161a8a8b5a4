"""Answers questions of SCBench from their context alone; shares no code with what makes them."""

import ast
import json
import re
import statistics
from datetime import datetime, timedelta


def once(pairs):
    assert len({key for key, _ in pairs}) == len(pairs), "a key occurs twice"
    return dict(pairs)


def kv(context, question, _):
    key = re.search(r'^Key: "(.*)"$', question, re.MULTILINE)[1]
    return json.loads(context[context.index("{") :], object_pairs_hook=once)[key]


def prefix_suffix(context, question, _):
    strings = json.loads(context[context.index("[") :])
    start, end = re.findall(r': "(\w+)"$', question, re.MULTILINE)
    starting, ending = ({s for s in strings if test(s)} for test in (
        lambda s: s.startswith(start), lambda s: s.endswith(end)))  # fmt: skip
    assert len(set(strings)) == len(strings)
    assert len(starting) > 1, "the prefix alone is enough"
    assert len(ending) > 1, "the suffix alone is enough"
    (answer,) = starting & ending
    return answer


def vt(context, question, _):
    values = {}
    for name, value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", context, re.MULTILINE):
        assert name not in values
        values[name] = value if value.isdigit() else values[value]
    asked, number = (
        re.search(p, question)[1] for p in (r"assigned the value (\d+)", r", (\d+) var")
    )
    names = tuple(name for name, value in values.items() if value == asked)
    assert len(names) == int(number)
    return names


def mf(context, question, _):
    numbers = json.loads(context)
    asked = re.search(r"The (.+) of the list is", question)[1]
    ordered = sorted(numbers)
    if "median" in asked:
        return statistics.median(numbers)
    if "mean" in asked:
        return int(statistics.mean(numbers) // 1)
    place = 1 if "second" in asked else 0
    value = ordered[place] if "smallest" in asked else ordered[-1 - place]
    assert numbers.count(value) == 1
    return value


def rule(question):
    """The answer of an example, as a text."""
    if "MM/DD/YYYY" in question:
        day, number, when = re.search(r"is (\S+)\. .* (\d+) days (\w+) in", question).groups()
        change = timedelta(int(number) * (1 if when == "later" else -1))
        return (datetime.strptime(day, "%m/%d/%Y") + change).strftime("%m/%d/%Y")
    if "odd" in question:
        return str(sum(digits[-1] in "13579" for digits in re.findall(r"\d+", question)))
    owners = dict(re.findall(r"(\w+) has a (\w+) ball", question))
    for one, other in re.findall(r"(\w+) and (\w+) swap", question):
        owners[one], owners[other] = owners[other], owners[one]
    return owners[re.search(r"does (\w+) have", question)[1]]


def letter(example):
    question, options = example.split("\nOptions:\n")
    listed = dict(re.findall(r"^\((.)\) (.*)$", options, re.MULTILINE))
    assert len(set(listed.values())) == 6
    (right,) = (mark for mark, option in listed.items() if option == rule(question))
    return f"({right})"


def many_shot(context, question, _):
    shots = [shot.split("\nAnswer: ") for shot in context.split("\n\n")]
    assert all(letter(example) == answer for example, answer in shots)
    asked = question.removesuffix("\nAnswer:")
    assert asked not in {example for example, _ in shots}
    return letter(asked)


def repoqa(context, question, _):
    description = question.split("Function Description:\n")[1].strip()
    (answer,) = (
        ast.get_source_segment(context, node)
        for node in ast.parse(context).body
        if isinstance(node, ast.FunctionDef)
        and " ".join(re.split(r"\n\n", ast.get_docstring(node))[0].split()) == description
    )
    return answer


def repoqa_and_kv(context, question, part):
    if part == "repoqa":
        return repoqa(context, question, None)
    lines = [json.loads(line) for line in context.split("\n") if line.startswith('{"')]
    return once([pair for line in lines for pair in line.items()])[
        re.search(r'"(.*)"', question)[1]
    ]


def summary_with_needles(context, question, part):
    if part == "passkey":
        (key,) = set(re.findall(rf"pass key {question.split()[5][:-1]} is (\d+)\.", context))
        return key
    name = re.search(r"document (\S+) by", question)[1]
    document = context.split(f"Document {name}:\n")[1].split("\n\n")[0]
    ends = [n + 1 for n in range(len(document)) if document[n - 1 : n + 1] in (". ", "! ", "? ")]
    return document[: ends[2]].rstrip()
