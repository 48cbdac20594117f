"""The demo world: endless short English stories from a seeded grammar, and four zero-shot tasks.

A story opens with the weather and somebody's trade, follows threads (who holds a thing, where a thing lies, how
many of something there are, who is meant by she or he, what came of what), told in turns, and ends by stating the
outcomes: its last words depend on its first ones, and on what holds in this world (which trade has which tool, what
follows from what, after which weather the ground is wet). The hash of a story's text decides the split it belongs to, so
the splits are disjoint for every seed.

The tasks ask for what holds in the world; they can be answered without reading the whole story.

`python -m data.demo --sample 3` shows stories; `--write-tasks` writes the tasks under data/tasks/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data import words as w

SPLITS = {"test": {0}, "validation": {1}, "train": set(range(2, 10))}
DOCUMENTS = {"train": 5000, "validation": 500, "test": 600}
TASKS = Path(__file__).parent / "tasks"
TASK_ITEMS = 250


@dataclass
class Thread:
    """One line of events, told in order. fact: the outcome without its last word, that word, wrong words."""

    sentences: list[str]
    fact: tuple[str, str, list[str]]
    reference: tuple[str, str, str] | None = None  # description, who is meant, the other one
    known: bool = False  # whether the outcome follows from what holds in the world


def _people(rng: random.Random, n: int, taken: set[str]) -> list[str]:
    free = [name for name in w.FEMALE + w.MALE if name not in taken]
    chosen = rng.sample(free, n)
    taken.update(chosen)
    return chosen


def _others(rng: random.Random, right: str, pool: list[str], n: int = 3) -> list[str]:
    return rng.sample([word for word in pool if word != right], n)


def _holding(rng: random.Random, taken: set[str]) -> Thread:
    """A thing passes from hand to hand."""
    people = _people(rng, rng.choice((2, 3, 3)), taken)
    thing = rng.choice(w.THINGS)
    first, colour, look = people[0], rng.choice(w.COLOURS), rng.choice(w.LOOKS)
    told = [
        rng.choice(
            (
                f"{first} had a {look} {colour} {thing} .",
                f"{first} found a {look} {colour} {thing} near the {rng.choice(w.PLACES)} .",
                f"{first} bought a {look} {colour} {thing} in {rng.choice(w.TOWNS)} .",
            )
        )
    ]
    for giver, taker in zip(people, people[1:], strict=False):
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
    owner = people[-1]
    wrong = [*people[:-1], *_others(rng, owner, [n for n in sorted(taken) if n not in people] + w.FEMALE, 3)][:3]
    stem = rng.choice((f"in the end the {thing} was with", f"now the {colour} {thing} belonged to"))
    return Thread(told, (stem, owner, wrong))


def _lying(rng: random.Random, taken: set[str]) -> Thread:
    """A thing is put somewhere and perhaps moved."""
    first, second = _people(rng, 2, taken)
    thing, place, holder = rng.choice(w.THINGS), rng.choice(w.PLACES), rng.choice(w.HOLDERS)
    other = rng.choice([p for p in w.PLACES if p != place])
    told = [
        rng.choice(
            (
                f"{first} put the {thing} into a {holder} at the {place} .",
                f"{first} hid the {rng.choice(w.LOOKS)} {thing} in a {holder} by the {place} .",
                f"{first} left the {thing} in a {rng.choice(w.COLOURS)} {holder} at the {place} .",
            )
        )
    ]
    where = place
    if rng.random() < 0.6:
        where = other
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
    wrong = [p for p in (place, other) if p != where] + _others(rng, where, w.PLACES, 3)
    stem = rng.choice((f"so the {thing} could be found at the", f"the {holder} with the {thing} stood at the"))
    return Thread(told, (stem, where, list(dict.fromkeys(wrong))[:3]))


def _counting(rng: random.Random, taken: set[str]) -> Thread:
    """Small sums."""
    first, second = _people(rng, 2, taken)
    what, have, change = rng.choice(w.COUNTED), rng.randint(2, 9), rng.randint(1, 5)
    told = [
        rng.choice(
            (
                f"{first} had {w.NUMBERS[have]} {what} .",
                f"{first} picked up {w.NUMBERS[have]} {what} .",
            )
        )
    ]
    if change >= have or rng.random() < 0.6:
        now = have + change
        told.append(f"{second} gave {w.NUMBERS[change]} more {what} to {first} .")
    else:
        now = have - change
        told.append(f"{first} gave {w.NUMBERS[change]} of the {what} to {second} .")
    near = [n for n in (now - 2, now - 1, now + 1, now + 2, have) if n >= 0 and n != now]
    wrong = [w.NUMBERS[n] for n in rng.sample(sorted(set(near)), 3)]
    return Thread(told, (f"when {first} counted the {what} the number was", w.NUMBERS[now], wrong))


def _meaning(rng: random.Random, taken: set[str]) -> Thread:
    """A woman and a man, of whom one is meant by she or he."""
    pair = [rng.choice([name for name in names if name not in taken]) for names in (w.FEMALE, w.MALE)]
    taken.update(pair)
    meant, other = rng.sample(pair, 2)
    first, second = rng.sample(pair, 2)
    pronoun, trait = ("she" if meant in w.FEMALE else "he"), rng.choice(w.TRAITS)
    told = [
        rng.choice(
            (
                f"{first} met {second} at the {rng.choice(w.PLACES)} and {pronoun} was {trait} .",
                f"{first} went to {rng.choice(w.TOWNS)} with {second} because {pronoun} was {trait} .",
                f"{first} talked to {second} and {pronoun} seemed {trait} that {rng.choice(w.TIMES)} .",
            )
        )
    ]
    stem = f"of these two , {pronoun} was the {trait} one : {pronoun} was"
    wrong = [other, *_others(rng, meant, [n for n in w.FEMALE + w.MALE if n not in pair], 2)]
    return Thread(told, (stem, meant, wrong), (stem, meant, other))


def _happening(rng: random.Random, taken: set[str]) -> Thread:
    """A cause and what came of it, the effect at the end of the story."""
    cause, effect = rng.choice(w.CAUSES)
    (witness,) = _people(rng, 1, taken)
    start, _, last = effect.rpartition(" ")
    wrong = [e.rpartition(" ")[2] for _, e in rng.sample([pair for pair in w.CAUSES if pair[1] != effect], 6)]
    told = [rng.choice((f"that day {cause} .", f"{witness} saw how {cause} .", f"people said that {cause} ."))]
    wrong = [word for word in dict.fromkeys(wrong) if word != last][:3]
    return Thread(told, (f"because {cause} {start}", last, wrong), known=True)


PLOTS: tuple[Callable[[random.Random, set[str]], Thread], ...] = (_holding, _lying, _counting, _meaning, _happening)


@dataclass(frozen=True)
class Story:
    """Sentences before the ending, threads whose outcomes the ending states, and the ending's sentences."""

    body: list[str]
    threads: list[Thread]
    ending: list[str]
    weather: str

    @property
    def told(self) -> str:
        """The story without its ending."""
        return " ".join(self.body)

    @property
    def text(self) -> str:
        """The whole story, one line."""
        return " ".join([*self.body, *self.ending, self.question, "yes ." if self.wet else "no ."])

    @property
    def question(self) -> str:
        """The yes-or-no question at the end."""
        return f"was the ground wet on that {self.weather} day ?"

    @property
    def wet(self) -> bool:
        """The answer."""
        return self.weather in w.WET


