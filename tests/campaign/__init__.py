"""The reliability campaign: generated bad input, kills, full disks and little memory, against every command.

    make campaign                                       minutes; BUDGET=120 SEED=3 for others
    python -m tests.campaign --only config --seed 3     one part
    python -m tests.campaign --only config --seed 3 --case 17 --keep DIR    one case again; its files stay in DIR

A case is a number: its part, the seed and the number decide what is damaged, and how. A command runs in a forked
process in which all is imported (processes.py), over files that are made once (stock.py). It held if it ended in time,
with a legal exit code, with one line for a mistake, without a traceback, and left everything that it was not told to
write as it was (verdicts.py).
"""
