"""The demo world: endless short English stories from a seeded grammar, and four zero-shot tasks.

A story opens with the weather, somebody's trade and two names. It then follows threads (who of the two holds a thing,
where a thing lies, how many of something there are, who is meant by she or he, what happened that day), told in
turns, and ends by stating the outcomes: its last words depend on its first ones, and on what holds in this world
(which trade has which tool, what follows from what, after which weather the ground is wet). The hash of a story's
text decides the split it belongs to, so the splits are disjoint for every seed.

The tasks ask for outcomes that only the story tells: without it each answer is as likely as the others.

`python -m scripts.demo_world --sample 3` shows stories; `--write-tasks` writes the tasks under data/tasks/.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data import words as w

SPLITS = {"test": {0}, "validation": {1}, "train": set(range(2, 10))}
DOCUMENTS = {"train": 5000, "validation": 500, "test": 600}
TASKS = Path(__file__).parent / "tasks"
TASK_ITEMS = 250


QUESTION = "was the ground wet ?"


@dataclass(frozen=True)
class Thread:
    """One line of events, told in order, and its outcome, which the ending states as ``stem outcome .``"""

    sentences: list[str]
    stem: str
    outcome: str


def _others(rng: random.Random, right: str, pool: Iterable[str], n: int = 3) -> list[str]:
    return rng.sample([word for word in pool if word != right], n)


def _a(phrase: str) -> str:
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "use", "uku", "one"))
    return f"{'an' if vowel else 'a'} {phrase}"


def _holding(rng: random.Random, pair: list[str]) -> Thread:
    """A thing passes from hand to hand."""
    giver, taker = rng.sample(pair, 2)
    thing, colour, look = rng.choice(w.THINGS), rng.choice(w.COLOURS), rng.choice(w.LOOKS)
    told = [
        rng.choice(
            (
                f"{giver} had {_a(look)} {colour} {thing} .",
                f"{giver} found {_a(look)} {colour} {thing} near the {rng.choice(w.PLACES)} .",
                f"{giver} bought {_a(look)} {colour} {thing} in {rng.choice(w.TOWNS)} .",
            )
        )
    ]
    for _ in range(rng.choice((0, 1, 1, 2))):
        told.append(
            rng.choice(
                (
                    f"{giver} gave the {thing} to {taker} .",
                    f"{giver} sold the {thing} to {taker} .",
                    f"then {taker} borrowed the {thing} from {giver} .",
                    f"later {giver} lent the {colour} {thing} to {taker} .",
                )
            )
        )
        giver, taker = taker, giver
    stem = rng.choice((f"in the end the {thing} was with", f"now the {colour} {thing} belonged to"))
    return Thread(told, stem, giver)


def _lying(rng: random.Random, pair: list[str]) -> Thread:
    """A thing is put somewhere and perhaps moved."""
    first, second = rng.sample(pair, 2)
    thing, holder = rng.choice(w.THINGS), rng.choice(w.HOLDERS)
    place, other = rng.sample(w.PLACES, 2)
    told = [
        rng.choice(
            (
                f"{first} put the {thing} into {_a(holder)} at the {place} .",
                f"{first} hid the {rng.choice(w.LOOKS)} {thing} in {_a(holder)} by the {place} .",
                f"{first} left the {thing} in {_a(rng.choice(w.COLOURS))} {holder} at the {place} .",
            )
        )
    ]
    moved = rng.random() < 0.5
    if moved:
        told.append(
            rng.choice(
                (
                    f"{second} carried the {holder} to the {other} .",
                    f"after a while {second} moved the {thing} from the {place} to the {other} .",
                )
            )
        )
    else:
        told.append(f"{second} looked at the {thing} but did not touch it .")
    stem = rng.choice((f"so the {thing} could be found at the", f"the {holder} with the {thing} stood at the"))
    return Thread(told, stem, other if moved else place)


def _counting(rng: random.Random, pair: list[str]) -> Thread:
    """Small sums."""
    first, second = rng.sample(pair, 2)
    what, have, change = rng.choice(w.COUNTED), rng.randint(3, 9), rng.randint(2, 5)
    told = [rng.choice((f"{first} had {w.NUMBERS[have]} {what} .", f"{first} picked up {w.NUMBERS[have]} {what} ."))]
    if change >= have or rng.random() < 0.6:
        now = have + change
        told.append(f"{second} gave {w.NUMBERS[change]} more {what} to {first} .")
    else:
        now = have - change
        told.append(f"{first} gave {w.NUMBERS[change]} of the {what} to {second} .")
    return Thread(told, f"when {first} counted the {what} the number was", w.NUMBERS[now])


def _meaning(rng: random.Random, pair: list[str]) -> Thread:
    """One of the two is meant by she or he."""
    meant, _ = rng.sample(pair, 2)
    first, second = rng.sample(pair, 2)
    trait = rng.choice(w.TRAITS)
    pronoun, object_, kind = ("she", "her", "woman") if meant in w.FEMALE else ("he", "him", "man")
    told = [
        rng.choice(
            (
                f"{first} met {second} at the {rng.choice(w.PLACES)} and {pronoun} was {trait} .",
                f"{first} went to {rng.choice(w.TOWNS)} with {second} because {pronoun} was {trait} .",
                f"{first} talked to {second} and {pronoun} seemed {trait} that {rng.choice(w.TIMES)} .",
            )
        )
    ]
    told.append(f"everybody {rng.choice(('liked', 'thanked', 'praised', 'noticed'))} {object_} for it .")
    return Thread(told, f"the {trait} one of the two was the", f"{kind} , {meant}")


def _happening(rng: random.Random, pair: list[str]) -> Thread:
    """A cause and what came of it, the effect at the end of the story."""
    cause, effect = rng.choice(w.CAUSES)
    told = [rng.choice((f"that day {cause} .", f"{rng.choice(pair)} saw how {cause} .", f"people said that {cause} ."))]
    return Thread(told, "because of that", effect)


PLOTS: dict[str, Callable[[random.Random, list[str]], Thread]] = {
    "holding": _holding,
    "lying": _lying,
    "counting": _counting,
    "meaning": _meaning,
    "happening": _happening,
}


@dataclass(frozen=True)
class Story:
    """Sentences before the ending, the threads by name, whose outcomes the ending states, the two people, the weather."""

    body: list[str]
    threads: dict[str, Thread]
    pair: list[str]
    weather: str

    @property
    def told(self) -> str:
        """The story without its ending."""
        return " ".join(self.body)

    @property
    def text(self) -> str:
        """The whole story, one line."""
        ending = [f"{thread.stem} {thread.outcome} ." for thread in self.threads.values()]
        return " ".join([*self.body, *ending, QUESTION, "yes ." if self.wet else "no ."])

    @property
    def wet(self) -> bool:
        """The answer to the question at the end."""
        return self.weather in w.WET


def _story(rng: random.Random) -> Story:
    pair = [rng.choice(w.FEMALE), rng.choice(w.MALE)]
    rng.shuffle(pair)
    job, weather = rng.choice(sorted(w.TOOLS)), rng.choice(rng.choice((w.WET, w.DRY)))
    plots = ["meaning", *rng.sample([name for name in sorted(PLOTS) if name != "meaning"], rng.choice((1, 2)))]
    threads = {name: PLOTS[name](rng, pair) for name in plots}
    hero, friend = pair
    body = [
        rng.choice(
            (
                f"it was {_a(weather)} {rng.choice(w.TIMES)} in {rng.choice(w.TOWNS)} .",
                f"one {weather} {rng.choice(w.TIMES)} this happened near the {rng.choice(w.PLACES)} .",
                f"here is a story of {_a(weather)} day in {rng.choice(w.TOWNS)} .",
            )
        ),
        rng.choice(
            (
                f"{hero} the {job} got up early to see {friend} .",
                f"{_a(job)} called {hero} had a friend called {friend} .",
            )
        ),
    ]
    queues = [list(thread.sentences) for thread in threads.values()]
    while any(queues):  # threads take turns at random, each in its own order
        body.append(rng.choice([queue for queue in queues if queue]).pop(0))
    # The hero goes by name or by trade; what the weather did to the boots is told once more.
    for i in range(2, len(body)):
        if rng.random() < 0.5:
            body[i] = " ".join(f"the {job}" if word == hero else word for word in body[i].split())
    body.insert(rng.randint(2, len(body)), f"their boots were {'muddy' if weather in w.WET else 'dusty'} .")
    if rng.random() < 0.4:
        passing = (f"{_a(rng.choice(w.ANIMALS))} watched them .", f"they ate {rng.choice(w.FOODS)} .")
        body.insert(rng.randint(2, len(body)), rng.choice(passing))
    threads["working"] = Thread([], "then it was time to go to work with the", w.TOOLS[job])
    order = rng.sample(sorted(threads), len(threads))
    return Story(body, {name: threads[name] for name in order}, pair, weather)


def _split_of(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0] % 10


def stories(split: str, seed: int = 0) -> Iterator[Story]:
    """Endless stories of one split (train, validation or test); the same for the same seed."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: use one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    while True:
        story = _story(rng)
        if _split_of(story.text) in SPLITS[split]:
            yield story


