"""What of the bench runs without a GPU: cases, floors, regimes, yardstick, reports."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from kda_bench import cases, checks, contenders, figure, regimes, report, timing, yardstick


@pytest.mark.parametrize(
    "text, heads, seqlens, name",
    [
        ("H=96 1x8192", 96, (8192,), "H=96 1x8192"),
        ("H=32 mixed", 32, cases.MIXED, "H=32 mixed"),
        ("H=32 16x2048", 32, (2048,) * 16, "H=32 16x2048"),
        (" H=8  300,20,1 ", 8, (300, 20, 1), "H=8 300,20,1"),
        ("H=8 20,20", 8, (20, 20), "H=8 2x20"),
    ],
)
def test_case_notation(text, heads, seqlens, name):
    case = cases.Case.parse(text)
    assert (case.heads, case.seqlens, case.name) == (heads, seqlens, name)
    assert cases.Case.parse(case.name) == case


@pytest.mark.parametrize("text", ["", "96 1x8192", "H=96", "H=96 8192x", "H=0 1x8", "H=2 3x0"])
def test_a_wrong_case_is_named(text):
    with pytest.raises(ValueError, match="case "):
        cases.Case.parse(text)


def test_floors_of_the_table():
    # Bytes over the copy bandwidth that an H200 was measured at, 4.27 TB/s.
    expected = {
        "H=96 1x8192": 236,
        "H=96 mixed": 236,
        "H=64 8x1024": 157,
        "H=32 16x2048": 315,
        "H=16 1x8192": 39,
        "H=12 1x2048": 7.4,
        "H=8 1x65536": 157,
        "H=4 1x1024": 1.2,
    }
    per_token = cases.make_inputs(cases.Case(2, (5, 3)), "fast", "cpu").token_bytes / (2 * 8)
    floors = {c.name: timing.floor_us(c.heads * c.tokens * per_token, 4.27) for c in cases.TABLE}
    for name, floor in expected.items():
        assert floors[name] == pytest.approx(floor, rel=0.03)


@pytest.mark.parametrize("gate, mean", [("fast", -2.5), ("slow", -0.05)])
def test_mean_log_decay(gate, mean):
    x = cases.make_inputs(cases.Case(96, (256,)), gate, "cpu")
    slope = x.A_log.exp()[:, None]
    decay = x.lower_bound * torch.sigmoid(slope * (x.g.float() + x.dt_bias))
    assert decay.mean().item() == pytest.approx(mean, rel=0.3)
    channels = decay[0].mean(0)
    # Where one channel is slow, what is made of a sequence's pieces on their own is not fast.
    assert gate == "slow" or (-3.2 < channels.min() and channels.max() < -1.8)


@pytest.mark.parametrize("gate", ["softplus", "given", "steep"])
def test_gates_of_kimi_linear(gate):
    """As flash-linear-attention and transformers start its layers, and steep channels on top."""
    x = cases.make_inputs(cases.Case(96, (64,)), gate, "cpu")
    rates, steps = x.A_log.exp(), torch.nn.functional.softplus(x.dt_bias)
    assert 0.99 < rates.min() < 2 and 14 < rates.max() < 16.01
    assert steps.min() == pytest.approx(1e-3, rel=0.02)
    assert steps.max() == pytest.approx(1e-1, rel=0.02)
    assert steps.median() == pytest.approx(1e-2, rel=0.1)
    if gate == "softplus":
        return
    steep = torch.zeros(128, dtype=torch.bool)
    steep[::8] = gate == "steep"
    assert -5 < x.g[..., ~steep].mean() < -0.1
    if gate == "steep":
        assert -200 <= x.g[..., steep].min() < -195 and -35 < x.g[..., steep].max() <= -30


def test_inputs_differ_between_seeds_only():
    case = cases.Case(2, (9, 4))
    first, again, other = (cases.make_inputs(case, "fast", "cpu", seed) for seed in (1, 1, 2))
    assert torch.equal(first.q, again.q) and not torch.equal(first.q, other.q)
    assert first.cu_seqlens.tolist() == [0, 9, 13]
    assert cases.make_inputs(cases.Case(2, (9,)), "fast", "cpu").cu_seqlens is None


@pytest.mark.parametrize("gate", cases.GATES)
@pytest.mark.parametrize(
    "suite, name",
    [
        ("prefill", "H=2 20,33"),
        ("prefill", "H=2 1x40"),
        ("decode", "decode B=3 H=2"),
        ("decode", "decode B=3 H=2 bf16 state"),
    ],
)
def test_contenders_get_the_case_that_the_yardstick_computes(suite, name, gate):
    """What this package is asked for is what compare.py's reference computes."""
    import compare

    suite = compare.SUITES[suite]
    x = suite.make_inputs(suite.parse(name), gate, "cpu")
    expected = compare.reference(x, suite.chunk)
    bound = suite.bind(contenders.This(), x)
    for result, exact in zip(bound.read(*bound.call()), expected):
        assert yardstick.relative_error(result, exact) < 5e-3


