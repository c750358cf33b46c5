"""The processor as vLLM drives it: requests come, go, move, wait and return; masks follow each of them.

Its inputs are vLLM's own records of what changed in the batch; each row is held against a constraint of its
own that reads the same tokens. Where there is a GPU (`-m gpu`), its steps are recorded ones.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed: an environment of its own, see serve/README.md")

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from crystallm_kit.engines.drawing import draw, uniform_numbers
from crystallm_kit.engines.vllm_constraint import CrystalConstraint
from crystallm_kit.models.folders import shipped_model_folder
from crystallm_kit.records import Conditions
from crystallm_kit.text.wyckoff import END, TOKENS
from crystallm_kit.tokens.masking import WyckoffConstraint
from crystallm_kit.tokens.requests import compile_request, request_to_json

SLOTS, WIDTH = 8, len(TOKENS)
REQUESTS = [
    compile_request(Conditions(formula=formula), max_sites=16)
    for formula in ({"Na": 1, "Cl": 1}, {"Sr": 1, "Ti": 1, "O": 3}, {"Li": 1, "Fe": 1, "P": 1, "O": 4})
] + [compile_request(Conditions(crystal_system="cubic"), max_sites=12)]
ID = {token: i for i, token in enumerate(TOKENS)}


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def _device(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    monkeypatch.setattr(Batch, "device", torch.device(request.param))


def processor(device: torch.device) -> CrystalConstraint:
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=SLOTS),
        model_config=SimpleNamespace(get_vocab_size=lambda: WIDTH),
    )
    return CrystalConstraint(config, device, device.type == "cuda")


class Batch:
    """A batch as vLLM keeps it: rows of (params, prompt ids, output ids)."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.processor = processor(self.device)
        self.rows: list[tuple[SamplingParams, list[int], list[int]]] = []
        self.generator = torch.Generator().manual_seed(0)

    def change(self, *, removed=(), added=(), moved=()) -> None:
        self.processor.update_state(BatchUpdate(len(self.rows), list(removed), list(added), list(moved)))

    def add(self, extra, *, prompt=(9,), output=(), **settings) -> int:
        """Append a request; return its row."""
        params = SamplingParams(max_tokens=200, extra_args=extra, **settings)
        self.rows.append((params, list(prompt), list(output)))
        row = len(self.rows) - 1
        self.change(added=[(row, *self.rows[row])])
        return row

    def logits(self) -> torch.Tensor:
        return torch.randn(len(self.rows), WIDTH, generator=self.generator)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return self.processor.apply(logits.to(self.device, copy=True)).cpu()

    def step(self, *, grows=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply, and append the most likely token to the rows that grow; return logits before and after."""
        before = self.logits()
        after = self.apply(before)
        for row, (_, _, output) in enumerate(self.rows):
            if grows is None or row in grows:
                output.append(int(after[row].argmax()))
        return before, after


def crystal(i: int, **more: object) -> dict[str, object]:
    return {"crystal": request_to_json(REQUESTS[i]), **more}


def allowed(request, tokens: list[int]) -> torch.Tensor:
    """Return (V,) bool: what a constraint of its own allows after these tokens."""
    constraint = WyckoffConstraint([request], vocabulary_size=WIDTH)
    for token in tokens:
        constraint.advance(torch.tensor([token]))
    return constraint.mask()[0]


def assert_masked(after_V: torch.Tensor, request, tokens: list[int]) -> None:
    assert torch.equal(after_V > -torch.inf, allowed(request, tokens))


def test_rows_without_arguments_stay_bit_for_bit():
    batch = Batch()
    batch.add(None)
    batch.add(crystal(0))
    batch.add({"someone_elses": 1})
    batch.add(crystal(1, crystal_seed=[0, 1], crystal_temperature=1.0), temperature=0)
    for _ in range(30):
        before, after = batch.step()
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[[1, 3]], after[[1, 3]])


def test_a_batch_without_arguments_of_ours_is_returned_as_it_came():
    batch = Batch()
    batch.add(None)
    logits = batch.logits().to(batch.device)
    assert batch.processor.apply(logits) is logits


def test_every_row_gets_its_own_mask_and_log_probabilities():
    batch = Batch()
    for i in range(4):
        batch.add(crystal(i))
    for _ in range(40):
        read = [list(output) for *_, output in batch.rows]
        before, after = batch.step()
        for i in range(4):
            assert_masked(after[i], REQUESTS[i], read[i])
            kept = before[i].masked_fill(~allowed(REQUESTS[i], read[i]), -torch.inf)
            assert torch.allclose(after[i], torch.log_softmax(kept, -1))


def test_requests_with_more_plans_and_with_groups_to_watch_come_to_a_batch_under_way():
    batch = Batch()
    many_plans = compile_request(Conditions(anonymous_formula="AB2C4"), max_sites=28)
    in_group = compile_request(
        Conditions(formula={"Sr": 1, "Ti": 1, "O": 3}, spacegroup_number=221), max_sites=12
    )
    requests = [REQUESTS[3], REQUESTS[0], many_plans, in_group]
    assert max(len(r.plans) for r in requests[:2]) < max(len(r.plans) for r in requests[2:])
    for request in requests:
        batch.add({"crystal": request_to_json(request)})
        for _ in range(5):
            read = [list(output) for *_, output in batch.rows]
            _, after = batch.step()
            for row, tokens in enumerate(read):
                assert_masked(after[row], requests[row], tokens)


def test_rows_that_move_swap_and_leave_keep_their_state():
    batch = Batch()
    for i in range(4):
        batch.add(crystal(i))
    for _ in range(7):
        batch.step()
    rows = batch.rows
    rows[0], rows[3] = rows[3], rows[0]
    batch.change(moved=[(0, 3, MoveDirectionality.SWAP)])
    requests = [REQUESTS[3], REQUESTS[1], REQUESTS[2], REQUESTS[0]]
    for row in range(4):
        read = list(rows[row][2])
        assert_masked(batch.apply(batch.logits())[row], requests[row], read)


def test_a_hole_is_filled_by_the_last_row_or_by_a_new_request():
    batch = Batch()
    for i in range(4):
        batch.add(crystal(i))
    for _ in range(5):
        batch.step()
    # request 1 ends; row 3 moves into its place
    batch.rows[1] = batch.rows.pop()
    batch.change(removed=[1], moved=[(3, 1, MoveDirectionality.UNIDIRECTIONAL)])
    read = [list(output) for *_, output in batch.rows]
    _, after = batch.step()
    for row, request in enumerate((REQUESTS[0], REQUESTS[3], REQUESTS[2])):
        assert_masked(after[row], request, read[row])
    # request 0 ends; a new one without arguments takes its place at once
    batch.rows[0] = (SamplingParams(max_tokens=9), [9], [])
    batch.change(added=[(0, *batch.rows[0])])
    before, after = batch.step()
    assert torch.equal(before[0], after[0])
    # and then one with arguments takes that place
    batch.rows[0] = (SamplingParams(max_tokens=9, extra_args=crystal(1)), [9], [])
    batch.change(added=[(0, *batch.rows[0])])
    _, after = batch.step()
    assert_masked(after[0], REQUESTS[1], [])
    assert len(batch.rows[2][2]) == 8
    assert_masked(after[2], REQUESTS[2], batch.rows[2][2][:-1])


def test_a_step_that_adds_no_token_moves_nothing():
    batch = Batch()
    batch.add(crystal(0))
    batch.add(crystal(1))
    batch.step()
    batch.step(grows={0})
    for _ in range(3):
        read = list(batch.rows[1][2])
        _, after = batch.step(grows={0})
        assert_masked(after[1], REQUESTS[1], read)
    assert len(batch.rows[1][2]) == 1


def test_a_token_that_is_still_on_its_way_is_read_when_it_is_there():
    """vLLM writes -1 for it into the list, and puts the token there before the next draw."""
    batch = Batch()
    batch.add(crystal(1))
    batch.step()
    output = batch.rows[0][2]
    token = output[-1]
    output[-1] = -1
    assert_masked(batch.apply(batch.logits())[0], REQUESTS[1], [])
    output[-1] = token
    assert_masked(batch.apply(batch.logits())[0], REQUESTS[1], [token])


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
def test_a_request_that_comes_back_is_replayed(n_tokens):
    batch = Batch()
    batch.add(crystal(0))
    batch.add(crystal(2))
    for _ in range(n_tokens):
        batch.step()
    params, prompt, output = batch.rows.pop()
    batch.change(removed=[1])
    batch.step()
    # vLLM makes a new list of its tokens
    row = batch.add(params.extra_args, prompt=prompt, output=output)
    _, after = batch.step()
    assert_masked(after[row], REQUESTS[2], output)
    assert_masked(after[0], REQUESTS[0], batch.rows[0][2][:-1])


def test_tokens_that_are_taken_back_are_forgotten():
    batch = Batch()
    batch.add(crystal(1))
    for _ in range(6):
        batch.step()
    del batch.rows[0][2][3:]
    _, after = batch.step()
    assert_masked(after[0], REQUESTS[1], batch.rows[0][2][:3])


def text_ids(*tokens: str) -> list[int]:
    return [ID[token] for token in tokens]


GIVEN = text_ids("Na", "1 ", "Cl", "1 ")


def test_a_beginning_in_the_prompt_is_read():
    batch = Batch()
    batch.add(crystal(1))
    batch.step()
    row = batch.add(crystal(0, crystal_given=4), prompt=[5, 5, *GIVEN])
    for _ in range(3):
        read = [*GIVEN, *batch.rows[row][2]]
        _, after = batch.step()
        assert_masked(after[row], REQUESTS[0], read)
        assert_masked(after[0], REQUESTS[1], batch.rows[0][2][:-1])


@pytest.mark.parametrize("settings", [{}, {"crystal_seed": [0, 0], "crystal_temperature": 1.0}])
def test_a_beginning_is_written_token_by_token_with_its_log_probability(settings):
    batch = Batch()
    batch.add(crystal(0, crystal_beginning=GIVEN, **settings), temperature=0)
    for k, token in enumerate(GIVEN):
        before, after = batch.step()
        assert batch.rows[0][2][-1] == token
        assert int((after[0] > -torch.inf).sum()) == 1
        kept = before[0].masked_fill(~allowed(REQUESTS[0], GIVEN[:k]), -torch.inf)
        assert torch.isclose(after[0, token], torch.log_softmax(kept, -1)[token])
    _, after = batch.step()
    assert int((allowed(REQUESTS[0], GIVEN) & (after[0] > -torch.inf)).sum()) >= 1


@pytest.mark.parametrize("where", ["prompt", "beginning"])
def test_a_beginning_that_the_request_rules_out_ends_there_and_nothing_breaks(where):
    batch = Batch()
    wrong = text_ids("Na", "1 ", "K", "1 ")
    if where == "prompt":
        batch.add(crystal(0, crystal_given=4), prompt=wrong)
        written = []
    else:
        batch.add(crystal(0, crystal_beginning=wrong))
        written = wrong[:2]
    batch.add(crystal(1))
    for _ in range(5):
        _, after = batch.step()
        assert_masked(after[1], REQUESTS[1], batch.rows[1][2][:-1])
    assert batch.rows[0][2][: len(written) + 1] == [*written, ID[END]]
    # its place is taken by another request, which starts afresh
    batch.rows[0] = (SamplingParams(max_tokens=9, extra_args=crystal(2)), [9], [])
    batch.change(added=[(0, *batch.rows[0])])
    _, after = batch.step()
    assert_masked(after[0], REQUESTS[2], [])


def test_ids_beyond_the_vocabulary_break_nothing():
    batch = Batch()
    batch.add({"crystal_beginning": [WIDTH + 5]})
    batch.add(crystal(0, crystal_beginning=[WIDTH + 5]))
    batch.add(crystal(0, crystal_given=1), prompt=[2**31 - 1])
    for _ in range(3):
        batch.step()


def test_numbers_have_a_temperature_of_their_own():
    """vLLM divides all logits by `temperature` afterwards."""
    batch = Batch()
    batch.add(crystal(0, crystal_number_temperature=0.25), temperature=0.5)
    tokens = text_ids("Na", "1 ", "Cl", "1 ", "225\n")
    seen = set()
    for _ in range(20):
        read = list(batch.rows[0][2])
        before, after = batch.step()
        constraint = WyckoffConstraint([REQUESTS[0]], vocabulary_size=WIDTH)
        for token in read:
            constraint.advance(torch.tensor([token]))
        kept = before[0].masked_fill(~constraint.mask()[0], -torch.inf)
        in_numbers = bool(constraint.in_numbers[0])
        seen.add(in_numbers)
        wanted = torch.softmax(kept / (0.25 if in_numbers else 0.5), -1)
        assert torch.allclose(torch.softmax(after[0] / 0.5, -1), wanted, atol=1e-6)
        if len(read) < len(tokens):
            batch.rows[0][2][-1] = tokens[len(read)]
    assert seen == {True, False}


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 3), (0.8, 5)])
def test_own_draws_are_those_of_the_other_engines(top_p, top_k):
    batch = Batch()
    settings = {"crystal_temperature": 0.8, "crystal_number_temperature": 0.4, "crystal_top_p": top_p}
    batch.add(None)
    for i in range(3):
        batch.add(crystal(i, crystal_seed=[3, i], crystal_top_k=top_k, **settings), temperature=0)
    numbers = [uniform_numbers(3, i, 30) for i in range(3)]
    constraint = WyckoffConstraint(REQUESTS[:3], vocabulary_size=WIDTH)
    for t in range(30):
        before, after = batch.step()
        kept = before[1:].masked_fill(~constraint.mask(), -torch.inf)
        wanted = draw(
            kept,
            torch.tensor([float(n[t]) for n in numbers]),
            torch.where(constraint.in_numbers, 0.4, 0.8),
            top_p=top_p,
            top_k=top_k,
        )
        assert torch.equal(after[1:].argmax(1), wanted)
        assert torch.equal((after[1:] > -torch.inf).sum(1), torch.ones(3, dtype=torch.long))
        log_p = torch.log_softmax(kept, -1).gather(1, wanted[:, None])
        assert torch.allclose(after[1:].gather(1, wanted[:, None]), log_p, atol=1e-5)
        constraint.advance(wanted)


def test_rows_can_be_normalised_without_a_constraint():
    batch = Batch()
    batch.add({"crystal_log_softmax": 1})
    before, after = batch.step()
    assert torch.allclose(after, torch.log_softmax(before, -1))


def test_a_request_is_compiled_once_where_it_comes_in(monkeypatch):
    monkeypatch.setenv("CRYSTALLM_KIT_SERVED_MODEL", str(shipped_model_folder()))
    params = SamplingParams(extra_args={"crystal": '{"conditions": {"formula": "SrTiO3"}}', "other": 1})
    CrystalConstraint.validate_params(params)
    request = compile_request(Conditions(formula={"Sr": 1, "Ti": 1, "O": 3}), max_sites=24)
    assert params.extra_args == {"crystal": request_to_json(request), "other": 1}
    CrystalConstraint.validate_params(params)
    assert params.extra_args["crystal"] == request_to_json(request)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"crystal": '{"conditions": {"formula": "Sr0"}}'}, "Sr0"),
        ({"crystal": '{"elements": [1], "required": [2]}'}, "elements"),
        ({"crystal_given": -1}, "need 'crystal'"),
        ({"crystals": 1}, "did you mean 'crystal'"),
    ],
)
def test_what_cannot_be_is_a_value_error_which_vllm_answers_with_400(monkeypatch, extra, message):
    monkeypatch.setenv("CRYSTALLM_KIT_SERVED_MODEL", str(shipped_model_folder()))
    with pytest.raises(ValueError, match=message):
        CrystalConstraint.validate_params(SamplingParams(extra_args=extra))