def documents(split: str, seed: int = 0) -> Iterator[str]:
    """Endless texts of stories, one line each."""
    return (story.text for story in stories(split, seed))


@lru_cache(maxsize=4)  # a run asks for one text several times
def text(split: str, n_documents: int | None = None, seed: int = 0) -> str:
    """The first n stories of a split, joined by blank lines."""
    stream = documents(split, seed)
    return "\n\n".join(next(stream) for _ in range(n_documents or DOCUMENTS[split]))


def task_items(name: str, n: int = TASK_ITEMS) -> list[dict[str, object]]:
    """Items of a zero-shot task, from stories of the test split that ``text("test")`` does not show."""
    stream = stories("test", seed=1)
    items: list[dict[str, object]] = []
    rng = random.Random(name)
    while len(items) < n:
        item = _ITEMS[name](next(stream), rng)
        if item is not None:
            items.append(item)
    return items


def _choice(context: str, choices: list[str], rng: random.Random) -> dict[str, object]:
    """An item whose right answer is the first of the choices."""
    shuffled = rng.sample(choices, len(choices))
    return {"context": context, "choices": shuffled, "label": shuffled.index(choices[0])}


def _last_word(story: Story, rng: random.Random) -> dict[str, object] | None:
    asked = story.threads[rng.choice(("working", "meaning"))]
    return {"text": f"{story.told} {asked.stem} {asked.outcome}"}


