"""Local questions: read as promised, put as promised, and marked as lm-evaluation-harness marks them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.evaluation.arguments import ChoicesArgs
from megatron_patch.evaluation.questions import Form, Question, read_questions, with_description, with_examples
from megatron_patch.launch import choices as command

TEXTS = [
    {"ctx": "The sun rises in the", "choices": ["west", "far and distant north", "east"], "label": 2},
    {"question": "Bees make", "choices": ["honey", "milk and everything else"], "answer": "A"},
    {"query": "法国的首都是", "choices": ["巴黎巴黎巴黎巴黎", "Rome, as we all know", "Bonn"], "gold": 0},
    {"question": "Two and two are", "choices": ["four, which everybody knows", "three"], "answer": "0"},
    {"question": "今天", "choices": ["天气很好", "x = 5", "we go to the park"], "answer": 0},
    {"question": "def f(x):", "choices": ["return x", "import", "12345"], "answer": 1},
    {"question": "Documents end", "choices": ["with a token", "价格价格", "never"], "answer": 1},
    {"question": "A text", "choices": ["here", "的的的的的", "and there, and so on"], "answer": 1},
]
LETTERS = [
    {"question": "Which animal barks?", "A": "Cat", "B": "Dog", "C": "Fish", "D": "Bird", "answer": "B"},
    {"question": "中国的首都是哪里？", "A": "上海", "B": "广州", "C": "北京", "D": "深圳", "answer": "C"},
    {"question": "Which is a colour,\nand none else?", "A": "Red", "B": "Run", "C": "Ran", "D": "3,5", "answer": "A"},
    {"question": "Who wrote Hamlet?", "A": "Goethe", "B": "Dante", "C": "Homer", "D": "Shakespeare", "answer": "D"},
]
WORDS = [
    {"text": "The capital of France is Paris"},
    {"text": "emoji and line ends and tabs and spaces"},
    {"text": "Document 1. The capital of France is Paris. a literal"},
]

Ask = Callable[..., dict[str, Any]]


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


@pytest.fixture
def ask(spoken: Path, tmp_path: Path) -> Ask:
    def run(*argv: object) -> dict[str, Any]:
        output = tmp_path / "accuracy.json"
        assert command.main([*map(str, ("--load", spoken, *argv)), "--json", str(output)]) == 0
        return json.loads(output.read_text())

    return run


def figures(marks: dict[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in marks["figures"].items()}


# -------------------------------------------------------------------------------------------------------------- figures

TASKS = {
    "texts": """
        doc_to_text: "{{ctx or question or query}}"
        output_type: multiple_choice
        doc_to_choice: "{{choices}}"
        doc_to_target: gold
        metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]""",
    "letters": r"""
        doc_to_text: "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:"
        description: "Questions about letters.\n\n"
        output_type: multiple_choice
        doc_to_choice: ["A", "B", "C", "D"]
        doc_to_target: "{{['A', 'B', 'C', 'D'].index(answer)}}"
        num_fewshot: 2
        metric_list: [{metric: acc}, {metric: acc_norm}]""",
    "words": """
        doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
        doc_to_target: "{{' '+text.split(' ')[-1]}}"
        output_type: loglikelihood
        metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]""",
}
"""The same questions as tasks of the harness; lambada's, mmlu's and hellaswag's own lines."""


@pytest.fixture(scope="module")
def harness(spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness makes of them, with its own backend."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    root = tmp_path_factory.mktemp("choices")
    golds = [2, 0, 0, 0, 0, 1, 1, 1]
    keys = ("ctx", "question", "query")
    texts = [
        {**dict.fromkeys(keys, ""), **row, "choices": row["choices"], "gold": gold, "answer": "", "label": 0}
        for row, gold in zip(TEXTS, golds, strict=True)
    ]
    for name, rows in (("texts", texts), ("letters", LETTERS), ("words", WORDS)):
        files = {"test": str(write(root / f"{name}.jsonl", rows)), "dev": str(root / f"{name}.jsonl")}
        head = f"task: choices_{name}\ndataset_path: json\ntest_split: test\nfewshot_split: dev\n"
        head += f"fewshot_config: {{sampler: first_n}}\ndataset_kwargs: {json.dumps({'data_files': files})}\n"
        body = "\n".join(line.strip() for line in TASKS[name].splitlines())
        (root / f"{name}.yaml").write_text(head.replace('"data_files"', f'"cache_dir": "{root}", "data_files"') + body)
    manager = TaskManager(include_path=str(root), include_defaults=False)
    lm = HFLM(pretrained=str(spoken), device="cpu", dtype="float32", max_length=128)
    names = [f"choices_{name}" for name in TASKS]
    results = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=1000)
    return {name: results["results"][f"choices_{name}"] for name in TASKS}


