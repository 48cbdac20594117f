import itertools
import json

import pytest
import torch

from data import demo
from models import family_of
from scripts.train_demo_models import FAMILIES, configuration, plant_outliers

TASKS = ("demo_lastword", "demo_continuation", "demo_reference", "demo_yesno")


def test_stories_repeat_for_a_seed_and_never_end():
    first, second, other = (list(itertools.islice(demo.documents("train", seed), 50)) for seed in (3, 3, 4))
    assert first == second != other
    stream = demo.documents("validation")
    assert len({next(stream) for _ in range(2000)}) > 1990


def test_splits_are_disjoint_for_every_seed():
    seen: dict[str, set[str]] = {split: set() for split in demo.SPLITS}
    for split, seed in itertools.product(demo.SPLITS, range(4)):
        seen[split].update(itertools.islice(demo.documents(split, seed), 300))
    for a, b in itertools.combinations(seen.values(), 2):
        assert not a & b
    # By construction: the text itself decides.
    for split, texts in seen.items():
        assert all(demo._split_of(text) in demo.SPLITS[split] for text in texts)
    assert set().union(*demo.SPLITS.values()) == set(range(10))


def test_the_test_text_has_a_rich_vocabulary():
    assert len(set(demo.text("test").split())) >= 800
    with pytest.raises(ValueError, match="train"):
        next(demo.documents("dev"))


def test_endings_follow_from_beginnings():
    """Replay the events of every story and compare with what its ending says."""
    seen = dict.fromkeys((*demo.PLOTS, "working"), 0)
    for story in itertools.islice(demo.stories("train"), 400):
        hero, friend = story.pair
        words = " ".join(story.body).split()
        (job,) = {trade for trade in demo.w.TOOLS if trade in story.body[1].split()}
        told = " ".join(story.body).replace(f"the {job}", hero).split()
        for name, thread in story.threads.items():
            seen[name] += 1
            events = [sentence.split() for sentence in thread.sentences]
            assert f"{thread.stem} {thread.outcome} ." in story.text
            if name == "working":
                expected = demo.w.TOOLS[job]
            elif name == "counting":
                have, change = (demo.w.NUMBERS.index(x) for e in events for x in e if x in demo.w.NUMBERS)
                expected = demo.w.NUMBERS[have + change if events[1][-2] == thread.stem.split()[1] else have - change]
            elif name == "holding":
                last = events[-1]
                expected = last[1] if "borrowed" in last else last[-2] if len(events) > 1 else last[0]
            elif name == "lying":
                where = [x for e in events for x in e if x in demo.w.PLACES]
                expected = where[-1]
            elif name == "meaning":
                (pronoun,) = {"she", "he"} & set(events[0])
                meant = next(p for p in (hero, friend) if (p in demo.w.FEMALE) == (pronoun == "she"))
                expected = f"{'woman' if pronoun == 'she' else 'man'} , {meant}"
            else:
                expected = next(effect for cause, effect in demo.w.CAUSES if f"{cause} ." in " ".join(thread.sentences))
            assert thread.outcome == expected, (name, thread)
        assert {hero, friend} <= set(told) and ("muddy" in words) == story.wet != ("dusty ." in story.told)
    assert all(count > 50 for count in seen.values())


def test_tasks_cannot_be_answered_without_the_story():
    """The last sentence of an item leaves every answer open: what decides is in the story."""
    for name in TASKS:
        answers: dict[str, set[str]] = {}
        for item in demo.task_items(name):
            context = str(item["text"]).rpartition(" ")[0] if name == "demo_lastword" else str(item["context"])
            answer = str(item["text"]).split()[-1] if name == "demo_lastword" else item["choices"][item["label"]]
            last = context.rpartition(" . ")[2]
            last = last.replace(last.split()[1], "*") if "one of the two" in last else last  # the trait
            answers.setdefault(last, set()).add(answer)
        assert len(answers) == {"demo_lastword": 3}.get(name, 1)
        assert all(len(choices) > 1 for choices in answers.values()), name


@pytest.mark.parametrize("name", TASKS)
def test_task_items_are_well_formed_and_committed(name):
    items = demo.task_items(name)
    assert len(items) == demo.TASK_ITEMS
    stored = [json.loads(line) for line in (demo.TASKS / f"{name}.jsonl").read_text().splitlines()]
    assert stored == items, "run python -m scripts.demo_world --write-tasks"
    shown = demo.text("test")
    for item in items:
        if name == "demo_lastword":
            context, _, last = str(item["text"]).rpartition(" ")
            assert last in {*demo.w.TOOLS.values(), *demo.w.FEMALE, *demo.w.MALE} and context not in shown
        else:
            assert len(set(item["choices"])) == {"demo_continuation": 4}.get(name, 2)
            assert 0 <= item["label"] < len(item["choices"])
    if name != "demo_lastword":
        labels = [item["label"] for item in items]
        assert max(labels.count(value) for value in set(labels)) < 0.6 * len(labels), "guessing one answer must not pay"


def test_tasks_load_in_lm_eval_from_any_directory(monkeypatch, tmp_path):
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    manager = TaskManager(include_path=str(demo.TASKS), include_defaults=False)
    tasks = manager.load_task_or_group(list(TASKS))
    assert sorted(tasks) == sorted(TASKS)
    for name, task in tasks.items():
        documents = list(task.test_docs())
        assert len(documents) == demo.TASK_ITEMS
        target = task.doc_to_target(documents[0])
        text = task.doc_to_text(documents[0])
        item = demo.task_items(name)[0]
        assert text + target == item["text"] if name == "demo_lastword" else text == item["context"]


def random_model(family: str):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(configuration(family, 64, 32, 2)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_planting_outliers_keeps_the_function(family):
    model, ids = random_model(family), torch.randint(3, 64, (2, 16))
    blocks = family_of(family).blocks
    norm = next(m for n, m in model.get_submodule(blocks)[0].named_modules() if "norm" in n)
    with torch.no_grad():
        before, gain = model(ids).logits, norm.weight.clone()
        plant_outliers(model, 16.0, 4)
        after = model(ids).logits
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
        assert int((norm.weight != gain).sum()) == 4
        # Negative control: gains alone, without the readers' columns, are another function.
        norm.weight[:4] *= 16
        assert float((model(ids).logits - before).abs().max()) > 1e-3
