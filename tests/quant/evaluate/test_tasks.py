"""Zero-shot tasks: lm-eval's own scores, paired differences, chance, and mistakes."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.load import load_model, load_tokenizer
from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError
from quant.evaluate import tasks as zero_shot
from quant.evaluate.bootstrap import paired_interval
from quant.evaluate.passes import FULL, Variant
from quant.evaluate.scorer import Scorer
from quant.evaluate.tasks import TaskScore, check_tasks, open_tasks, report
from quant.run.request import Request
from quant.run.session import open_session
from tests.conftest import VOCABULARY
from tests.helpers import config_for, perform, replace

CPU = torch.device("cpu")


def scorer_of(path, tmp_path, batch=4) -> tuple[Scorer, object]:
    model = load_model(str(path), dtype=torch.float32, cache_dir=tmp_path)
    plain = Variant(lambda _, weights: weights)
    return Scorer(model, {FULL: plain}, CPU, batch, "cpu", tmp_path), load_tokenizer(path)


@pytest.mark.parametrize("name", ["opt", "falcon rw", "llama gqa, tied", "bloom"])
def test_log_likelihoods_are_those_of_the_model(name, model_dir, tmp_path):
    """Sequences of many lengths, padded and batched, against one unpadded call of transformers each."""
    scorer, _ = scorer_of(model_dir(name), tmp_path)
    generator = torch.Generator().manual_seed(0)
    keys = []
    for length in (2, 3, 31, 32, 33, 34, 50, 64, 65):
        tokens = tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())
        keys.append((tokens, min(length - 1, 1 + length % 5)))
    scores = scorer.scores(FULL, [*keys, keys[0]])
    assert scores[-1] == scores[0] and len(scorer.known[FULL]) == len(keys)
    reference = AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=torch.float32).eval()
    for (tokens, scored), (value, greedy) in zip(keys, scores, strict=False):
        with torch.no_grad():
            log_p = reference(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)[-scored:]
        target = torch.tensor(tokens[-scored:])
        assert value == pytest.approx(float(log_p.gather(1, target[:, None]).sum()), rel=1e-4)
        assert greedy == bool((log_p.argmax(-1) == target).all())


def test_scores_are_lm_evals_own(local_task, tmp_path):
    """The demo's tasks and a local one on an embedded model: item by item what lm-eval's own model class gives."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    path = zero_shot.OWN_TASKS.parents[1] / "models" / "demo" / "opt"
    names = ["demo_lastword", "demo_reference", "mine"]
    tasks = open_tasks(names, local_task, None, 12)
    scorer, tokenizer = scorer_of(path, tmp_path)
    scores = zero_shot.run_tasks(scorer, tokenizer, tasks)
    reference = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(path), batch_size=3, max_length=512, device="cpu",
        # lm-eval 0.4.13's cache mixes up continuations of one and of several tokens that end one sequence
        logits_cache=False,
    )  # fmt: skip
    expected = lm_eval.simple_evaluate(
        model=reference, tasks=names, task_manager=tasks.manager, limit=12, bootstrap_iters=0
    )
    for name in names:
        own, other = scores[name][FULL], expected["results"][name]
        for sample in expected["samples"][name]:  # which of two equal choices is likeliest, rounding alone would say
            best = sorted(likelihood for likelihood, _ in sample["filtered_resps"])[-2:]
            assert len(best) == 1 or best[1] - best[0] > 1e-3
        assert own.mean == pytest.approx(other["acc,none"], abs=1e-12)
        assert own.values.tolist() == [sample["acc"] for sample in expected["samples"][name]]
        for metric, value in own.others.items():
            assert value == pytest.approx(other[f"{metric},none"], rel=1e-4), metric
    assert scores["demo_reference"][FULL].chance == 0.5 and scores["mine"][FULL].chance == pytest.approx(1 / 3)
    assert scores["demo_lastword"][FULL].chance == 0