def test_decode_notation_and_floors():
    case = cases.DecodeCase.parse("decode B=32 H=32 bf16 state")
    assert case == cases.DecodeCase(32, 32, torch.bfloat16)
    assert case.seqlens == (1,) * 32
    assert all(cases.DecodeCase.parse(c.name) == c for c in cases.DECODE_TABLE)
    for text in ("decode", "B=1 H=1", "decode B=0 H=1", "decode B=1 H=1 fp8 state"):
        with pytest.raises(ValueError, match="case "):
            cases.DecodeCase.parse(text)
    # At the 4.27 TB/s of an H200, in microseconds.
    x = cases.make_decode_inputs(cases.DecodeCase(8, 32), "fast", "cpu")
    assert timing.floor_us(x.state_bytes, 4.27) == pytest.approx(7.9, rel=0.01)


@pytest.mark.parametrize("regime", regimes.REGIMES)
def test_yardstick_is_the_recurrence(regime, monkeypatch):
    monkeypatch.setattr(yardstick, "SLAB_BYTES", 1)  # one head at a time
    problem = regimes.make_problem(regime, (37, 0, 50, 1), 3, "cpu", seed=7)
    how = problem.reference_arguments()
    o, state = yardstick.kda_float64(**how)
    o_ref, state_ref = contenders.load_this().reference.kda_recurrence(**how)
    assert torch.isfinite(o_ref).all() and torch.isfinite(state_ref).all()
    assert yardstick.relative_error(o, o_ref) < 1e-12
    assert yardstick.relative_error(state, state_ref) < 1e-12


@pytest.mark.parametrize("regime", regimes.REGIMES)
def test_regimes_hand_both_sides_the_same_call(regime):
    problem = regimes.make_problem(regime, (40, 3), 2, "cpu", seed=3)
    o, state = contenders.load_this().chunk_kda(**problem.arguments)
    o_ref, state_ref = yardstick.kda_float64(**problem.reference_arguments())
    assert yardstick.relative_error(o, o_ref) < 5e-3
    assert yardstick.relative_error(state, state_ref) < 5e-3


def rows():
    """Two cases: in the second, one peer declined and one was wrong."""

    def row(case, contender, us, note=""):
        error = 2e-3 if us else None
        values = (case, 64, [8], "fast", contender, us, us, us, 100.0, error, error, note)
        return dict(zip(report.ROW, values, strict=True))

    return [
        row("H=64 1x8", "this", 200.0),
        row("H=64 1x8", "fla", 800.0),
        row("H=64 1x8", "cudnn-frontend", 100.0),
        row("H=64 2x8", "this", 300.0),
        row("H=64 2x8", "fla", 600.0),
        row("H=64 2x8", "cudnn-frontend", None, "declined: why"),
    ]


def test_report_counts_only_what_finished(tmp_path):
    result = report.header() | {"copy_tb_s": 4.27, "rows": rows()}
    report.write_json(tmp_path / "prefill.json", result)
    assert json.loads((tmp_path / "prefill.json").read_text()) == result
    assert set(result) == {"command", "commit", "device", "copy_tb_s", "rows"}
    assert report.speed_ups(rows(), "fla") == [4.0, 2.0]
    assert report.speed_ups(rows(), "cudnn-frontend") == [0.5]
    text = report.markdown(result)
    assert "| H=64 1x8 | fast | 100 | 200 (2.0×) | 800 (8.0×) | 100 (1.0×) |" in text
    assert "| H=64 2x8 | fast | 100 | 300 (3.0×) | 600 (6.0×) | – |" in text
    assert "fla / this: geomean 2.83 over 2 cases" in text
    assert "* H=64 2x8, fast, cudnn-frontend: declined: why" in text


