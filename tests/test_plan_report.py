"""Reports of plans: peaks, the verdict and its exit code, what would help, and settings that a search suggests."""

import dataclasses
import itertools
import json

import jax
import pytest

from grpo_jax.config import check, default
from grpo_jax.config.flags import override_key
from grpo_jax.config.schema import RolloutMeshSection
from grpo_jax.parallel.mesh import make_mesh, rollout_axis_sizes
from grpo_jax.planning import needs, suggest
from grpo_jax.planning.estimate import estimate_run
from grpo_jax.planning.programs import RunShapes, rollout_sizes
from grpo_jax.planning.remedies import find_remedies
from grpo_jax.planning.report import (
    DOES_NOT_FIT,
    EXPERTS_NOTE,
    FITS,
    LONG_ROW,
    MIXTURE_NOTE,
    TRAINER_BYTES,
    USABLE,
    exit_code,
    format_report,
    plan_report,
)
from grpo_jax.planning.suggest import suggest_settings
from grpo_jax.planning.topology import CHIPS, GIB, Chip
from grpo_jax.rollout.memory import USABLE_FRACTION, RolloutMemory, plan_rollout
from tests.test_needs import COMPLETION, MODELS, PROMPT, run_of
from tests.tiny import CONFIG

MIB = 2**20
NO_COUNTS = dict(product_flops=0.0, attention_flops=0.0, bytes=1e6, kernels=0.0, host_reads=0.0)


def compiled(name: str, arguments=0, results=0, aliased=0, temporary=0, **counts) -> dict:
    sizes = dict(argument_bytes=arguments, output_bytes=results, alias_bytes=aliased, temp_bytes=temporary)
    counted = NO_COUNTS | dict(collectives=[], copies=[]) | counts
    return {"name": name, "digest": "abc", "seconds": 3.0, **sizes, "counts": counted}


def results_of(run: RunShapes, *changed: dict) -> dict[str, dict]:
    columns = rollout_sizes(run)[-1]
    names = "placement", "prefill", f"decode {columns}", "scoring", "update"
    return {name: compiled(name) for name in names} | {result["name"]: result for result in changed}


def report_of(run: RunShapes, *changed: dict, memory_bytes=100 * MIB, kind="v5e", price=None) -> dict:
    return plan_report(run, f"{kind}:1", kind, memory_bytes, results_of(run, *changed), price)


def test_a_peak_counts_what_is_kept_for_other_programs():
    run = run_of()
    memory = needs.run_memory(run)
    sizes = dict(arguments=500, results=90, aliased=40, temporary=7)
    for name, held in (
        ("placement", memory.state + memory.reference - 500),  # the policy is an argument and a part of the state
        ("prefill", memory.state + memory.reference),
        ("decode 96", memory.state + memory.reference),
        ("scoring", memory.state),  # the reference is an argument
        ("update", memory.reference),  # the state is an argument
    ):
        report = report_of(run, compiled(name, **sizes))
        assert report["programs"][name]["peak_bytes"] == held + 500 + 90 - 40 + 7


def test_a_phase_has_the_peak_of_its_largest_program():
    report = report_of(run_of(), compiled("decode 96", temporary=5 * MIB), compiled("prefill", temporary=3 * MIB))
    assert report["peaks"]["rollout"] == report["programs"]["decode 96"]["peak_bytes"]
    assert set(report["peaks"]) == {"rollout", "scoring", "update"}


def test_a_phase_that_was_not_compiled_has_the_peak_of_the_formula():
    run = run_of()
    formula = needs.phase_peaks(run)
    update = compiled("update", temporary=5)
    for room, fits in ((formula["rollout"], True), (formula["rollout"] - MIB, False)):
        memory_bytes = int(room / USABLE) + 1
        report = plan_report(run, "v5e:1", "v5e", memory_bytes, {"update": update})
        assert report["peaks"] == {"update": report["programs"]["update"]["peak_bytes"], "rollout": formula["rollout"]}
        assert report["fits"] == fits