def rewritten(local_task, **lines) -> None:
    """Replace lines of the local task's YAML by their beginning; None takes a line away."""
    file = local_task / "mine.yaml"
    kept = [line for line in file.read_text().splitlines() if line.split(":")[0] not in lines]
    file.write_text(
        "\n".join([*kept, *(f"{key}: {value}" for key, value in lines.items() if value is not None)]) + "\n"
    )


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({"doc_to_text": '""'}, "--tasks mine: a context is empty"),
        ({"output_type": "generate_until", "metric_list": "[{metric: exact_match}]"}, "generate text"),
        ({"output_type": "loglikelihood_rolling", "metric_list": "[{metric: word_perplexity}]"}, "rolling"),
        ({"doc_to_choice": '"{{nothing}}"'}, "--tasks mine: a task's template cannot be filled in"),
        ({"doc_to_choice": "7"}, "--tasks mine: "),
        ({"test_split": "nothing"}, "--tasks mine: "),
        ({"num_fewshot": "many"}, "--tasks mine: "),
        ({"metric_list": "7"}, "--tasks mine: "),
        ({"dataset_kwargs": "7"}, "--tasks mine: "),
        ({"dataset_path": "[json]"}, "--tasks mine: "),
        ({"process_docs": "7"}, "--tasks mine: "),
    ],
)
def test_a_task_that_cannot_be_scored_is_one_line(lines, says, model_dir, local_task, tmp_path):
    scorer, tokenizer = scorer_of(model_dir("llama"), tmp_path)
    check_tasks(open_tasks(["mine"], local_task, None, 4), tokenizer, scorer.model)
    rewritten(local_task, **lines)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        check_tasks(open_tasks(["mine"], local_task, None, 4), tokenizer, scorer.model)
    assert "\n" not in str(error.value)


def test_ids_of_tasks_are_checked_before_any_work(model_dir, text, local_task, tmp_path):
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([*(f"<filler {i}>" for i in range(VOCABULARY - len(tokenizer))), "<|im_start|>"])
    tokenizer.save_pretrained(model)
    config = config_for(model, text, tmp_path, tasks=("mine",), task_path=local_task, solver="rtn", options={})
    open_session(config)  # the task is good, though the tokenizer has a token too many
    rewritten(local_task, doc_to_text='"<|im_start|> {{question}}"')
    with pytest.raises(InputError, match="--tasks mine: the tokenizer gives token 264, the model has 264"):
        open_session(config)
    assert not config.output.run_dir.exists()


def test_an_answer_longer_than_the_model_is_one_line(local_task, model_dir, tmp_path):
    rewritten(local_task, doc_to_choice='"{{[question * 9, choices[0]]}}"', doc_to_target="0")
    scorer, tokenizer = scorer_of(model_dir("llama"), tmp_path)
    with pytest.raises(InputError, match="--tasks mine: an answer has .* tokens, the model takes at most 64"):
        check_tasks(open_tasks(["mine"], local_task, None, 2), tokenizer, scorer.model)


def test_requests_are_encoded_once(local_task, tmp_path, monkeypatch):
    scorer, tokenizer = scorer_of_demo(tmp_path)
    tasks = open_tasks(["mine"], local_task, None, 4)
    zero_shot.run_tasks(scorer, tokenizer, tasks)
    first = {name: dict(known) for name, known in scorer.known.items()}
    tasks = open_tasks(["mine"], local_task, None, 4)
    check_tasks(tasks, tokenizer, scorer.model)
    monkeypatch.setattr(zero_shot, "encode_request", None)  # a call would fail
    scorer.known[FULL].clear()
    zero_shot.run_tasks(scorer, tokenizer, tasks)
    assert scorer.known == first and len(tasks.keys) == 12


def test_a_run_reports_both_forms(model_dir, text, local_task, tmp_path):
    config = Request.of(
        model=str(model_dir("llama")), dataset=str(text), eval_datasets=(), nsamples=4, seqlen=32, wbits=2, solver="rtn",
        cache_dir=tmp_path / "cache", run_dir=tmp_path / "run", tasks=("mine",), task_path=local_task, act=ActSpec(4, 4),
    )  # fmt: skip
    results = perform(config)
    entry = results["zero_shot"]["mine"]
    assert entry["items"] == 20 and entry["metric"] == "acc" and "acc_norm" in entry["others"]
    assert entry["difference"] == pytest.approx(entry["quantized"] - entry["fp"])
    low, high = entry["difference_ci95"]
    assert low <= entry["difference"] <= high and entry["stderr"] > 0
    fewer = replace(config, limit=5)
    again = perform(fewer)
    assert again["zero_shot"]["mine"]["items"] == 5 and again["codes_sha256"] == results["codes_sha256"]
    base = replace(config, wbits=16, act=ActSpec(), run_dir=tmp_path / "base")
    assert perform(base)["zero_shot"]["mine"]["fp"] == entry["fp"]


