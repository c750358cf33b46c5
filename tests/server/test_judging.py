"""The processes that judge: the same verdicts as in one process, whatever happens to them."""

import asyncio
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import orjson
import pytest
from pymatgen.core import Structure

from crystallm_kit.generation import Judging, judge_by, sample_to_dict
from crystallm_kit.records import Completion, Conditions
from crystallm_kit.scores.funnel import mark_duplicates, stage_of
from crystallm_kit.server.backend import BackendError
from crystallm_kit.server.judge_worker import CompareTask, Forms, Item, JudgeTask, compared, judged
from crystallm_kit.server.judging import Judges
from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.structures.symmetry import spacegroup_number
from crystallm_kit.text.representation import representation

JUDGING = Judging("test", representation("wyckoff"), begins_the_text=False)
ROCK_SALT = "Na1 Cl1 225\nNa a\nCl b\n{} end"
TEXTS = (
    ROCK_SALT.format("5.64"),
    ROCK_SALT.format("1.64"),  # overlap
    ROCK_SALT.format("5.64").replace("Cl1", "Cl2"),  # its sites do not add up
    "Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end",
    "Ti2 O4 136\nTi a\nO f\n4.59 2.9",  # cut
    "Na1 O1 225\nNa a\nO b\n5.1 end",
    "no crystal",
    "",
)


def items(texts=TEXTS):
    return tuple(
        Item(i, 0, "", text, "stop" if "end" in text or not text else "length", -1.5)
        for i, text in enumerate(texts)
    )


def task(texts=TEXTS, **changes):
    made = JudgeTask(JUDGING, Conditions(), 7, "cif", is_unique=True, with_invalid=False, items=items(texts))
    return dataclasses.replace(made, **changes)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def with_judges(use, **settings):
    judges = Judges(1, **settings)
    await judges.start()
    try:
        return await use(judges)
    finally:
        await judges.close()


def huge_text(n_elements=40):
    """A crystal of 99 atoms for each of many elements in space group 1: comparing its pairs takes long."""
    symbols = ELEMENTS[:n_elements]
    header = "".join(f"{symbol}99 " for symbol in symbols) + "1\n"
    sites = "".join(f"{symbol} a\n" * 99 for symbol in symbols)
    points = "".join(f".{i * 7919 % 10000:04d} .{i * 104729 % 10000:04d} .{i * 1299709 % 10000:04d} "
                     for i in range(99 * len(symbols)))  # fmt: skip
    return header + sites + "99.00 99.00 99.00 90.00 90.00 90.00 " + points + "end"


def test_other_processes_judge_as_this_one_does():
    outcomes = run(with_judges(lambda judges: judges.judge(task(with_invalid=True))))
    for item, outcome in zip(items(), outcomes, strict=True):
        completion = Completion("", item.text, (), item.stop_reason, -1.5, 7, item.index)
        sample = judge_by(JUDGING, completion, Conditions(), index=item.index, seed=7)
        assert (outcome.index, outcome.reason, outcome.text) == (
            item.index,
            sample.verdict.reason,
            sample.text,
        )
        assert outcome.stage == (
            "" if sample.verdict.valid else stage_of(sample.verdict.reason, sample.verdict)
        )
        line, whole = orjson.loads(outcome.line), sample_to_dict(sample)
        for key in ("id", "formula", "measures", "log_probability", "text"):
            assert line[key] == whole[key]
        checks = {**whole["checks"], "unique": True} if sample.verdict.valid else whole["checks"]
        assert line["verdict"] == {**{k: whole[k] for k in ("valid", "reason", "detail")}, "checks": checks}
    assert [outcome.reason for outcome in outcomes] == [
        None, "overlap", "parse:composition", None, "truncated", "parse:number", "truncated", "parse:empty",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["cif", "json"])
def test_a_structure_reads_back_as_the_crystal(form):
    line = orjson.loads(judged(task(form=form), items()[0], 10).line)
    structure = Structure.from_str(line["structure"], fmt=form)
    assert structure.composition.reduced_formula == line["formula"] == "NaCl"
    assert spacegroup_number(structure) == line["spacegroup_number"] == 225


def test_an_extxyz_reads_back_with_the_name_of_the_sample(tmp_path):
    from crystallm_kit.structures.files import read

    path = tmp_path / "x.extxyz"
    path.write_text(orjson.loads(judged(task(form="extxyz"), items()[3], 10).line)["structure"])
    (crystal,) = read(path)
    assert (crystal.id, crystal.structure.composition.reduced_formula) == ("7-3", "TiO2")


def test_a_number_of_redraws_stands_among_the_measures():
    item = dataclasses.replace(items()[0], redraws=2)
    assert orjson.loads(judged(task(), item, 10).line)["measures"]["redraws"] == 2