def test_a_result_that_json_cannot_hold_leaves_the_last_one(tmp_path):
    path = tmp_path / "prefill.json"
    report.write_json(path, {"us": 1.0})
    with pytest.raises(ValueError):
        report.write_json(path, {"us": float("nan")})
    assert json.loads(path.read_text()) == {"us": 1.0}


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    paths = report.plot({"rows": rows()}, tmp_path / "decode")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    paths += [tmp_path / "prefill.svg", tmp_path / "figures" / "prefill.png"]
    figure.draw({"device": "a GPU", "rows": rows()}, paths[2:])
    assert all(path.stat().st_size > 1000 for path in paths)


def prefill_run() -> dict:
    """A run that holds all that is asked of it. In slow decay the peers need twice the time."""

    def row(case, gate, contender, us):
        floor = 110.0 if gate in cases.GIVEN else 100.0
        error = 4e-3 if contender == "fla" else 3e-3
        values = (case.name, case.heads, list(case.seqlens), gate, contender)
        return dict(zip(report.ROW, (*values, us, us, us, floor, error, error, ""), strict=True))

    times = {"this": 110.0, "this-portable": 300.0, "fla": 800.0, "flashkda-upstream": 400.0}
    found = [
        row(case, gate, name, us * (1 + (gate == "slow" and name in checks.PEERS)))
        for case in cases.TABLE
        for gate in (cases.GATES if case.name in cases.EVERY_GATE else cases.BOUNDED)
        for name, us in (times | {"this": 15.0} if case.name == "H=4 1x1024" else times).items()
    ]
    for row_ in found:
        if row_["gate"] == "given" and row_["contender"] == "this":
            row_["us"] = 120.0
        if row_["case"] == "H=12 1x2048" and row_["contender"] == "this":
            row_["us"] = 30.0
    return {
        "device": "NVIDIA H200",
        "commit": "c",
        "command": "x",
        "copy_tb_s": 4.27,
        "rows": found,
    }


def test_a_good_run_holds_every_check():
    lines = checks.markdown(prefill_run())
    assert "not held" not in "\n".join(lines)
    assert sum(line.startswith("* ") for line in lines) == len(checks.CHECKS)
    assert "| H=32 16x2048 | 700 | 472 | 110 ok | 110 ok |" in lines
    assert sum(line.startswith("| H=") for line in lines) == len(checks.TARGETS)


@pytest.mark.parametrize(
    "case, gate, contender, key, value, expected",
    [
        ("H=64 mixed", "slow", "this", "us", 421.0, "| 110 ok | 421 **not held** |"),
        ("H=8 1x65536", "slow", "this", "us", 1300.0, "Few chains, us a step"),
        ("H=16 8x2048", "fast", "this", "us", 310.0, "No row slower than the portable path"),
        ("H=16 8x2048", "fast", "fla", "us", 100.0, "Faster than the fastest peer in every row"),
        ("H=16 8x2048", "fast", "fla", "us", 299.0, "faster than flash-linear-attention in every"),
        ("H=32 1x8192", "given", "this", "us", 140.0, "Gate sources within 15%"),
        ("H=32 1x8192", "softplus", "this", "us", 90.0, "Gate sources within 15%"),
        ("H=32 mixed", "fast", "this", "error_state", 5e-3, "error_state 0.005 > 0.004"),
        ("H=32 mixed", "fast", "this", "error_o", None, "error_o None > 0.004"),
        ("H=64 8x1024", "fast", "this-portable", "us", 1e30, "in the geomean of H >= 64"),
    ],
)
def test_a_check_that_is_not_held_says_so(case, gate, contender, key, value, expected):
    result = prefill_run()
    for row in result["rows"]:
        if (row["case"], row["gate"], row["contender"]) == (case, gate, contender):
            row[key] = value
    broken = [line for line in checks.markdown(result) if "not held" in line]
    assert any(expected in line for line in broken), broken


def test_checks_without_peers_or_targets():
    result = prefill_run()
    result["rows"] = [row for row in result["rows"] if row["contender"] == "fla"]
    assert checks.markdown(result) == []
    result = prefill_run() | {"device": "another GPU"}
    assert not any("must" in line for line in checks.markdown(result))