def test_chance_is_said(tmp_path):
    rng = np.random.default_rng(0)
    guessing = TaskScore("acc", rng.integers(0, 2, 200).astype(float), 0.5, {})
    knowing = TaskScore("acc", np.ones(200), 0.5, {})
    open_ended = TaskScore("acc", np.zeros(200), 0.0, {})
    entries = report({n: {"q": s} for n, s in (("a", guessing), ("b", knowing), ("c", open_ended))}, "q")
    assert [entries[n]["at_chance"] for n in "abc"] == [True, False, False]
    assert entries["a"]["stderr"] == pytest.approx(stats.sem(guessing.values))


def test_the_interval_is_the_percentile_bootstrap_of_scipy():
    """The same draws of pairs, by other code."""
    rng = np.random.default_rng(2)
    values, reference = rng.normal(1.0, 2.0, 60), rng.normal(0.8, 1.0, 60)
    draws = np.random.default_rng(5)
    theirs = stats.bootstrap((values - reference,), np.mean, n_resamples=2000, method="percentile", random_state=draws)
    assert paired_interval(values, reference, seed=5) == pytest.approx([*theirs.confidence_interval], rel=1e-12)


def test_the_interval_covers_the_truth_at_its_rate():
    """Paired items with a true difference of -0.1: 95% intervals hold it in 92 to 98 of 100 worlds."""
    rng, held = np.random.default_rng(1), 0
    for world in range(300):
        before = rng.random(200) < 0.7
        after = np.where(rng.random(200) < 0.2, rng.random(200) < 0.2, before)  # moves a fifth to 0.2: -0.1
        low, high = paired_interval(after.astype(float), before.astype(float), seed=world)
        held += low <= -0.1 <= high
    assert 0.92 < held / 300 < 0.98  # measured 0.96


def test_mistakes_are_named(local_task, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="unknown task 'demo_lastwort'; did you mean demo_lastword"):
        open_tasks(["demo_lastwort"], None, None, None)
    with pytest.raises(InputError, match="is not a directory"):
        open_tasks(["mine"], tmp_path / "nothing", None, None)
    (local_task / "rows.jsonl").unlink()
    with pytest.raises(InputError, match="--tasks mine: its data cannot be loaded"):
        open_tasks(["mine"], local_task, None, None)


@pytest.mark.slow
def test_a_task_that_needs_the_network_says_so():
    with pytest.raises(InputError, match="--tasks piqa: its data cannot be loaded .*piqa"):
        open_tasks(["piqa"], None, None, None)


def test_tasks_that_generate_are_refused(local_task, tmp_path, model_dir):
    text = (local_task / "mine.yaml").read_text().replace("multiple_choice", "generate_until").replace("mine", "talk")
    text = text.replace("{metric: acc, aggregation: mean, higher_is_better: true}, ", "").replace(
        "acc_norm", "exact_match"
    )
    (local_task / "talk.yaml").write_text(text.replace('doc_to_choice: "{{choices}}"\n', ""))
    tasks = open_tasks(["talk"], local_task, None, 2)
    scorer, tokenizer = scorer_of(model_dir("opt"), tmp_path)
    with pytest.raises(InputError, match="generate text"):
        zero_shot.run_tasks(scorer, tokenizer, tasks)