def _story(rng: random.Random) -> Story:
    taken: set[str] = set()
    threads = [plot(rng, taken) for plot in rng.sample(PLOTS, rng.choice((2, 3, 3)))]
    (hero,) = _people(rng, 1, taken)
    job, weather = rng.choice(sorted(w.TOOLS)), rng.choice(rng.choice((w.WET, w.DRY)))
    body = [
        rng.choice(
            (
                f"it was a {weather} {rng.choice(w.TIMES)} in {rng.choice(w.TOWNS)} .",
                f"one {weather} {rng.choice(w.TIMES)} this happened near the {rng.choice(w.PLACES)} .",
                f"here is a story of a {weather} day in {rng.choice(w.TOWNS)} .",
            )
        ),
        rng.choice((f"{hero} the {job} got up early .", f"a {job} called {hero} had nothing to do .")),
    ]
    queues = [list(thread.sentences) for thread in threads]
    while any(queues):  # threads take turns at random, each in its own order
        body.append(rng.choice([queue for queue in queues if queue]).pop(0))
    tools = _others(rng, w.TOOLS[job], list(w.TOOLS.values()))
    threads.append(Thread([], (f"then the {job} went to work with the", w.TOOLS[job], tools), known=True))
    ending = [f"{thread.fact[0]} {thread.fact[1]} ." for thread in threads]
    rng.shuffle(ending)
    return Story(body, threads, ending, weather)


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


def _last_word(story: Story, rng: random.Random) -> dict[str, object] | None:
    stem, word, _ = story.threads[-1].fact
    return {"text": f"{story.told} {stem} {word}"}


def _continuation(story: Story, rng: random.Random) -> dict[str, object] | None:
    known = [thread for thread in story.threads if thread.known]
    stem, word, wrong = rng.choice(known).fact
    choices = [word, *wrong]
    rng.shuffle(choices)
    return {"context": story.told, "choices": [f"{stem} {c} ." for c in choices], "label": choices.index(word)}


def _reference(story: Story, rng: random.Random) -> dict[str, object] | None:
    found = [thread.reference for thread in story.threads if thread.reference]
    if not found:
        return None
    stem, meant, other = found[0]
    choices = [meant, other]
    rng.shuffle(choices)
    return {"context": f"{story.told} {stem}", "choices": choices, "label": choices.index(meant)}


def _yes_no(story: Story, rng: random.Random) -> dict[str, object] | None:
    return {"context": f"{story.told} {story.question}", "choices": ["no", "yes"], "label": int(story.wet)}


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
        (directory / f"{name}.jsonl").write_text("".join(lines))


def main() -> None:
    """Show stories or write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="print N stories of the training split")
    parser.add_argument("--write-tasks", action="store_true", help="write the four tasks' items under data/tasks/")
    args = parser.parse_args()
    if args.sample:
        stream = documents("train")
        sys.stdout.write("\n\n".join(next(stream) for _ in range(args.sample)) + "\n")
    if args.write_tasks:
        write_tasks()


if __name__ == "__main__":
    main()
