"""Pipeline schedules for tests: arguments drawn at random, tables with one fault, and programs followed without JAX."""

import dataclasses

from hypothesis import strategies as st

from mhc_jax.pipeline_schedules.tables import Place, Schedule
from mhc_jax.pipeline_schedules.validate import operations, peak_activations


@st.composite
def arguments(draw, name):
    """Draw (devices, microbatches, chunks, latency) that the schedule accepts."""
    P, chunks, latency = draw(st.integers(2, 5)), 0, draw(st.integers(1, 2))
    if name == "interleaved":
        return P, P * draw(st.integers(1, 3)), draw(st.integers(2, 3)), latency
    if name.startswith("dualpipe"):
        P += P % 2 if name == "dualpipe" else 0
        return P, 2 * P + 2 * draw(st.integers(0, 3)), chunks, latency
    return P, draw(st.integers(1 if name == "gpipe" else P, 2 * P + 3)), chunks, latency


def replay(schedule, program):
    """Follow the columns as the executor does, with (microbatch, stage) in place of arrays, and check every slot that is read.

    Activations and what W waits for are written at once, the rest when a tick ends.

    Returns:
      (kind, microbatch, stage) of every operation, in order.
    """
    column, done = program.columns, []
    lies = {what: {} for what in ("inputs", "gradients", "activations", "deferrals")}
    late = [{} for _ in range(schedule.latency)]  # for each tick, (device, kind) -> what is sent
    for tick in range(len(schedule.table)):
        made, landed = {}, {}
        for d in range(schedule.devices):

            def at(name, d=d, tick=tick):
                return int(column[name][d, tick])

            def holds(what, name, expected, d=d, at=at):
                found = lies[what].get((d, at(name)))
                assert found == expected, f"tick {tick}, device {d}: {found} in {name} {at(name)}, not {expected}"

            for k, each in enumerate(program.phases):
                op = each[at(f"operation_{k}")]
                for half in ("backward", "forward"):  # F&B: read before it is written
                    kind = getattr(op, half)
                    if not kind:
                        continue
                    m, chunk, stage = (at(f"{half}_{name}") for name in ("microbatch", "chunk", "stage"))
                    assert schedule.routes[schedule.route_of[m]][stage] == Place(d, chunk)
                    if kind == "F":
                        if stage > 0:
                            holds("inputs", "forward_read", (m, stage))
                        lies["activations"][d, at("keep")] = (m, stage)
                        made[d, "F"] = landed["inputs", d, at("to_self")] = (m, stage + 1)
                        landed["gradients", d, at("from_loss")] = (m, stage)
                    else:
                        holds("gradients", "backward_read", (m, stage))
                        holds("activations", "kept", (m, stage))
                        if kind == "W":
                            holds("deferrals", "deferred", (m, stage))
                        else:
                            made[d, "B"] = landed["gradients", d, at("to_own_gradients")] = (m, stage - 1)
                        if kind == "I":
                            lies["deferrals"][d, at("defer")] = (m, stage)
                    done.append((kind, m, stage))
        late = [made, *late][: schedule.latency]
        for k, channel in enumerate(program.channels):
            for source, target in channel.pairs:
                for kind in channel.kinds:
                    what, slot = "inputs" if kind == "F" else "gradients", column[f"arrives_{k}_{kind}"][target, tick]
                    landed[what, target, int(slot)] = late[-1].get((source, kind))
        for (what, d, slot), value in landed.items():
            if slot >= 0:
                lies[what][d, slot] = value
    for what, slots in lies.items():
        assert max((slot for _, slot in slots), default=-1) < max(getattr(program, what), 1)
    return done


WAYS = ("dropped", "twice", "microbatch", "kind", "receives", "sends", "chunk", "early", "late", "room")


def replaced(schedule, tick, device, cell) -> Schedule:
    """The schedule with another cell."""
    row = schedule.table[tick]
    row = (*row[:device], tuple(cell), *row[device + 1 :])
    return dataclasses.replace(schedule, table=(*schedule.table[:tick], row, *schedule.table[tick + 1 :]))


def corrupted(schedule, how, pick):
    """The schedule with one fault of the kind `how`; the number `pick` chooses where."""
    some = list(operations(schedule))
    if how == "late":  # only what another operation needs can be too late
        some = [found for found in some if found[2].kind not in "BW" or found[2].sends is not None]
    if how == "early":  # only what needs another operation can be too early
        some = [found for found in some if found[2].kind != "F" or found[2].receives is not None]
    tick, device, op = some[pick % len(some)]
    others, empty = [one for one in schedule.table[tick][device] if one != op], ((),) * schedule.devices
    end = len(schedule.table)
    longer = dataclasses.replace(schedule, table=(*schedule.table, empty))
    if how == "dropped":
        return replaced(schedule, tick, device, others)
    if how == "twice":
        return replaced(longer, tick + 1 + pick // len(some) % (end - tick), device, [op])
    if how == "late":
        return replaced(replaced(longer, tick, device, others), end, device, [op])
    if how == "early":
        longer = dataclasses.replace(schedule, table=(empty, *schedule.table))
        return replaced(replaced(longer, tick + 1, device, others), 0, device, [op])
    if how == "room":
        tight = list(schedule.bound)
        tight[device] = peak_activations(schedule)[device][0] - 1
        return dataclasses.replace(schedule, bound=tuple(tight))
    wrong = {
        "microbatch": (op.microbatch + 1) % (schedule.microbatches + 1),
        "kind": {"F": "B", "B": "W", "I": "F", "W": "I"}[op.kind],
        "receives": schedule.devices if op.receives is None else (op.receives + 1) % (schedule.devices + 1),
        "sends": schedule.devices if op.sends is None else None,
        "chunk": op.chunk + 1,
    }
    cell = [op._replace(**{how: wrong[how]}) if one == op else one for one in schedule.table[tick][device]]
    return replaced(schedule, tick, device, cell)