def test_the_verdict_and_the_exit_code():
    run = run_of()
    held = needs.run_memory(run).reference
    budget = int(USABLE * 100 * MIB)
    exact = report_of(run, compiled("update", temporary=budget - held))
    assert exact["fits"] and exit_code(exact) == FITS == 0 and "remedies" not in exact
    above = report_of(run, compiled("update", temporary=budget - held + 1))
    assert not above["fits"] and exit_code(above) == DOES_NOT_FIT == 3
    assert "Fits." in format_report(exact) and "Does not fit." in format_report(above)


def test_a_compiler_that_ends_is_a_line_of_the_report():
    report = report_of(run_of(), {"name": "prefill", "error": "the compiler ended with signal 6: Check failed"})
    assert exit_code(report) == DOES_NOT_FIT
    text = format_report(report)
    assert "prefill         the compiler ended with signal 6" in text and "Does not compile: prefill." in text


def test_the_text_shows_what_was_counted_beside_what_is_needed():
    run = run_of()
    work = needs.update_work(run)
    exchange = dict(kind="all-gather", axes=["fsdp"], devices=4, bytes=2e9, sent_bytes=1.5e9, count=3.0, op_name="x")
    update = compiled("update", product_flops=2 * work.products, collectives=[exchange, exchange | {"bytes": 1e9}])
    least = needs.decode_bytes(run, 96)
    copy = dict(array="f32[8]", bytes=32, count=2.0, op_name="y")
    decode = compiled("decode 96", bytes=1.5 * least, copies=[copy], kernels=350.0)
    lines = format_report(report_of(run, update, decode, price=2.0)).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("Work per chip")) :]
    work_line, decode_line = (
        next(line for line in table if line.startswith(name)) for name in ("  update ", "  decode 96 ")
    )
    assert " 2.00 " in work_line
    assert decode_line.split()[-3:] == ["1.50", "350", "2"]
    assert any(line.split() == ["update", "all-gather", "fsdp", "6", "9.000", "2000.00"] for line in lines)
    assert any("1,000 updates cost" in line for line in lines)


def test_a_report_is_plain_json_and_estimates_what_the_counts_say():
    run = run_of()
    report = report_of(run, compiled("update", product_flops=1e15), price=2.0)
    assert json.loads(json.dumps(report)) == report
    made = estimate_run(run, CHIPS["v5e"], report["programs"])
    assert report["estimate"]["update"]["total"] == made.update.total
    assert report["estimate"]["update"]["limit"] == "products"
    assert report["estimate"]["cost_of_1000_steps"] == pytest.approx(1000 * made.step / 3600 * 2)
    assert "cost_of_1000_steps" not in report_of(run)["estimate"]
    assert "estimate" not in report_of(run, kind="cpu") and format_report(report_of(run, kind="cpu"))


def test_a_gpu_run_that_needs_more_than_jax_takes_is_told_how():
    large = compiled("update", temporary=80 * MIB)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in format_report(report_of(run_of(), large, kind="h100"))
    assert "MEM_FRACTION" not in format_report(report_of(run_of(), large))
    assert "MEM_FRACTION" not in format_report(report_of(run_of(), kind="h100"))


def settings_of(run: RunShapes, **excess: int) -> dict[str, bool]:
    found = find_remedies(run, {"rollout": -1, "update": -1} | excess, memory_bytes=GIB)
    return {remedy.settings: remedy.suffices for remedy in found}