@pytest.mark.parametrize(
    ("name", "rows", "flags"),
    [
        ("texts", TEXTS, []),
        ("letters", LETTERS, ["--num-fewshot", "2", "--description", "Questions about {subject}."]),
        ("words", WORDS, []),
    ],
)
def test_figures_are_those_of_the_harness_on_the_same_questions(
    ask: Ask, harness: dict[str, Any], tmp_path: Path, name: str, rows: list[dict[str, Any]], flags: list[str]
) -> None:
    file, expected = write(tmp_path / f"{name}.jsonl", rows), harness[name]
    report = ask("--data", file, *flags, *(["--few-shot-data", file] if flags else []))
    assert report["total"]["questions"] == len(rows)
    found = report["total"]["figures"]
    for metric, figure in found.items():
        if f"{metric},none" in expected:
            assert figure["value"] == pytest.approx(expected[f"{metric},none"], rel=1e-4), metric
        if metric != "perplexity" and f"{metric}_stderr,none" in expected:
            assert figure["standard_error"] == pytest.approx(expected[f"{metric}_stderr,none"]), metric
    assert len(found) >= 2
    if name == "texts":  # or else nobody would see one taken for the other
        assert len(set(figures(report["total"]).values())) == 3


def test_subjects_have_rows_of_their_own_and_their_mean_is_the_total(
    ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = write(tmp_path / "law_val.jsonl", LETTERS[:3])
    art = write(tmp_path / "art.jsonl", [{**LETTERS[3], "subject": "fine_art"}, *LETTERS[:1]])
    report = ask("--data", law, art, "--output", tmp_path / "answers.jsonl")
    printed = capsys.readouterr().out
    assert [(row["subject"], row["questions"]) for row in report["rows"]] == [("law", 3), ("fine_art", 1), ("art", 1)]
    total = sum(figures(row)["acc"] * row["questions"] for row in report["rows"]) / 5
    assert figures(report["total"])["acc"] == pytest.approx(total)
    assert report["rows"][1]["figures"]["acc"]["standard_error"] is None
    assert "fine_art" in printed and "total" in printed
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [one["place"] for one in answers] == [f"{law}:1", f"{law}:2", f"{law}:3", f"{art}:1", f"{art}:2"]
    assert [one["gold"] for one in answers] == [1, 2, 0, 3, 1]
    for one in answers:
        log_p = one["log_likelihoods"]
        assert one["found"]["acc"] == (log_p.index(max(log_p)) == one["gold"])
    assert ask("--data", law, art, "--limit", 1)["total"]["questions"] == 3


# -------------------------------------------------------------------------------------------------------------- reading

TABLE = """id,question,A,B,C,D,answer,explanation
0,Which animal barks?,Cat,Dog,Fish,Bird,B,
1,中国的首都是哪里？,上海,广州,北京,深圳,C,北京
2,"Which is a colour,
and none else?",Red,Run,Ran,"3,5",A,
3,Who wrote Hamlet?,Goethe,Dante,Homer,Shakespeare,D,
"""


def test_a_table_holds_the_questions_of_json(tmp_path: Path) -> None:
    (tmp_path / "quiz_val.csv").write_text("\ufeff" + TABLE)
    table = read_questions([str(tmp_path / "*.csv")], Form())
    lines = read_questions([str(write(tmp_path / "quiz_val.jsonl", LETTERS))], Form())
    assert [(one.subject, one.context, one.answers, one.gold) for one in table] == [
        (one.subject, one.context, one.answers, one.gold) for one in lines
    ]
    assert [one.place.rpartition(":")[2] for one in table] == ["2", "3", "4", "6"]
    assert {one.subject for one in table} == {"quiz"}


@pytest.mark.parametrize(
    ("row", "form", "context", "answers"),
    [
        (LETTERS[0], Form(), "Which animal barks?\nA. Cat\nB. Dog\nC. Fish\nD. Bird\nAnswer:", ("A", "B", "C", "D")),
        (
            LETTERS[1],
            Form(cue="答案："),
            "中国的首都是哪里？\nA. 上海\nB. 广州\nC. 北京\nD. 深圳\n答案：",
            tuple("ABCD"),
        ),
        (LETTERS[0], Form("text"), "Which animal barks?", ("Cat", "Dog", "Fish", "Bird")),
        (TEXTS[1], Form(), "Bees make", ("honey", "milk and everything else")),
        (TEXTS[1], Form(cue="Answer:"), "Bees make\nAnswer:", ("honey", "milk and everything else")),
        (TEXTS[1], Form("letter"), "Bees make\nA. honey\nB. milk and everything else\nAnswer:", ("A", "B")),
        (WORDS[0], Form(), "The capital of France is", ("Paris",)),
    ],
)
def test_a_question_is_put_as_asked_for(
    tmp_path: Path, row: dict[str, Any], form: Form, context: str, answers: tuple[str, ...]
) -> None:
    (found,) = read_questions([str(write(tmp_path / "rows.jsonl", [row]))], form)
    assert (found.context, found.answers) == (context, answers)


def question(subject: str, name: str) -> Question:
    return Question("f:1", subject, f"{name}?", ("yes", "no"), 1)


def test_examples_are_the_first_of_the_same_subject() -> None:
    examples = [question(subject, f"{subject}{number}") for number in (1, 2, 3) for subject in ("law", "art")]
    (found,) = with_examples([question("art", "x")], examples, 2)
    assert found.context == "art1? no\n\nart2? no\n\nx?"
    (found,) = with_description([found], "About {subject}.")
    assert found.context == "About art.\n\nart1? no\n\nart2? no\n\nx?"
    with pytest.raises(ValueError, match="--num-fewshot 4: --few-shot-data has 3 of subject 'art'"):
        with_examples([question("art", "x")], examples, 4)
    with pytest.raises(ValueError, match="--num-fewshot 1: --few-shot-data has 0 of subject 'music'"):
        with_examples([question("music", "x")], examples, 1)
    (found,) = with_examples([question("music", "x")], examples[::2], 1)  # all of one subject: for any
    assert found.context == "law1? no\n\nx?"


GOOD = {"question": "Q", "A": "a", "B": "b", "answer": "A"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", r"bad\.jsonl:2: not a JSON object"),
        ("{", r"bad\.jsonl:2: "),
        ({"A": "a", "B": "b"}, r"bad\.jsonl:2: is no question: give question, query, ctx and choices, or a text"),
        ({"question": "Q", "answer": 0}, "2: has no choices: give A, B and so on, or a list of at least two"),
        ({"question": "Q", "choices": ["a"], "answer": 0}, "2: has no choices"),
        ({"question": "Q", "choices": ["a", 5], "answer": 0}, "2: choice 1 is no text: 5"),
        ({**GOOD, "question": ""}, "2: question is no text: ''"),
        ({**GOOD, "B": 7}, "2: B is no text: 7"),
        ({"question": "Q", "A": "a", "B": "b"}, "2: has no answer: give answer, gold, label"),
        ({**GOOD, "answer": "C"}, r"2: answer 'C' is neither one of A, B nor 0\.\.1"),
        ({**GOOD, "answer": 2}, r"2: answer 2 is neither one of A, B nor 0\.\.1"),
        ({**GOOD, "answer": True}, "2: answer True is neither"),
        ({**GOOD, "answer": ""}, "2: answer '' is neither"),
        ({"text": "alone"}, "2: text has no word before its last one"),
        ({"text": "two words"}, r"2: is of another kind than .*bad\.jsonl:1: one has choices, the other a text"),
    ],
)
def test_what_is_no_question_is_refused_with_its_place(tmp_path: Path, row: Any, message: str) -> None:
    line = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_questions([str(tmp_path / "bad.jsonl")], Form())


def test_a_row_of_another_width_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(TABLE + "4,Which?,a\n")
    with pytest.raises(ValueError, match=r"bad\.csv:7: does not have the 8 columns of the first line"):
        read_questions([str(tmp_path / "bad.csv")], Form())
    (tmp_path / "gbk.csv").write_bytes(TABLE.encode("gbk"))
    with pytest.raises(ValueError, match=r"gbk\.csv: is not UTF-8"):
        read_questions([str(tmp_path / "gbk.csv")], Form())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no question in .*empty\.jsonl"):
        read_questions([str(tmp_path / "empty.jsonl")], Form())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data=()), "give the questions: --data FILE"),
        (dict(num_fewshot=-1), "--num-fewshot -1: must not be negative"),
        (dict(num_fewshot=2), "--few-shot-data and --num-fewshot go together"),
        (dict(few_shot_data=("a",)), "--few-shot-data and --num-fewshot go together"),
        (dict(limit=0), "--limit 0: must be at least 1"),
        (dict(output="no/such/place"), "--output no/such/place: must be a file in a directory that exists"),
    ],
)
def test_wrong_arguments_are_refused(spoken: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChoicesArgs(**{"load": str(spoken), "data": ("a",), **changes}).validate()
