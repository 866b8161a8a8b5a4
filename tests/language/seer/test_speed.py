"""From which length on block gates decode faster: what is timed, and what is kept of it."""

from language.seer import speed
from language.seer.attach import attach_block_gates, block_gates
from language.seer.speed import BUDGET, DEFAULT, NEVER, WAYS, dense_below, faster_from


def times(*gates, stock=2.0, everything=2.0):
    return {
        2**n: dict(zip(WAYS, (stock, everything, ms), strict=True)) for n, ms in enumerate(gates)
    }


def test_gates_pay_from_the_length_on_after_which_they_are_never_slower():
    assert faster_from(times(3.0, 1.0, 1.9)) == 2
    assert faster_from(times(1.0, 3.0, 1.9)) == 4
    assert faster_from(times(1.0, 1.0)) == 1
    assert faster_from(times(1.0, 1.0, 2.0)) is None
    assert faster_from(times(1.5, 1.5, everything=1.0)) is None  # faster than stock alone
    assert faster_from(times(1.5, 1.5, stock=1.0)) is None


def test_times_are_kept_for_a_model_and_budgets_move_the_length(tiny, tmp_path):
    model, other = tiny(), tiny(num_hidden_layers=1)
    assert dense_below(tmp_path, model, None) == DEFAULT
    speed.write_speed(tmp_path, model, times(3.0, 1.0))
    assert dense_below(tmp_path, other, None) == DEFAULT
    for budget, least in ((None, 2), (1, 2), (BUDGET, 2), (2 * BUDGET, 4), (BUDGET + 1, 3)):
        assert dense_below(tmp_path, model, budget) == least
    speed.write_speed(tmp_path, model, times(3.0, 3.0))
    assert dense_below(tmp_path, model, BUDGET) == NEVER


def test_all_ways_are_timed_after_as_many_tokens_and_gates_remain(tiny, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "BUDGET", 12)
    model = tiny()
    gates = attach_block_gates(model, "decode", block_size=4)
    calls, read = [], []
    for gate in gates.values():
        attend = gate.forward
        monkeypatch.setattr(gate, "forward", lambda seen, a=attend: calls.append(1) or a(seen))
        choose = gate.choose
        monkeypatch.setattr(
            gate, "choose", lambda *x, c=choose: read.append(x[0].k.shape[2]) or c(*x)
        )
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, given: lengths.append(given["cache"].get_seq_length()),
        with_kwargs=True,
    )
    found = speed.token_milliseconds(model, 40)
    assert found.keys() == set(WAYS)
    assert all(ms > 0 for ms in found.values())
    assert lengths == [*range(40, 56)] * 9  # three ways, once before and in two rounds
    assert len(calls) == 2 * 6 * 16
    assert sorted(set(read)) == [41, 49]  # once in eight tokens
    assert block_gates(model) == gates
    assert all(0.2 < gate.density < 0.4 for gate in gates.values())
