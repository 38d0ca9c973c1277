"""lm-evaluation-harness gets from us what it gets from its own Hugging Face backend, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.evaluation.arguments import HarnessArgs
from megatron_patch.launch import harness as command
from tests.evaluation.runs import Asked, answers, check_equal, harnessed
from tests.tokenizer import make
from tests.workers import Pool

WINDOW = 48
PROMPT = "Question: what is the capital of France, and of Italy?\nAnswer:"
ASKED: Asked = (
    [
        (PROMPT, " Paris"),
        (PROMPT, " Rome"),
        (PROMPT, " A"),  # one token each: the model sees the question once
        (PROMPT, " B"),
        (PROMPT + " ", "Paris"),  # whose spaces go to the answer
        (PROMPT + " \n", "Paris, of course"),
        ("", "The capital of France is Paris."),
        ("", "<|endoftext|>The end"),  # that a text begins with what it is given
        ("<s>a text", " and its end</s>"),
        ("<|endoftext|>a text", " and its end<|im_end|>"),
        (make.TEXTS[1] * 3, "今天天气很好"),  # a context that does not fit
        ("x", " y" * 15),
    ],
    ["The capital of France is Paris.", "", " ".join(make.TEXTS[:5]) * 2, "<s>begun", "a literal </s> and <|im_end|>"],
    [
        (PROMPT, {"until": ["\n", "e"], "max_gen_toks": 12}),
        ("<s>a text", {"until": "a", "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),
        (make.TEXTS[1] * 3, {"max_gen_toks": 16}),
        ("The", {"until": [], "max_new_tokens": 8, "temperature": 0.0}),
        ("x", {"until": ["<|im_end|>", "</s>"], "max_gen_toks": 30}),
    ],
)
"""What is hard to get right."""


def theirs(root: Path, **options: Any) -> Any:
    """The harness's own backend."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(root), device="cpu", dtype="float32", batch_size=3, max_length=WINDOW, **options)


@pytest.fixture(scope="module")
def expected(spoken: Path, spoken_llama: Path) -> dict[Path, list[list[Any]]]:
    """The answers of its own backend; a text it cannot continue it continues by nothing."""
    return {root: answers(theirs(root), ASKED) for root in (spoken, spoken_llama)}


@pytest.mark.parametrize("model", ["spoken", "spoken_llama"])
def test_answers_are_those_of_the_harness_own_backend(
    model: str, expected: dict[Path, list[list[Any]]], request: pytest.FixtureRequest
) -> None:
    from megatron_patch.evaluation.harness import MegatronPatchLM

    root = request.getfixturevalue(model)
    lm = MegatronPatchLM(load=str(root), seq_length=WINDOW, batch_size=3)
    check_equal(answers(lm, ASKED), expected[root])
    lm.close()


LAYOUTS = {
    "TP2": dict(tensor_model_parallel_size=2),
    "PP2": dict(pipeline_model_parallel_size=2),
    "DP2": {},
}


@pytest.fixture(scope="module")
def converted(spoken: Path) -> Path:
    from megatron_patch.checkpoint.convert import convert

    convert(spoken, spoken.parent / "for-the-harness")
    return spoken.parent / "for-the-harness"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_of_every_layout_gets_the_same(
    pool: Pool, spoken: Path, converted: Path, expected: dict[Path, list[list[Any]]], layout: str
) -> None:
    options = {"seq_length": WINDOW, **LAYOUTS[layout]}
    first, second = pool.run(harnessed, 2, str(converted), ASKED, options)
    assert first == second
    check_equal(first, expected[spoken])


def test_what_is_drawn_does_not_depend_on_who_shares_the_work(pool: Pool, converted: Path) -> None:
    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 20}
    asked = ([], [], [("The capital", drawn)] * 3)
    (alone,) = pool.run(harnessed, 1, str(converted), asked, {})
    assert len(set(alone[2])) == 3
    assert pool.run(harnessed, 2, str(converted), asked, {}) == [alone, alone]


# ----------------------------------------------------------------------------------------------------------- the tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local tasks of three kinds."""
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": "The sun rises in the", "choices": ["west", "far and distant north", "east"], "answer": 2},
        {"question": "Bees make", "choices": ["honey", "milk and everything else"], "answer": 0},
        {"question": "法国的首都是", "choices": ["巴黎", "Rome, as everybody knows"], "answer": 0},
        {"question": "Two and two are", "choices": ["four", "three"], "answer": 0},
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = "\n".join(
        [
            "dataset_path: json",
            f"dataset_kwargs: {{data_files: {{test: {root}/rows.jsonl}}, cache_dir: {root}/cache}}",
            "test_split: test",
            "fewshot_split: test",
            "fewshot_config: {sampler: first_n}",
            'doc_to_text: "{{question}}"',
        ]
    )
    kinds = {
        "several": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]",
        "cloze": "output_type: loglikelihood\ndoc_to_target: ' {{choices[0]}}'\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]",
        "free": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 10}\nmetric_list: [{metric: exact_match}]",
    }
    for name, lines in kinds.items():
        (root / f"{name}.yaml").write_text(f"task: tests_{name}\n{head}\n{lines}\n")
    return root


NAMES = ("tests_several", "tests_cloze", "tests_free")
TURNS = "{% for m in messages %}<|im_end|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}A: {% endif %}"


