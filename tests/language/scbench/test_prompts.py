"""What a model reads of a row: the published texts, chats cut in two, and what is left out."""

import copy
import itertools
from dataclasses import replace

import pytest

from language.scbench.prompts import conversation
from language.scbench.row import TASKS, Row, Turn

CHAT = (
    "{% if messages[0].role != 'system' %}<system>Be good.<end>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPTIONS = ("ann", "bob", "cat", "dog")
NUMBERS = "The {} number is: "


def row_of(task, **options):
    parts = TASKS[task].parts
    inputs = [NUMBERS.format(n) for n in ("largest", "Smallest")] if task == "mf" else ["q1", "q2"]
    answers = {"mf": [7, 3], "vt": [("AB", "CD"), ("EF",)]}.get(task, ["bob", "cat"])
    turns = tuple(
        Turn(question, answer, OPTIONS * (task == "choice_eng"), part)
        for question, answer, part in zip(inputs, answers, parts or [None, None], strict=True)
    )
    return Row(task, 5, "[7, 3]" if task == "mf" else "some text", turns, **options)


def texts(tokenizer, task, mode, **options):
    said = conversation(row_of(task), tokenizer, mode, max_length=None, **options)
    return [tokenizer.decode(part) for part in (said.context, *said.questions, *said.golden)]


KV = "Extract the value corresponding to the specified key in the JSON object below.\n\nsome text"
REPOQA = (
    "Based on the function description and code context, please retrieve and repeat the exact"
    " described function from the code context in a code block wrapped by ```:\n\nsome text"
)
LIST = "A. ann\nB. bob\nC. cat\nD. dog\n\n"
CONTEXTS = {
    "kv": KV,
    "repoqa": REPOQA,
    "qa_eng": "Read the book and answer the question. Be very concise in your answer.\n\nsome text",
    "qa_chn": "阅读以下书籍然后回答问题。\n\nsome text",
    "choice_eng": "Read the book and answer the question.\n\nsome text",
}
QUESTIONS = {
    "qa_eng": "Question: {}\nAnswer:",
    "qa_chn": "问题：{}\n答案：",
    "choice_eng": f"Question: {{}}\n{LIST}The the correct answer is",
}
PLAIN = [task for task in TASKS if task != "mf"]


@pytest.mark.parametrize("task", PLAIN)
def test_texts_are_the_published_ones(task, byte_tokenizer):
    context, question = CONTEXTS.get(task, "some text"), QUESTIONS.get(task, "{}")
    later = question.replace("The the", "The letter of the")
    golden = {"vt": "['AB', 'CD']"}.get(task, "bob")
    assert texts(byte_tokenizer, task, "turns") == [
        f"{context}\n\n{question.format('q1')}", "", f"\n\n{later.format('q2')}", golden, "",
    ]  # fmt: skip
    assert texts(byte_tokenizer, task, "requests") == [
        context, question.format("q1"), question.format("q2"), "", "",
    ]  # fmt: skip


def test_math_find_asks_what_is(byte_tokenizer):
    first, second = (NUMBERS.format(name) for name in ("largest", "Smallest"))
    wanted = "What is the {} number?\n\n"
    assert texts(byte_tokenizer, "mf", "turns") == [
        f"{wanted.format('largest')}[7, 3]\n\n{first}",
        "",
        f"\n\n{wanted.format('smallest')}{second}",
        "7",
        "",
    ]
    context, *questions = texts(byte_tokenizer, "mf", "requests")[:3]
    assert context == f"{first}\n\n[7, 3]"
    assert questions == [wanted.format("largest") + first, wanted.format("smallest") + second]


def chatting(tokenizer, template=CHAT):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("task", PLAIN)
def test_chats_are_what_the_template_makes_of_them_as_a_whole(task, byte_tokenizer):
    tokenizer = chatting(byte_tokenizer)
    context, question = CONTEXTS.get(task, "some text"), QUESTIONS.get(task, "{}")
    first, *others = texts(tokenizer, task, "requests")[:3]
    for name, cut in zip(("q1", "q2"), others, strict=True):
        whole = [user(context + question.format(name))]
        assert first + cut == tokenizer.apply_chat_template(
            whole, add_generation_prompt=True, tokenize=False
        )
    plain = texts(byte_tokenizer, task, "turns")
    assert texts(tokenizer, task, "turns", chat=False) == plain
    first, _, later, golden, _ = texts(tokenizer, task, "turns")
    messages = [
        user(f"{context}\n\n{question.format('q1')}"),
        {"role": "assistant", "content": {"vt": "['AB', 'CD']"}.get(task, "bob")},
        user(question.replace("The the", "The").format("q2")),
    ]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert first + golden + later == whole + "This paper" * (task == "summary")
    own = texts(tokenizer, task, "turns", own_answers=True)
    assert own[:3] == [first, "", later.removeprefix(golden)]
    assert own[3:] == ["", ""]


def test_a_question_after_an_answer_of_the_model_begins_with_its_end(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.eos_token = "!"
    plain = texts(byte_tokenizer, "choice_eng", "turns", own_answers=True)[2]
    assert plain == f"Question: q2\n{LIST}The correct answer is"
    assert texts(tokenizer, "choice_eng", "turns", own_answers=True)[2] == f"!{plain}"


def test_tokens_of_a_beginning_occur_once(byte_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(byte_tokenizer)
    start = tokenizer.encode("^")
    tokenizer._tokenizer.post_processor = TemplateProcessing("^ $A", special_tokens=[("^", *start)])
    for mode in ("turns", "requests"):
        said = conversation(row_of("kv"), tokenizer, mode, max_length=None)
        assert said.context[:1] == tuple(start)
        parts = (said.context, *said.questions, *said.golden)
        assert sum(part.count(start[0]) for part in parts) == 1
        chat = chatting(tokenizer, f"^{CHAT}")
        assert conversation(row_of("kv"), chat, mode, max_length=None).context.count(start[0]) == 1


def test_answer_and_question_are_encoded_as_one(merging_tokenizer):
    for task, own in itertools.product(PLAIN, (False, True)):
        said = conversation(
            row_of(task), merging_tokenizer, "turns", max_length=None, own_answers=own
        )
        text = merging_tokenizer.decode(said.golden[0] + said.questions[1])
        encoded = merging_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tuple(encoded) == said.golden[0] + said.questions[1]
        assert said.golden[1] == () == said.questions[0]
        assert bool(said.golden[0]) is not own


def read_at_most(said, mode, own):
    """Tokens that a model has read when the last answer is whole."""
    if mode == "requests":
        return len(said.context) + max(map(len, said.questions)) + said.new_tokens[0]
    kept = sum(said.new_tokens[:-1]) if own else sum(map(len, said.golden))
    return len(said.context) + sum(map(len, said.questions)) + kept + said.new_tokens[-1]


@pytest.mark.parametrize(
    ("task", "mode", "taken"),
    [
        ("kv", "turns", 300), ("kv", "requests", 1300), ("vt", "turns", 60), ("mf", "turns", 10),
        ("repoqa_and_kv", "turns", 1104), ("summary_with_needles", "requests", 1815),
    ],
)  # fmt: skip
def test_the_middle_of_long_contexts_is_left_out(task, mode, taken, byte_tokenizer):
    row = row_of(task)
    whole = conversation(row, byte_tokenizer, mode, max_length=None)
    length = len(whole.context)
    taken = max(taken, read_at_most(whole, mode, own=False) - length)
    for budget in (length + 1, length):
        assert conversation(row, byte_tokenizer, mode, max_length=taken + budget) == whole
    for budget in (2, 3, length - 1):
        cut = conversation(row, byte_tokenizer, mode, max_length=taken + budget)
        half = budget // 2
        assert cut.context == whole.context[:half] + whole.context[-half:]
        assert cut.truncated == length - 2 * half
        assert (cut.questions, cut.golden) == (whole.questions, whole.golden)


def test_answers_have_the_length_of_the_task_or_of_the_row(byte_tokenizer):
    for row, limits in [
        (row_of("kv"), (150, 150)), (row_of("kv", new_tokens=3), (3, 3)),
        (row_of("repoqa_and_kv"), (1024, 80)), (row_of("summary_with_needles"), (800, 15)),
    ]:  # fmt: skip
        assert conversation(row, byte_tokenizer, "turns", max_length=None).new_tokens == limits


@pytest.mark.parametrize(("mode", "own"), [("turns", False), ("turns", True), ("requests", False)])
def test_questions_and_answers_are_of_the_length(mode, own, byte_tokenizer):
    turns = tuple(Turn(f"{n} " * 40, "golden" * (n + 1)) for n in range(3))
    row = Row("kv", 5, "some text" * 99, turns, origin="exact", new_tokens=3)
    options = {"own_answers": own}
    whole = conversation(row, byte_tokenizer, mode, max_length=None, **options)
    length = read_at_most(whole, mode, own)
    assert conversation(row, byte_tokenizer, mode, max_length=length, **options) == whole
    cut = conversation(row, byte_tokenizer, mode, max_length=length - 1, **options)
    assert cut.truncated in (1, 2)
    of_file = conversation(
        replace(row, origin="file"), byte_tokenizer, mode, max_length=1100, **options
    )
    taken = read_at_most(of_file, mode, own) - len(of_file.context)
    if mode == "requests":
        taken = 3 * 3 + 1000
    assert 1100 - taken - len(of_file.context) in (0, 1)


def test_what_gives_no_conversation_is_refused(byte_tokenizer, refused):
    def call(row, tokenizer=byte_tokenizer, mode="turns", length=None, **options):
        return conversation(row, tokenizer, mode, max_length=length, **options)

    refused("mode is 'both'; choose one of turns, requests", call, row_of("kv"), mode="both")
    refused("length of 301 has no place.*answers of kv take 300", call, row_of("kv"), length=301)
    refused("a length of 1301.* take 1300", call, row_of("kv"), mode="requests", length=1301)
    for template in ("nothing", "{{ messages[0].content[:3] }}", "{{ messages[0].content * 2 }}"):
        for mode in ("turns", "requests"):
            refused(
                "leaves no place to cut",
                call,
                row_of("kv"),
                chatting(byte_tokenizer, template),
                mode,
            )
    fails = chatting(byte_tokenizer, "{{ raise_exception('no\nway') }}")
    refused("chat template of the tokenizer fails \\(no way\\)", call, row_of("kv"), fails)
    unclear = Row("mf", 5, "[7]", (Turn("Largest?", 7),))
    refused("mf, row 5: the question 'Largest\\?' names nothing", call, unclear)
    for missing in ("", ()):
        row = Row("kv", 5, "text", (Turn("q", missing), Turn("q", "a")))
        refused("kv, row 5, turn 1 has no golden answer", call, row)
        assert len(call(row, own_answers=True).questions) == 2
        assert len(call(row, mode="requests").questions) == 2