def test_what_is_not_valid_is_written_only_where_it_is_asked_for():
    assert [bool(judged(task(), item, 10).line) for item in items()[:3]] == [True, False, False]


def test_a_killed_process_is_replaced_and_its_task_is_judged_whole():
    async def use(judges):
        work = task([ROCK_SALT.format(f"{4.5 + i / 1000:.2f}") for i in range(1000)])
        before = judges.pids
        waiting = asyncio.create_task(judges.judge(work))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        os.kill(before[0], signal.SIGKILL)
        outcomes = await waiting
        return before, judges.pids, judges.n_replaced, outcomes

    before, after, n_replaced, outcomes = run(with_judges(use))
    assert [outcome.index for outcome in outcomes] == list(range(1000))
    assert {outcome.reason for outcome in outcomes} == {None}
    assert before != after
    assert n_replaced == 1


def test_a_process_killed_while_idle_is_replaced_too():
    async def use(judges):
        os.kill(judges.pids[0], signal.SIGKILL)
        await asyncio.sleep(0.1)
        return await judges.judge(task())

    assert run(with_judges(use))[0].reason is None


def test_a_text_that_takes_too_long_fails_alone():
    async def use(judges):
        started = time.monotonic()
        slow, fast = await asyncio.gather(
            judges.judge(task([TEXTS[0], huge_text(), TEXTS[3]])), judges.judge(task())
        )
        return slow, fast, time.monotonic() - started

    slow, fast, seconds = run(with_judges(use, seconds_per_text=0.3))
    assert [outcome.reason for outcome in slow] == [None, "error", None]
    assert fast[0].reason is None
    assert seconds < 20


DEADLY = """
import os, signal, time
from crystallm_kit.text.wyckoff import WyckoffRepresentation

class Deadly(WyckoffRepresentation):
    def decode(self, text):
        if "Kr" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "Xe" in text:  # compiled code that never comes back: no alarm is heard
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(3600)
        return super().decode(text)
"""


@pytest.mark.parametrize("symbol", ["Kr", "Xe"])
def test_a_text_that_ends_its_process_twice_fails_alone(tmp_path, monkeypatch, symbol):
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("crystallm_kit.server.judging._GRACE_SECONDS", 0.3)
    deadly = dataclasses.replace(JUDGING, representation=importlib.import_module("deadly").Deadly())

    async def use(judges):
        texts = [TEXTS[0], TEXTS[0].replace("Na", symbol), TEXTS[3]]
        outcomes = await judges.judge(task(texts, judging=deadly, with_invalid=True))
        return outcomes, judges.n_replaced

    outcomes, n_replaced = run(with_judges(use, seconds_per_text=1))
    assert [outcome.reason for outcome in outcomes] == [None, "error", None]
    assert "twice" in orjson.loads(outcomes[1].line)["verdict"]["detail"]
    assert n_replaced == 2


def test_the_process_never_loads_torch():
    code = "import sys, crystallm_kit.server.judge_worker as w; w._warm_up(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_closed_judges_refuse_instead_of_waiting():
    async def use():
        judges = Judges(1)
        with pytest.raises(BackendError, match="do not run"):
            await judges.judge(task())

    run(use())


def test_copies_are_found_as_in_a_whole_list():
    texts = [ROCK_SALT.format("5.64"), ROCK_SALT.format("5.65"), "Na1 Cl1 221\nNa a\nCl b\n3.40 end",
             "Na1 Cl1 225\nNa b\nCl a\n5.60 end", "Na1 Cl1 221\nNa a\nCl b\n3.50 end"]  # fmt: skip
    samples = [
        judge_by(JUDGING, Completion("", text, (), "stop", -1.0, 0, i), Conditions(), index=i, seed=0)
        for i, text in enumerate(texts)
    ]
    named = tuple((sample.id, sample.text) for sample in samples)
    found = run(with_judges(lambda judges: judges.compare(CompareTask(JUDGING, (), named, True))))
    expected = [None if s.verdict.valid else s.verdict.detail.split()[-1] for s in mark_duplicates(samples)]
    assert found == expected == [None, "0-0", None, "0-0", "0-2"]
    # those kept before count, and without each other only those
    assert list(compared(CompareTask(JUDGING, named[:1], named[1:], False), Forms())) == [
        "0-0",
        None,
        "0-0",
        None,
    ]


def test_a_line_is_json_even_where_the_log_probability_is_not_a_number():
    item = dataclasses.replace(items()[0], log_probability=float("nan"))
    assert json.loads(judged(task(), item, 10).line)["log_probability"] is None