def test_a_run_by_command_finds_what_a_run_by_their_backend_finds(
    spoken: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    reference = theirs(spoken)
    reference.tokenizer.chat_template = CHAT
    asked = dict(num_fewshot=1, limit=3, apply_chat_template=True, system_instruction="Be brief.")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = lm_eval.simple_evaluate(reference, tasks=list(NAMES), task_manager=manager, bootstrap_iters=10, **asked)

    (tmp_path / "tokenizer").mkdir()
    for file in spoken.iterdir():
        if "token" in file.name:
            (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(CHAT)
    files = {"--json": tmp_path / "results.json", "--samples": tmp_path / "samples.jsonl"}
    capsys.readouterr()
    argv = [
        "--load",
        spoken,
        "--tokenizer-model",
        tmp_path / "tokenizer",
        "--seq-length",
        WINDOW,
        "--include-path",
        tasks,
    ]
    argv += ["--tasks", *NAMES, "--num-fewshot", 1, "--limit", 3, "--apply-chat-template"]
    argv += ["--system-instruction", "Be brief.", *(word for pair in files.items() for word in pair)]
    assert command.main(list(map(str, argv))) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)

    found = json.loads(files["--json"].read_text())["results"]
    assert {*found} == {*NAMES}
    for name in NAMES:
        for metric, value in expected["results"][name].items():
            if not metric.endswith("stderr,none") and isinstance(value, float):
                assert found[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    samples = [json.loads(line) for line in files["--samples"].read_text().splitlines()]
    assert [sample["task"] for sample in samples] == [name for name in NAMES for _ in range(3)]
    for sample in samples:
        (their,) = (one for one in expected["samples"][sample["task"]] if one["doc_id"] == sample["doc_id"])
        assert sample["arguments"] == json.loads(json.dumps(their["arguments"]))
        assert "Be brief." in sample["arguments"][0][0]


@pytest.mark.parametrize("messages", [1, 2])
def test_a_template_without_system_messages_is_given_none(
    spoken: Path, messages: int, caplog: pytest.LogCaptureFixture
) -> None:
    from jinja2.exceptions import TemplateError

    from megatron_patch.evaluation.harness import MegatronPatchLM

    lm = MegatronPatchLM(load=str(spoken))
    refusal = "{% if messages[0].role == 'system' or messages | length > 2 %}{{ raise_exception('no') }}{% endif %}"
    lm.tokenizer.hf.chat_template = refusal + CHAT
    chat = [{"role": "system", "content": "S"}, *[{"role": "user", "content": "U"}] * messages]
    assert lm.apply_chat_template(chat) == "<|im_end|>user: U\n" * messages + "A: "
    assert messages > 1 or "refuses a system message, which is left out" in caplog.text  # once
    with pytest.raises(TemplateError):
        lm.apply_chat_template(chat[1:] * 3)
    lm.close()


def test_the_harness_finds_us_by_name(spoken: Path, tasks: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import megatron_patch.evaluation.harness  # noqa: F401

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        "megatron-patch", f"load={spoken},dtype=float32", ["tests_several"], batch_size=2, task_manager=manager
    )
    assert results["config"]["seq_length"] == 128
    assert results["n-samples"]["tests_several"]["effective"] == 4


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=()), "give what to run: --tasks NAME"),
        (dict(include_path=("nowhere",)), "--include-path nowhere: no such directory"),
        (dict(num_fewshot=-1), "--num-fewshot -1: must not be negative"),
        (dict(limit=0), "--limit 0: must be at least 1"),
        (dict(samples="no/such/place"), "--samples no/such/place: must be a file in a directory that exists"),
    ],
)
def test_wrong_arguments_are_refused(spoken: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HarnessArgs(**{"load": str(spoken), "tasks": ("a",), **changes}).validate()


def test_without_the_harness_its_extra_is_named(spoken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_patch.evaluation.arguments.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lm_eval is not installed; pip install 'megatron-patch\[harness\]'"):
        HarnessArgs(load=str(spoken), tasks=("a",)).validate()


def test_a_task_that_nobody_has_is_refused(spoken: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    from megatron_patch.evaluation import harness

    local = TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **options: local)  # to list the harness's own takes seconds
    with pytest.raises(ValueError, match="--tasks tests_none: no such task; --include-path DIR"):
        command.main(["--load", str(spoken), "--include-path", str(tasks), "--tasks", "tests_several", "tests_none"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (([("a", "b" * 900)], [], []), r"what is to be scored has \d+ tokens and does not fit into --seq-length 48"),
        (([("abc", "")], [], []), "'' has no token of its own behind 'abc'"),
        (([], [], [("a", {"max_gen_toks": 48})]), "max_gen_toks=48: must be less than --seq-length 48"),
        (([], [], [("a", {"num_beams": 4, "max_gen_toks": 8})]), "generation_kwargs: num_beams not supported; known"),
    ],
)
def test_what_cannot_be_answered_is_refused(spoken: Path, asked: Asked, message: str) -> None:
    from megatron_patch.evaluation.harness import MegatronPatchLM

    lm = MegatronPatchLM(load=str(spoken), seq_length=WINDOW)
    with pytest.raises(ValueError, match=message):
        answers(lm, asked)
    lm.close()