def _continuation(story: Story, rng: random.Random) -> dict[str, object] | None:
    thread = story.threads.get("happening")
    if thread is None:
        return None
    wrong = _others(rng, thread.outcome, [effect for _, effect in w.CAUSES])
    return _choice(f"{story.told} {thread.stem}", [f"{effect} ." for effect in (thread.outcome, *wrong)], rng)


def _reference(story: Story, rng: random.Random) -> dict[str, object] | None:
    thread = story.threads["meaning"]
    woman, man = sorted(story.pair, key=lambda name: name in w.MALE)
    both = [f"woman , {woman}", f"man , {man}"]
    return _choice(f"{story.told} {thread.stem}", [thread.outcome, *_others(rng, thread.outcome, both, 1)], rng)


def _yes_no(story: Story, rng: random.Random) -> dict[str, object] | None:
    return {"context": f"{story.told} {QUESTION}", "choices": ["no", "yes"], "label": int(story.wet)}


_ITEMS: dict[str, Callable[[Story, random.Random], dict[str, object] | None]] = {
    "demo_lastword": _last_word,
    "demo_continuation": _continuation,
    "demo_reference": _reference,
    "demo_yesno": _yes_no,
}


def write_tasks(directory: Path = TASKS) -> None:
    """Write the items of every task as JSONL."""
    for name in _ITEMS:
        lines = [json.dumps(item) + "\n" for item in task_items(name)]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