@pytest.mark.parametrize("included", [False, True])
def test_a_task_runs_no_python_without_the_flag(included, local_task, tmp_path):
    mark = tmp_path / "PWNED"
    (local_task / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef rows(docs):\n    return docs\n")
    code = "process_docs: !function evil.rows\n"
    if included:
        (tmp_path / "base.yaml").write_text(code.replace("evil", "tasks.evil"))
        code = f"include: {tmp_path / 'base.yaml'}\n"
    file = local_task / "mine.yaml"
    file.write_text(code + file.read_text())
    says = "base.yaml, line 1: !function runs Python" if included else "mine.yaml, line 1: !function runs Python"
    with pytest.raises(InputError, match=says):
        open_tasks(["mine"], local_task, None, 4)
    assert not mark.exists()
    assert open_tasks(["mine"], local_task, None, 4, trust_remote_code=True).members == {"mine": ("mine",)}
    assert mark.exists(), "with the flag it is the person's own"


def test_a_template_of_a_task_reaches_no_python(local_task, tmp_path):
    mark = tmp_path / "PWNED"
    file = local_task / "mine.yaml"
    evil = (
        "{{ question.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mknod('"
        + str(mark)
        + "') }}"
    )
    lines = [
        f'doc_to_text: "{evil}"' if line.startswith("doc_to_text") else line for line in file.read_text().splitlines()
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match="a task's template reaches for Python"):
        zero_shot.run_tasks(*scorer_of_demo(tmp_path), open_tasks(["mine"], local_task, None, 4))
    assert not mark.exists()


def scorer_of_demo(tmp_path) -> tuple[Scorer, object]:
    return scorer_of(zero_shot.OWN_TASKS.parents[1] / "models" / "demo" / "opt", tmp_path)


@pytest.mark.parametrize("name", ["7", "false", "{a: 1}"])
def test_a_task_whose_name_is_none_is_one_line(name, local_task):
    (local_task / "other.yaml").write_text(f"task: {name}\ndataset_path: json\n")
    with pytest.raises(InputError) as error:
        open_tasks(["other"], local_task, None, 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["a: [", "\x00", "- " * 3000 + "x"])
def test_a_task_that_is_no_yaml_is_one_line(content, local_task):
    (local_task / "other.yaml").write_text(content)
    with pytest.raises(InputError, match="other.yaml is not a readable task") as error:
        open_tasks(["mine"], local_task, None, 4)
    assert "\n" not in str(error.value)


def test_a_metric_runs_no_python_without_the_flag(local_task, tmp_path):
    mark = tmp_path / "PWNED"
    (local_task / "m.py").write_text(f"open({str(mark)!r}, 'w')\n")
    file = local_task / "mine.yaml"
    for more in ("", ", hf_evaluate: true"):
        own = f"metric_list: [{{metric: {local_task / 'm.py'}, aggregation: mean, higher_is_better: true{more}}}]"
        lines = [own if line.startswith("metric_list") else line for line in file.read_text().splitlines()]
        file.write_text("\n".join(lines))
        with pytest.raises(InputError):
            zero_shot.run_tasks(*scorer_of_demo(tmp_path), open_tasks(["mine"], local_task, None, 4))
        assert not mark.exists()


def test_a_tag_that_names_a_python_object_is_refused(local_task):
    file = local_task / "mine.yaml"
    file.write_text("process_docs: !!python/object/apply:os.getcwd []\n" + file.read_text())
    with pytest.raises(InputError, match="mine.yaml, line 1: tag:yaml.org,2002:python.* runs Python"):
        open_tasks(["mine"], local_task, None, 4)


def test_the_flag_counts_where_tasks_run(local_task):
    import evaluate

    tasks = open_tasks(["mine"], local_task, None, 4, trust_remote_code=True)
    load = evaluate.load
    with zero_shot.sandbox(tasks.trust_remote_code):
        assert evaluate.load is load
    with zero_shot.sandbox(), pytest.raises(InputError, match="'m.py' is a program"):
        evaluate.load("m.py")
    assert evaluate.load is load


def test_an_include_is_looked_for_where_the_file_is(local_task, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "base.txt").write_text("process_docs: !function evil.rows\n")
    (hidden / "real.txt").write_text("include: base.txt\n" + (local_task / "mine.yaml").read_text())
    (local_task / "link.yaml").symlink_to(hidden / "real.txt")
    with pytest.raises(InputError, match="base.txt, line 1: !function runs Python"):
        open_tasks(["mine"], local_task, None, 4)
    (hidden / "real.txt").write_text("include: nothing.txt\n")
    with pytest.raises(InputError, match="nothing.txt is not a readable task"):
        open_tasks(["mine"], local_task, None, 4)


def test_includes_are_read_once(local_task):
    for i in range(24):
        (local_task / f"i{i}.yaml").write_text(f"include: [i{i + 1}.yaml, i{i + 1}.yaml]\n" if i < 23 else "task: x\n")
    zero_shot.check_no_code(local_task / "i0.yaml", set())
    (local_task / "self.yaml").write_text("include: self.yaml\n")
    zero_shot.check_no_code(local_task / "self.yaml", set())


@pytest.mark.parametrize("template", ["{{", "{{ range(10**9) | list }}", "{% for %}"])
def test_a_template_that_is_none_is_one_line(template, local_task, tmp_path):
    file = local_task / "mine.yaml"
    lines = [
        f'doc_to_text: "{template}"' if line.startswith("doc_to_text") else line
        for line in file.read_text().splitlines()
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match="template cannot be filled in|cannot be loaded"):
        zero_shot.run_tasks(*scorer_of_demo(tmp_path), open_tasks(["mine"], local_task, None, 4))