def test_remedies_of_a_rollout_begin_with_fewer_slots():
    run = run_of(slots=16, data=2, fsdp=2, rollout_sizes=dict(data=4))
    memory = needs.run_memory(run)
    assert needs.shard_slots(run) == 2
    found = settings_of(run, rollout=memory.cache // 2)
    assert next(iter(found)) == "rollout.slots=4" and found["rollout.slots=4"]
    assert found["rollout.mesh.tensor=2"]
    far = settings_of(run, rollout=10 * MIB)
    assert not any(far.values())
    assert list(far)[:2] == ["rollout.slots=4", "rollout.mesh.tensor=2"]
    split = run_of(slots=16, data=1, fsdp=4, rollout_sizes=dict(fsdp=4))
    assert list(settings_of(split, rollout=10 * MIB))[:2] == ["rollout.slots=4", "rollout.mesh.tensor=2"]
    assert list(far)[-2:] == ["optim.name=adafactor", "loss.kl_coef=0"]


def test_remedies_of_an_update_do_not_touch_the_rollout():
    run = run_of(slots=8, data=2, fsdp=2)
    run = run._replace(cfg=dataclasses.replace(run.cfg, train=dataclasses.replace(run.cfg.train, micro_tokens=400)))
    found = settings_of(run, update=1000)
    assert not any(name.startswith("rollout") for name in found)
    names = [name.split("=")[0] for name in found]
    assert names == ["train.micro_tokens", "train.remat", "mesh.data", "8 chips", *names[-3:]]
    assert names[-3:] == ["optim.mu_dtype", "optim.name", "loss.kl_coef"]
    assert found["mesh.data=1 mesh.fsdp=4"]


def test_a_remedy_suffices_when_the_changed_run_fits_by_formula():
    run = run_of(slots=8, fsdp=2)
    before = needs.phase_peaks(run)
    without = dataclasses.replace(run.cfg, loss=dataclasses.replace(run.cfg.loss, kl_coef=0.0))
    saved = before["update"] - needs.phase_peaks(run._replace(cfg=without))["update"]
    assert saved == needs.run_memory(run).reference
    assert settings_of(run, update=saved)["loss.kl_coef=0"]
    assert not settings_of(run, update=saved + 1)["loss.kl_coef=0"]


def applied(raw, run: RunShapes, settings: str) -> RunShapes:
    """Returns the run as it is after a user has set what a remedy says; training would refuse keys without effect."""
    raw = raw.copy_and_resolve_references()
    if settings.endswith("chips"):
        raw.mesh.fsdp = int(settings.split()[0]) // (raw.mesh.data * raw.mesh.tensor)
    else:
        for setting in settings.split():
            override_key(raw, *setting.split("="))
    cfg = check(raw)
    model_cfg = dataclasses.replace(run.model_cfg, remat=cfg.train.remat)
    mesh = needs.abstract_mesh(**dataclasses.asdict(cfg.mesh))
    tensor = cfg.rollout.mesh.tensor or run.rollout_mesh.shape["tensor"]
    rollout_mesh = mesh.update(axis_sizes=rollout_axis_sizes(mesh, tensor, 1))
    return RunShapes(cfg, model_cfg, mesh, rollout_mesh, cfg.rollout.slots or run.slots)


@pytest.mark.parametrize("tensor, count", [(1, 10), (2, 9)])  # 4 tensor shards of a rollout would copy its 2 heads
def test_a_remedy_saves_what_it_says_once_it_is_set_as_it_is_written(tensor, count):
    """With keys away from their defaults that have no effect on Adafactor, or without a reference."""
    raw = default()
    raw.rollout.prompts, raw.rollout.samples, raw.rollout.max_prompt_tokens, raw.rollout.max_tokens = 16, 2, 32, 64
    raw.mesh.data, raw.mesh.fsdp, raw.mesh.tensor, raw.train.micro_tokens, raw.train.remat = 2, 2, tensor, 400, "none"
    raw.loss.kl_coef, raw.loss.kl_in, raw.model.reference_dtype = 0.1, "reward", "bfloat16"
    raw.optim.b1, raw.optim.b2, raw.optim.eps = 0.8, 0.95, 1e-6
    mesh = needs.abstract_mesh(data=2, fsdp=2, tensor=tensor)
    run = RunShapes(check(raw), dataclasses.replace(CONFIG, remat="none"), mesh, mesh, 32)
    before, found = needs.phase_peaks(run), find_remedies(run, {"rollout": GIB, "update": GIB}, GIB)
    assert len(found) == count
    for remedy in found:
        after = needs.phase_peaks(applied(raw, run, remedy.settings))
        assert {phase: before[phase] - after[phase] for phase in before} == remedy.saves, remedy


def test_a_remedy_suffices_only_if_training_would_start():
    """Training sets memory aside for prefill and for placing the weights, which a plan's formula does not count."""
    run = run_of(slots=8, fsdp=2)
    excess, twice = {"rollout": 1, "update": -MIB}, 2 * max(needs.phase_peaks(run).values())
    plenty, little = ({each.settings: each for each in find_remedies(run, excess, size)} for size in (GIB, twice))
    assert plenty["optim.mu_dtype=bfloat16"].suffices and plenty["4 chips"].suffices
    assert not any(each.suffices for each in little.values()) and "optim.mu_dtype=bfloat16" in little
    report = plan_report(run, "v5e:2", "v5e", twice, {}, refusal="rollout.slots may be at most 0.")
    assert max(report["peaks"].values()) < report["budget_bytes"] and not report["fits"]
    assert report["remedies"] and "estimate" not in report
    text = format_report(report)
    assert "Does not fit.\n  rollout.slots may be at most 0." in text and "saves" in text


def test_notes_say_what_takes_longer_or_more_memory_than_needed():
    run = run_of(MODELS["qwen3_moe"], fsdp=2)
    assert report_of(run)["notes"] == [MIXTURE_NOTE]
    on_experts = run._replace(mesh=needs.abstract_mesh(expert=2))
    assert report_of(on_experts)["notes"] == [MIXTURE_NOTE, EXPERTS_NOTE]
    dense = run_of()
    rollout = dataclasses.replace(dense.cfg.rollout, max_tokens=LONG_ROW - PROMPT)
    long = dense._replace(cfg=dataclasses.replace(dense.cfg, rollout=rollout))
    (note,) = report_of(long)["notes"]
    assert "16,384 x 16,384, which take 1.5 GiB" in note
    assert report_of(dense)["notes"] == report_of(long, kind="h100")["notes"] == []


def test_a_process_of_cpu_devices_holds_what_each_of_them_holds_the_trainer_and_its_compilers():
    """While a checkpoint is saved, each device holds its state twice. What any compiler takes is counted once."""
    run = run_of(fsdp=2)
    memory = needs.run_memory(run)
    compilers = {"placement": (6, 30, 10), "prefill": (7, 100, 40), "update": (5, 1000, 200)}
    results = {
        name: compiled(name) | {"started_bytes": started, "compiler_bytes": more, "kept_bytes": kept}
        for name, (started, more, kept) in compilers.items()
    }
    report = plan_report(run, "cpu:2", "cpu", GIB, results)
    saving = 2 * memory.state + memory.reference
    assert saving > max(report["peaks"].values())
    grown = TRAINER_BYTES + 7 + 10 + 30 + 190 + 800
    assert report["process_bytes"] == grown + 2 * saving
    large = results | {"update": results["update"] | {"temp_bytes": MIB}}
    assert plan_report(run, "cpu:2", "cpu", GIB, large)["process_bytes"] == grown + 2 * (MIB + memory.reference)


def suggestions(memory_bytes: int, count=3, **limits):
    run = run_of()
    chip = Chip("tpu", memory_bytes, bandwidth=1e9, flops=1e12, link_bandwidth=1e9, network_bandwidth=1e9)
    cfg = dataclasses.replace(run.cfg, rollout=dataclasses.replace(run.cfg.rollout, **limits))
    mesh = make_mesh(devices=jax.devices()[:1]).abstract_mesh.update(axis_sizes=(4, 1, 1, 1))
    return suggest_settings(cfg, run.model_cfg, mesh, chip, count), chip


def test_suggested_settings_fit_and_are_sorted():
    found, chip = suggestions(100 * MIB, count=100)
    assert len({(made.run.mesh, made.run.rollout_mesh) for made in found}) == len(found) > 3
    usable = int(USABLE_FRACTION * chip.memory_bytes)
    for made in found:
        assert max(needs.phase_peaks(made.run).values()) <= usable
        assert made.run.mesh.size == made.run.rollout_mesh.size == 4
        assert made.run.cfg.train.micro_tokens >= 32 + COMPLETION
        assert set(made.settings) == {
            *("mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor", "rollout.mesh.tensor", "rollout.mesh.expert"),
            *("rollout.slots", "train.micro_tokens"),
        }
    cfg = default()
    for flag in found[0].flags:
        override_key(cfg, *flag.removeprefix("--config.").split("="))
    assert check(cfg).rollout.mesh.tensor == found[0].run.rollout_mesh.shape["tensor"]
    steps = [made.estimate.step for made in found]
    assert all(later > 0.97 * earlier for earlier, later in itertools.pairwise(steps))
    assert suggestions(100 * MIB)[0] == found[:3]


def test_less_memory_leaves_fewer_choices():
    plenty, little = (suggestions(memory, count=100)[0] for memory in (100 * MIB, 20 * MIB))
    assert 0 < len(little) < len(plenty)
    assert suggestions(MIB)[0] == []


def test_training_starts_with_suggested_settings():
    """They have the slots and the mesh of rollouts that training would choose."""
    found, chip = suggestions(20 * MIB, count=100)
    for made in found:
        held = sum(needs.training_memory(made.run.cfg, made.run.model_cfg, made.run.mesh)[:2])
        sizes = RolloutMeshSection(**{axis: made.settings[f"rollout.mesh.{axis}"] for axis in ("tensor", "expert")})
        rollout = dataclasses.replace(made.run.cfg.rollout, slots=made.run.slots, mesh=sizes)
        cfg = dataclasses.replace(made.run.cfg, rollout=rollout)
        made_plan = plan_rollout(cfg, made.run.model_cfg, made.run.mesh, held, chip.memory_bytes)
        assert made_plan.slots == made.run.slots
        assert held + needs.update_temporaries(made.run) <= USABLE_FRACTION * chip.memory_bytes


def test_settings_whose_update_does_not_fit_are_not_suggested():
    """The logits of a chunk of 65,536 tokens take 48 MiB, of which tensor shards hold a part each."""
    run = run_of()
    cfg = dataclasses.replace(run.cfg, train=dataclasses.replace(run.cfg.train, chunk_tokens=2**16))
    chip = Chip("tpu", 40 * MIB, bandwidth=1e9, flops=1e12, link_bandwidth=1e9, network_bandwidth=1e9)
    found = suggest_settings(cfg, run.model_cfg, needs.abstract_mesh(data=2), chip, 100)
    assert found and all(made.run.mesh.shape["tensor"] == 2 for made in found)


def test_slots_are_suggested_where_weights_can_be_placed_beside_them(monkeypatch):
    """By hand: a slot takes 4 bytes, the weights 10, and as much as 60 while they are placed."""
    memory = RolloutMemory(10, 60, prompt_bytes=20, prefill_bytes=30, token_bytes=1, columns=1, slot_bytes=4)
    monkeypatch.setattr(suggest, "rollout_memory", lambda *_: memory)
    run = run_of(data=2)
    mesh = make_mesh(data=2, devices=jax.devices()[:2]).abstract_mesh
    choices = {free: list(suggest.rollout_choices(run.cfg, CONFIG, mesh, free)) for free in (69, 70, 1000)}
    sizes = {free: [(each.axis_sizes, slots) for each, slots in found] for free, found in choices.items()}
    whole, split = (2, 1, 1, 1), (1, 1, 1, 2)
    assert sizes == {69: [], 70: [(whole, 4), (split, 2)], 1000: [(whole, 8), (split, 8)]}


def test_suggestions_keep_the_slots_and_the_rollout_mesh_that_are_given():
    for made in suggestions(100 * MIB, count=100, slots=4)[0]:
        assert made.run.slots == 4