def test_the_readmes_tables(tmp_path):
    import render

    result = prefill_run()
    lines = render.readme_prefill(result)
    assert (
        "| H=96 mixed | 100 | **110** (1.1×) | **110** (1.1×) | 400 FlashKDA | 800 FlashKDA |"
        in lines
    )
    assert sum(line.startswith("| H=") for line in lines) == len(cases.TABLE)
    readme = "a\n<!-- prefill table -->\nold\n<!-- end -->\nb\n<!-- end -->\n"
    assert render.replaced(readme, "prefill table", ["x", "y"]) == (
        "a\n<!-- prefill table -->\nx\ny\n<!-- end -->\nb\n<!-- end -->\n"
    )
    with pytest.raises(ValueError, match="layer table"):
        render.replaced(readme, "layer table", [])
    readme = (render.ROOT / "README.md").read_text()
    for blocks in render.README.values():
        for name in blocks:
            assert render.replaced(readme, name, ["x"]) != readme
    pytest.importorskip("matplotlib")
    text = render.render(result, tmp_path / "prefill")
    assert "Asked of these numbers" in text and (tmp_path / "prefill.svg").exists()


def test_errors_beside_flas():
    import accuracy

    def row(ours, fla, rounding=1e-3):
        names = ("error_o", "error_state")
        return {
            "this": dict(zip(names, ours, strict=True)),
            "fla": dict(zip(names, fla, strict=True)),
            "rounding_o": rounding,
        }

    assert accuracy.no_larger(row((2e-3, 2e-3), (2e-3, 2e-3)))
    assert not accuracy.no_larger(row((2.1e-3, 1e-3), (2e-3, 2e-3)))
    assert not accuracy.no_larger(row((1e-3, 2.1e-3), (2e-3, 2e-3)))
    assert accuracy.no_larger(row((1.005e-3, 1e-3), (1e-3, 2e-3)))
    assert accuracy.no_larger(row((2e-3, 2e-3), (None, None)))
    assert not accuracy.no_larger(row((None, 1e-3), (None, None)))


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(contenders.FlashKda, "module", "no_such_module")
    present, absent = contenders.installed(["flashkda-upstream"])
    assert not present and "no_such_module" in absent["flashkda-upstream"]


def test_who_serves_what():
    prefill, decode = (
        [c.name for c in contenders.CONTENDERS if contenders.serves(c, suite)]
        for suite in ("prefill", "decode")
    )
    peers = ["fla", "flashkda-upstream", "cudnn-frontend"]
    assert prefill == ["this", "this-portable", *peers]
    assert decode == ["this", "fla"]


def test_without_a_gpu_the_scripts_say_so(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    import compare

    monkeypatch.setattr(sys, "argv", ["compare.py", "--only", "--case", "H=1 1x8"])
    with pytest.raises(SystemExit, match="torch sees no CUDA GPU"):
        compare.main()


def test_compare_reads_its_command_line(monkeypatch):
    import compare

    monkeypatch.setattr(sys, "argv", ["compare.py", "--quick", "--case", "H=7 1x8"])
    options = compare.arguments()
    points = [(case.name, gate) for case, gate in options.points]
    every = [(name, gate) for name in cases.EVERY_GATE for gate in cases.GATES]
    assert set(every) <= set(points)
    assert [name for name, gate in points if gate == "fast"] == [
        *(case.name for case in cases.QUICK),
        "H=7 1x8",
    ]
    assert points[-2:] == [("H=7 1x8", "fast"), ("H=7 1x8", "slow")]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--quick", "--gate", "given"])
    assert {gate for _, gate in compare.arguments().points} == {"given"}
    monkeypatch.setattr(sys, "argv", ["compare.py", "--case", "H=7"])
    with pytest.raises(SystemExit):
        compare.arguments()


def test_a_wrong_or_unwritten_result_gets_a_note():
    import compare

    x = cases.make_inputs(cases.Case(1, (32,)), "fast", "cpu")
    expected = compare.reference(x, 32)

    def judged(call):
        return compare.judge(call, lambda o, state: (o, state), expected)

    o, state = (x.clone() for x in expected)
    assert judged(lambda: (o.clone(), state.clone())) == {"error_o": 0.0, "error_state": 0.0}
    assert "wrong: error_o is 1.0e-01" in judged(lambda: (1.1 * o, state.clone()))["note"]
    assert "wrong: error_state is 1.0e-01" in judged(lambda: (o.clone(), 0.9 * state))["note"]
    # A call that writes nothing leaves the poison.
    assert "wrong: error_o is not finite" in judged(lambda: (o, state))["note"]
